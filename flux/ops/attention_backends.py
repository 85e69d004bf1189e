"""What can compute a transformer's attention, and what of it a device can run: chosen once for a run, and told.

Rows say what each needs. Packages are imported when they are chosen, and not before. Whatever is chosen, torch's own
attention takes over where it cannot go on: for calls with a bias that it cannot take, and for good after it failed or
gave numbers that are not finite.

Shapes: B batch, H heads, L query length, S key length, D head dimension.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError
from .attention import Kernel, attention
from .devices import capability

__all__ = ["BACKENDS", "CHOICES", "PLAIN", "Attention", "Backend", "Case", "choose_attention", "until_finite"]

Tell = Callable[[str], None]
Result = TypeVar("Result", bound=Tensor)

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
NOT_OURS = ("out of memory", "ALLOC_FAILED", "CUDA error", "HIP error")  # of faults that another kernel would meet too


@dataclass(frozen=True)
class Case:
    """What attention is wanted for.

    Attributes:
        device: Where.
        dtype: Of queries, keys and values.
        width: D.
    """

    device: torch.device
    dtype: torch.dtype
    width: int


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute attention, and what it needs.

    Attributes:
        name: What it is chosen by.
        what: A few words about it.
        load: Gives the function, and imports what it needs for that.
        capability: The oldest GPU that runs it (``devices.capability``); None for any device.
        on_cpu: Whether it also runs on a CPU, in any type and width.
        dtypes: That it takes; none at all for any.
        widths: Of heads, that it takes; none at all for any.
        package: That has to be installed; None where torch has it.
        takes_bias: Whether it can add a bias to the logits.
        exact: Whether it rounds no more than the type that it computes in.
    """

    name: str
    what: str
    load: Callable[[], Kernel]
    capability: tuple[int, int] | None = None
    on_cpu: bool = False
    dtypes: tuple[torch.dtype, ...] = ()
    widths: tuple[int, ...] = ()
    package: str | None = None
    takes_bias: bool = False
    exact: bool = True

    def fault(self, case: Case) -> str | None:
        """Why it cannot run in a case, or None. Says nothing of packages."""
        if self.capability is None or (self.on_cpu and case.device.type == "cpu"):
            return None
        if capability(str(case.device)) < self.capability:
            return f"needs an NVIDIA GPU of capability {self.capability[0]}.{self.capability[1]} or newer"
        if self.dtypes and case.dtype not in self.dtypes:
            return f"takes {' and '.join(map(_named, self.dtypes))}, and not {_named(case.dtype)}"
        if self.widths and case.width not in self.widths:
            return f"takes no heads of width {case.width}"
        return None


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_torch(kernel: SDPBackend) -> Callable[[], Kernel]:
    """Torch's attention by one of its kernels and no other."""

    def forced(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, /, *, scale: float | None = None) -> Tensor:
        with sdpa_kernel(kernel):
            return attention(q, k, v, bias, scale=scale)

    return lambda: forced


def _sage() -> Kernel:
    sageattn: Callable[..., Tensor] = importlib.import_module("sageattention").sageattn

    def run(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None = None, /, *, scale: float | None = None) -> Tensor:
        return sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale)

    return run


def _flash_attn() -> Kernel:
    flash: Callable[..., Tensor] = importlib.import_module("flash_attn").flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None = None, /, *, scale: float | None = None) -> Tensor:
        return flash(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale).transpose(1, 2)

    return run


PLAIN = Backend(name="sdpa", what="torch's, by its own choice", load=lambda: attention, takes_bias=True)
BACKENDS: dict[str, Backend] = {
    row.name: row
    for row in (
        PLAIN,
        Backend(
            name="cudnn", what="cuDNN's, in torch", load=_by_torch(SDPBackend.CUDNN_ATTENTION), capability=(8, 0),
            dtypes=SIXTEEN_BITS, widths=tuple(range(8, 129, 8)),
        ),
        Backend(
            name="flash", what="FlashAttention, in torch", load=_by_torch(SDPBackend.FLASH_ATTENTION),
            capability=(8, 0), on_cpu=True, dtypes=SIXTEEN_BITS, widths=tuple(range(8, 257, 8)),
        ),
        Backend(
            name="efficient", what="xFormers' memory-efficient one, in torch",
            load=_by_torch(SDPBackend.EFFICIENT_ATTENTION), capability=(5, 0), takes_bias=True,
        ),
        Backend(
            name="math", what="as it is written down, for comparison", load=_by_torch(SDPBackend.MATH),
            takes_bias=True,
        ),
        Backend(
            name="flash-attn", what="the package flash-attn", load=_flash_attn, package="flash_attn",
            capability=(8, 0), dtypes=SIXTEEN_BITS, widths=tuple(range(8, 257, 8)),
        ),
        Backend(
            name="sage", what="the package sageattention, which rounds to 8 bits", load=_sage,
            package="sageattention", capability=(8, 0), dtypes=SIXTEEN_BITS, widths=(64, 96, 128), exact=False,
        ),
    )
}  # fmt: skip
HOPPER = (9, 0)
# The first that runs is taken, from GPUs of a capability on: on older ones torch chooses as well without being told.
ORDER: tuple[tuple[str, tuple[int, int]], ...] = (
    ("sage", (8, 0)), ("cudnn", HOPPER), ("flash-attn", (8, 0)), ("sdpa", (0, 0)),
)  # fmt: skip
AUTO, FAST = "auto", "fast"  # of all that is exact, and of all
CHOICES = (AUTO, FAST, *BACKENDS)


class Attention:
    """The attention of a run: what was chosen, and torch's own from when that cannot go on.

    Attributes:
        backend: What is used now.
        why: In a few words.

    Args:
        backend: What was chosen.
        why: Likewise.
        kernel: Its function.
        tell: Told in a sentence when it is given up.
    """

    def __init__(self, backend: Backend, why: str, kernel: Kernel, tell: Tell | None = None) -> None:
        self.backend, self.why = backend, why
        self._kernel, self._tell = kernel, tell or (lambda _: None)

    @property
    def is_plain(self) -> bool:
        """Whether it is torch's own already."""
        return self.backend is PLAIN

    @property
    def report(self) -> str:
        """Which, and why."""
        return f"{self.backend.name} ({self.backend.what}): {self.why}"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, /, *, scale: float | None = None
    ) -> Tensor:
        """See ``attention.attention``."""
        if bias is not None and not self.backend.takes_bias:
            return attention(q, k, v, bias, scale=scale)
        try:
            return self._kernel(q, k, v, bias, scale=scale)
        except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
            others_fault = any(word in str(error) for word in NOT_OURS)
            if self.is_plain or others_fault or isinstance(error, torch.OutOfMemoryError):
                raise
            self.leave(f"failed ({' '.join(str(error).split()) or type(error).__name__})")
        return attention(q, k, v, bias, scale=scale)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Use torch's own inside the block."""
        before = self.backend, self._kernel
        self.backend, self._kernel = PLAIN, attention
        try:
            yield
        finally:
            self.backend, self._kernel = before

    def leave(self, fault: str) -> None:
        """Use torch's own from here on, and tell; ``fault`` is what the chosen one did."""
        self._tell(f"attention by {self.backend.name} {fault}: torch's own is used from here on")
        self.why = f"{self.backend.name} {fault}"
        self.backend, self._kernel = PLAIN, attention


def choose_attention(name: str, case: Case, tell: Tell | None = None) -> Attention:
    """What computes the attention of a run.

    Args:
        name: One of ``CHOICES``: "auto" for the fastest that is known of the device and rounds no more than needed,
            "fast" for the fastest at all, or a backend.
        case: What it is for.
        tell: Told in a sentence where it has to be given up later.

    Raises:
        UserError: There is no such backend, or it cannot run here.
    """
    if name in (AUTO, FAST):
        return _automatic(name, case, tell)
    backend = BACKENDS.get(name)
    if backend is None:
        raise UserError(f"there is no attention {name!r}; choose one of: {', '.join(CHOICES)}")
    fault = backend.fault(case)
    if fault is not None:
        raise UserError(f"attention by {name} cannot run here: it {fault}; choose another one, or auto")
    kernel, fault = _loaded(name)
    if kernel is None:
        raise UserError(f"attention by {name} cannot run here: {fault}; install {backend.package}, or choose auto")
    return Attention(backend, "asked for", kernel, tell)


def _automatic(name: str, case: Case, tell: Tell | None) -> Attention:
    """The first of ``ORDER`` that runs in a case."""
    generation = capability(str(case.device))
    for candidate, oldest in ORDER:
        backend = BACKENDS[candidate]
        if generation < oldest or not (backend.exact or name == FAST) or backend.fault(case) is not None:
            continue
        kernel, _ = _loaded(candidate)
        if kernel is not None:
            why = "nothing else is faster here" if backend is PLAIN else "the fastest here"
            return Attention(backend, why if name == FAST else f"{why} of what is exact", kernel, tell)
    raise AssertionError("torch's own runs everywhere")


@functools.cache
def _loaded(name: str) -> tuple[Kernel | None, str]:
    """A backend's function, or why there is none."""
    backend = BACKENDS[name]
    try:
        return backend.load(), ""
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == backend.package:
            return None, f"the Python package {backend.package} is not installed"
        return None, f"the Python package {backend.package} cannot be used ({' '.join(str(error).split())})"


def until_finite(kernels: Iterable[Any], compute: Callable[[], Result]) -> Result:
    """What ``compute`` gives; where that is not finite, once more with torch's own attention in the place of others.

    Others are given up only where torch's own does better: else the fault is the model's.

    Args:
        kernels: What ``compute`` uses; those that are no ``Attention`` are left alone.
        compute: Can be called again.
    """
    out = compute()
    others = [own for own in kernels if isinstance(own, Attention) and not own.is_plain]
    if not others or bool(torch.isfinite(out).all()):
        return out
    with ExitStack() as held:
        for own in others:
            held.enter_context(own.set_aside())
        again = compute()
    if bool(torch.isfinite(again).all()):
        for own in others:
            own.leave("gave numbers that are not finite")
    return again
