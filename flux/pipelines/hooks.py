"""What a run tells its caller, and asks of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import Cancelled
from ..memory.metering import Meter, NoMeter

__all__ = ["Hooks"]


@dataclass(frozen=True)
class Hooks:
    """What a run tells its caller, and asks of it; every one is optional.

    Attributes:
        progress: Called with the stage's name, the steps done, and how many there are.
        preview: Called after a step with its number and the estimate (B, C, h, w) of the final latents.
        cancelled: Asked before every block, and every weight that is loaded; True stops the run with ``Cancelled``.
        warn: Told in a sentence what was done otherwise than asked.
        meter: Notes what each stage takes.
        tell: Told in a sentence what came of what was asked.
    """

    progress: Callable[[str, int, int], None] | None = None
    preview: Callable[[int, Tensor], None] | None = None
    cancelled: Callable[[], bool] | None = None
    warn: Callable[[str], None] | None = None
    meter: Meter | NoMeter = NoMeter()
    tell: Callable[[str], None] | None = None

    def loading(self, done: int, total: int) -> None:
        """Tell of weights on their way into memory, and raise ``Cancelled`` if the caller wants the run to stop."""
        self.check()
        if self.progress is not None:
            self.progress("loading", done, total)

    def check(self, _: int = 0) -> None:
        """Raise ``Cancelled`` if the caller wants the run to stop."""
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("the run was cancelled")
