"""Picture sizes: aspect presets by megapixels, on the grid of 16 pixels that FLUX works on."""

from __future__ import annotations

import math

from ..flux.pipelines.text_to_image import GRID, round_size
from .fields import MAX_SIDE

__all__ = ["ASPECTS", "EXACT", "MINI", "image_tokens", "picture_size"]

EXACT = "exact width and height"
MINI = "128x128 (embedded model)"
MINI_SIDE = 128
MEGAPIXEL = 1024 * 1024

RATIOS = ((1, 1), (4, 3), (3, 2), (16, 9), (21, 9))
ASPECTS: dict[str, float | None] = {
    **{f"{a}:{b}": a / b for a, b in RATIOS},
    **{f"{b}:{a}": b / a for a, b in RATIOS if a != b},
    MINI: 1.0,
    EXACT: None,
}


def picture_size(aspect: str, megapixels: float, width: int, height: int) -> tuple[int, int]:
    """Width and height in pixels, multiples of 16, neither above 2048.

    Args:
        aspect: A key of ``ASPECTS``.
        megapixels: Area of a preset, in units of 1024 x 1024 pixels.
        width: For ``EXACT``.
        height: Likewise.
    """
    ratio = ASPECTS[aspect]
    if ratio is None:
        return round_size(min(width, MAX_SIDE)), round_size(min(height, MAX_SIDE))
    if aspect == MINI:
        return MINI_SIDE, MINI_SIDE
    area = megapixels * MEGAPIXEL
    wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
    shrink = min(1.0, MAX_SIDE / max(wide, high))
    return _on_grid(wide * shrink), _on_grid(high * shrink)


def image_tokens(width: int, height: int) -> int:
    """Tokens that a picture of so many pixels is made of."""
    return math.ceil(width / GRID) * math.ceil(height / GRID)


def _on_grid(length: float) -> int:
    return max(GRID, round(length / GRID) * GRID)
