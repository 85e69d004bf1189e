"""Packed weights on the meta device, to foresee what their layers make as they run on another one."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..ops.devices import standing_for
from ..ops.packed import PackedWeight
from .tracing import Tracer

__all__ = ["Outline", "Outlined", "Outlines"]


class Outline(PackedWeight, Protocol):
    """A packed weight on the meta device."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""

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
        self._kinds = {name: weight.kind for name, weight in self._weights.items()}
        self._unpackings: dict[Hashable, int] = {}  # what comes and goes while numbers are made
        self._hash = hash((device, tuple(self._kinds.items())))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outlines) and (self._device, self._kinds) == (other._device, other._kinds)

    def __bool__(self) -> bool:
        return bool(self._weights)

    def of(self, names: Collection[str]) -> Outlines:
        """Those of some parameters."""
        return Outlines(self._device, {name: own for name, own in self._weights.items() if name in names})

    @contextmanager
    def fitted(self, module: nn.Module) -> Iterator[None]:
        """Have a module on the meta device run with them inside the block."""
        layers: list[tuple[Any, PackedWeight]] = [
            (module.get_submodule(name.rpartition(".")[0]), _Fitted(own, self._kinds[name], self._unpackings))
            for name, own in self._weights.items()
        ]
        try:
            with standing_for(self._device):
                for layer, weight in layers:
                    layer.packed = weight
                yield
        finally:
            for layer, _ in layers:
                layer.packed = None


class _Fitted:
    """An outline in a layer. Of weights that take the same one is unpacked, and the others are as if they were.

    Args:
        weight: The outline.
        kind: Its own.
        unpackings: Bytes beside the numbers that unpacking takes at most, by kind and type.
    """

    def __init__(self, weight: Outline, kind: Hashable, unpackings: dict[Hashable, int]) -> None:
        self._weight, self._kind, self._unpackings = weight, kind, unpackings
        self.device, self.nbytes = weight.device, weight.nbytes

    def numbers(self, dtype: torch.dtype) -> Tensor:
        key = self._kind, dtype
        if key not in self._unpackings:
            with Tracer() as tracer:
                out = self._weight.numbers(dtype)
            self._unpackings[key] = tracer.peak - tracer.live
            return out
        out = torch.empty(self._weight.shape, dtype=dtype, device=self.device)
        torch.empty(self._unpackings[key], dtype=torch.uint8, device=self.device)
        return out

    def rows(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        return self._weight.rows(places, dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        return self._weight.product(x, bias)
