"""What a model's further input channels are: Fill's picture and mask, a control picture, or nothing.

Shapes: B batch, C latent channels, h and w in latent cells.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

__all__ = [
    "CELL", "FILL", "GREY", "MASK_CHANNELS", "ROUNDINGS", "fill_channels", "folded_mask", "hidden_and_shown",
    "neutral_channels",
]  # fmt: skip

CELL = 8  # pixels of a latent cell along each side
MASK_CHANNELS = CELL * CELL
FILL = "fill"
GREY = HALF = 0.5  # what a model sees in a hole, and what masks are rounded at
ROUNDINGS = ("soft", "hidden", "binary")


def hidden_and_shown(mask: Tensor, rounding: str) -> tuple[Tensor, Tensor]:
    """What of a soft mask hides pixels, and what of it the model is told.

    Args:
        mask: Of any shape, in 0..1.
        rounding: "soft": the mask itself for both (Black Forest Labs). "hidden": pixels are hidden by the rounded mask,
            a half to 0, and the model is told the soft one (ComfyUI). "binary": the rounded one for both, a half to 1
            (diffusers).
    """
    if rounding == "soft":
        return mask, mask
    if rounding == "hidden":
        return mask.round(), mask
    rounded = (mask >= HALF).to(mask)
    return rounded, rounded


def folded_mask(mask: Tensor) -> Tensor:
    """A mask (B, 1, 8h, 8w) as channels (B, 64, h, w): pixel (row, column) of a cell is channel 8 row + column."""
    return rearrange(mask, "b 1 (h p) (w q) -> b (p q) h w", p=CELL, q=CELL)


def fill_channels(latents: Tensor, mask: Tensor) -> Tensor:
    """Fill's further channels (B, C + 64, h, w) (Black Forest Labs' ``prepare_fill``).

    Args:
        latents: Of the picture with grey where it is painted anew (B, C, h, w), in the transformer's space.
        mask: (B or 1, 1, 8h, 8w), 1 where the picture is painted anew.
    """
    folded = folded_mask(mask.to(latents)).expand(len(latents), -1, -1, -1)
    return torch.cat((latents, folded), dim=1)


def neutral_channels(x: Tensor, count: int) -> Tensor:
    """Channels (1, count, h, w) that tell a model nothing, beside latents x (B, C, h, w).

    A control model gets zeros; Fill gets an empty picture, all of which is painted.
    """
    channels = x.new_zeros(1, count, *x.shape[-2:])
    channels[:, x.shape[1] :] = 1.0
    return channels
