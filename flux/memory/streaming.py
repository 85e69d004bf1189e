"""Blocks whose weights come when they run and are gone when they have, while the next ones are on their way.

Blocks run in one order, again and again, so that the next ones are always known. A reader thread brings them into a
ring of buffers of fixed size; nothing is allocated while a run samples. Weights travel as they are stored, and layers
unpack them at use (``ops.packed``); so the bits are those of packed weights that stay.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.dtypes import held_as
from ..ops.packed import PackedWeight
from .accounts import Sized, aligned, buffer_bytes
from .lanes import Arrival, Departure, Lane, Mark
from .spread import SLOTS

__all__ = ["StoredWeight", "Streamer", "Unit"]

MOST_STALLS = 512  # whose times are not read yet


class Movable(PackedWeight, Protocol):
    """A packed weight whose stored tensors can be elsewhere."""

    def tensors(self) -> Mapping[str, Tensor]: ...
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> PackedWeight: ...


class StoredWeight(Sized, Protocol):
    """A weight in a file."""

    def packed(self) -> Movable:
        """As it is stored; a view of the file."""

    def forget(self) -> None:
        """Let go of pages of a mapped file."""

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Read the bytes of every stored tensor into memory (n,) of the caller's."""


@dataclass(frozen=True)
class Unit:
    """What comes and goes together: the weights of one block.

    Attributes:
        place: Of the block among all, in the order in which they run.
        layers: Layers that take packed weights (``ops.packed.takes_packed``), with theirs.
    """

    place: int
    layers: Sequence[tuple[Any, StoredWeight]]


@dataclass(frozen=True)
class _Piece:
    """One stored tensor's place in a buffer."""

    name: str
    start: int
    length: int
    dtype: torch.dtype
    shape: torch.Size

    def view_of(self, buffer: Tensor) -> Tensor:
        whole = buffer[self.start : self.start + self.length]
        return whole.view(held_as(self.dtype, buffer.device)).view(self.shape)


class _Layout:
    """Where in a buffer everything of a unit is."""

    def __init__(self, unit: Unit) -> None:
        self.unit, self.size = unit, 0
        self.packed = [weight.packed() for _, weight in unit.layers]
        self.pieces = [[self._placed(name, tensor) for name, tensor in own.tensors().items()] for own in self.packed]
        assert self.size == buffer_bytes(weight for _, weight in unit.layers)
        for _, weight in unit.layers:
            weight.forget()  # the pages that were looked at to check scales

    def _placed(self, name: str, tensor: Tensor) -> _Piece:
        start = self.size
        self.size += aligned(tensor.nbytes)
        return _Piece(name, start, tensor.nbytes, tensor.dtype, tensor.shape)

    def read(self, memory: Tensor) -> None:
        """Read everything into memory (size,) of the host."""
        for (_, weight), pieces in zip(self.unit.layers, self.pieces, strict=True):
            weight.read_into({piece.name: memory[piece.start : piece.start + piece.length] for piece in pieces})

    def weights_in(self, buffer: Tensor) -> list[PackedWeight]:
        """Every layer's weight as a view of a buffer."""
        return [
            packed.with_tensors({piece.name: piece.view_of(buffer) for piece in pieces})
            for packed, pieces in zip(self.packed, self.pieces, strict=True)
        ]

    def bind(self, weights: Sequence[PackedWeight]) -> None:
        """Have the layers use these weights."""
        for (layer, _), weight in zip(self.unit.layers, weights, strict=True):
            layer.packed = weight

    def unbind(self) -> None:
        """Have the layers fail rather than use what is no longer theirs."""
        for layer, _ in self.unit.layers:
            layer.packed = None


@dataclass(frozen=True)
class _Coming:
    """A unit on its way into one of the buffers."""

    layout: _Layout
    slot: int
    after: Departure | None
    arrival: Future[Arrival]


class Streamer:
    """Brings the weights of blocks ahead of their use, for as long as it is open.

    Args:
        units: In the order in which they run; at least one.
        lane: To the device.
        slots: Buffers of the ring.
        clock: Seconds.

    Attributes:
        brought: Bytes that were brought so far.
    """

    def __init__(
        self, units: Sequence[Unit], lane: Lane, *, slots: int = SLOTS, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.brought, self._waited = 0, 0.0
        self._stalls: deque[tuple[Mark, Mark | None]] = deque()
        self._lane, self._clock = lane, clock
        self._layouts = [_Layout(unit) for unit in units]
        self._order = {unit.place: index for index, unit in enumerate(units)}
        size = max(layout.size for layout in self._layouts)
        self._buffers = [lane.buffer(size) for _ in range(min(slots, len(units)))]
        self._reader = ThreadPoolExecutor(1, "weights")
        self._coming: deque[_Coming] = deque()
        self._running: tuple[_Layout, int] | None = None
        self._views: dict[tuple[int, int], list[PackedWeight]] = {}
        self._next = 0
        try:
            for slot in range(len(self._buffers)):
                self._request(slot, lane.leave())  # what was freed for the buffers may still be read from
        except BaseException:  # there is no thread for it
            self.close()
            raise

    @property
    def ring_bytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.numel() for buffer in self._buffers)

    @property
    def waited(self) -> float:
        """Seconds that blocks stood still because their weights were not there yet, as far as a device can tell."""
        self._settle(0)
        return self._waited

    def before(self, place: int) -> None:
        """Have the weights of the block at ``place`` there, if it is streamed; called before it runs.

        Raises:
            FileError: They could not be read any more.
        """
        if self._running is not None:
            if self._running[0].unit.place == place:
                return
            self._leave()
        index = self._order.get(place)
        if index is None:
            return
        if self._coming[0].layout is not self._layouts[index]:
            self._begin_again(index)
        coming = self._coming.popleft()
        began, mark = self._clock(), self._lane.mark()
        try:
            coming.arrival.result().wait()
        except BaseException:
            self._coming.appendleft(self._asked_for(coming.layout, coming.slot, coming.after))  # for another try
            raise
        if mark is None:
            self._waited += self._clock() - began
        else:
            self._stalls.append((mark, self._lane.mark()))
            if len(self._stalls) > MOST_STALLS:  # of which the first are long past, and need not be waited for
                self._settle(MOST_STALLS // 2)
        self.brought += coming.layout.size
        coming.layout.bind(self._weights(coming))
        self._running = coming.layout, coming.slot

    def _settle(self, left: int) -> None:
        """Add up stalls, the oldest first, until no more than some are left."""
        while len(self._stalls) > left:
            began, ended = self._stalls.popleft()
            try:
                self._waited += began.seconds_to(ended)
            except RuntimeError:  # a device that is gone tells no times; what it was given to do fails by itself
                self._stalls.clear()

    def after(self, place: int) -> None:
        """The block at ``place`` was set going, and the next one may come in its place; called when it has run."""
        if self._running is not None and self._running[0].unit.place == place:
            self._leave()

    def close(self) -> None:
        """Let go of everything; what is under way is waited for."""
        if self._running is not None:
            self._running[0].unbind()
            self._running = None
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()
        try:
            self._lane.close()
        finally:
            self._views.clear()
            self._buffers.clear()

    def _weights(self, coming: _Coming) -> list[PackedWeight]:
        """Views of a buffer, made once for each block in it."""
        key = coming.layout.unit.place, coming.slot
        if key not in self._views:
            self._views[key] = coming.layout.weights_in(self._buffers[coming.slot])
        return self._views[key]

    def _leave(self) -> None:
        """The running block has been set going: its buffer is the next one's."""
        assert self._running is not None
        layout, slot = self._running
        layout.unbind()
        self._running = None
        self._request(slot, self._lane.leave())

    def _request(self, slot: int, after: Departure | None) -> None:
        layout = self._layouts[self._next]
        self._next = (self._next + 1) % len(self._layouts)
        self._coming.append(self._asked_for(layout, slot, after))

    def _asked_for(self, layout: _Layout, slot: int, after: Departure | None) -> _Coming:
        return _Coming(layout, slot, after, self._reader.submit(self._bring, slot, layout, after))

    @torch.inference_mode()  # as buffers may have been made in, by a thread in whose runs no gradients flow
    def _bring(self, slot: int, layout: _Layout, after: Departure | None) -> Arrival:
        """Called by the thread that reads."""
        return self._lane.bring(self._buffers[slot], layout.size, layout.read, after)

    def _begin_again(self, index: int) -> None:
        """Blocks run otherwise than expected: a pass was broken off, or left out all but its first blocks.

        They come from this one on; those that are wanted and on their way stay where they are.
        """
        expected, count = list(self._coming), len(self._layouts)
        there = {self._order[coming.layout.unit.place]: coming for coming in expected}
        wanted = [(index + ahead) % count for ahead in range(len(expected))]
        free = deque(coming for own, coming in there.items() if own not in wanted)
        self._coming.clear()
        for own in wanted:
            if own in there:
                self._coming.append(there[own])
                continue
            given_up = free.popleft()
            given_up.arrival.cancel()
            self._next = own
            self._request(given_up.slot, given_up.after)
        self._next = (wanted[-1] + 1) % count
