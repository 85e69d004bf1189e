"""Positions of tokens, and the rotation that encodes them (RoPE, Su et al. 2021).

Shapes: B batch, L tokens, A axes, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "apply_rope", "image_ids", "reference_ids", "rope", "rope_in_place", "text_ids"]

LAYOUTS = ("offset", "index", "uxo")  # of several references; ComfyUI's names
PATCH = 2  # latent cells along each side of a token

WITHOUT_FP64 = ("mps",)  # devices that cannot hold the angles' precision; the CPU computes them for these


def image_ids(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Ids (height * width, 3) of image tokens, row-major: (0, row, column). Sizes are in tokens."""
    ids = torch.zeros(height, width, 3, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)[None, :]
    return ids.view(-1, 3)


def reference_ids(
    sizes: Sequence[tuple[int, int]],
    image: tuple[int, int],
    layout: str = "offset",
    device: torch.device | None = None,
) -> Tensor:
    """Ids (L, 3) of the tokens of references, one picture after the other.

    A single one has the first axis 1 and its rows and columns from 0, as in Black Forest Labs' Kontext. Of several the
    layouts are ComfyUI's (``comfy/ldm/flux/model.py``): "offset" lays them side by side so that the whole stays as
    square as it can, "index" counts the first axis up, "uxo" goes on diagonally from the picture's far corner.

    Args:
        sizes: Height and width of each in latent cells.
        image: The same of the picture that is made.
        layout: One of ``LAYOUTS``.
        device: Where the ids go.
    """
    parts = []
    height, width = (PATCH * -(-side // PATCH) for side in image) if layout == "uxo" else (0, 0)
    for index, (h, w) in enumerate(sizes):
        place, top, left = 1, 0, 0
        if layout == "index":
            place = index + 1
        elif layout == "uxo":
            place, top, left = 0, height, width
            height, width = height + h, width + w
        else:
            top, left = (0, width) if h + height > w + width else (height, 0)
            height, width = max(height, h + top), max(width, w + left)
        ids = image_ids(-(-h // PATCH), -(-w // PATCH), device)
        parts.append(ids + ids.new_tensor([place, -(-top // PATCH), -(-left // PATCH)]))
    return torch.cat(parts)


def text_ids(length: int, device: torch.device | None = None) -> Tensor:
    """Ids (length, 3) of FLUX.1's text tokens: all zero, so that the rotation leaves them as they are."""
    return torch.zeros(length, 3, device=device)


def rope(ids: Tensor, axes: tuple[int, ...], theta: float) -> Tensor:
    """Unit complex numbers (L, D/2) that rotate each pair of a head's dimensions.

    Args:
        ids: Positions (L, A).
        axes: Dimensions given to each axis, even, D in all.
        theta: Base of the frequencies ``theta ** (-2i / d)``.
    """
    places = ids.cpu() if ids.device.type in WITHOUT_FP64 else ids
    angles = []
    for axis, dim in enumerate(axes):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=places.device) / dim
        omega = theta**-exponents
        angles.append((places[:, axis, None].double() * omega).float())
    joined = torch.cat(angles, dim=-1).to(ids.device)
    return torch.polar(torch.ones_like(joined), joined)


def apply_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x (B, heads, L, D), in fp32, and return x's dtype.

    Args:
        x: To be rotated.
        rotation: From ``rope``, or its cosines and sines (L, D/2, 2) apart.
    """
    if torch.compiler.is_compiling() or not rotation.is_complex():  # the compiler cannot fuse complex numbers
        cos, sin = (torch.view_as_real(rotation) if rotation.is_complex() else rotation).unbind(-1)
        even, odd = as_pairs(x).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(as_pairs(x))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def rope_in_place(x: Tensor, rotation: Tensor) -> Tensor:
    """As ``apply_rope`` for a complex rotation, but x is used up."""
    pairs = torch.view_as_complex(as_pairs(x)).mul_(rotation)
    return torch.view_as_real(pairs).flatten(-2).to(x.dtype)


def as_pairs(x: Tensor) -> Tensor:
    """(..., D) to fp32 (..., D/2, 2)."""
    return x.float().view(*x.shape[:-1], -1, 2)
