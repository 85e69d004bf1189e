"""Memory that ran out: how that is told from other faults, and how a run goes on with less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..errors import UserError
from .policy import GIB
from .residency import Residency

__all__ = ["Fallback", "is_exhausted"]

Result = TypeVar("Result")

CPU_WORDS = "can't allocate memory"  # torch's, where the host's memory ran out
SHARE_THAT_STAYS = 0.5  # of the blocks that stay, each time that memory runs out


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that a device or the host had no memory for something."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and CPU_WORDS in str(error)


class Fallback:
    """Repeats what ran out of memory with fewer and fewer weights in it.

    Args:
        residencies: Of the modules that run, loaded.
        without: For each the prefixes that it was loaded without.
        tell: Told in a sentence what is done.
    """

    def __init__(
        self,
        residencies: Sequence[Residency],
        without: Sequence[tuple[str, ...]],
        tell: Callable[[str], None] | None,
    ) -> None:
        self._loaded = list(zip(residencies, without, strict=True))
        self._tell = tell or (lambda _: None)

    def __call__(self, compute: Callable[[], Result]) -> Result:
        """What ``compute`` gives; it is called again, from its beginning, after memory ran out.

        Raises:
            UserError: It runs out though all that can be streamed is.
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
        counts = []
        for residency, without in self._loaded:
            footprint = residency.accounts.footprint(without, residency.limit)
            blocks = footprint.blocks
            if len(blocks.streamed) == len(blocks.kept):
                continue
            limit = footprint.device_bytes - int((1 - SHARE_THAT_STAYS) * blocks.resident_bytes)
            lowered = residency.accounts.footprint(without, limit).blocks
            if lowered.streamed == blocks.streamed:  # few blocks: the next step down is the last
                limit = 0
            residency.load(without, limit=limit)
            now = residency.accounts.footprint(without, limit).blocks
            if now.streamed != blocks.streamed:
                counts.append(f"{len(now.streamed)} of {len(now.kept)}")
        if not counts:
            needed = sum(residency.accounts.footprint(without, 0).device_bytes for residency, without in self._loaded)
            raise UserError(
                f"memory ran out though all weights that can be streamed are, and {needed / GIB:.2f} GiB are left of "
                "them: ask for a smaller picture or fewer at once, or free memory that others hold"
            ) from fault
        self._tell(f"memory ran out: {' and '.join(counts)} blocks are streamed from here on, and the step is repeated")
