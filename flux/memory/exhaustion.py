"""Memory that ran out: how that is told from other faults, and how a run goes on with less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..errors import ExhaustedError
from ..ops.host_memory import drop_spare
from .policy import GIB
from .residency import Residency, Watch

__all__ = ["Fallback", "is_exhausted", "load_what_fits"]

Result = TypeVar("Result")
Tell = Callable[[str], None]

WORDS = (  # torch's, where the host's memory ran out, and where a driver had none for something beside tensors
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUDA out of memory",  # where a compiler wrapped torch's own error
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
SHARE_THAT_STAYS = 0.5  # of the blocks that stay, each time that memory runs out


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that a device or the host had no memory for something."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def load_what_fits(
    residency: Residency,
    without: tuple[str, ...] = (),
    watch: Watch | None = None,
    limit: int | None = None,
    tell: Tell | None = None,
) -> None:
    """``Residency.load``, with a lower limit where memory runs out on the way.

    Args:
        residency: Of a module.
        without: See there.
        watch: See there.
        limit: See there.
        tell: Told in a sentence what is done.

    Raises:
        ExhaustedError: It runs out though all that can be streamed is.
    """
    while True:
        try:
            residency.load(without, watch, limit, tell)
            return
        except Exception as error:
            if not is_exhausted(error):
                raise
            fault = error
        fault.__traceback__ = None
        residency.release()
        lower = _lowered(residency, without, limit)
        if lower is None:
            raise _too_little([(residency, without)]) from fault
        limit, streamed = lower
        if tell is not None:
            tell(f"memory ran out while weights were loaded: {streamed} blocks are streamed")


def _lowered(residency: Residency, without: tuple[str, ...], limit: int | None) -> tuple[int, str] | None:
    """A limit under which about half of the blocks stay that stay under this one, and how many are streamed then.

    None where all are streamed already.
    """
    footprint = residency.accounts.footprint(without, limit)
    blocks = footprint.blocks
    lower = footprint.device_bytes - int((1 - SHARE_THAT_STAYS) * blocks.resident_bytes)
    for next_limit in (lower, 0):
        now = residency.accounts.footprint(without, next_limit).blocks
        if len(now.streamed) > len(blocks.streamed):
            return next_limit, f"{len(now.streamed)} of {len(now.kept)}"
    return None


def _too_little(loaded: Sequence[tuple[Residency, tuple[str, ...]]]) -> ExhaustedError:
    needed = sum(residency.accounts.footprint(without, 0).device_bytes for residency, without in loaded)
    return ExhaustedError(
        f"memory ran out though all weights that can be streamed are, and {needed / GIB:.2f} GiB of them have to stay: "
        "ask for a smaller picture or fewer at once, or free memory that others hold"
    )


class Fallback:
    """Repeats what ran out of memory with fewer and fewer weights in it.

    Args:
        residencies: Of the modules that run, loaded.
        without: For each the prefixes that it was loaded without.
        tell: Told in a sentence what is done.
        what: What is repeated.
    """

    def __init__(
        self,
        residencies: Sequence[Residency],
        without: Sequence[tuple[str, ...]],
        tell: Tell | None,
        what: str = "the step",
    ) -> None:
        self._loaded = list(zip(residencies, without, strict=True))
        self._tell, self._what = tell or (lambda _: None), what

    def __call__(self, compute: Callable[[], Result]) -> Result:
        """What ``compute`` gives; it is called again, from its beginning, after memory ran out.

        Raises:
            ExhaustedError: It runs out though all that can be streamed is.
        """
        while True:
            try:
                return compute()
            except Exception as error:
                if not is_exhausted(error):
                    raise
                fault = error
            # Outside of the handler, which holds what the failed computation had made.
            fault.__traceback__ = None
            self._lower(fault)

    def _lower(self, fault: Exception) -> None:
        """Stream half of the blocks that stay, of every module."""
        drop_spare()  # that of whole blocks, which are not unpacked at once any more
        counts = []
        for residency, without in self._loaded:
            lower = _lowered(residency, without, residency.limit)
            if lower is not None:
                load_what_fits(residency, without, limit=lower[0], tell=self._tell)
                counts.append(lower[1])
        if not counts:
            raise _too_little(self._loaded) from fault
        blocks = " and ".join(counts)
        self._tell(f"memory ran out: {blocks} blocks are streamed from here on, and {self._what} is repeated")
