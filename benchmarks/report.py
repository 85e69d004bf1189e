"""What a benchmark found: text for people, and plain values for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Report", "finite", "verdict"]


@dataclass(frozen=True)
class Report:
    """A table.

    Attributes:
        text: Markdown.
        data: The same figures as JSON can hold them; a number that is not finite is None, as is the PSNR of equal
            pictures.
    """

    text: str
    data: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", finite(self.data))

    def __str__(self) -> str:
        return self.text


def finite(value: Any) -> Any:
    """The same lists, dicts and values, with None in the place of every number that is infinite or NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(own) for name, own in value.items()}
    return [finite(own) for own in value] if isinstance(value, list | tuple) else value


def verdict(holds: bool) -> str:
    """Whether a bar holds, in a word."""
    return "holds" if holds else "MISSED"
