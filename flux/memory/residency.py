"""Which weights of a module are in memory: the one place that brings them there and lets them go.

A module is built on the meta device, where it takes no memory; ``Residency`` binds it to a file and gives its
parameters their numbers, all of them or some, for the length of a block or until they are released. Weights of layers
that can unpack at use may come packed instead: they take what they take in the file. Where a limit leaves no room for
all, such layers of some of the module's blocks are streamed: see ``streaming``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..ops.host_memory import drop_spare
from ..ops.packed import Embedding, PackedWeight, takes_packed
from .accounts import Accounts, Sized, below
from .lanes import Lane, lane_for
from .outlines import Outline, Outlines
from .streamed import Passed, StreamedBlocks
from .streaming import Movable, Unit

__all__ = ["Residency", "Watch", "Weight"]

Tell = Callable[[str], None]


class Watch(Protocol):
    """Hears of weights on their way: how many are there, and how many will be. May raise to stop."""

    def __call__(self, done: int, total: int, /) -> None: ...


class Weight(Sized, Protocol):
    """Where a parameter's numbers come from."""

    def numbers(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor: ...
    def packed(self, device: torch.device | None = None) -> Movable: ...
    def outline(self, device: torch.device) -> Outline:
        """What ``packed`` gives for a device, on the meta device in its place; no byte is read."""

    def read_into(self, targets: Mapping[str, Tensor]) -> None: ...
    def forget(self) -> None:
        """Let go of pages of a mapped file."""


class Residency:
    """The weights of one module.

    Attributes:
        accounts: What they take.
        limit: That they were loaded under the last time.
        passed: What was streamed so far, and how long blocks waited for it.

    Args:
        module: Built on the meta device.
        weights: For each parameter of the module, where its numbers come from.
        device: Where weights go.
        dtype: What floating-point weights become there.
        keeps_packed: Whether layers that can unpack at use get their weights packed, where that takes less.
        blocks: The prefixes of what can be streamed, in the order in which it runs.
        lane: The way of what is streamed; the device's own when None.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, Weight],
        *,
        device: torch.device,
        dtype: torch.dtype,
        keeps_packed: bool = False,
        blocks: Sequence[str] = (),
        lane: Lane | None = None,
    ) -> None:
        self.module, self.device, self.dtype = module, device, dtype
        self._weights = dict(weights)
        self._lane = lane
        self.limit: int | None = None
        self._streamed: frozenset[str] = frozenset()
        self._fetched: frozenset[str] = frozenset()
        self.accounts = Accounts(module, self._weights, item=dtype.itemsize, keeps_packed=keeps_packed, blocks=blocks)
        self._flow = StreamedBlocks(module, blocks)
        module.requires_grad_(False)

    def load(
        self,
        without: Iterable[str] = (),
        watch: Watch | None = None,
        limit: int | None = None,
        tell: Tell | None = None,
    ) -> int:
        """Bring in every absent parameter except those below some prefixes; what goes beyond the limit is streamed.

        Args:
            without: The prefixes.
            watch: Called before each parameter, and at the end.
            limit: Bytes that all of this module's may take. What cannot be streamed stays in any case.
            tell: Told in a sentence where what is streamed will be slower than it could be.

        Returns:
            The bytes brought.
        """
        self._stop()
        self.limit = limit
        without, accounts = tuple(without), self.accounts
        apart, footprint = below(without), accounts.footprint(without, limit)
        streamed = {place: accounts.names_in(accounts.blocks[place], without) for place in footprint.blocks.streamed}
        self._streamed = frozenset(name for names in streamed.values() for name in names)
        self._fetched = frozenset(footprint.fetched)
        for name in self._streamed | self._fetched:
            self._drop(name)
        coming = (name for name in self._weights if not name.startswith(apart) and name not in self._streamed)
        wanted = [name for name in coming if self._absent(name)]
        brought = 0
        for index, name in enumerate(wanted):
            if watch is not None:
                watch(index, len(wanted))
            if name in self._fetched:
                self._bring_rows(name)
            else:
                brought += self._bring(name, packed=name in accounts.packable)
        if watch is not None and wanted:
            watch(len(wanted), len(wanted))
        if streamed:
            units = [self._unit(place, names) for place, names in streamed.items()]
            self._flow.start(units, self._lane or lane_for(self.device, tell))
        return brought

    def release(self, prefixes: Iterable[str] | None = None) -> int:
        """Let go of the parameters below ``prefixes``, or of all and of what streams; returns the bytes let go."""
        chosen = None if prefixes is None else below(prefixes)
        released = 0
        try:
            if prefixes is None:
                self._stop()
        finally:  # also where a device is lost
            for name in self._weights:
                if chosen is None or name.startswith(chosen):
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

    @functools.cached_property
    def outlines(self) -> Outlines:
        """The weights of linear layers as they are stored, for plans."""
        return Outlines.of_file(self._weights, self.accounts.movable, self.device, self.dtype)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the parameters that are in memory now, and of the ring that others go through."""
        passing = self._streamed | self._fetched
        return self._flow.ring_bytes + sum(self._bytes(name) for name in self._weights if name not in passing)

    @property
    def streams(self) -> bool:
        """Whether some of its blocks come and go."""
        return bool(self._streamed)

    @property
    def passed(self) -> Passed:
        """See the class."""
        return self._flow.passed

    def _unit(self, place: int, names: Iterable[str]) -> Unit:
        return Unit(place, tuple((self._place(name)[0], self._weights[name]) for name in names))

    def _stop(self) -> None:
        self._streamed = frozenset()
        self._flow.stop()

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

    def _bring_rows(self, name: str) -> None:
        """Have an embedding fetch rows from the file as they are asked for."""
        layer, _ = self._place(name)
        layer.packed, layer.dtype = self._weights[name].packed(), self.dtype

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
