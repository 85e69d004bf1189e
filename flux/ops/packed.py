"""Layers whose weight may be packed: they unpack it when they run, and keep nothing of it.

A layer has its weight either as numbers, in ``weight``, or packed, in ``packed``; the other is then on the meta device,
or None. Who puts it there knows storage formats; a layer only asks for numbers.

A linear layer may have side branches, which add to what it puts out and leave its weight alone, however it is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .host_memory import ALIGNMENT, empty, into
from .linear import linear

__all__ = ["Embedding", "Linear", "PackedWeight", "SideBranch", "takes_packed", "unpacked"]


class PackedWeight(Protocol):
    """A weight as it is stored."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """The weight itself."""

    def rows(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows (n, K) by their numbers (n,)."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """``x @ weight.T + bias`` in the stored format, where there is hardware for it; None elsewhere."""


@dataclass(eq=False)
class SideBranch:
    """What a layer's output gets besides: ``strength * (up @ (down @ x) + bias)``, of low rank (Hu et al. 2021, LoRA).

    Gradients flow to its tensors, which are taken as they are: on the layer's device, in its inputs' dtype.

    Attributes:
        down: (r, k).
        up: (N, r).
        bias: (N,) or None.
        columns: Which of the inputs' columns it takes, k in all and side by side in this order; None for all of them.
        strength: 0 leaves it out altogether.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    columns: tuple[slice, ...] | None = None
    strength: float = 1.0

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """Outputs (..., N), which are written to, with what the branch makes of inputs (..., K)."""
        if self.strength == 0:
            return out
        taken = x if self.columns is None else torch.cat([x[..., part] for part in self.columns], dim=-1)
        return out.add_(linear(linear(taken, self.down), self.up, self.bias), alpha=self.strength)


class Linear(nn.Linear):
    """``torch.nn.Linear`` by ``ops.linear``, with a weight that may be packed.

    Attributes:
        packed: The weight as it is stored; None where ``weight`` has its numbers.
        branches: Added to the output one after the other. With branches, inputs may be wider than the weight, which
            takes their first columns.
    """

    packed: PackedWeight | None = None
    branches: tuple[SideBranch, ...] = ()

    def reset_parameters(self) -> None:
        """As torch's; nothing on the meta device, where hundreds of layers would spend most of a model's making."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., N) of inputs (..., K)."""
        if self.branches:
            return self._with_branches(x)
        if self.packed is None:
            return linear(x, self.weight, self.bias)
        return self._unpacked(x, self.packed)

    def _unpacked(self, x: Tensor, packed: PackedWeight) -> Tensor:
        out = packed.product(x, self.bias)
        return linear(x, packed.numbers(x.dtype), self.bias) if out is None else out

    def _with_branches(self, x: Tensor) -> Tensor:
        # A copy of what is cut out, for a product of a view may differ in the last bit from one of whole inputs.
        own = x if x.shape[-1] == self.in_features else x[..., : self.in_features].contiguous()
        out = linear(own, self.weight, self.bias) if self.packed is None else self._unpacked(own, self.packed)
        for branch in self.branches:
            out = branch.add_to(out, x)
        return out


class Embedding(nn.Embedding):
    """``torch.nn.Embedding`` whose table may be packed, here or on the CPU: only rows that are asked for are unpacked.

    Attributes:
        packed: The table as it is stored; None where ``weight`` has its numbers.
        dtype: Of what a packed table gives.
    """

    packed: PackedWeight | None = None
    dtype: torch.dtype = torch.float32

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Rows (..., K) by their numbers (...)."""
        if self.packed is None:
            return F.embedding(input, self.weight)
        places = input.reshape(-1).to(self.packed.device)
        return self.packed.rows(places, self.dtype).to(input.device).view(*input.shape, self.embedding_dim)


def takes_packed(layer: Any) -> bool:
    """Whether a layer can use a packed weight."""
    return isinstance(layer, (Linear, Embedding))


@contextmanager
def unpacked(layers: Iterable[Linear], dtype: torch.dtype) -> Iterator[None]:
    """Have packed weights unpacked inside the block, once for all uses.

    Args:
        layers: Those with numbers stay as they are.
        dtype: Of what they will be given.
    """
    before = [(layer, layer.packed) for layer in layers if layer.packed is not None]
    try:
        for (layer, packed), place in zip(before, _side_by_side(before, dtype), strict=True):
            with into(place):
                layer.packed = _Unpacked(packed.numbers(dtype))
        yield
    finally:
        for layer, packed in before:
            layer.packed = packed


def _side_by_side(weights: Sequence[tuple[Linear, PackedWeight]], dtype: torch.dtype) -> Iterator[Tensor]:
    """A place for each weight's numbers, in memory that is lent, and comes back, as a whole."""
    counts = [layer.out_features * layer.in_features for layer, _ in weights]
    sizes = [-(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT for count in counts]
    if weights:
        whole = empty((sum(sizes),), torch.uint8, weights[0][1].device)
        for count, place in zip(counts, torch.split(whole, sizes), strict=True):
            yield place[: count * dtype.itemsize].view(dtype)


@dataclass(frozen=True, eq=False)
class _Unpacked:
    """Numbers in the place of a packed weight; see ``PackedWeight``."""

    tensor: Tensor

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype)

    def rows(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        return self.tensor[places].to(dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        del x, bias
        return None
