"""``python -m flux demo``: what the embedded models can do, as pictures and one contact sheet."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .console import Bar, say

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ..pipelines.text_to_image import FluxModel, Request

__all__ = ["run"]

COLUMNS = 4
GAP = 6  # pixels between pictures on the sheet
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


def run(arguments: argparse.Namespace) -> int:
    """Draw every shot, then one that starts from the first picture, and the sheet; returns the exit code."""
    began = time.monotonic()
    from ..images import save_picture, write_whole
    from ..mini.files import MINI, MINI_SCHNELL, open_mini
    from ..pipelines.text_to_image import Request

    folder = Path(arguments.out)
    models = {"mini": open_mini(MINI), "mini-schnell": open_mini(MINI_SCHNELL)}
    pictures: list[Tensor] = []
    with Bar(arguments.quiet) as bar:
        for index, shot in enumerate((*SHOTS, FROM_PICTURE)):
            request = Request(prompt=shot.prompt, width=shot.width, height=shot.height, seed=SEED)
            if shot is FROM_PICTURE:
                request = Request(prompt=shot.prompt, seed=SEED, image=pictures[0], denoise=DENOISE)
            seconds, pixels, settings = _draw(models[shot.model], request)
            path = folder / f"{shot.name}.png"
            save_picture(path, pixels.numpy(), settings)
            say(f"{path}  ({seconds:.1f} s)  {shot.prompt}")
            pictures.append(pixels.permute(2, 0, 1)[None].float() / 255)
            bar.show("pictures", index + 1, len(SHOTS) + 1)
    sheet = _sheet([picture[0] for picture in pictures[: len(SHOTS)]])
    path = folder / "sheet.png"
    write_whole(path, lambda file: sheet.save(file, "PNG"))
    say(str(path))
    say(f"{len(pictures)} pictures in {time.monotonic() - began:.1f} s, start-up included")
    return 0


def _draw(model: FluxModel, request: Request) -> tuple[float, Tensor, dict[str, object]]:
    """Seconds, bytes (H, W, 3) and settings of one picture."""
    from ..pipelines.text_to_image import generate

    start = time.monotonic()
    picture = generate(model, request)[0]
    return time.monotonic() - start, picture.pixels, picture.settings


def _sheet(pictures: list[Tensor]) -> Image:
    """Pictures (3, H, W) in 0..1 of one size, in rows on grey."""
    import torch
    from PIL import Image

    height, width = pictures[0].shape[-2:]
    rows = -(-len(pictures) // COLUMNS)
    whole = torch.full((3, rows * (height + GAP) + GAP, COLUMNS * (width + GAP) + GAP), 0.5)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, COLUMNS)
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        whole[:, top : top + height, left : left + width] = picture
    return Image.fromarray((whole * 255).round().byte().permute(1, 2, 0).numpy())
