"""Control pictures at the size of the output, whatever size, aspect and channels they come in.

Pictures: (B, H, W, C), fp32 in 0..1; C is 3 where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError

__all__ = [
    "ASPECT_TOLERANCE",
    "FITS",
    "Warn",
    "as_bytes",
    "as_rgb",
    "check_finite",
    "choose",
    "differs_in_aspect",
    "fit_control",
    "has_colours",
    "is_black_and_white",
    "lacks_edges",
    "resize",
]

Warn = Callable[[str], None]

FITS = ("stretch", "crop", "pad")
ASPECT_TOLERANCE = 0.03  # what rounding a side of 512 to a multiple of 16 can change
COLOURED = 0.02  # mean difference between a picture's channels, from which on it is no depth picture
BLACK_OR_WHITE = 0.98  # share of a picture's pixels, from which on it may be edges already
WITH_ALPHA = (2, 4)
CHANNELS = (1, 2, 3, 4)
BYTE_MAX = 255


def fit_control(
    picture: Tensor, height: int, width: int, how: str = "stretch", warn: Warn | None = None, fill: float | None = None
) -> Tensor:
    """A control photo or map at the output's size, resized with Lanczos as BFL does.

    Args:
        picture: (B, h, w, 1 to 4). Transparent places count as black, which in a map is no edge and far away.
        height: Of the output, in pixels.
        width: Likewise.
        how: "stretch" takes the whole picture, "crop" its middle, "pad" all of it with bands beside it.
        warn: Told what is done where the picture's aspect differs from the output's by more than ``ASPECT_TOLERANCE``.
        fill: What the bands are, 0..1; None repeats the picture's edge, which gives no edges of its own.

    Returns:
        (B, height, width, 3); bit for bit the picture where it has this size.

    Raises:
        UserError: The picture or the size is not one, or there is no such way.
    """
    choose(how, FITS, "way to fit a control picture")
    _check_size(height, width)
    picture = as_rgb(picture, background=0.0)
    if warn is not None and differs_in_aspect(picture, height, width):
        warn(_told(picture, height, width, how))
    if how == "crop":
        return resize(picture, height, width, box=_middle(picture, height, width))
    if how == "pad":
        return _letterbox(picture, height, width, fill)
    return resize(picture, height, width)


def as_rgb(picture: Tensor, background: float = 1.0) -> Tensor:
    """A picture with three channels: grey is repeated, and what is transparent shows ``background``, 0..1.

    Raises:
        UserError: It is no batch of pictures, or not of 1 to 4 channels.
    """
    if picture.ndim != 4 or picture.shape[-1] not in CHANNELS or not picture.numel():
        raise UserError(
            f"a tensor of shape {list(picture.shape)} is no picture; give (pictures, height, width, 3), none of them 0"
        )
    if not picture.is_floating_point():
        raise UserError(f"the picture has numbers of type {picture.dtype}; give floating-point numbers in 0..1")
    picture = picture.float()
    if picture.shape[-1] in WITH_ALPHA:
        alpha = picture[..., -1:]
        picture = picture[..., :-1] * alpha + background * (1 - alpha)
    return picture.expand(*picture.shape[:-1], 3).contiguous()


def as_bytes(picture: Tensor) -> NDArray[np.uint8]:
    """A picture's 8-bit levels, rounded. BFL cuts instead, which takes a level from some that were whole before."""
    levels: NDArray[np.uint8] = (picture.clamp(0, 1) * BYTE_MAX).round().byte().cpu().numpy()
    return levels


def resize(
    picture: Tensor,
    height: int,
    width: int,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
    box: tuple[float, float, float, float] | None = None,
) -> Tensor:
    """Resize by Pillow, which widens its filters when it shrinks, in fp32 and cut to 0..1.

    Args:
        picture: (B, h, w, C) of any C.
        height: Of the result, in pixels.
        width: Likewise.
        resample: Pillow's filter.
        box: Left, top, right and bottom of the part to take, in pixels with fractions; None for all.

    Returns:
        (B, height, width, C); bit for bit the picture where nothing is to do.
    """
    whole = (0.0, 0.0, float(picture.shape[2]), float(picture.shape[1]))
    if picture.shape[1:3] == (height, width) and box in (None, whole):
        return picture
    planes = picture.movedim(-1, 1).flatten(0, 1).float().cpu().numpy()
    resized = [np.asarray(Image.fromarray(plane).resize((width, height), resample, box)) for plane in planes]
    out = torch.from_numpy(np.stack(resized)).clamp_(0, 1).view(picture.shape[0], -1, height, width)
    return out.movedim(1, -1).contiguous().to(picture.device)


def differs_in_aspect(picture: Tensor, height: int, width: int) -> bool:
    """Whether a picture (B, h, w, ...) is of another aspect than this size, by more than ``ASPECT_TOLERANCE``."""
    ratio = (picture.shape[2] * height) / (picture.shape[1] * width)
    return max(ratio, 1 / ratio) > 1 + ASPECT_TOLERANCE


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity, which would be blamed on the weights later.

    Raises:
        UserError: There are some.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"numbers in the {name} are not finite (NaN or infinite); give finite ones")


def has_colours(picture: Tensor) -> bool:
    """Whether pictures (B, H, W, 3) are more colourful than depth is, whatever noise JPEG left on it."""
    return float((picture.amax(-1) - picture.amin(-1)).mean()) > COLOURED


def is_black_and_white(picture: Tensor) -> bool:
    """Whether pictures (B, H, W, 3) have black and white, and nothing else but for a few pixels, as edges do."""
    black, white = (picture == 0).all(-1), (picture == 1).all(-1)
    return bool(black.any() and white.any()) and float((black | white).float().mean()) >= BLACK_OR_WHITE


def lacks_edges(edges: Tensor) -> bool:
    """Whether one of several pictures of edges (B, H, W, C) is black all over."""
    return not bool(edges.flatten(1).any(dim=1).all())


def choose(how: str, ways: tuple[str, ...], what: str) -> None:
    """Refuse a way that is not there.

    Raises:
        UserError: It is none of ``ways``; ``what`` says of what they are.
    """
    if how not in ways:
        raise UserError(f"there is no {what} named {how!r}; choose one of {', '.join(ways)}")


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise UserError(f"a picture of {width}x{height} pixels cannot be made; give sides of 1 and more")


def _told(picture: Tensor, height: int, width: int, how: str) -> str:
    """A sentence about what becomes of a picture of another aspect."""
    wider = picture.shape[2] * height > picture.shape[1] * width
    done = {
        "stretch": "it is stretched, which changes its shapes",
        "crop": f"what does not fit at its {'left and right' if wider else 'top and bottom'} is cut off",
        "pad": f"bands are added at its {'top and bottom' if wider else 'left and right'}",
    }
    return (
        f"the control picture ({picture.shape[2]}x{picture.shape[1]}) has another aspect than the output "
        f"({width}x{height}): {done[how]}"
    )


def _middle(picture: Tensor, height: int, width: int) -> tuple[float, float, float, float]:
    """The largest box of this aspect in the picture's middle: left, top, right, bottom."""
    h, w = picture.shape[1:3]
    scale = min(h / height, w / width)
    box_w, box_h = min(float(w), width * scale), min(float(h), height * scale)
    left, top = (w - box_w) / 2, (h - box_h) / 2
    return left, top, left + box_w, top + box_h


def _letterbox(picture: Tensor, height: int, width: int, fill: float | None) -> Tensor:
    """The whole picture in the middle, with bands beside it."""
    h, w = picture.shape[1:3]
    scale = min(height / h, width / w)
    inner_h, inner_w = min(height, max(1, round(h * scale))), min(width, max(1, round(w * scale)))
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    inner = resize(picture, inner_h, inner_w).movedim(-1, 1)
    bands = (left, width - inner_w - left, top, height - inner_h - top)
    padded = F.pad(inner, bands, mode="replicate") if fill is None else F.pad(inner, bands, value=fill)
    return padded.movedim(1, -1).contiguous()
