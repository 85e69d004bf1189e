"""Packed weights on the meta device, to foresee what their layers make as they run on another one."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from ..ops.devices import standing_for
from ..ops.packed import PackedWeight

__all__ = ["Outline", "Outlined", "Outlines"]


class Outline(PackedWeight, Protocol):
    """A packed weight on the meta device."""

    @property
    def kind(self) -> Hashable:
        """All that unpacking it, or a product with it, takes memory by."""

    def stands_as(self, dtype: torch.dtype) -> bool:
        """Whether its numbers in a type are the stored ones themselves, of which no copy is made."""


class Outlined(Protocol):
    """A weight in a file."""

    def outline(self, device: torch.device) -> Outline:
        """As it is stored, on the meta device in the place of another; no byte is read."""


class Outlines:
    """Those weights of a module's linear layers that do not stand as they are used; equal where they take the same.

    Args:
        device: Whose way to multiply them is taken.
        weights: By parameter.
    """

    @classmethod
    def of_file(
        cls, weights: Mapping[str, Outlined], names: Iterable[str], device: torch.device, dtype: torch.dtype
    ) -> Outlines:
        """As they are in a file.

        Args:
            weights: Of all parameters.
            names: Of the layers' own.
            device: Where they will be.
            dtype: Of their numbers where they are used.
        """
        found = {name: weights[name].outline(device) for name in sorted(names)}
        return cls(str(device), {name: own for name, own in found.items() if not own.stands_as(dtype)})

    def __init__(self, device: str, weights: Mapping[str, Outline]) -> None:
        self._device, self._weights = device, dict(weights)
        self._kind = device, tuple((name, weight.kind) for name, weight in self._weights.items())
        self._hash = hash(self._kind)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outlines) and self._kind == other._kind

    def __bool__(self) -> bool:
        return bool(self._weights)

    def of(self, names: Collection[str]) -> Outlines:
        """Those of some parameters."""
        return Outlines(self._device, {name: own for name, own in self._weights.items() if name in names})

    @contextmanager
    def fitted(self, module: nn.Module) -> Iterator[None]:
        """Have a module on the meta device run with them inside the block."""
        layers: list[tuple[Any, Outline]]
        layers = [(module.get_submodule(name.rpartition(".")[0]), own) for name, own in self._weights.items()]
        try:
            with standing_for(self._device):
                for layer, weight in layers:
                    layer.packed = weight
                yield
        finally:
            for layer, _ in layers:
                layer.packed = None
