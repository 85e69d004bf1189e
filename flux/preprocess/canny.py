"""Edges by OpenCV's Canny, as BFL's Canny models were trained with them.

Pictures: (B, H, W, C), fp32 in 0..1, C of 1 to 4. Thresholds are on OpenCV's scale: |dx| + |dy| of 3x3 Sobel filters on
8-bit levels, of the channel in which it is largest, so that a step of d levels counts 4 d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from .control import as_bytes, as_rgb

__all__ = ["HIGH", "LOW", "MAX_THRESHOLD", "auto_thresholds", "automatic_canny", "canny"]

LOW, HIGH = 50.0, 200.0  # BFL's
MAX_THRESHOLD = 2040.0  # no gradient is larger: |dx| + |dy| of a corner between 0 and 255 is less than twice 4 * 255
LOW_SHARE = 0.4  # Canny (1986) advises a high threshold of two to three times the low one
FAINTEST = 16.0  # a step of 4 levels, the least high threshold that is chosen: noise and JPEG reach it in flat pictures
SOBEL_SIZE = 3


def canny(image: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """Edges between fixed thresholds; the defaults are those of BFL's Canny models.

    Args:
        image: (B, H, W, C).
        low: Pixels above it are edges where they touch one above ``high``.
        high: Pixels above it are edges.

    Returns:
        (B, H, W, 3), 1 on edges, else 0.

    Raises:
        UserError: The thresholds are no numbers from 0 on, or in the wrong order.
    """
    for name, value in (("low", low), ("high", high)):
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"the {name} threshold is {value:g}; give a number from 0 to {MAX_THRESHOLD:g}")
    if low > high:
        raise UserError(f"the low threshold ({low:g}) is above the high one ({high:g}); exchange them")
    return _edges(image, [(low, high)] * image.shape[0])


def automatic_canny(image: Tensor) -> Tensor:
    """Edges (B, H, W, 3) between thresholds that each picture chooses itself; see ``auto_thresholds``."""
    return _edges(image, auto_thresholds(image))


def auto_thresholds(image: Tensor) -> list[tuple[float, float]]:
    """Low and high threshold for each picture (B, H, W, C), of its own gradients.

    The high one parts the gradients best in two classes, by Otsu's method (1979); the low one is ``LOW_SHARE`` of it.
    """
    return [_otsu(picture) for picture in as_bytes(as_rgb(image))]


def _otsu(picture: NDArray[np.uint8]) -> tuple[float, float]:
    strengths = _gradients(picture)
    found, _ = cv2.threshold(strengths, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    high = max(float(found), FAINTEST)
    return LOW_SHARE * high, high


def _gradients(picture: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """What ``cv2.Canny`` compares with its thresholds: (H, W, 3) to (H, W)."""
    dx, dy = (
        cv2.Sobel(picture, cv2.CV_16S, x, 1 - x, ksize=SOBEL_SIZE, borderType=cv2.BORDER_REPLICATE) for x in (1, 0)
    )
    strengths: NDArray[np.uint16] = (np.abs(dx) + np.abs(dy)).max(axis=-1).astype(np.uint16)
    return strengths


def _edges(image: Tensor, thresholds: Sequence[tuple[float, float]]) -> Tensor:
    pictures = as_bytes(as_rgb(image))
    found = [cv2.Canny(picture, low, high) for picture, (low, high) in zip(pictures, thresholds, strict=True)]
    edges = torch.from_numpy(np.stack(found) > 0).to(image.device, torch.float32)
    return edges[..., None].repeat(1, 1, 1, 3)
