"""A module's parameters bound to what they are made of in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FileError
from .packed import Packed, PackedPart
from .renames import Plan, Recipe, assemble
from .sources import Source

__all__ = ["Binding", "Shapes", "bind", "listed"]

Shapes = Mapping[str, tuple[int, ...]]

SHOWN = 3  # names that a message lists
LARGEST_PADDING = 31  # rows or columns that nvfp4 and mxfp8 may add


@dataclass(frozen=True)
class Binding:
    """One parameter: the stored tensors, and how they are cut and joined.

    Attributes:
        shape: Of the parameter.
        recipe: From the layout's plan.
        sources: The stored tensors by name.
    """

    shape: tuple[int, ...]
    recipe: Recipe
    sources: Mapping[str, Source]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(source.nbytes for source in self.sources.values())

    @property
    def pieces(self) -> tuple[int, ...]:
        """Bytes of every stored tensor, companions among them, in the order of ``Packed.tensors``."""
        return tuple(size for source in self.sources.values() for size in source.piece_bytes)

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    def numbers(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """The parameter's numbers.

        Args:
            dtype: That they become. Stored so, on the CPU, they may be a view of the file, not to be written to.
            device: Where they go, packed; the CPU when None.

        Raises:
            FileError: The file changed, or has a scale that is not a usable number.
        """
        alone = self.shape if self.recipe.only_renames else None
        out = assemble(self.recipe, lambda name: self.sources[name].numbers(dtype, device, alone))
        return out.view(self.shape)

    def forget(self) -> None:
        """Let go of the file's pages that were mapped for it."""
        for source in self.sources.values():
            source.forget()

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Read what ``packed`` would give into memory of the caller's.

        Args:
            targets: Bytes (n,) on the CPU for each of ``Packed.tensors``.

        Raises:
            FileError: The file changed since it was opened.
        """
        alone = len(self.sources) == 1
        for place, source in enumerate(self.sources.values()):
            source.read_into({role: targets[role if alone else f"{place}.{role}"] for role in source.parts})

    def packed(self, device: torch.device | None = None) -> Packed:
        """The parameter as it is stored; on the CPU a view of the file."""
        return self._packed(lambda source: source.stored(device))

    def outline(self, device: torch.device) -> Packed:
        """The parameter as ``packed`` gives it for a device, on the meta device in its place; no byte is read."""
        return self._packed(lambda source: source.outline(device))

    def _packed(self, stored: Callable[[Source], Mapping[str, Tensor]]) -> Packed:
        alone = self.recipe.only_renames
        parts = {
            name: PackedPart(source.format, self.shape if alone else source.shape, stored(source), source.multiplies)
            for name, source in self.sources.items()
        }
        return Packed(self.shape, self.recipe, parts)


def bind(
    plan: Plan, sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]], label: str
) -> dict[str, Binding]:
    """A binding for every parameter.

    Args:
        plan: From the file's names to ours.
        sources: The file's tensors.
        shapes: Every parameter's shape by name.
        label: What messages call the file.

    Raises:
        FileError: A parameter has no tensor or one of another shape, or a tensor belongs to no parameter.
    """
    _complain(label, "lacks tensors", [name for name in shapes if name not in plan])
    unknown = [name for name in plan if name not in shapes]
    _complain(label, "has unknown tensors", [source for name in unknown for source in plan[name].sources])
    bound, misshapen = {}, []
    for name, shape in shapes.items():
        recipe = plan[name]
        own = {source: sources[source] for source in recipe.sources}
        found = recipe.shape(lambda source, own=own: own[source].shape)  # type: ignore[misc]
        if found != shape and not _is_padded(recipe, own, found, shape):
            misshapen.append(f"{' and '.join(own)} {list(found)} in place of {list(shape)}")
        bound[name] = Binding(shape, recipe, own)
    _complain(label, "has tensors of another shape", misshapen)
    return bound


def _is_padded(recipe: Recipe, own: Mapping[str, Source], found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a tensor is only larger by what its format pads."""
    return (
        recipe.only_renames
        and all(source.format.pads for source in own.values())
        and len(found) == len(shape)
        and all(0 <= more - side <= LARGEST_PADDING for more, side in zip(found, shape, strict=True))
    )


def _complain(label: str, fault: str, names: list[str]) -> None:
    if names:
        raise FileError(f"{label} {fault}: {listed(names)}; use a whole file of this model")


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
