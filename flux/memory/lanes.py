"""How bytes get from a file into a buffer on a device, and when they are there.

On a CPU they are read into the buffer itself. On an NVIDIA or AMD GPU a reader thread reads them into pinned memory,
from where they travel on a stream of their own; events, not waiting, keep that stream and the one that computes apart.
On other devices they are read into memory of the host and copied in the device's only queue.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.pieces import by_several

__all__ = ["Arrival", "CpuLane", "CudaLane", "Departure", "Lane", "Mark", "QueueLane", "lane_for"]

MILLI = 1000  # of a second
Read = Callable[[Tensor], None]  # writes bytes into memory (n,) of the host


class Arrival(Protocol):
    """Bytes on their way."""

    def wait(self) -> None:
        """Have what is computed from now on find the bytes there. Called by the thread that computes."""


class Departure(Protocol):
    """The end of a block that used a buffer."""

    def wait(self) -> None:
        """Have what is brought from now on not disturb that block. Called by the thread that reads."""


class Mark(Protocol):
    """A moment of what is computed."""

    def seconds_to(self, other: Any) -> float:
        """From this one to a later one of the same lane; waits for it."""


class Lane(Protocol):
    """The way to one device."""

    def buffer(self, size: int) -> Tensor:
        """Bytes (size,) on the device."""

    def bring(self, buffer: Tensor, size: int, read: Read, after: Departure | None) -> Arrival:
        """Have ``size`` bytes read, and brought to ``buffer`` once the block before is through with it.

        Called by the thread that reads.
        """

    def leave(self) -> Departure:
        """Note that a block has been set going. Called by the thread that computes."""

    def mark(self) -> Mark | None:
        """The moment at which what is computed has come so far; None where that is now."""

    def close(self) -> None:
        """Let go of everything, once all that is under way has come."""


class _Here:
    """What is there already."""

    def wait(self) -> None:
        """Nothing to wait for."""


class CpuLane:
    """To memory of the host: a block is over when the next one is asked for."""

    def buffer(self, size: int) -> Tensor:
        """See ``Lane``."""
        return torch.empty(size, dtype=torch.uint8)

    def bring(self, buffer: Tensor, size: int, read: Read, after: Departure | None) -> Arrival:
        """See ``Lane``."""
        read(buffer[:size])
        return _Here()

    def leave(self) -> Departure:
        """See ``Lane``."""
        return _Here()

    def mark(self) -> None:
        """See ``Lane``."""

    def close(self) -> None:
        """See ``Lane``."""


class _Moment:
    """An event on one of a GPU's streams."""

    def __init__(self, stream: torch.cuda.Stream, waiting: Callable[[], torch.cuda.Stream]) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._waiting = waiting
        self._event.record(stream)

    def wait(self) -> None:
        """Have the other stream wait for it; this thread goes on."""
        self._waiting().wait_event(self._event)

    def block(self) -> None:
        """Have this thread wait for it."""
        self._event.synchronize()


class Stages:
    """Pieces of memory on the host, from where bytes travel to a device.

    Args:
        count: How many take turns.
        warn: Told once where memory cannot be pinned, and transfers are slower for it.
        pin: Makes bytes (n,) in pinned memory; a RuntimeError says that there is none.
    """

    def __init__(
        self, count: int, warn: Callable[[str], None] | None = None, pin: Callable[[int], Tensor] | None = None
    ) -> None:
        self._pieces: list[Tensor | None] = [None] * count
        self._warn, self._pin = warn, pin or _pinned

    def piece(self, turn: int, size: int) -> Tensor:
        """The memory (n,) whose turn it is, of ``size`` bytes at least."""
        found = self._pieces[turn]
        if found is None or found.numel() < size:
            self._pieces[turn] = None  # what was too small is gone before the next one comes
            found = self._pieces[turn] = self._made(size)
        return found

    def clear(self) -> None:
        """Let go of all."""
        self._pieces = [None] * len(self._pieces)

    def _made(self, size: int) -> Tensor:
        try:
            return self._pin(size)
        except RuntimeError:  # what torch raises where the system pins no more
            if self._warn is not None:
                self._warn("memory could not be pinned; weights are streamed from ordinary memory, which is slower")
                self._warn = None
            return torch.empty(size, dtype=torch.uint8)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class _TimedMoment:
    """A moment of the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(device))

    def seconds_to(self, other: _TimedMoment) -> float:
        """See ``Mark``."""
        other._event.synchronize()
        return float(self._event.elapsed_time(other._event)) / MILLI


class CudaLane:
    """To a GPU, through two pieces of pinned memory: one is filled while the other travels.

    Args:
        device: The GPU.
        warn: Told once where memory cannot be pinned, and transfers are slower for it.
    """

    STAGES = 2

    def __init__(self, device: torch.device, warn: Callable[[str], None] | None = None) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stages = Stages(self.STAGES, warn)
        self._travels: list[_Moment | None] = [None] * self.STAGES
        self._turn, self._lock = 0, threading.Lock()

    def buffer(self, size: int) -> Tensor:
        """See ``Lane``."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def bring(self, buffer: Tensor, size: int, read: Read, after: Departure | None) -> Arrival:
        """See ``Lane``."""
        with self._lock:
            turn = self._turn
            self._turn = (turn + 1) % self.STAGES
        travelling = self._travels[turn]
        if travelling is not None:
            travelling.block()
        stage = self._stages.piece(turn, buffer.numel())
        with by_several():  # the CPU has nothing else to do
            read(stage[:size])
        with torch.cuda.stream(self._stream):
            if after is not None:
                after.wait()
            buffer[:size].copy_(stage[:size], non_blocking=True)
        arrival = _Moment(self._stream, lambda: torch.cuda.current_stream(self.device))
        self._travels[turn] = arrival
        return arrival

    def leave(self) -> Departure:
        """See ``Lane``."""
        return _Moment(torch.cuda.current_stream(self.device), lambda: self._stream)

    def mark(self) -> Mark:
        """See ``Lane``: on a GPU what is computed lags behind the thread that set it going."""
        return _TimedMoment(self.device)

    def close(self) -> None:
        """See ``Lane``."""
        try:
            self._stream.synchronize()
        finally:  # where the device is lost, nothing is under way any more
            self._stages.clear()
            self._travels = [None] * self.STAGES


class QueueLane(CpuLane):
    """To a device whose work is done in the order in which it was given, copies among it: Apple's GPUs, Intel's.

    Args:
        device: It.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stages = Stages(1, pin=_ordinary)

    def buffer(self, size: int) -> Tensor:
        """See ``Lane``."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def bring(self, buffer: Tensor, size: int, read: Read, after: Departure | None) -> Arrival:
        """See ``Lane``. What was given before uses the buffer before the copy comes to it."""
        stage = self._stages.piece(0, buffer.numel())[:size]
        read(stage)
        buffer[:size].copy_(stage)  # waits for the copy, so that the stage is free again
        return _Here()

    def close(self) -> None:
        """See ``Lane``."""
        self._stages.clear()


def _ordinary(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def lane_for(device: torch.device, warn: Callable[[str], None] | None = None) -> Lane:
    """The way to a device."""
    if device.type == "cuda":
        return CudaLane(device, warn)
    return CpuLane() if device.type == "cpu" else QueueLane(device)
