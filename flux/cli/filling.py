"""What ``fill`` and ``outpaint`` draw: a part of a picture, and what is around it; the rest leaves as it came in."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..editing.inpaint import CropOptions, crop_for_inpaint, stitch
from ..editing.masks import MaskOptions
from ..editing.outpaint import OutpaintPlan, extend, finish, plan_outpaint, plan_to_aspect
from ..errors import UserError
from ..images import origin_of
from ..pipelines.guided import FillInput
from .engine import (
    Desk,
    Job,
    as_numbers,
    as_pixels,
    beginning_of,
    channels_first,
    guide_of,
    mask_of,
    picture_of,
    request_of,
)

__all__ = ["make"]

Finish = Callable[[Tensor], Tensor]

LOSSY = (".jpg", ".jpeg", ".webp")
SIDES = ("left", "right", "top", "bottom")


def make(arguments: argparse.Namespace, desk: Desk) -> Job:
    """What the options ask for.

    Raises:
        UserError: They do not fit the picture or each other, or a picture cannot be read.
    """
    if Path(arguments.out).suffix.lower() in LOSSY:
        desk.warn(f"{Path(arguments.out).name} changes what was to be kept a little; a .png keeps it to the bit")
    origin = origin_of(arguments.image)
    for sentence in origin.losses:
        desk.warn(sentence)
    job = _fill(arguments, desk) if arguments.command == "fill" else _outpaint(arguments, desk)
    return replace(job, profile=origin.profile)


def _fill(arguments: argparse.Namespace, desk: Desk) -> Job:
    if not 0 <= arguments.colour_match <= 1:
        raise UserError(f"--colour-match is {arguments.colour_match:g}; give a number from 0 to 1")
    picture, mask = picture_of(arguments.image), mask_of(arguments.mask)
    crop = crop_for_inpaint(picture, mask, _crop_options(arguments, desk, picture), desk.warn)

    def stitched(pixels: Tensor) -> Tensor:
        return as_pixels(stitch(crop, as_numbers(pixels), desk.warn, colour_match=arguments.colour_match))

    facts: dict[str, object] = {
        "command": "fill",
        "image": arguments.image.name,
        "mask": arguments.mask.name,
        "invert": arguments.invert,
        "fill_holes": arguments.fill_holes,
        "grow": arguments.grow,
        "blur": arguments.blur,
        "rounding": arguments.rounding,
        "colour_match": arguments.colour_match,
        "crop": [crop.box.left, crop.box.top, crop.box.width, crop.box.height],
    }
    begun = beginning_of(arguments, crop.picture)
    return _job(arguments, desk, crop.picture, crop.mask, stitched, facts, arguments.rounding, **begun)


def _crop_options(arguments: argparse.Namespace, desk: Desk, picture: Tensor) -> CropOptions:
    mask = MaskOptions(
        invert=arguments.invert, fill_holes=arguments.fill_holes, grow=arguments.grow, blur=arguments.blur
    )
    if not arguments.no_crop:
        side = desk.side if arguments.side is None else arguments.side
        return CropOptions(context=arguments.context, side=side, mask=mask)
    if arguments.side is not None:
        raise UserError("--side is of a crop, and --no-crop asks for none; give one of them")
    return CropOptions(context=1, min_context=max(picture.shape[1:3]), side=0, mask=mask)


def _outpaint(arguments: argparse.Namespace, desk: Desk) -> Job:
    picture = picture_of(arguments.image)
    plan = _plan(arguments, picture)
    canvas = extend(picture, plan, arguments.feather)

    def finished(pixels: Tensor) -> Tensor:
        return as_pixels(finish(canvas, as_numbers(pixels)))

    facts: dict[str, object] = {
        "command": "outpaint",
        "image": arguments.image.name,
        "sides": {side: getattr(plan, side) for side in SIDES},
        "feather": arguments.feather,
    }
    return _job(arguments, desk, canvas.picture, canvas.mask, finished, facts)


def _plan(arguments: argparse.Namespace, picture: Tensor) -> OutpaintPlan:
    height, width = picture.shape[1:3]
    sides = {side: getattr(arguments, side) for side in SIDES}
    if arguments.aspect is None:
        return plan_outpaint(height, width, **sides, exact=True)
    if any(sides.values()):
        raise UserError("--aspect and pixels for sides were given; give one of them")
    across, down = arguments.aspect
    return plan_to_aspect(height, width, across, down, arguments.anchor)


def _job(
    arguments: argparse.Namespace,
    desk: Desk,
    picture: Tensor,
    mask: Tensor,
    finished: Finish,
    facts: dict[str, object],
    rounding: str = "soft",
    **fields: Any,
) -> Job:
    """To paint ``mask`` (1, H, W) in ``picture`` (1, H, W, 3); further fields are the request's."""
    height, width = picture.shape[1:3]
    given = FillInput(
        picture=channels_first(picture), mask=mask[None], rounding=rounding, strength=arguments.strength,
        mask_checked=True, **guide_of(arguments),
    )  # fmt: skip
    request = request_of(arguments, desk.seed, width=width, height=height, inputs=[given], **fields)
    return Job(desk.model, request, finished, facts)
