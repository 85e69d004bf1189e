"""What a run took, stage by stage: the most memory, seconds of each pass, and seconds lost waiting for weights.

On CUDA memory is the most that torch's allocator handed out; on a CPU what the process's resident set grew by since the
meter was made, looked at from time to time. Both include what earlier stages left behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil
import torch

from .streamed import Passed

__all__ = ["Gauge", "Meter", "Metered", "NoMeter", "Several", "StageActual", "gauge_for"]

LOOK_EVERY = 0.01  # seconds


class Metered(Protocol):
    """Whose weights a stage runs with."""

    @property
    def resident_bytes(self) -> int: ...
    @property
    def passed(self) -> Passed: ...


@dataclass(frozen=True)
class Several:
    """The weights of several modules that one stage runs with."""

    modules: Sequence[Metered]

    @property
    def resident_bytes(self) -> int:
        """See ``Metered``."""
        return sum(own.resident_bytes for own in self.modules)

    @property
    def passed(self) -> Passed:
        """See ``Metered``."""
        found = [own.passed for own in self.modules]
        return Passed(sum(own.bytes for own in found), sum(own.waited for own in found))


@dataclass
class StageActual:
    """What one stage of a run took; a stage that ran several times is one, with every pass.

    Attributes:
        name: Its key, as in a plan.
        title: What ran in it.
        seconds: In all, loading among them.
        passes: Seconds of each step, picture or prompt.
        peak_bytes: The most that it took at once.
        resident_bytes: Of weights that stayed, and of the ring that others went through.
        streamed_bytes: Brought through it, all passes together.
        waited: Seconds that blocks waited for their weights.
    """

    name: str
    title: str
    seconds: float = 0.0
    passes: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    resident_bytes: int = 0
    streamed_bytes: int = 0
    waited: float = 0.0

    def joined(self, later: StageActual) -> StageActual:
        """This and a later run of the same as one."""
        return StageActual(
            self.name,
            self.title,
            self.seconds + later.seconds,
            [*self.passes, *later.passes],
            max(self.peak_bytes, later.peak_bytes),
            max(self.resident_bytes, later.resident_bytes),
            self.streamed_bytes + later.streamed_bytes,
            self.waited + later.waited,
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "title": self.title,
            "seconds": self.seconds,
            "pass_seconds": list(self.passes),
            "peak_bytes": self.peak_bytes,
            "resident_bytes": self.resident_bytes,
            "streamed_bytes": self.streamed_bytes,
            "waited_seconds": self.waited,
        }


class Gauge(Protocol):
    """Looks at a device's memory."""

    def start(self) -> None:
        """Begin anew."""

    def most(self) -> int:
        """Bytes in use at most since then, beyond those when the gauge was made."""


class CudaGauge:
    """By torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = torch.cuda.memory_allocated(device)

    def start(self) -> None:
        """See ``Gauge``."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def most(self) -> int:
        """See ``Gauge``."""
        return max(0, torch.cuda.max_memory_allocated(self._device) - self._before)


class ResidentGauge:
    """By the process's resident set."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._now()
        self._most = self._before
        self._done: threading.Event | None = None

    def start(self) -> None:
        """See ``Gauge``."""
        self.most()
        self._most = self._now()
        self._done = threading.Event()
        threading.Thread(target=self._watch, args=(self._done,), name="memory", daemon=True).start()

    def most(self) -> int:
        """See ``Gauge``; ends the watching."""
        if self._done is not None:
            self._done.set()
        return max(0, max(self._most, self._now()) - self._before)

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(LOOK_EVERY):
            self._most = max(self._most, self._now())

    def _now(self) -> int:
        return int(self._process.memory_info().rss)


def gauge_for(device: torch.device) -> Gauge:
    """What looks at a device's memory; on others than CUDA at the process's."""
    return CudaGauge(device) if device.type == "cuda" else ResidentGauge()


class Meter:
    """Notes what stages take, one after the other.

    Args:
        device: Where they run.
        clock: Seconds.

    Attributes:
        stages: Those that have begun, by their keys.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.stages: dict[str, StageActual] = {}
        self._gauge, self._clock = gauge_for(device), clock
        self._running: tuple[StageActual, Metered] | None = None
        self._since = 0.0

    @contextmanager
    def stage(self, name: str, title: str, weights: Metered) -> Iterator[None]:
        """Note what is taken inside the block.

        Args:
            name: The stage's key.
            title: What runs in it.
            weights: What it runs with; may be loaded inside the block.
        """
        stage = self.stages.setdefault(name, StageActual(name, title))
        before, began = weights.passed, self._clock()
        self._running = stage, weights
        self._gauge.start()
        self.begin()
        try:
            yield
        finally:
            self._running = None
            passed = weights.passed.after(before)
            stage.peak_bytes = max(stage.peak_bytes, self._gauge.most())
            stage.seconds += self._clock() - began
            stage.streamed_bytes += passed.bytes
            stage.waited += passed.waited

    def begin(self) -> None:
        """A pass begins now, and not when the stage or the pass before it did."""
        self._since = self._clock()

    def tick(self) -> None:
        """A pass of the running stage is over, and the next one begins."""
        if self._running is None:
            return
        stage, weights = self._running
        now = self._clock()
        stage.passes.append(now - self._since)
        stage.resident_bytes = max(stage.resident_bytes, weights.resident_bytes)
        self._since = now


class NoMeter:
    """Notes nothing."""

    @contextmanager
    def stage(self, name: str, title: str, weights: Metered) -> Iterator[None]:
        """See ``Meter``."""
        yield

    def begin(self) -> None:
        """See ``Meter``."""

    def tick(self) -> None:
        """See ``Meter``."""
