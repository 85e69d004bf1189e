"""Says whether a picture shows what a prompt of Foundry Mini asked for, from its pixels alone.

The picture is measured first and compared with the request afterwards: what it shows (its background, its blobs with
their colour, shape, centre and radius, or the word that can be read in it) is found without a look at what was asked.
Thresholds are fixed and stand in each module with their reasons; none is tuned to a model.

Legend: (H, W) pixels; coverage is how much of a pixel an object hides, 0..1; ``scale`` is how much smaller than on a
128-pixel canvas things are drawn; areas are in pixels of a 128-pixel canvas.
"""

from __future__ import annotations

import numpy as np

from flux.mini.language import Request

from .objects import Blob, check_objects, find_blobs
from .picture import PALETTE, Image, measure
from .tally import Pair, Tally, Verdict
from .words import check_sign, read_word

__all__ = ["Blob", "Tally", "Verdict", "check", "find_blobs", "read_word"]


def check(image: Image, request: Request) -> Verdict:
    """Compare a picture with a request.

    Args:
        image: (H, W, 3) RGB.
        request: What was asked for.

    Raises:
        ValueError: The image is not (H, W, 3) bytes.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != len(PALETTE[0]):
        raise ValueError(f"expected RGB bytes (H, W, 3), found {image.dtype} {image.shape}; convert the picture first")
    picture = measure(image)
    faults: list[str] = []
    background: Pair = (0, 0)
    if request.background is not None:
        background = (int(picture.background == request.background), 1)
        if not background[0]:
            faults.append(f"background is {picture.background}, not {request.background}")
    if request.word is not None:
        return check_sign(picture, request, background, faults)
    return check_objects(picture, request, background, faults)
