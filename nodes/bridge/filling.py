"""Pictures that are painted into: a part cut out or an area added, told to a Fill model, and put back exactly.

Shapes: B pictures of H by W pixels; IMAGE (B, H, W, 3) and MASK (B, H, W) in 0..1, a mask 1 where the picture changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...flux.adapters.channels import CELL, GREY, ROUNDINGS, hidden_and_shown
from ...flux.adapters.guides import check_strength
from ...flux.editing.colour import match_colour
from ...flux.editing.inpaint import Crop, CropOptions, check_painted, crop_for_inpaint, stitch
from ...flux.editing.masks import SET, as_mask, check_mask, fit_mask, match_batch
from ...flux.editing.outpaint import Canvas, OutpaintPlan, extend, finish, plan_outpaint, plan_to_aspect
from ...flux.errors import MismatchError, NumericError, UserError
from ...flux.preprocess.control import as_rgb, choose, resize
from .control_lora import takes_hole
from .entries import Change, Conditioning, check_region, with_part
from .experts import receiver
from .pictures import HOLE, IMAGE, MASK, if_taken, marked, shows_part, with_room
from .preflight import encoded_by
from .progress import say

__all__ = [
    "ScaledCrop", "add_hole", "as_picture", "cut_out", "encode", "lay_out", "put_back", "tell_of_area", "tinted",
    "with_both",
]  # fmt: skip

CHANNELS = 16  # of FLUX.1's latents
MEGAPIXEL = 1024 * 1024
LARGE = 2.0  # megapixels; FLUX.1 was trained on pictures of up to so many
ALWAYS = (1.0, 0.0, 1.0)  # strength, start and end of what acts fully all the time
TINT = (1.0, 0.0, 0.0)  # red, which says "mask" to most people
TINTED = 0.5  # of a pixel's colour
LEVEL = 1.5 / 255  # by which colours of one place may differ
FILLED_SHARE = 0.9  # of a canvas's new pixels; the host's own node softens its mask within the picture

Extra = dict[str, Any]
Sides = dict[str, int]


@dataclass(frozen=True, eq=False)
class ScaledCrop(Crop):
    """A crop of a picture that was made smaller, and becomes as large as it was when it is put back.

    Attributes:
        size: Its own height and width in pixels.
    """

    size: tuple[int, int]


def as_picture(image: Tensor) -> Tensor:
    """An IMAGE with three channels: itself where it has them; what is transparent shows white, and that is said.

    Raises:
        UserError: It is no IMAGE.
    """
    if image.ndim == 4 and image.shape[-1] == 3:
        return image
    picture = as_rgb(image)
    if image.shape[-1] in (2, 4) and bool((image[..., -1] < 1).any()):
        say("the picture has transparent places: they are laid on white")
    return picture


def cut_out(image: Tensor, mask: Tensor, options: CropOptions) -> Crop:
    """What surrounds a mask, at the size that a model paints best; see ``crop_for_inpaint``.

    Raises:
        UserError: The picture or the mask is none, the mask is empty, or their numbers do not fit.
    """
    crop = crop_for_inpaint(as_picture(image), mask, options, say)
    tell_of_area(crop.picture)
    return crop


def lay_out(
    image: Tensor, sides: Sides, aspect: tuple[int, int] | None, *, anchor: str, feather: int, fill: str
) -> Canvas:
    """A picture on its larger canvas, whose sides are multiples of 16; what that adds is cut off again in the end.

    Args:
        image: IMAGE.
        sides: Pixels to add, by "left", "right", "top" and "bottom"; ignored where there is an aspect.
        aspect: Width to height to grow to; None to grow by sides.
        anchor: Where the picture stands then.
        feather: Pixels of the seam to each side of it.
        fill: What the new area shows.

    Raises:
        UserError: No side grows, or the canvas or the feather is too large.
    """
    picture = as_picture(image)
    canvas = extend(picture, _plan(picture, sides, aspect, anchor), feather, fill)
    tell_of_area(canvas.picture)
    return canvas


def _plan(picture: Tensor, sides: Sides, aspect: tuple[int, int] | None, anchor: str) -> OutpaintPlan:
    height, width = picture.shape[1:3]
    if aspect is not None:
        return plan_to_aspect(height, width, *aspect, anchor)
    return plan_outpaint(height, width, **sides, exact=True)


def put_back(image: Tensor, crop: Any, colour_match: float) -> Tensor:
    """A painted crop in its original, or a painted canvas around it: bit for bit the original where it is kept.

    Args:
        image: IMAGE, as it was painted.
        crop: What ``cut_out`` or ``lay_out`` gave, or a reference's.
        colour_match: How far its colours are matched to the original's at the seam, 0..1.

    Raises:
        UserError: The picture is not of the crop's size or number.
        MismatchError: What came in is no crop.
    """
    painted = as_picture(image)
    if isinstance(crop, Crop):
        whole = stitch(crop, painted, say, colour_match=colour_match)
        return resize(whole, *crop.size) if isinstance(crop, ScaledCrop) else whole
    if not isinstance(crop, Canvas):
        raise MismatchError(
            f"the crop is a {type(crop).__name__}; connect the crop output of FLUX Inpaint Crop, FLUX Outpaint or FLUX "
            "Reference"
        )
    check_painted(painted, crop.picture, "canvas")
    if colour_match != 0:
        shown, painted = match_batch(crop.picture, painted.float())
        painted = match_colour(painted, shown.float(), crop.blend, colour_match, warn=say)
    return finish(crop, painted)


def tinted(image: Tensor, mask: Tensor) -> Tensor:
    """A picture (B, H, W, 3) with what its mask (B, H, W) holds in red, for a look at it."""
    share = TINTED * mask[..., None].to(image)
    return image.lerp(image.new_tensor(TINT).expand_as(image), share.expand_as(image))


def tell_of_area(picture: Tensor) -> None:
    """Warn of a picture (B, H, W, 3) that is larger than what FLUX.1 was trained on."""
    height, width = picture.shape[1:3]
    if height * width > LARGE * MEGAPIXEL:
        say(
            f"{width}x{height} are {height * width / MEGAPIXEL:.1f} megapixels, and FLUX.1 was trained on up to "
            f"{LARGE:g}: expect repetitions, much time and memory, or make it smaller first"
        )


def encode(vae: Any, picture: Tensor) -> Tensor:
    """Latents (B, 16, H / 8, W / 8) of a picture in the VAE's own space.

    Raises:
        MismatchError: The VAE is another family's.
        NumericError: The latents are not finite.
    """
    latents: Tensor = vae.encode(picture)
    if latents.ndim != 4 or latents.shape[1] != CHANNELS:
        raise MismatchError(
            f"the VAE makes latents of shape {list(latents.shape)}, but FLUX.1's have {CHANNELS} channels; load its "
            "autoencoder with Load FLUX Autoencoder"
        )
    if not bool(torch.isfinite(latents).all()):
        raise NumericError(
            "the encoded picture has numbers that are not finite; the picture or the VAE's file is damaged, or the VAE "
            "overflows its number format: start ComfyUI with --fp32-vae"
        )
    return latents


def with_both(
    positive: Conditioning, negative: Conditioning | None, change: Change, **acting: Any
) -> tuple[Conditioning, Conditioning]:
    """Two CONDITIONINGs with a part; without a negative one the positive stands for it, so that cfg has no effect.

    Args:
        positive: Any node's.
        negative: Likewise, or None.
        change: See ``with_part``.
        acting: When, where and how much; likewise.
    """
    changed = with_part(positive, change, **acting)
    return changed, changed if negative is None else with_part(negative, change, **acting)


def add_hole(
    positive: Conditioning,
    negative: Conditioning | None,
    vae: Any,
    image: Tensor,
    mask: Tensor,
    *,
    strength: float,
    start: float,
    end: float,
    rounding: str,
    noise_mask: bool,
    region: Tensor | None = None,
) -> tuple[Conditioning, Conditioning, dict[str, Any], Tensor]:
    """Tell a Fill model which part of a picture to paint, under the host's keys.

    Where it does not act the model is told of a picture that is hidden as a whole, as in its training. With nothing
    under those keys it would see latents of zeros, which are no picture's.

    Args:
        positive: Any node's. A control picture that it carries moves to the control LoRA's place.
        negative: Likewise; None where there is none.
        vae: Any VAE of FLUX.1.
        image: IMAGE; sides that are no multiples of 8 are cut evenly, as the host does, and that is said.
        mask: MASK of any size.
        strength: 0..2; how much of the prediction sees the picture, the rest sees it hidden as a whole.
        start: From when, as a fraction of the run.
        end: Until when.
        rounding: How soft masks are taken, one of ``adapters.channels.ROUNDINGS``.
        noise_mask: Whether the sampler keeps the rest of the latent.
        region: MASK (1, H, W) of where in the new picture the picture with the hole is seen; None for everywhere.

    Returns:
        Both CONDITIONINGs, a LATENT of the picture, and the picture as the model sees it, as an IMAGE.

    Raises:
        UserError: The picture, the mask, the strength, the times or the region are none, or the mask is empty.
        MismatchError: The VAE is another family's.
    """
    check_strength(strength)
    check_region(region, "the picture would be seen nowhere")
    choose(rounding, ROUNDINGS, "rounding of masks")
    picture, hole = _with_hole(as_picture(image), mask)
    hidden, shown = hidden_and_shown(hole, rounding)
    if not bool(hidden.any()):
        say("nothing of the mask is above one half, so that rounding hides nothing: choose soft, or paint it whiter")
    seen = picture * (1 - hidden[..., None]) + GREY * hidden[..., None]
    added = {IMAGE: encode(vae, seen), MASK: shown[:, None]}
    hidden_whole = _hidden_whole(vae, seen) if (strength, start, end) != ALWAYS or region is not None else {}
    replaced, given = False, receiver([*positive, *(negative or ())], lambda patcher: takes_hole(patcher.model.spec))

    def change(text: Tensor, extra: Extra) -> tuple[Tensor, Extra]:
        nonlocal replaced
        if given(extra) is False:
            return text, extra
        replaced |= shows_part(extra)
        return text, {**encoded_by(vae, extra if given(extra) else if_taken(extra, HOLE)), **added}

    def without(text: Tensor, extra: Extra) -> tuple[Tensor, Extra]:
        if given(extra) is False or extra.get(MASK) is not None:
            return (text, extra) if given(extra) is False else marked(text, extra)
        return marked(text, {**encoded_by(vae, extra if given(extra) else if_taken(extra, HOLE)), **hidden_whole})

    positive, negative = (None if entries is None else with_room(entries) for entries in (positive, negative))
    both = with_both(positive, negative, change, start=start, end=end, share=strength, region=region, without=without)
    if replaced:
        say(
            "the prompt carries a picture with a hole already, which this one replaces: take one FLUX Fill out, give "
            "each its own time, or paint both places by one mask"
        )
    latent = {"samples": encode(vae, picture), **({"noise_mask": shown[:, None]} if noise_mask else {})}
    return *both, latent, seen


def _hidden_whole(vae: Any, picture: Tensor) -> Extra:
    """What a Fill model is told where nothing of a picture (B, H, W, 3) is to be seen."""
    grey = torch.full_like(picture[:1], GREY)
    return {IMAGE: encode(vae, grey), MASK: torch.ones_like(grey[..., 0])[:, None]}


def _with_hole(picture: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A picture (B, H, W, 3) and its mask (B, H, W), both on the grid of latent cells."""
    hole = as_mask(mask.to(picture.device))
    height, width = picture.shape[1:3]
    canvas = hole.shape[1:] == (height, width) and _is_canvas(*match_batch(picture, hole))
    check_mask(hole, None if canvas else say)
    hole = fit_mask(hole, height, width, say)
    high, wide = height // CELL * CELL, width // CELL * CELL
    if 0 in (high, wide):
        raise UserError(f"the picture is {width}x{height}; give one of at least {CELL}x{CELL} pixels")
    if (high, wide) != (height, width):
        say(
            f"the picture's sides ({width}x{height}) do not divide by {CELL}: the {wide}x{high} in its middle are "
            "taken; to keep its size put FLUX Inpaint Crop before it and FLUX Stitch behind it"
        )
    top, left = (height - high) // 2, (width - wide) // 2
    inside = slice(None), slice(top, top + high), slice(left, left + wide)
    return match_batch(picture[inside], hole[inside])


def _is_canvas(pictures: Tensor, holes: Tensor) -> bool:
    """Whether pictures (B, H, W, 3) show grey, or their edge repeated, in masks (B, H, W) all around a rectangle.

    So are canvases to be outpainted, whose masks keep only the middle on purpose.
    """
    return all(_is_one_canvas(picture, hole) for picture, hole in zip(pictures, holes, strict=True))


def _is_one_canvas(picture: Tensor, hole: Tensor) -> bool:
    kept = hole < SET
    rows, columns = kept.any(1), kept.any(0)
    if not kept.any() or not torch.equal(kept, rows[:, None] & columns):
        return False
    down, across = (_nearest(inside) for inside in (rows, columns))
    filled = (picture - GREY).abs().amax(-1) <= LEVEL
    filled |= (picture - picture[down][:, across]).abs().amax(-1) <= LEVEL
    return bool(filled[~kept].float().mean() >= FILLED_SHARE)


def _nearest(inside: Tensor) -> Tensor:
    """For every place of a line the nearest of a stretch of it."""
    [places] = inside.nonzero(as_tuple=True)
    return torch.arange(len(inside), device=inside.device).clamp(int(places[0]), int(places[-1]))
