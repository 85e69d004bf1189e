"""Inpainting that keeps what is kept: cut out a mask's surroundings, let them be painted, and stitch them back.

The model paints a crop at a size that suits it. Of what it painted only the masked part goes back, into a copy of the
original, so that every pixel whose blend is 0 keeps its bits: it is chosen, not computed.

Pictures: (B, H, W, 3), fp32 in 0..1; masks (B, H, W); H, W the original's size, h, w the crop's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import NumericError, UserError
from ..preprocess.control import Warn, check_finite, resize
from .colour import match_colour
from .masks import MaskOptions, match_batch, prepare_mask

__all__ = ["Box", "Crop", "CropOptions", "check_painted", "check_picture", "composite", "crop_for_inpaint", "stitch"]

MAX_CONTEXT = 100.0
MAX_SIDE = 8192  # pixels of a square crop
MAX_ASPECT = 4.0  # of a crop; models were not trained on longer ones
SAME_SCALE = 1.1  # a crop that is larger or smaller by less than this factor is not resized, which spares it two blurs


@dataclass(frozen=True, kw_only=True)
class CropOptions:
    """How a crop is chosen.

    Attributes:
        context: By which factor the box around the mask grows; 1 is tight.
        min_context: Pixels that it grows by at least, on each side.
        side: The crop is resized so that its area is about the square of it: 1024 for FLUX, 128 for the embedded
            models; 0 keeps the picture's scale.
        multiple: What the crop's sides divide by, in pixels.
        mask: What is done to the mask.
    """

    context: float = 1.5
    min_context: int = 32
    side: int = 1024
    multiple: int = 16
    mask: MaskOptions = field(default_factory=MaskOptions)

    def __post_init__(self) -> None:
        if not 1 <= self.context <= MAX_CONTEXT:
            raise UserError(f"the context factor is {self.context:g}; give a number from 1 to {MAX_CONTEXT:g}")
        if self.min_context < 0:
            raise UserError(f"the least context is {self.min_context} pixels; give 0 or more")
        if self.multiple < 1:
            raise UserError(f"the crop's sides are to divide by {self.multiple}; give 1 or more, as 16 for FLUX")
        if self.side and not self.multiple <= self.side <= MAX_SIDE:
            raise UserError(
                f"the crop's side is {self.side} pixels; give {self.multiple} to {MAX_SIDE}, or 0 to keep the "
                "picture's scale"
            )


@dataclass(frozen=True)
class Box:
    """A part of a picture, in its pixels; it may stick out of the picture."""

    top: int
    left: int
    height: int
    width: int

    def within(self, height: int, width: int) -> Box:
        """What of it lies in a picture of this size."""
        top, left = max(self.top, 0), max(self.left, 0)
        bottom, right = min(self.top + self.height, height), min(self.left + self.width, width)
        return Box(top, left, bottom - top, right - left)

    def shifted(self, down: int, right: int) -> Box:
        """The box so many pixels farther."""
        return Box(self.top + down, self.left + right, self.height, self.width)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """What takes it out of (B, H, W, ...), where it lies within."""
        return slice(None), slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclass(frozen=True, eq=False)
class Crop:
    """A part of a picture to be painted, with all that it takes to put it back.

    Attributes:
        picture: (B, h, w, 3), at the model's size.
        mask: What the model is to repaint of it (B, h, w).
        original: The whole picture (B, H, W, 3), as it came in.
        blend: How much of the painted picture replaces it (B, H, W).
        box: Where the crop stands in the original.
    """

    picture: Tensor
    mask: Tensor
    original: Tensor
    blend: Tensor
    box: Box


def crop_for_inpaint(image: Tensor, mask: Tensor, options: CropOptions | None = None, warn: Warn | None = None) -> Crop:
    """Cut out what surrounds a mask, at the size that a model paints best.

    The box is around the masks of all pictures together, so that a batch stays a batch. Near the picture's border it is
    shifted inwards; where the picture is smaller than the box, the crop repeats the picture's edge, and ``stitch``
    leaves that away again.

    Args:
        image: (B, H, W, 3).
        mask: 1 where the picture is repainted; one for all pictures or one for each, of any size.
        options: How the crop is chosen.
        warn: Told what is done or looks wrong, a sentence a call.

    Raises:
        UserError: The picture or the mask is none, the mask is empty, or their numbers do not fit.
    """
    options = CropOptions() if options is None else options
    check_picture(image)
    height, width = image.shape[1:3]
    fitted = prepare_mask(mask.to(image.device), height, width, options.mask, warn)
    box, size = _choose_box(_bounds(fitted.repaint), (height, width), options)
    picture = resize(_window(image, box).float(), *size)
    repaint = _resize_mask(_window(fitted.repaint, box), size)
    original, blend = match_batch(image, fitted.blend)
    picture, repaint = match_batch(picture, repaint)
    return Crop(picture, repaint, original, blend, box)


def stitch(crop: Crop, painted: Tensor, warn: Warn | None = None, *, colour_match: float = 0.0) -> Tensor:
    """Put a painted crop back. Where the crop's blend is 0, the original's bits leave as they came in.

    Args:
        crop: What ``crop_for_inpaint`` gave.
        painted: (B, h, w, 3), as large as the crop's picture; several for one original give several pictures.
        warn: Told where colours cannot be matched.
        colour_match: How far the painted colours are matched to the original's around the mask, 0..1; 0 is not at all.

    Returns:
        (B, H, W, 3) in the original's type.

    Raises:
        UserError: The painted picture does not fit the crop, or the strength is not in 0..1.
        NumericError: It has numbers that are not finite.
    """
    check_painted(painted, crop.picture, "crop")
    original, painted = match_batch(crop.original, painted.to(crop.original.device))
    original, blend = match_batch(original, crop.blend)
    visible = crop.box.within(*original.shape[1:3])
    painted = resize(painted.float(), crop.box.height, crop.box.width)
    painted = painted[visible.shifted(-crop.box.top, -crop.box.left).slices]
    kept, weight = original[visible.slices], blend[visible.slices]
    painted = match_colour(painted, kept.float(), weight, colour_match, warn=warn)
    result = original.clone()
    result[visible.slices] = composite(kept, painted, weight)
    return result


def composite(original: Tensor, painted: Tensor, blend: Tensor) -> Tensor:
    """Blend two pictures (B, H, W, 3) by (B, H, W): at 0 the original's bits, at 1 the painted picture's."""
    weight = blend[..., None]
    mixed = torch.lerp(original.float(), painted.float(), weight.float()).to(original.dtype)
    return torch.where(weight == 0, original, mixed)


def check_picture(image: Tensor) -> None:
    """Refuse what is no batch of pictures.

    Raises:
        UserError: It is not of shape (B, H, W, 3), or not of finite floating-point numbers.
    """
    _check_form(image)
    check_finite("picture", image)


def _check_form(image: Tensor) -> None:
    if image.ndim != 4 or image.shape[-1] != 3 or not image.numel():
        raise UserError(
            f"a tensor of shape {list(image.shape)} is no picture; give (pictures, height, width, 3), none of them 0"
        )
    if not image.is_floating_point():
        raise UserError(f"the picture has numbers of type {image.dtype}; give floating-point numbers in 0..1")


def check_painted(painted: Tensor, asked: Tensor, what: str) -> None:
    """Refuse a painted picture that is not what was asked for.

    Args:
        painted: Of a model.
        asked: The picture (B, h, w, 3) that it was to paint in.
        what: That is, for messages.

    Raises:
        UserError: It is no picture, or of another size or number.
        NumericError: It has numbers that are not finite.
    """
    _check_form(painted)
    (count, *size, _), (asked_count, *asked_size, _) = painted.shape, asked.shape
    if size != asked_size:
        raise UserError(
            f"the painted picture is {size[1]}x{size[0]} and the {what} {asked_size[1]}x{asked_size[0]}; "
            f"give what was painted in this {what}, at its size"
        )
    if asked_count not in (1, count):
        raise UserError(
            f"the {what} has {asked_count} pictures, and the number of painted ones is {count}; give one for each, in "
            "their order"
        )
    if not painted.isfinite().all():
        raise NumericError("the painted picture has numbers that are not finite; try another precision or model file")


def _bounds(mask: Tensor) -> Box:
    """The smallest box around all that is not 0 in (B, H, W)."""
    hit = (mask > 0).any(0)
    (top, bottom), (left, right) = (
        (int(lines[0]), int(lines[-1]) + 1) for lines in (hit.any(1).nonzero(), hit.any(0).nonzero())
    )
    return Box(top, left, bottom - top, right - left)


def _choose_box(bounds: Box, picture: tuple[int, int], options: CropOptions) -> tuple[Box, tuple[int, int]]:
    """The box to cut out of a picture (H, W), and the size (h, w) that it is resized to.

    The box gets the aspect that the size has after rounding to the multiple, to within a pixel, so that resizing does
    not stretch.
    """
    height, width = (
        min(max(math.ceil(length * options.context), length + 2 * options.min_context), limit)
        for length, limit in zip((bounds.height, bounds.width), picture, strict=True)
    )
    height, width = max(height, math.ceil(width / MAX_ASPECT)), max(width, math.ceil(height / MAX_ASPECT))
    scale = options.side / math.sqrt(height * width) if options.side else 1.0
    if 1 / SAME_SCALE < scale < SAME_SCALE:
        size = _multiple_above(height, options.multiple), _multiple_above(width, options.multiple)
        height, width = size
    else:
        size = _multiple_near(height * scale, options.multiple), _multiple_near(width * scale, options.multiple)
        height, width = max(height, -(-width * size[0] // size[1])), max(width, -(-height * size[1] // size[0]))
    top = _place(bounds.top, bounds.height, height, picture[0])
    left = _place(bounds.left, bounds.width, width, picture[1])
    return Box(top, left, height, width), size


def _multiple_above(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _multiple_near(length: float, multiple: int) -> int:
    return max(1, round(length / multiple)) * multiple


def _place(start: int, length: int, box: int, limit: int) -> int:
    """Where a box starts: its middle on the mask's, but within the picture, or around it where it is larger."""
    if box >= limit:
        return -((box - limit) // 2)
    return min(max((2 * start + length - box) // 2, 0), limit - box)


def _window(values: Tensor, box: Box) -> Tensor:
    """A copy of a part of (B, H, W, ...); beyond the picture its edge is repeated."""
    rows = torch.arange(box.top, box.top + box.height, device=values.device).clamp(0, values.shape[1] - 1)
    columns = torch.arange(box.left, box.left + box.width, device=values.device).clamp(0, values.shape[2] - 1)
    return values[:, rows][:, :, columns]


def _resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (B, h', w') at another size, as softly as that makes it."""
    if mask.shape[1:] == size:
        return mask
    return F.interpolate(mask[:, None], size, mode="bilinear", antialias=True)[:, 0].clamp(0, 1)
