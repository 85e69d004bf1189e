"""A module some of whose blocks are streamed: their weights come when they are called, and go when they have run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from .lanes import Lane
from .streaming import Streamer, Unit

__all__ = ["Passed", "StreamedBlocks"]


class Passed(NamedTuple):
    """What went through rings of buffers: bytes, and seconds that blocks waited for them."""

    bytes: int = 0
    waited: float = 0.0

    def after(self, before: Passed) -> Passed:
        """What came since."""
        return Passed(self.bytes - before.bytes, self.waited - before.waited)


class StreamedBlocks:
    """Streamers of one module, one after the other.

    Attributes:
        streamer: The one that runs; None while nothing is streamed.

    Args:
        module: Has the blocks.
        blocks: Their prefixes, in the order in which they run.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[str]) -> None:
        self._module, self._blocks = module, tuple(blocks)
        self.streamer: Streamer | None = None
        self._hooks: list[RemovableHandle] = []
        self._passed = Passed()

    @property
    def passed(self) -> Passed:
        """What was streamed so far, and how long blocks waited for it."""
        before, streamer = self._passed, self.streamer
        return before if streamer is None else Passed(before.bytes + streamer.brought, before.waited + streamer.waited)

    @property
    def ring_bytes(self) -> int:
        """Of the buffers that are there now."""
        return 0 if self.streamer is None else self.streamer.ring_bytes

    def start(self, units: Sequence[Unit], lane: Lane) -> None:
        """Stream these in place of what was streamed; nothing where there are none."""
        self.stop()
        if not units:
            return
        streamer = self.streamer = Streamer(units, lane)
        for unit in units:
            block = self._module.get_submodule(self._blocks[unit.place])
            before, after = partial(_call, streamer.before, unit.place), partial(_call, streamer.after, unit.place)
            self._hooks += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]

    def stop(self) -> None:
        """Stream nothing any more; holds also where a device is lost meanwhile."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        try:
            self._passed = self.passed
        finally:
            streamer, self.streamer = self.streamer, None
            if streamer is not None:
                streamer.close()


def _call(listener: Callable[[int], None], place: int, *_: object) -> None:
    """A module's hook."""
    listener(place)
