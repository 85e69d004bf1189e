"""Colours of a painted picture, matched to the original's where both show the same.

Around a mask the model has painted again what was there. How that differs from the original, in mean and in spread, is
a fault of the whole painted picture, and can be taken out of it.

Pictures: (B, H, W, 3), fp32 in 0..1; masks (B, H, W).
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from ..preprocess.control import Warn
from .masks import grow, match_batch

__all__ = ["RING", "match_colour", "ring_around"]

RING = 16  # pixels
LEAST = 16  # pixels of a ring, below which its mean and spread say little
FLAT = 0.1  # Lab; added to spreads, so that two flat areas' rounding is no ratio
MAX_GAIN = 2.0  # beyond which the two do not show the same

Picture = NDArray[np.float32]  # (H, W, 3)


def match_colour(
    painted: Tensor, original: Tensor, mask: Tensor, strength: float = 1.0, ring: int = RING, warn: Warn | None = None
) -> Tensor:
    """Give a painted picture the original's mean and standard deviation in the ring around the mask, in CIE Lab.

    As Reinhard et al. (2001, "Color transfer between images"), with statistics of the ring alone. In Lab, for a shift
    that is small in light parts is small in dark ones, too.

    Args:
        painted: (B, H, W, 3).
        original: (B, H, W, 3).
        mask: (B, H, W), or one for all: more than 0 where the two show different things.
        strength: 0 changes nothing, 1 all of the difference.
        ring: How wide the ring is, in pixels.
        warn: Told where there is no ring, so that nothing was changed.

    Returns:
        (B, H, W, 3); bit for bit ``painted`` where the strength is 0 or there is no ring.

    Raises:
        UserError: The strength is not in 0..1.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"the colour match has a strength of {strength:g}; give a number from 0 to 1")
    if strength == 0:
        return painted
    _, rings = match_batch(painted, ring_around(mask, ring))
    if warn is not None and (rings.flatten(1).sum(1) < LEAST).any():
        warn("there is nothing kept around the mask, so the colours are not matched; give the crop more context")
    matched = [_matched(*each, strength) for each in zip(painted, original, rings, strict=True)]
    return torch.stack(matched)


def ring_around(mask: Tensor, width: int) -> Tensor:
    """Where a mask (B, H, W) is 0 and no farther than ``width`` pixels from where it is not: (B, H, W), true there."""
    inside = mask > 0
    return (grow(inside.float(), width) > 0) & ~inside


def _matched(painted: Tensor, original: Tensor, ring: Tensor, strength: float) -> Tensor:
    """One picture (H, W, 3). OpenCV's way to Lab and back is off by up to 0.004, so only the difference is taken."""
    if int(ring.sum()) < LEAST:
        return painted
    lab, target = _lab(painted), _lab(original)
    where = ring.cpu().numpy()
    ours, theirs = lab[where], target[where]
    gain = ((theirs.std(0) + FLAT) / (ours.std(0) + FLAT)).clip(1 / MAX_GAIN, MAX_GAIN)
    shifted = (lab - ours.mean(0)) * gain + theirs.mean(0)
    change = torch.from_numpy(_rgb(shifted) - _rgb(lab)).to(painted.device)
    return (painted + strength * change).clamp(0, 1)


def _lab(picture: Tensor) -> Picture:
    values = np.ascontiguousarray(picture.float().clamp(0, 1).cpu().numpy())
    return np.asarray(cv2.cvtColor(values, cv2.COLOR_RGB2Lab), dtype=np.float32)


def _rgb(lab: Picture) -> Picture:
    return np.asarray(cv2.cvtColor(lab.astype(np.float32), cv2.COLOR_Lab2RGB), dtype=np.float32)
