"""Which weights of a module are in memory: the one place that brings them there and lets them go.

A module is built on the meta device, where it takes no memory; ``Residency`` binds it to a file and gives its
parameters their numbers, all of them or some, for the length of a block or until they are released. Weights of layers
that can unpack at use may come packed instead: they take what they take in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..ops.host_memory import drop_spare
from ..ops.packed import Embedding, PackedWeight, takes_packed

__all__ = ["Residency", "Watch", "Weight"]


class Watch(Protocol):
    """Hears of weights on their way: how many are there, and how many will be. May raise to stop."""

    def __call__(self, done: int, total: int, /) -> None: ...


class Weight(Protocol):
    """Where a parameter's numbers come from."""

    @property
    def nbytes(self) -> int:
        """Bytes as it is stored."""

    @property
    def parameters(self) -> int:
        """How many numbers."""

    def numbers(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor: ...
    def packed(self, device: torch.device | None = None) -> PackedWeight: ...
    def forget(self) -> None:
        """Let go of pages of a mapped file."""


class Residency:
    """The weights of one module.

    Args:
        module: Built on the meta device.
        weights: For each parameter of the module, where its numbers come from.
        device: Where weights go.
        dtype: What floating-point weights become there.
        keeps_packed: Whether layers that can unpack at use get their weights packed, where that takes less.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, Weight],
        *,
        device: torch.device,
        dtype: torch.dtype,
        keeps_packed: bool = False,
    ) -> None:
        self.module, self.device, self.dtype = module, device, dtype
        self._weights = dict(weights)
        self._packable = self._gaining() if keeps_packed else set()
        module.requires_grad_(False)

    def load(self, without: Iterable[str] = (), watch: Watch | None = None) -> int:
        """Bring in every absent parameter except those below some prefixes.

        Args:
            without: The prefixes.
            watch: Called before each parameter, and at the end.

        Returns:
            The bytes brought.
        """
        apart = tuple(f"{prefix}." for prefix in without)
        wanted = [name for name in self._weights if not name.startswith(apart) and self._absent(name)]
        brought = 0
        for index, name in enumerate(wanted):
            if watch is not None:
                watch(index, len(wanted))
            brought += self._bring(name, packed=name in self._packable)
        if watch is not None and wanted:
            watch(len(wanted), len(wanted))
        return brought

    def release(self, prefixes: Iterable[str] | None = None) -> int:
        """Let go of the parameters below ``prefixes``, or of all; returns the bytes let go."""
        below = None if prefixes is None else tuple(f"{prefix}." for prefix in prefixes)
        released = 0
        for name in self._weights:
            if below is None or name.startswith(below):
                released += self._drop(name)
        drop_spare()
        return released

    @contextmanager
    def borrow(self, prefix: str) -> Iterator[None]:
        """Have the numbers below ``prefix`` inside the block; those that were absent before are absent after it."""
        borrowed = [name for name in self._weights if name.startswith(f"{prefix}.") and self._absent(name)]
        try:
            for name in borrowed:
                self._bring(name, packed=False)
            yield
        finally:
            for name in borrowed:
                self._drop(name)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the parameters that are in memory now."""
        return sum(self._bytes(name) for name in self._weights)

    def _gaining(self) -> set[str]:
        """The parameters that take less packed, in layers that can use them so."""
        names = (f"{path}.weight" for path, layer in self.module.named_modules() if takes_packed(layer))
        known = ((name, self._weights[name]) for name in names if name in self._weights)
        return {name for name, weight in known if weight.nbytes < weight.parameters * self.dtype.itemsize}

    def _place(self, name: str) -> tuple[Any, str]:
        path, _, leaf = name.rpartition(".")
        return self.module.get_submodule(path), leaf

    def _packed(self, name: str) -> PackedWeight | None:
        layer, leaf = self._place(name)
        return layer.packed if leaf == "weight" and takes_packed(layer) else None

    def _absent(self, name: str) -> bool:
        return self.module.get_parameter(name).is_meta and self._packed(name) is None

    def _bytes(self, name: str) -> int:
        parameter, packed = self.module.get_parameter(name), self._packed(name)
        if packed is not None:
            return packed.nbytes
        return 0 if parameter.is_meta else parameter.nbytes

    def _bring(self, name: str, *, packed: bool) -> int:
        layer, _ = self._place(name)
        weight = self._weights[name]
        if packed:
            layer.packed = weight.packed(self.device)
            if isinstance(layer, Embedding):
                layer.dtype = self.dtype
        else:
            self._set(name, weight.numbers(self.dtype, self.device))
        return self._bytes(name)

    def _drop(self, name: str) -> int:
        brought = self._bytes(name)
        layer, _ = self._place(name)
        if self._packed(name) is not None:
            layer.packed = None
        if not self.module.get_parameter(name).is_meta:
            self._set(name, torch.empty_like(self.module.get_parameter(name), device="meta"))
        if brought:
            self._weights[name].forget()
        return brought

    def _set(self, name: str, tensor: Tensor) -> None:
        layer, leaf = self._place(name)
        setattr(layer, leaf, nn.Parameter(tensor, requires_grad=False))
