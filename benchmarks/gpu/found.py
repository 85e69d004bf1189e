"""What a section found, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..report import verdict

__all__ = ["Bar", "Found", "cell", "table"]

GIB = 1 << 30
BYTES = {"resident", "peak", "planned", "taken", "streamed"}
SECONDS = {
    "seconds", "of which once a prompt", "a step", "a picture", "a pass",
    "as a graph", "bringing alone", "a step at that rate",
}  # fmt: skip
SHARES_OF = {"of the bf16 roofline", "off"}


@dataclass(frozen=True)
class Bar:
    """What a figure may be at most, where it counts.

    Attributes:
        what: It is.
        value: That was measured; None where it could not be.
        most: That it may be.
    """

    what: str
    value: float | None
    most: float

    @property
    def holds(self) -> bool:
        return self.value is not None and self.value <= self.most

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"**{self.value:.3f}**"
        return f"{self.what}: {value} (≤ {self.most:g}: {verdict(self.holds)})"


@dataclass
class Found:
    """What a section found: rows of figures, all with the same keys; bars; and sentences on what went otherwise."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def cell(name: str, value: Any) -> str:
    """A figure as people read it."""
    if name in BYTES:
        return f"{value / GIB:.2f} GiB"
    if name in SECONDS:
        return f"{value:.3f} s"
    if name in SHARES_OF:
        return f"{100 * value:.0f} %"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(found: Found, is_judged: bool) -> str:
    """Rows and bars as Markdown."""
    names = list(found.rows[0])
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(cell(name, row[name]) for name in names)} |" for row in found.rows]
    if is_judged and found.bars:
        lines += ["", *(f"- {bar}" for bar in found.bars)]
    if found.notes:
        lines += ["", *(f"- {note}" for note in found.notes)]
    return "\n".join(lines)
