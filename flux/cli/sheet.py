"""The demo's contact sheet: a chain of pictures with arrows and captions, and other pictures below.

Pictures: (3, H, W) in 0..1.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from torch import Tensor

__all__ = ["Link", "draw_sheet"]

COLUMNS = 6
GAP, MARGIN = 24, 8  # pixels between pictures on the sheet, and around all
GROUND = (128, 128, 128)
INK = (255, 255, 255)
CAPTION_LINES, CAPTION_WIDTH, LINE_HEIGHT = 4, 21, 13  # characters a line, and pixels of one
ARROW = ((-7, -2), (0, -2), (0, -6), (7, 0), (0, 6), (0, 2), (-7, 2))  # around its middle, in pixels


@dataclass(frozen=True)
class Link:
    """One picture of the chain.

    Attributes:
        picture: (3, H, W).
        caption: How it came about, in a few words.
        follows: Whether it came of the one before it; else it stands beside that.
    """

    picture: Tensor
    caption: str
    follows: bool = True


def draw_sheet(chain: Sequence[Link], pictures: Sequence[Tensor]) -> Image:
    """The chain with arrows and captions, and pictures (3, H, W) in 0..1 in rows below; all of one size, on grey."""
    from PIL import Image, ImageDraw

    height, width = pictures[0].shape[-2:]
    below = MARGIN + height + CAPTION_LINES * LINE_HEIGHT + GAP
    rows = -(-len(pictures) // COLUMNS)
    size = (2 * MARGIN + COLUMNS * (width + GAP) - GAP, below + rows * (height + GAP) - GAP + MARGIN)
    sheet = Image.new("RGB", size, GROUND)
    pen = ImageDraw.Draw(sheet)
    for index, link in enumerate(chain):
        corner = (MARGIN + index * (width + GAP), MARGIN)
        sheet.paste(_as_image(link.picture), corner)
        _caption(pen, link.caption, (corner[0], corner[1] + height))
        if index and link.follows:
            _arrow(pen, (corner[0] - GAP // 2, corner[1] + height // 2))
    for index, picture in enumerate(pictures):
        row, column = divmod(index, COLUMNS)
        sheet.paste(_as_image(picture), (MARGIN + column * (width + GAP), below + row * (height + GAP)))
    return sheet


def _as_image(picture: Tensor) -> Image:
    from PIL import Image

    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def _caption(pen: ImageDraw, text: str, corner: tuple[int, int]) -> None:
    lines = textwrap.wrap(text, CAPTION_WIDTH)[:CAPTION_LINES]
    for index, line in enumerate(lines):
        pen.text((corner[0], corner[1] + 2 + index * LINE_HEIGHT), line, fill=INK)


def _arrow(pen: ImageDraw, middle: tuple[int, int]) -> None:
    pen.polygon([(middle[0] + x, middle[1] + y) for x, y in ARROW], fill=INK)
