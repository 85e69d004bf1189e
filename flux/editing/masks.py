"""Masks that say what is repainted: checked, fitted to a picture, grown, softened.

A mask has two uses. The model is told what to repaint, and what it painted is blended with the original. A pixel whose
blend is 0 keeps the original's bits, so everything here keeps exact zeros, and says where it makes some others.

Masks: (B, H, W), fp32 in 0..1, 1 where the picture is repainted. Lengths are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from ..preprocess.control import Warn, differs_in_aspect

__all__ = [
    "MAX_BLUR",
    "MAX_GROW",
    "FittedMask",
    "MaskOptions",
    "as_mask",
    "blur",
    "check_mask",
    "feather_inward",
    "fill_holes",
    "fit_mask",
    "grow",
    "match_batch",
    "prepare_mask",
    "smoothstep",
    "tell_of_size",
]

MAX_GROW = 512
MAX_BLUR = 256.0

DISC = 16  # the largest disc that is applied at once; larger ones are sums of it, which costs r and not r * r
KERNEL_SIGMAS = 3  # where a Gaussian is cut: 0.3 % of it lies beyond
RAMP_SIGMAS = 1.5 * math.sqrt(2 * math.pi)  # smoothstep over so many is as steep in its middle as a Gaussian's edge
HOLE_LEVELS = 16  # to what fraction of its greatest value a soft mask's holes are filled exactly

FAINT = 0.05  # below it a value is hardly seen; JPEG makes such of black
FAINT_SHARE = 0.1  # of the pixels, from which on it is no soft edge
MASKED_SIDES = 2  # of a picture that are mask: a thing that was meant touches two others at most, as in a corner
SIDE_SHARE = 0.95  # of a side's pixels
INVERTED_SHARE = 0.5  # of the pixels
SET = 0.5  # from here on a value counts as mask where pixels are counted
EMPTY = (
    "the mask is empty, so there is nothing to repaint; paint white where the picture is to change (a picture without "
    "transparency gives an empty mask, too)"
)

Plane = NDArray[np.float32]  # (H, W)


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """What is done to a mask, in this order: invert, fill holes, grow, blur.

    Attributes:
        invert: Repaint what the mask keeps.
        fill_holes: Repaint also what the mask encloses.
        grow: Pixels by which it is widened in every direction; less than 0 shrinks it. A side at the picture's border
            stays there.
        blur: Standard deviation of the blend's soft edge, in pixels; 0 leaves the edge as it is.
        blur_inward: Whether the soft edge lies within the mask, so that what the mask keeps is kept exactly; else it
            lies on both sides, and reaches ``KERNEL_SIGMAS`` times ``blur`` into what the mask keeps.
    """

    invert: bool = False
    fill_holes: bool = False
    grow: int = 0
    blur: float = 0.0
    blur_inward: bool = True

    def __post_init__(self) -> None:
        if not -MAX_GROW <= self.grow <= MAX_GROW:
            raise UserError(f"the mask is to grow by {self.grow} pixels; give a number from {-MAX_GROW} to {MAX_GROW}")
        if not 0 <= self.blur <= MAX_BLUR:
            raise UserError(f"the mask's blur is {self.blur:g} pixels; give a number from 0 to {MAX_BLUR:g}")


@dataclass(frozen=True, eq=False)
class FittedMask:
    """A mask in its two uses, both (B, H, W).

    Attributes:
        repaint: What the model is told.
        blend: How much of the painted picture is taken; not 0 only where ``repaint`` is not.
    """

    repaint: Tensor
    blend: Tensor


def prepare_mask(mask: Tensor, height: int, width: int, options: MaskOptions, warn: Warn | None = None) -> FittedMask:
    """Check a user's mask and bring it to a picture's size.

    Args:
        mask: Of any size; see ``as_mask``.
        height: The picture's.
        width: Likewise.
        options: What is done to it.
        warn: Told what is done or looks wrong, a sentence a call.

    Raises:
        UserError: The mask is none, is empty, or shrinks to nothing.
    """
    mask = as_mask(mask)
    mask = 1 - mask if options.invert else mask
    check_mask(mask, warn)
    mask = fit_mask(mask, height, width, warn)
    mask = fill_holes(mask) if options.fill_holes else mask
    mask = grow(mask, options.grow)
    if not mask.any():
        raise UserError(
            f"nothing is left of the mask when it shrinks by {-options.grow} pixels; shrink it less, or paint a larger "
            "area"
        )
    if options.blur_inward:
        return FittedMask(mask, feather_inward(mask, options.blur))
    softened = blur(mask, options.blur)
    return FittedMask(torch.maximum(mask, softened), softened)


def as_mask(mask: Tensor) -> Tensor:
    """A mask as (B, H, W) in fp32, cut to 0..1.

    Args:
        mask: (H, W), (B, H, W) or (B, 1, H, W), of any type.

    Raises:
        UserError: It is no mask, or has numbers that are not finite.
    """
    planes = mask[None] if mask.ndim == 2 else mask[:, 0] if mask.ndim == 4 and mask.shape[1] == 1 else mask
    if planes.ndim != 3 or not planes.numel():
        raise UserError(f"a tensor of shape {list(mask.shape)} is no mask; give (masks, height, width), none of them 0")
    planes = planes.float()
    if not planes.isfinite().all():
        raise UserError("the mask has numbers that are not finite; give numbers in 0..1")
    return planes.clamp(0, 1)


def check_mask(mask: Tensor, warn: Warn | None = None) -> None:
    """Refuse a mask that repaints nothing, and tell what looks like a mistake.

    A mask looks inverted where it holds the picture's whole border and most of its pixels, but not the middle: people
    paint what is to change, and seldom all around. Keeping one object and repainting what is behind it looks the same,
    so this is a hint.

    Args:
        mask: (B, H, W) in 0..1.
        warn: Told of each finding, in a sentence.

    Raises:
        UserError: All masks are empty.
    """
    if not mask.any():
        raise UserError(EMPTY)
    if warn is None:
        return
    found = [_finding(plane) for plane in mask]
    for sentence in dict.fromkeys(filter(None, found)):
        indices = [index for index, one in enumerate(found) if one == sentence]
        warn(_which(indices, len(found)) + sentence)


def _which(indices: list[int], count: int) -> str:
    """To which masks of a batch a sentence belongs; nothing where there is one, or it is all of them."""
    return "" if len(indices) == count else f"mask {', '.join(str(index + 1) for index in indices)} of {count}: "


def _finding(mask: Tensor) -> str:
    """A sentence on what looks wrong with a mask (H, W), or nothing."""
    if not mask.any():
        return "the mask is empty, so this picture stays as it is"
    if mask.min() == 1:
        return "the mask covers the whole picture: all of it is repainted and nothing kept"
    faint = ((mask > 0) & (mask < FAINT)).float().mean().item()
    if faint >= FAINT_SHARE:
        return (
            f"{faint:.0%} of the mask are nearly black and not black, as in a JPEG, and change the picture a little; "
            "save the mask as PNG, or raise its contrast"
        )
    share = (mask >= SET).float().mean().item()
    if share >= INVERTED_SHARE and _is_around(mask):
        return (
            f"the mask covers {share:.0%} of the picture, nearly all around what it keeps; if that is what should be "
            "repainted, invert the mask"
        )
    return ""


def _is_around(mask: Tensor) -> bool:
    """Whether a mask (H, W) lies around what it keeps: a thing in the middle, at a side or in a corner.

    What reaches from one end of a side to the other is rather a picture that is to grow.
    """
    masked = [(side >= SET).float().mean().item() for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1])]
    return sum(share >= SIDE_SHARE for share in masked) >= MASKED_SIDES and min(masked) > 1 - SIDE_SHARE


def fit_mask(mask: Tensor, height: int, width: int, warn: Warn | None = None) -> Tensor:
    """A mask at a picture's size, resized bilinearly over all that becomes one pixel.

    Args:
        mask: (B, h, w) in 0..1.
        height: Of the picture.
        width: Likewise.
        warn: Told that the mask was resized, and whether its shapes are stretched.

    Returns:
        (B, height, width); the mask itself where it has this size.
    """
    if mask.shape[1:] == (height, width):
        return mask
    if warn is not None:
        tell_of_size(mask, height, width, warn)
    resized = F.interpolate(mask[:, None], (height, width), mode="bilinear", antialias=True)
    return resized[:, 0].clamp(0, 1)


def tell_of_size(mask: Tensor, height: int, width: int, warn: Warn) -> None:
    """Tell that a mask (B, h, w) is resized to a picture's size, where it has another one."""
    if mask.shape[1:] == (height, width):
        return
    stretched = " and stretched, for its aspect is another" if differs_in_aspect(mask, height, width) else ""
    warn(
        f"the mask ({mask.shape[2]}x{mask.shape[1]}) is of another size than the picture ({width}x{height}): "
        f"it is resized{stretched}"
    )


def match_batch(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (B, ...) and masks (B, ...), one repeated for all of the other, without copying.

    Raises:
        UserError: There are several of both, but not as many.
    """
    pictures, masks = image.shape[0], mask.shape[0]
    if pictures != masks and 1 not in (pictures, masks):
        raise UserError(
            f"there are {pictures} pictures and {masks} masks; give as many masks as pictures, or one for all"
        )
    count = max(pictures, masks)
    return image.expand(count, *image.shape[1:]), mask.expand(count, *mask.shape[1:])


def fill_holes(mask: Tensor) -> Tensor:
    """Set what a mask (B, H, W) encloses to the least value that a way out of it has to cross.

    Exact in hard masks, in soft ones down to the next of ``HOLE_LEVELS`` steps up to their greatest value. What lies
    between the mask and the picture's border is not enclosed, and a line that touches at corners is closed.
    """
    return _each(mask, _filled)


def _filled(mask: Plane) -> Plane:
    """Greyscale filling, a level at a time: below it, what cannot be reached from outside is raised to it."""
    filled: Plane = mask.copy()
    top = float(mask.max())
    for level in (top * step / HOLE_LEVELS for step in range(1, HOLE_LEVELS + 1)):
        below = np.pad(mask < np.float32(level), 1, constant_values=True).astype(np.uint8)
        _, areas = cv2.connectedComponents(below, connectivity=4)
        enclosed = (below != 0) & (areas != areas[0, 0])
        np.maximum(filled, np.float32(level), out=filled, where=enclosed[1:-1, 1:-1])
    return filled


def grow(mask: Tensor, pixels: int) -> Tensor:
    """Widen a mask (B, H, W) by a disc of this radius, or shrink it where that is below 0; soft edges stay soft.

    Discs larger than ``DISC`` are made of several, which never reach farther, but up to a pixel each less far.
    """
    morph = cv2.dilate if pixels > 0 else cv2.erode

    def run(plane: Plane) -> Plane:
        for radius in _radii(min(abs(pixels), sum(plane.shape))):
            plane = np.asarray(morph(plane, _disc(radius)), dtype=np.float32)
        return plane

    return _each(mask, run) if pixels else mask


def _radii(radius: int) -> list[int]:
    """Radii up to ``DISC`` that add up to this one."""
    return [DISC] * (radius // DISC) + ([radius % DISC] if radius % DISC else [])


def _disc(radius: int) -> NDArray[np.uint8]:
    """All within this distance of the middle. OpenCV's own ellipses are less round and not the same in all versions."""
    steps = np.arange(-radius, radius + 1)
    disc: NDArray[np.uint8] = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(np.uint8)
    return disc


def blur(mask: Tensor, sigma: float) -> Tensor:
    """A mask (B, H, W) under a Gaussian of this standard deviation in pixels, which stays 0 beyond ``KERNEL_SIGMAS``.

    The picture's border is repeated outwards, so that a mask that touches it is not softened there.
    """
    reach = math.ceil(KERNEL_SIGMAS * sigma)
    size = (2 * reach + 1, 2 * reach + 1)

    def run(plane: Plane) -> Plane:
        soft = cv2.GaussianBlur(plane, size, sigma, borderType=cv2.BORDER_REPLICATE)
        return np.asarray(soft, dtype=np.float32).clip(0, 1)

    return _each(mask, run) if sigma > 0 else mask


def feather_inward(mask: Tensor, sigma: float) -> Tensor:
    """Soften a mask's edge within it: what is 0 stays 0, and the soft edge is as steep as a Gaussian's.

    The edge rises as smoothstep over ``RAMP_SIGMAS * sigma`` pixels, in areas that are thinner over as much as they
    have, so that each comes to its full value somewhere and a thin line is not lost.

    Args:
        mask: (B, H, W).
        sigma: The Gaussian's standard deviation, in pixels.

    Returns:
        (B, H, W), nowhere above the mask.
    """
    ramp = RAMP_SIGMAS * sigma
    return mask * smoothstep(_each(mask, lambda plane: _depth(plane, ramp))) if sigma > 0 else mask


def _depth(mask: Plane, ramp: float) -> Plane:
    """How far inside each pixel lies, as a fraction of ``ramp`` or of its area's greatest depth, whichever is less.

    A pixel's middle is half a pixel inside of its edge, from which depth counts.
    """
    inside = (mask > 0).astype(np.uint8)
    if inside.all():
        return np.ones_like(mask)
    depth = np.asarray(cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)) - 0.5
    count, areas = cv2.connectedComponents(inside, connectivity=8)
    area = np.asarray(areas, dtype=np.int32)
    deepest = np.zeros(count, dtype=np.float32)
    np.maximum.at(deepest, area, depth.clip(0, ramp).astype(np.float32))
    return np.asarray(np.divide(depth, deepest[area], out=np.zeros_like(mask), where=inside != 0).clip(0, 1))


def smoothstep(t: Tensor) -> Tensor:
    """From 0 to 1 over 0..1, level at both ends: 3 t^2 - 2 t^3; exactly 0 below and 1 above."""
    t = t.clamp(0, 1)
    return (t * t * (3 - 2 * t)).clamp(max=1)  # rounding can lift it above


def _each(mask: Tensor, change: Callable[[Plane], Plane]) -> Tensor:
    """Apply a change to every mask of a batch (B, H, W), on the CPU."""
    planes = mask.float().cpu().numpy()
    return torch.from_numpy(np.stack([change(np.ascontiguousarray(plane)) for plane in planes])).to(mask.device)
