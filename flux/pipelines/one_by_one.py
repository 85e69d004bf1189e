"""Several pictures at once on a CPU: blocks run for one picture after the other.

A CPU has no use for more rows in a product than one picture brings. What a block makes of one picture takes the memory
of one, which the heap has ready and caches hold in part; and a block's weights are unpacked once for all, where memory
is not short.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.flux1 import DoubleBlock, Flux1, ModulationLayer, RotaryAttention, SingleBlock
from ..ops.host_memory import Lender, drop_spare
from ..ops.packed import Linear, unpacked
from .forwards import Forward, run_by

__all__ = ["pictures_one_by_one"]

LOGITS = 4  # dimensions of attention's logits
STREAMS: dict[type[nn.Module], int] = {DoubleBlock: 2, SingleBlock: 1}  # inputs that outputs are like, which come first
BATCHED: dict[type[nn.Module], tuple[int, ...]] = {  # places of inputs with a batch dimension; the rotation has none
    DoubleBlock: (0, 1, 3, 4),
    SingleBlock: (0, 2),
}


@contextmanager
def pictures_one_by_one(model: Flux1, is_short: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Have a model's blocks run for one picture after the other inside the block, where no gradients are asked for.

    Args:
        model: Of the engine's own layers.
        is_short: Whether memory is, so that every use unpacks a matrix by itself.
    """
    lender = Lender()  # a block's inputs come back for the next one's outputs
    blocks = (*model.double_blocks, *model.single_blocks)
    with run_by(blocks, lambda block, forward: partial(_run, lender, is_short, block, forward)):
        try:
            yield
        finally:
            drop_spare()  # that of a whole block, which no single matrix of it would take


def _run(lender: Lender, is_short: Callable[[], bool], block: nn.Module, forward: Forward, *given: Any) -> Any:
    """What a block's ``forward`` gives."""
    kind, (*tensors, attend) = type(block), given
    count = len(tensors[0])
    if count == 1 or torch.is_grad_enabled() or type(attend) is not RotaryAttention:
        return forward(*given)
    outputs = [lender.empty(tuple(own.shape), own.dtype, own.device) for own in tensors[: STREAMS[kind]]]
    with nullcontext() if is_short() else unpacked(_layers(block), tensors[0].dtype):
        for index in range(count):
            own = [_of(tensor, index) if place in BATCHED[kind] else tensor for place, tensor in enumerate(tensors)]
            made = forward(*own, RotaryAttention(_bias_of(attend.bias, index), attend.kernel))
            for output, part in zip(outputs, made if isinstance(made, tuple) else (made,), strict=True):
                output[index : index + 1] = part
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _layers(block: nn.Module) -> Iterator[Linear]:
    """Those that run with every picture."""
    for child in block.children():
        if not isinstance(child, ModulationLayer):
            yield from (layer for layer in child.modules() if isinstance(layer, Linear))


def _of(tensor: Tensor, index: int) -> Tensor:
    """One picture's part (1, ...) of something (B or 1, ...)."""
    return tensor if len(tensor) == 1 else tensor[index : index + 1]


def _bias_of(bias: Tensor | None, index: int) -> Tensor | None:
    """Likewise of logits (B or 1, H or 1, L, L), or of something without a batch dimension."""
    return bias if bias is None or bias.ndim < LOGITS else _of(bias, index)
