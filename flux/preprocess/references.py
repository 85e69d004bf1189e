"""Reference pictures at sizes that the transformer takes, by default without a pixel moved.

Pictures: (B, H, W, C), fp32 in 0..1; sizes in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from .control import Warn, as_rgb, choose, differs_in_aspect, resize

__all__ = [
    "BUDGET_PIXELS", "GRID", "KONTEXT_SIZES", "REFERENCE_FITS", "FittedReference", "PaddedSize", "fit_reference",
    "kontext_size", "reference_size_of_output",
]  # fmt: skip

GRID = 16  # pixels along a token's side
NATIVE_SIDE = 1024  # pixels along each side of what FLUX.1 Kontext was trained on
BUDGET_PIXELS = 1024 * 1024  # what Kontext was trained on
MAX_ASPECT = 32  # long side to short; of a narrower picture padding to the grid would be the larger part
REFERENCE_FITS = ("pad", "kontext", "crop")
KONTEXT_SIZES = (  # width, height: BFL's recommended ones
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024),
    (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672),
)  # fmt: skip


@dataclass(frozen=True)
class PaddedSize:
    """A picture's size, and the size on the grid that it is run at.

    Attributes:
        height: Of the picture itself, which lies at the top left.
        width: Likewise.
        padded_height: Multiples of the grid.
        padded_width: Likewise.
    """

    height: int
    width: int
    padded_height: int
    padded_width: int

    def cut(self, picture: Tensor) -> Tensor:
        """The picture (B, height, width, C) without what was added to it.

        Raises:
            ValueError: It is not of the padded size.
        """
        if picture.shape[1:3] != (self.padded_height, self.padded_width):
            raise ValueError(
                f"the picture is {picture.shape[2]}x{picture.shape[1]}, not {self.padded_width}x{self.padded_height}"
            )
        return picture[:, : self.height, : self.width]


@dataclass(frozen=True, eq=False)
class FittedReference:
    """A reference as it is encoded.

    Attributes:
        picture: (B, padded height, padded width, 3).
        size: What of it is the reference's content.
    """

    picture: Tensor
    size: PaddedSize


def kontext_size(width: int, height: int, native_side: int = NATIVE_SIDE) -> tuple[int, int]:
    """Width and height of the recommended size with the nearest aspect ratio; of two as near, the smaller pair.

    Args:
        width: Of the picture.
        height: Likewise.
        native_side: Of the pictures that the model was trained on; for others than FLUX.1 Kontext's the sizes are in
            proportion to it, on the grid.
    """
    aspect = width / height
    wide, high = min(KONTEXT_SIZES, key=lambda size: (abs(aspect - size[0] / size[1]), size))
    if native_side == NATIVE_SIDE:
        return wide, high
    return _in_proportion(wide, native_side), _in_proportion(high, native_side)


def _in_proportion(side: int, native_side: int) -> int:
    return max(GRID, round(side * native_side / NATIVE_SIDE / GRID) * GRID)


def reference_size_of_output(height: int, width: int, multiple: int = GRID) -> PaddedSize:
    """How an output gets a reference's size: run it at the padded size, and ``cut`` what comes out.

    Raises:
        UserError: The size or the grid is not one.
    """
    if min(height, width, multiple) < 1:
        raise UserError(f"{width}x{height} on a grid of {multiple} is no size; give numbers from 1 on")
    return PaddedSize(height, width, math.ceil(height / multiple) * multiple, math.ceil(width / multiple) * multiple)


def fit_reference(
    picture: Tensor,
    how: str = "pad",
    budget_pixels: int = BUDGET_PIXELS,
    multiple: int = GRID,
    warn: Warn | None = None,
    native_side: int = NATIVE_SIDE,
) -> FittedReference:
    """A reference at a size that can be encoded.

    Args:
        picture: (B, H, W, 1 to 4). Transparent places are shown on white.
        how: "pad" never crops and never stretches: the picture lies bit for bit at the top left, and its right and
            bottom edges are repeated up to the grid. "crop" cuts evenly to the grid. "kontext" resizes to the nearest
            of BFL's sizes, as BFL does, which changes the aspect.
        budget_pixels: A picture of more pixels is first scaled down to it, with its aspect kept; "kontext" has its own
            sizes. What "pad" adds is not counted.
        multiple: The grid.
        warn: Told when the picture is scaled or stretched.
        native_side: For "kontext"; see ``kontext_size``.

    Returns:
        The picture and what of it is content.

    Raises:
        UserError: There is no such way, or no size that fits.
    """
    choose(how, REFERENCE_FITS, "way to fit a reference")
    picture = as_rgb(picture)
    warn = warn or (lambda _: None)
    if how == "kontext":
        return _at_kontext_size(picture, native_side, multiple, warn)
    picture = _within(picture, budget_pixels, multiple, warn)
    return _padded(picture, multiple) if how == "pad" else _cropped(picture, multiple)


def _at_kontext_size(picture: Tensor, native_side: int, multiple: int, warn: Warn) -> FittedReference:
    sides = kontext_size(picture.shape[2], picture.shape[1], native_side)
    width, height = (side // multiple * multiple for side in sides)
    if picture.shape[1:3] != (height, width) and not differs_in_aspect(picture, height, width):
        warn(f"the reference ({picture.shape[2]}x{picture.shape[1]}) is resized to {width}x{height}")
    if differs_in_aspect(picture, height, width):
        warn(
            f"the reference ({picture.shape[2]}x{picture.shape[1]}) is stretched to {width}x{height}, which changes "
            "its shapes; pad keeps them"
        )
    return FittedReference(resize(picture, height, width), PaddedSize(height, width, height, width))


def _within(picture: Tensor, budget_pixels: int, multiple: int, warn: Warn) -> Tensor:
    """The picture with no more pixels than the budget."""
    if budget_pixels < multiple**2:
        raise UserError(
            f"a budget of {budget_pixels} pixels does not hold one token of {multiple}x{multiple}; give more"
        )
    height, width = picture.shape[1:3]
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(
            f"the reference ({width}x{height}) is more than {MAX_ASPECT} times as long as it is wide; crop it to "
            "what matters"
        )
    if height * width <= budget_pixels:
        return picture
    scale = math.sqrt(budget_pixels / (height * width))
    new_height, new_width = max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
    warn(
        f"the reference ({width}x{height}) has more pixels than its budget of {budget_pixels}: it is scaled to "
        f"{new_width}x{new_height}"
    )
    return resize(picture, new_height, new_width)


def _padded(picture: Tensor, multiple: int) -> FittedReference:
    size = reference_size_of_output(picture.shape[1], picture.shape[2], multiple)
    bands = (0, size.padded_width - size.width, 0, size.padded_height - size.height)
    padded = F.pad(picture.movedim(-1, 1), bands, mode="replicate").movedim(1, -1).contiguous()
    return FittedReference(padded, size)


def _cropped(picture: Tensor, multiple: int) -> FittedReference:
    h, w = picture.shape[1:3]
    height, width = h // multiple * multiple, w // multiple * multiple
    if not height * width:
        raise UserError(f"a reference of {w}x{h} cannot be cropped to multiples of {multiple}; pad it instead")
    top, left = (h - height) // 2, (w - width) // 2
    return FittedReference(
        picture[:, top : top + height, left : left + width].contiguous(), PaddedSize(height, width, height, width)
    )
