"""One weight as it is stored, on some device: packed until its numbers are wanted."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .formats.base import Format
from .formats.floats import for_device
from .renames import Recipe, assemble

__all__ = ["Packed", "PackedPart"]


@dataclass(frozen=True)
class PackedPart:
    """One stored tensor: ``format.decode`` makes numbers of ``shape`` from the tensors by role."""

    format: Format
    shape: tuple[int, ...]
    stored: Mapping[str, Tensor]
    multiplies: bool = True  # whether products in the stored format are welcome

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return self.format.decode(self.stored, self.shape, dtype)


@dataclass(frozen=True)
class Packed:
    """A weight of one stored tensor, or of several that are cut and joined.

    Attributes:
        shape: Of the numbers.
        recipe: What is done to the stored tensors' numbers.
        parts: The stored tensors by their names in the file.
    """

    shape: tuple[int, ...]
    recipe: Recipe
    parts: Mapping[str, PackedPart]

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def device(self) -> torch.device:
        """Where the stored tensors are."""
        return next(iter(self.tensors().values())).device

    @property
    def formats(self) -> tuple[Format, ...]:
        """Of the stored tensors, each once."""
        return tuple(dict.fromkeys(part.format for part in self.parts.values()))

    @property
    def kind(self) -> Hashable:
        """All that unpacking it, or a product with it, takes memory by: equal for weights of which that is the same."""
        places = {name: place for place, name in enumerate(self.parts)}
        pieces = tuple((places[one.name], one.start, one.stop, one.of) for one in self.recipe.pieces)
        parts = tuple((part.format.name, part.shape, part.multiplies) for part in self.parts.values())
        stored = tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors().items())
        return self.shape, pieces, self.recipe.shares, self.recipe.reshape, parts, stored

    def stands_as(self, dtype: torch.dtype) -> bool:
        """Whether its numbers in a type are the stored ones themselves, of which no copy is made."""
        return self.recipe.only_renames and [tensor.dtype for tensor in self.tensors().values()] == [dtype]

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor: by role where there is one stored tensor, else by its place and role ("1.scale")."""
        if len(self.parts) == 1:
            return dict(next(iter(self.parts.values())).stored)
        return {
            f"{place}.{role}": tensor
            for place, part in enumerate(self.parts.values())
            for role, tensor in part.stored.items()
        }

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Packed:
        """The same weight with other tensors of the same names, as on another device."""
        alone = len(self.parts) == 1
        parts = {
            name: replace(part, stored={role: tensors[role if alone else f"{place}.{role}"] for role in part.stored})
            for place, (name, part) in enumerate(self.parts.items())
        }
        return replace(self, parts=parts)

    def to(self, device: torch.device) -> Packed:
        """The weight on a device; itself where it is there already."""
        if self.device == device:
            return self
        return self.with_tensors({name: for_device(t, device).to(device) for name, t in self.tensors().items()})

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """The weight's numbers, on the device of the stored tensors."""
        out = assemble(self.recipe, lambda name: self.parts[name].numbers(dtype))
        return out if tuple(out.shape) == self.shape else out.view(self.shape)

    def rows(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of a matrix, unpacked alone where the format packs rows by themselves.

        Args:
            places: Row numbers (n,).
            dtype: That the numbers become.

        Returns:
            (n, columns).
        """
        alone = next(iter(self.parts.values()))
        if not self.recipe.only_renames or alone.format.rows is None:
            return self.numbers(dtype)[places]
        picked = alone.format.rows(alone.stored, alone.shape, places)
        return alone.format.decode(picked, (len(places), *alone.shape[1:]), dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """``x @ weight.T + bias`` in the stored format, where format, file and device allow it.

        Args:
            x: (..., K).
            bias: (N,) or None.

        Returns:
            (..., N), or None where weights have to be unpacked.
        """
        alone = next(iter(self.parts.values()))
        multiply = alone.format.product
        if multiply is None or not alone.multiplies or not self.recipe.only_renames:
            return None
        out = multiply(alone.stored, x.reshape(-1, x.shape[-1]), bias)
        return None if out is None else out[:, : self.shape[0]].view(*x.shape[:-1], self.shape[0])
