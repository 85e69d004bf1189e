"""What a storage format is: stored bytes, with what belongs to them, to numbers.

A format is a row; ``decode`` is its one function. It takes tensors as they stand in a file, on any device, and gives
the numbers on the same device. Nothing else in the engine knows how numbers are packed.

Shapes: N rows (output features), K columns (input features).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DATA", "Decode", "Format", "Parts", "PickRows", "Product"]

DATA = "data"  # the role of the packed numbers themselves; companions have roles of their own

Parts = Mapping[str, Tensor]
Decode = Callable[[Parts, tuple[int, ...], torch.dtype], Tensor]
Product = Callable[[Parts, Tensor, "Tensor | None"], "Tensor | None"]
PickRows = Callable[[Parts, tuple[int, ...], Tensor], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to store a tensor.

    Attributes:
        name: As people know it, and as ``inspect`` prints it.
        bits: A weight takes on disk, companions included.
        decode: ``decode(parts, shape, dtype)``: the tensors by role, the shape that the numbers have, and the
            floating-point type that they become. Computes in fp32 and rounds once.
        companions: Roles that must be there beside ``DATA``.
        optional: Roles that may be there.
        rows: ``rows(parts, shape, places)``: the tensors by role of these rows alone, in this order, still packed. None
            where rows cannot be told apart.
        pads: Whether rows and columns may be filled up to whole blocks; ``decode`` takes the shape without.
        product: ``product(parts, x, bias)``: ``x (M, K) @ W.T + bias`` in the stored format; gives None where the
            device has no units for it. None where there is no such product.
    """

    name: str
    bits: float
    decode: Decode
    companions: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    rows: PickRows | None = None
    pads: bool = False
    product: Product | None = None
