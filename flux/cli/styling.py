"""What ``redux`` draws: what other pictures show, taken over through a vision tower and FLUX.1 Redux."""

from __future__ import annotations

import argparse

from torch import Tensor

from ..errors import UserError
from ..memory.available import available_bytes
from ..memory.plan import StagePlan
from ..memory.policy import read_policy
from ..pipelines.planning import Job as Work
from ..pipelines.planning import grant, plan_run, planned_of_part
from ..pipelines.redux import ReduxPicture, open_redux_encoder, style_guide
from ..preprocess.vision import vision_pixels
from .engine import DTYPES, Desk, Job, guide_of, mask_of, picture_of, request_of, strengths_of

__all__ = ["make"]

ATTENTION = "attention"


def make(arguments: argparse.Namespace, desk: Desk) -> Job:
    """What the options ask for.

    Raises:
        UserError: They do not fit each other, or something cannot be read.
    """
    paths, model, files = arguments.image, desk.model, desk.files
    strengths = strengths_of(arguments, len(paths))
    mask = _mask(arguments)
    assert files.redux is not None
    encoder = open_redux_encoder(
        files.vision, files.redux, desk.device, DTYPES[arguments.dtype], model.transformer.given
    )
    side, patch = encoder.tower.spec.side, encoder.tower.spec.patch
    by_attention = arguments.strength_mode == ATTENTION
    pictures = [
        ReduxPicture(
            views=vision_pixels(picture_of(path), side, arguments.fit, mask, patch, desk.warn),
            grid=arguments.grid,
            tokens=arguments.tokens,
            scale=1.0 if by_attention else strength,
        )
        for path, strength in zip(paths, strengths, strict=True)
    ]
    guide = guide_of(arguments)
    policy, views = read_policy(arguments.policy), sum(len(picture.views.pixels) for picture in pictures)
    work = Work(width=desk.side, height=desk.side, views=views)
    limits = grant((encoder.tower,), work, policy).limits
    before: tuple[StagePlan, ...] = ()
    if arguments.report:
        free = available_bytes(desk.device)
        before = plan_run(
            [planned_of_part(encoder.tower)], work, policy, device=str(desk.device), available=free
        ).stages
    encoded = encoder.encode_all(pictures, limits=limits, warn=desk.warn, meter=desk.meter)
    guides = [
        style_guide(tokens, strength=strength if by_attention else 1.0, **guide)
        for tokens, strength in zip(encoded, strengths, strict=True)
    ]
    request = request_of(arguments, desk.seed, width=arguments.width, height=arguments.height, inputs=guides)
    facts: dict[str, object] = {
        "command": "redux",
        "images": [path.name for path in paths],
        "strengths": strengths,
        "strength_mode": arguments.strength_mode,
        "fit": arguments.fit,
        "style_tokens": [guide.tokens.shape[1] for guide in guides],
        "redux": encoder.redux.path.name,
        "vision": encoder.tower.path.name,
        **({"mask": arguments.mask.name} if mask is not None else {}),
    }
    return Job(model, request, facts=facts, before=before)


def _mask(arguments: argparse.Namespace) -> Tensor | None:
    """The reference's mask (1, H, W)."""
    if arguments.mask is None:
        return None
    if len(arguments.image) > 1:
        raise UserError(
            "--mask is of a single IMAGE, and several were given; give one IMAGE, or no mask (in ComfyUI every FLUX "
            "Redux has one of its own)"
        )
    return mask_of(arguments.mask)
