"""What a computation would allocate, found by running it on the meta device, where tensors have no memory.

Every storage that comes and goes is counted as its device would hold it. Modules need no weights for it, and the code
that is traced is the code that runs; so what is found stays true when a model changes.

Convolutions work on copies in an order of their own: oneDNN's hold what goes in or what comes out, the larger of the
two, a second time (measured with the autoencoder's shapes). What cuDNN's hold is not known beforehand: counted alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["Traced", "Tracer", "trace"]


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's stubs lack it
    """Counts the bytes of storages that are made inside the block.

    Attributes:
        live: Bytes that are there now.
        peak: The most that there were at once.
        operations: Of matrix products and convolutions.

    Args:
        apart: Tensors that are there before, such as weights, and are not counted; nor is what is first seen
            as something given.
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.operations = 0.0
        self._known: set[int] = set()
        self._apart: list[Tensor] = []  # held, so that their storages' numbers are not given to others
        self._leave_out(apart)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._leave_out(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_meta)
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._count(leaf.untyped_storage())
        if func.overloadpacket is torch.ops.aten.convolution:
            self.peak = max(self.peak, self.live + max(args[0].nbytes, out.nbytes))
        return out

    def _leave_out(self, tensors: Iterable[Tensor]) -> None:
        """What nothing in the block made was there before."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key not in self._known:
                self._known.add(key)
                self._apart.append(tensor)

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
    """Attention that makes its result and nothing else, as fused kernels do; on the meta device torch spells it out.

    Where numbers of a position do not stand side by side, no fused kernel takes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0.0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            self.operations += (
                2.0 * q.numel() * k.shape[-2] + 2.0 * (q.numel() // q.shape[-1]) * v.shape[-2] * v.shape[-1]
            )
            if any(tensor.stride(-1) != 1 for tensor in (q, k, v)):
                return _unfused(q, k, v)
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return func(*args, **(kwargs or {}))


def _unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What torch makes where it writes out the logits: them, and their softmax."""
    logits = q.new_empty(*q.shape[:-1], k.shape[-2], dtype=torch.float32)
    shares = torch.empty_like(logits)
    del logits
    return shares.new_empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)


@dataclass(frozen=True)
class Traced:
    """What a computation takes.

    Attributes:
        peak: The most bytes of tensors that it has at once, what it is given not counted.
        operations: Of matrix products and convolutions, a multiplication and an addition being two.
    """

    peak: int
    operations: float


def trace(module: nn.Module, prepare: Callable[[], Callable[[], Any]]) -> Traced:
    """Run something on the meta device and count.

    Args:
        module: On the meta device; its weights are not counted.
        prepare: Makes what is given, which is not counted either, and returns what is to be run.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("meta"), _Attention() as attention:
        run = prepare()
        tracer = Tracer((*module.parameters(), *module.buffers()))
        attention.operations = 0.0
        with tracer:
            run()
    return Traced(tracer.peak, tracer.operations + attention.operations)
