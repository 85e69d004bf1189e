"""What the command line says: results on stdout, notes, progress and faults on stderr."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["Bar", "fault", "note", "say", "say_beside"]


def say(line: str) -> None:
    """Put a line of results on stdout, at once, so that a pipe's reader can begin."""
    if sys.stdout is not None:  # closed by the caller, who does not want to know
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def say_beside(lines: str) -> None:
    """Put lines on stderr, where they are in nobody's way who reads results."""
    sys.stderr.write(f"{lines}\n")


def note(sentence: str) -> None:
    """Tell what was done otherwise than asked."""
    sys.stderr.write(f"note: {sentence}\n")


def fault(sentence: str) -> None:
    """Tell why there is no result."""
    sys.stderr.write(f"error: {sentence}\n")


class Bar:
    """A progress bar for each stage of a picture, on a terminal only.

    Args:
        quiet: Show nothing whatever stderr is.
    """

    def __init__(self, quiet: bool) -> None:
        self.shown = not quiet and sys.stderr.isatty()
        self._bar: Any = None
        self._stage = ""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def show(self, stage: str, done: int, total: int) -> None:
        """Show ``done`` of a stage's ``total`` steps; the bar goes with the last of them, or with the next stage."""
        if not self.shown:
            return
        if self._stage != stage:
            self._close()
            self._stage = stage
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=stage, unit="step", leave=False, file=sys.stderr)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
