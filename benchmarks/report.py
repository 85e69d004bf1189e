"""What a benchmark found: text for people, and plain values for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Report", "verdict"]


@dataclass(frozen=True)
class Report:
    """A table.

    Attributes:
        text: Markdown.
        data: The same figures, as JSON can hold them.
    """

    text: str
    data: dict[str, Any]

    def __str__(self) -> str:
        return self.text


def verdict(holds: bool) -> str:
    """Whether a bar holds, in a word."""
    return "holds" if holds else "MISSED"
