"""Layers whose weight may be packed: they unpack it when they run, and keep nothing of it.

A layer has its weight either as numbers, in ``weight``, or packed, in ``packed``; the other is then on the meta device,
or None. Who puts it there knows storage formats; a layer only asks for numbers.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import linear

__all__ = ["Embedding", "Linear", "PackedWeight", "takes_packed"]


class PackedWeight(Protocol):
    """A weight as it is stored."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """The weight itself."""

    def rows(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows (n, K) by their numbers (n,)."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """``x @ weight.T + bias`` in the stored format, where there is hardware for it; None elsewhere."""


class Linear(nn.Linear):
    """``torch.nn.Linear`` by ``ops.linear``, with a weight that may be packed.

    Attributes:
        packed: The weight as it is stored; None where ``weight`` has its numbers.
    """

    packed: PackedWeight | None = None

    def reset_parameters(self) -> None:
        """As torch's; nothing on the meta device, where hundreds of layers would spend most of a model's making."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., N) of inputs (..., K)."""
        if self.packed is None:
            return linear(x, self.weight, self.bias)
        out = self.packed.product(x, self.bias)
        return linear(x, self.packed.numbers(x.dtype), self.bias) if out is None else out


class Embedding(nn.Embedding):
    """``torch.nn.Embedding`` whose table may be packed: only the rows that are asked for are unpacked.

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
        return self.packed.rows(input.reshape(-1), self.dtype).view(*input.shape, self.embedding_dim)


def takes_packed(layer: Any) -> bool:
    """Whether a layer can use a packed weight."""
    return isinstance(layer, (Linear, Embedding))
