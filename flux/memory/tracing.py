"""What a computation would allocate, found by running it on the meta device, where tensors have no memory.

Every storage that comes and goes is counted as its device would hold it. Modules need no weights for it, and the code
that is traced is the code that runs; so what is found stays true when a model changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Tracer", "traced"]


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's stubs lack it
    """Counts the bytes of storages that are made inside the block.

    Attributes:
        live: Bytes that are there now.
        peak: The most that there were at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Have the storages of what is there before not counted, such as weights."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Attention(TorchFunctionMode):
    """Attention that makes its result and nothing else, as fused kernels do; on the meta device torch spells it out."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def traced(*modules: nn.Module) -> Iterator[Tracer]:
    """Trace what is computed inside the block on the meta device, where these modules are; weights do not count."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("meta"), _Attention(), Tracer() as tracer:
        for module in modules:
            tracer.leave_out((*module.parameters(), *module.buffers()))
        yield tracer
