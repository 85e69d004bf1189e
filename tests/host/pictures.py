"""Whether a picture shows what its prompt asked for, judged by the pixel checker."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from benchmarks.checker import check
from flux.mini.language import Request, Wanted

PROMPT = "a large red circle on the left and a large blue square on the right"
REQUEST = Request(
    objects=(
        Wanted("circle", "red", size="large", position="left"),
        Wanted("square", "blue", size="large", position="right"),
    )
)
OTHER_PROMPT = "a green star in the center on a white background"
OTHER_REQUEST = Request(objects=(Wanted("star", "green", position="center"),), background="white")


def pixels(png: bytes) -> np.ndarray:
    """A picture's bytes (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def assert_shows(png: bytes, request: Request) -> None:
    """The picture shows everything that was asked, and nothing else."""
    verdict = check(pixels(png), request)
    assert verdict.all_right, verdict.faults
