"""FLUX.1's packing: 2x2 patches of a latent become tokens, row-major, and back.

Shapes: B batch, C latent channels, h and w latent height and width. A token's 4C channels are ordered channel, patch
row, patch column (c * 4 + ph * 2 + pw), as Black Forest Labs, diffusers and ComfyUI have it.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

__all__ = ["PATCH", "crop", "pack", "pad_to_patch", "token_grid", "unpack"]

PATCH = 2


def token_grid(h: int, w: int) -> tuple[int, int]:
    """Rows and columns of tokens for a latent of h x w; an odd edge takes a token of its own."""
    return -(-h // PATCH), -(-w // PATCH)


def pack(latent: Tensor) -> Tensor:
    """Latent (B, C, h, w), h and w even, to tokens (B, (h/2)(w/2), 4C). Odd latents go through ``pad_to_patch``."""
    return rearrange(latent, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens (B, rows * columns, 4C) to a latent (B, C, h, w).

    Args:
        tokens: As ``pack`` gives them.
        h: Latent height; of an odd one, the padding is cut off.
        w: Latent width, the same.
    """
    rows, columns = token_grid(h, w)
    pattern = "b (h w) (c ph pw) -> b c (h ph) (w pw)"
    return crop(rearrange(tokens, pattern, h=rows, w=columns, ph=PATCH, pw=PATCH), (h, w))


def pad_to_patch(latent: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Pad odd sizes by one row below or one column on the right, taken from the opposite edge, as ComfyUI does.

    Args:
        latent: (B, C, h, w).

    Returns:
        The padded latent, the same tensor where nothing is to pad, and (h, w) for ``crop`` or ``unpack``.
    """
    h, w = latent.shape[-2:]
    if h % PATCH == 0 and w % PATCH == 0:
        return latent, (h, w)
    return F.pad(latent, (0, -w % PATCH, 0, -h % PATCH), mode="circular"), (h, w)


def crop(latent: Tensor, size: tuple[int, int]) -> Tensor:
    """The top left (h, w) of a latent (B, C, ..., ...): a view that takes ``pad_to_patch``'s padding off."""
    return latent[..., : size[0], : size[1]]
