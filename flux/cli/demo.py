"""``python -m flux demo``: what the embedded models can do, as pictures and one contact sheet."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .console import Bar, say
from .sheet import Link, draw_sheet

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipelines.text_to_image import FluxModel, Request

    Finish = Callable[[Tensor], Tensor]

__all__ = ["run"]

SEED = 7


@dataclass(frozen=True)
class Shot:
    """One picture of the demo: its file's name, the model, the prompt, and its size."""

    name: str
    model: str
    prompt: str
    width: int = 128
    height: int = 128


SHOTS = (
    Shot("circle-and-square", "mini", "a red circle on the left and a blue square on the right"),
    Shot("star", "mini", "a large yellow star in the center on a purple background"),
    Shot("rings", "mini", "two green rings on a black background"),
    Shot("related", "mini", "an orange triangle above a small white cross on a blue background"),
    Shot(
        "three",
        "mini",
        "a red square at the top, a large green circle on the left and a yellow star on the right",
    ),
    Shot("open", "mini", 'the word "OPEN" in red on a white background'),
    Shot("flux", "mini", 'the word "FLUX" in yellow on a blue background'),
    Shot("terse", "mini", "purple cross, right, large; orange circle, left, small"),
    Shot("schnell-circle", "mini-schnell", "a large blue circle in the center on a yellow background"),
    Shot("schnell-two", "mini-schnell", "a white star at the top and a red ring at the bottom on a green background"),
    Shot("schnell-sale", "mini-schnell", 'the word "SALE" in white on a red background'),
    Shot("schnell-crosses", "mini-schnell", "three small black crosses on a white background"),
)
FROM_PICTURE = Shot("from-picture", "mini", "a red circle on the left and a green star on the right")
DENOISE = 0.85  # of the picture made from the first one

# The production chain, which begins with the first shot.
HOLE = (68, 32, 128, 96)  # left, top, right, bottom: around the square on the right
FILL_PROMPT = "a yellow star"
EDIT_PROMPT = "make the circle green"
VARIATIONS = 2


def run(arguments: argparse.Namespace) -> int:
    """Draw every shot, one that starts from the first picture, the chain, and the sheet; returns the exit code."""
    began = time.monotonic()
    from ..images import write_whole
    from ..mini.files import MINI, MINI_SCHNELL, open_mini
    from ..pipelines.text_to_image import Request

    models = {"mini": open_mini(MINI), "mini-schnell": open_mini(MINI_SCHNELL)}
    with Bar(arguments.quiet) as bar:
        studio = _Studio(Path(arguments.out), bar, len(SHOTS) + 1 + CHAIN_LENGTH)
        pictures = [
            studio.paint(
                shot.name,
                models[shot.model],
                Request(prompt=shot.prompt, width=shot.width, height=shot.height, seed=SEED),
            )
            for shot in SHOTS
        ]
        studio.paint(
            FROM_PICTURE.name, models[FROM_PICTURE.model],
            Request(prompt=FROM_PICTURE.prompt, seed=SEED, image=pictures[0], denoise=DENOISE),
        )  # fmt: skip
        chain = _chain(studio, pictures[0])
    sheet = draw_sheet(chain, [picture[0] for picture in pictures])
    path = studio.folder / "sheet.png"
    write_whole(path, lambda file: sheet.save(file, "PNG"))
    say(str(path))
    say(f"{studio.done} pictures in {time.monotonic() - began:.1f} s, start-up included")
    return 0


class _Studio:
    """Draws pictures into a folder, and tells of each.

    Args:
        folder: Where they go.
        bar: Shows how many there are.
        total: How many there will be.
    """

    def __init__(self, folder: Path, bar: Bar, total: int) -> None:
        self.folder, self.bar, self.total = folder, bar, total
        self.done = 0

    def paint(self, name: str, model: FluxModel, request: Request, finish: Finish | None = None) -> Tensor:
        """One picture (1, 3, H, W) in 0..1; ``finish`` makes of (1, H, W, 3) what is written."""
        from ..images import save_picture
        from ..pipelines.text_to_image import generate
        from .engine import as_numbers, as_pixels, channels_first

        start = time.monotonic()
        [picture] = generate(model, request)
        pixels = picture.pixels if finish is None else as_pixels(finish(as_numbers(picture.pixels)))
        path = self.folder / f"{name}.png"
        save_picture(path, pixels.numpy(), picture.settings)
        say(f"{path}  ({time.monotonic() - start:.1f} s)  {request.prompt}".rstrip())
        self.done += 1
        self.bar.show("pictures", self.done, self.total)
        return channels_first(as_numbers(pixels))


CHAIN_LENGTH = 2 + VARIATIONS  # pictures that it draws itself


def _chain(studio: _Studio, first: Tensor) -> list[Link]:
    """Text, what Fill paints into a hole, what Redux makes of that, and what Kontext makes of one."""
    from ..mini import files
    from ..pipelines.guided import ReferenceInput
    from ..pipelines.redux import ReduxPicture, style_guide
    from ..pipelines.text_to_image import Request
    from ..preprocess.vision import vision_pixels

    height, width = first.shape[-2:]
    holed, filled = _filled(studio, first)
    encoder, model = files.open_redux_mini(), files.open_mini(files.MINI_REDUX)
    views = vision_pixels(filled.movedim(1, -1), encoder.tower.spec.side)
    guide = style_guide(encoder.encode(ReduxPicture(views=views)))
    variations = [
        studio.paint(
            f"chain-{3 + index}-redux", model,
            Request(prompt="", width=width, height=height, seed=SEED + index, inputs=[guide]),
        )
        for index in range(VARIATIONS)
    ]  # fmt: skip
    edited = studio.paint(
        f"chain-{3 + VARIATIONS}-edit", files.open_mini(files.MINI_KONTEXT),
        Request(prompt=EDIT_PROMPT, seed=SEED, inputs=[ReferenceInput(picture=variations[-1])]),
    )  # fmt: skip
    return [
        Link(first[0], f'text: "{SHOTS[0].prompt}"'),
        Link(holed[0], "a hole"),
        Link(filled[0], f'Fill: "{FILL_PROMPT}"'),
        *(Link(one[0], f"Redux: variation {index + 1}", follows=index == 0) for index, one in enumerate(variations)),
        Link(edited[0], f'Kontext: "{EDIT_PROMPT}"'),
    ]


def _filled(studio: _Studio, first: Tensor) -> tuple[Tensor, Tensor]:
    """A picture with a hole, and with what was painted there."""
    from ..adapters.channels import GREY
    from ..editing.inpaint import CropOptions, crop_for_inpaint, stitch
    from ..mini import files
    from ..pipelines.guided import FillInput
    from ..pipelines.text_to_image import Request
    from .engine import channels_first

    model = files.open_mini(files.MINI_FILL)
    left, top, right, bottom = HOLE
    mask = first.new_zeros(1, *first.shape[-2:])
    mask[:, top:bottom, left:right] = 1
    crop = crop_for_inpaint(first.movedim(1, -1), mask, CropOptions(side=model.transformer.spec.native_side))
    height, width = crop.picture.shape[1:3]
    given = FillInput(picture=channels_first(crop.picture), mask=crop.mask[None])
    request = Request(prompt=FILL_PROMPT, height=height, width=width, seed=SEED, inputs=[given])
    filled = studio.paint("chain-2-fill", model, request, lambda painted: stitch(crop, painted))
    return first * (1 - mask[None]) + GREY * mask[None], filled
