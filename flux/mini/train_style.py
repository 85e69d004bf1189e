"""Train the embedded Redux: a small vision tower with its adapter, whose tokens the frozen text model understands.

First both learn to say in the text encoder's own tokens what lies where: every cell of the tower's grid gives a token
of the words for the object there. The frozen transformer alone, asked from nothing, taught a tower next to nothing.
Then they learn by flow matching through it.

Shapes: B batch, N cells of the tower's grid, D the text tokens' width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.flux1 import Flux1
from ..models.redux import Redux
from ..models.vision.siglip import SiglipVision
from ..ops.dtypes import fast_dtype
from ..preprocess.vision import reduce_grid, vision_pixels
from ..specs.vision import REDUX_MINI, SIGLIP_MINI
from ..training.flow import TextBatch, predict_velocity
from .dataset import CANVASES, NATIVE
from .examples import REACH, Image, scene_example, style_example
from .language import Request, Span, phrase, text_of
from .loop import FlowRecipe, Report, run_stage
from .scenes import Scene, draw
from .train_guided import DRAWN_BATCHES, OTHER_SIZES_SHARE, Bench, noised
from .train_text import token_owners

__all__ = ["Style", "cells_of", "train_style", "train_words", "vision_view", "words_of"]

BYTE = 255
COARSE_SHARE = 0.25  # of the steps with Redux tokens averaged to a coarser grid
COARSE_GRIDS = (3, 5)
LEFT_OUT = -1e4  # added to the logits of tokens that are left out
GROUND = -1  # the cells of no object


class Style(nn.Module):
    """The embedded vision tower with the embedded Redux adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = SiglipVision(SIGLIP_MINI)
        self.redux = Redux(REDUX_MINI)

    def forward(self, views: Tensor, grid: int | None = None) -> Tensor:
        """Tokens (B, N, text width) of views (B, 3, side, side), averaged to a coarser grid where one is given."""
        tokens: Tensor = self.redux(self.tower(views))
        return tokens if grid is None else reduce_grid(tokens, None, grid)[0]


def vision_view(picture: Image) -> Tensor:
    """A picture (H, W, 3) as the embedded tower sees it (3, side, side), in -1..1: stretched to its square."""
    image = torch.from_numpy(picture)[None].float() / BYTE
    return vision_pixels(image, SIGLIP_MINI.side, patch=SIGLIP_MINI.patch).pixels[0]


def cells_of(scene: Scene, grid: int) -> list[int]:
    """For each cell of a grid over a scene, row by row, the item that covers most of its middle, or ``GROUND``."""
    across, down = scene.width / grid, scene.height / grid
    found = []
    for row in range(grid):
        for column in range(grid):
            x, y = (column + 0.5) * across, (row + 0.5) * down
            near = [
                (max(abs(x - item.x) - across / 2, abs(y - item.y) - down / 2) / (item.radius * REACH), index)
                for index, item in enumerate(scene.items)
            ]
            nearest = min(near, default=(1.0, GROUND))
            found.append(nearest[1] if nearest[0] < 1 else GROUND)
    return found


def words_of(seen: Sequence[tuple[Request, Scene]], bench: Bench, grid: int) -> Tensor:
    """The text encoder's tokens (B, N, D) for the cells of a grid over each scene.

    A scene is described in one sentence. A cell on an object gives a token of that object's words, one cell this word
    and its neighbour the next; a cell on the ground one of the others.

    Args:
        seen: Scenes, each with what it answers.
        bench: Encodes the sentences.
        grid: Cells along a side.
    """
    told = [replace(request, background=scene.background) for request, scene in seen]
    sentences = [phrase(request, random.Random("words")) for request in told]
    tokens = bench.encoders.encode([text_of(spans) for spans in sentences]).tokens
    chosen = [
        _columns(scene, request, spans, bench, grid)
        for (_, scene), request, spans in zip(seen, told, sentences, strict=True)
    ]
    return torch.stack([own[columns] for own, columns in zip(tokens, chosen, strict=True)])


def _columns(scene: Scene, request: Request, spans: list[Span], bench: Bench, grid: int) -> list[int]:
    """Which of a sentence's tokens each cell of a grid over a scene gives."""
    tokenizer = bench.encoders.t5_tokenizer
    owners = token_owners(spans, tokenizer, tokenizer(text_of(spans)).used)
    kinds = [(wanted.shape, wanted.colour) for wanted in request.objects]
    chosen = []
    for index, item in enumerate(cells_of(scene, grid)):
        thing = None if item == GROUND else scene.items[item]
        owner = None if thing is None else kinds.index((thing.shape, thing.colour))
        own = [column for column, one in enumerate(owners) if one == owner]
        chosen.append(own[sum(divmod(index, grid)) % len(own)])
    return chosen


def train_words(folder: Path, bench: Bench, recipe: FlowRecipe, *, seed: int, report: Report) -> Style:
    """Train tower and adapter to say what they see; returns them with averaged weights."""
    torch.manual_seed(seed)
    style = Style().to(bench.device)
    compute = fast_dtype(torch.device(bench.device))

    def loss(step: int) -> Tensor:
        rng = random.Random(f"words/{seed}/{step}")
        canvas = NATIVE if rng.random() > OTHER_SIZES_SHARE else rng.choice(CANVASES)
        seen = [scene_example(rng, canvas, sign_share=0.0) for _ in range(recipe.batch)]
        views = torch.stack([vision_view(draw(scene)) for _, scene in seen]).to(bench.device)
        wanted = words_of(seen, bench, SIGLIP_MINI.grid)
        with torch.autocast(views.device.type, compute, enabled=compute != torch.float32):
            tokens = style(views)
        return F.mse_loss(tokens.float(), wanted) / wanted.var()

    return run_stage("style-words", style, loss, folder / "style-words.safetensors", recipe, seed, report)


@dataclass(frozen=True)
class Batch:
    """Latents to learn, what the tower sees, which cells of it count (B, N as a grid), and prompts."""

    latents: Tensor
    views: Tensor
    keep: Tensor
    text: TextBatch


def _batch(bench: Bench, size: int, rng: random.Random) -> Batch:
    canvas = NATIVE if rng.random() > OTHER_SIZES_SHARE else rng.choice(CANVASES)
    examples = [style_example(rng, canvas) for _ in range(size)]
    kept = torch.from_numpy(np.stack([example.keep for example in examples]))
    return Batch(
        bench.latents([example.picture for example in examples]),
        torch.stack([vision_view(example.reference) for example in examples]).to(bench.device),
        F.adaptive_max_pool2d(kept, SIGLIP_MINI.grid),
        bench.encoders.encode([example.prompt for example in examples]),
    )


def train_style(
    folder: Path, start: Style, model: Flux1, bench: Bench, recipe: FlowRecipe, *, seed: int, report: Report
) -> Style:
    """Train tower and adapter together through the frozen text model; returns them with averaged weights.

    Args:
        folder: Of the checkpoint.
        start: What ``train_words`` gave; it is trained on.
        model: The text model.
        bench: Encoders.
        recipe: Steps and rates.
        seed: Of what is drawn.
        report: Told how far it is.
    """
    model.requires_grad_(False)
    style = start.train().to(bench.device)
    compute = fast_dtype(torch.device(bench.device))
    drawn: dict[int, Batch] = {}

    def loss(step: int) -> Tensor:
        index, rng = step % DRAWN_BATCHES, random.Random(f"style/{seed}/{step}")
        if index not in drawn:
            drawn[index] = _batch(bench, recipe.batch, random.Random(f"style/{seed}/drawn/{index}"))
        batch = drawn[index]
        noisy, times, guidance, target = noised(batch.latents, rng)
        grid = rng.choice(COARSE_GRIDS) if rng.random() < COARSE_SHARE else None
        keep = batch.keep if grid is None else F.adaptive_max_pool2d(batch.keep, grid)
        with torch.autocast(noisy.device.type, compute, enabled=compute != torch.float32):
            tokens = style(batch.views, grid)
            joined = TextBatch(torch.cat((batch.text.tokens, tokens), dim=1), batch.text.pooled)
            bias = _left_out(keep.flatten(1), batch.text.tokens.shape[1], target.shape[1]).to(noisy.device)
            velocity = predict_velocity(model, noisy, times, joined, guidance, bias=bias)
        return F.mse_loss(velocity.float(), target)

    return run_stage("style", style, loss, folder / "style.safetensors", recipe, seed, report)


def _left_out(keep: Tensor, before: int, behind: int) -> Tensor:
    """Bias (B, 1, 1, L) that leaves style tokens out where ``keep`` (B, N) is 0; they stand between text and image."""
    bias = (keep == 0).float() * LEFT_OUT
    return F.pad(bias, (before, behind))[:, None, None]
