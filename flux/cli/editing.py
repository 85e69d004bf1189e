"""What ``edit`` draws: a picture changed by instruction, at its own size."""

from __future__ import annotations

import argparse

from torch import Tensor

from ..errors import UserError
from ..pipelines.guided import ReferenceInput
from ..preprocess.control import resize
from ..preprocess.references import FittedReference, fit_reference
from .engine import (
    Desk,
    Job,
    as_numbers,
    as_pixels,
    beginning_of,
    channels_first,
    guide_of,
    picture_of,
    request_of,
    strengths_of,
)

__all__ = ["make"]

KEEPS_PLACE = "pad"
HAS_SIZES = "kontext"
LEAST_BUDGET = 192 * 192  # pixels; the embedded model was trained on canvases up to this size
MEGA = 1_000_000
MOST_MEGAPIXELS = 100.0


def make(arguments: argparse.Namespace, desk: Desk) -> Job:
    """What the options ask for.

    Raises:
        UserError: They do not fit each other, or a picture cannot be read.
    """
    paths = [arguments.image, *arguments.reference]
    strengths = strengths_of(arguments, len(paths))
    pictures = [picture_of(path) for path in paths]
    budget = _budget(arguments, desk)
    fitted = [
        fit_reference(picture, arguments.fit, budget, warn=desk.warn, native_side=desk.side) for picture in pictures
    ]
    guide = guide_of(arguments)
    inputs = [
        ReferenceInput(picture=channels_first(one.picture), strength=strength, **guide)
        for one, strength in zip(fitted, strengths, strict=True)
    ]
    size = fitted[0].size
    request = request_of(
        arguments, desk.seed, width=size.padded_width, height=size.padded_height, inputs=inputs,
        layout=arguments.layout, **beginning_of(arguments, fitted[0].picture),
    )  # fmt: skip
    facts: dict[str, object] = {
        "command": "edit",
        "images": [path.name for path in paths],
        "fit": arguments.fit,
        "layout": arguments.layout,
    }
    own = (int(pictures[0].shape[1]), int(pictures[0].shape[2]))
    if arguments.fit == KEEPS_PLACE and (size.height, size.width) != own:
        desk.warn(f"the result is scaled back to the picture's size, {own[1]}x{own[0]}")

    def cut(pixels: Tensor) -> Tensor:
        return _cut(pixels, fitted[0], own if arguments.fit == KEEPS_PLACE else (size.height, size.width))

    return Job(desk.model, request, cut, facts)


def _cut(pixels: Tensor, fitted: FittedReference, size: tuple[int, int]) -> Tensor:
    """Bytes (H, W, 3) without what was added at the right and the bottom, at a size (height, width)."""
    return as_pixels(resize(fitted.size.cut(as_numbers(pixels)), *size))


def _budget(arguments: argparse.Namespace, desk: Desk) -> int:
    """Pixels of a reference at most."""
    if arguments.budget is not None and arguments.fit == HAS_SIZES:
        raise UserError("--fit kontext has sizes of its own, so that there is no --budget beside it; leave one out")
    if arguments.budget is None:
        return max(desk.side * desk.side, LEAST_BUDGET)
    if not 0 < arguments.budget <= MOST_MEGAPIXELS:
        raise UserError(f"the budget is {arguments.budget:g} megapixels; give a number up to {MOST_MEGAPIXELS:g}")
    pixels: int = round(arguments.budget * MEGA)
    return pixels
