"""Train the embedded Redux: a small vision tower with its adapter, and the text model to heed their tokens.

First both learn to say in the text encoder's own tokens what lies where: every cell of the tower's grid gives a token
of the words for the object there. Then they learn by flow matching through the text model, which learns to heed them.

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

from ..adapters import attending
from ..models.flux1 import Flux1
from ..models.redux import Redux
from ..models.vision.siglip import PatchEmbeddings, SiglipVision
from ..ops.dtypes import mixed_precision
from ..preprocess.vision import reduce_grid, vision_pixels
from ..sampling.packing import token_grid
from ..specs.vision import REDUX_MINI, SIGLIP_MINI
from ..training.flow import TextBatch, predict_velocity
from .dataset import NATIVE
from .examples import REACH, Image, scene_example, style_example
from .language import COLOURS, SHAPES, Request, Span, phrase, random_request, text_of
from .loop import FlowRecipe, Report, run_stage
from .scenes import Scene, draw, lay_out
from .train_flow import TIME_MEAN
from .train_guided import DRAWN_BATCHES, GUIDANCE_RANGE, Bench, noised, random_canvas
from .train_text import token_owners

__all__ = ["Listener", "Style", "cells_of", "start_tower", "train_style", "train_words", "vision_view", "words_of"]

BYTE = 255
COARSE_SHARE = 0.1  # of the steps with Redux tokens averaged to a coarser grid
COARSE_GRIDS = (3, 5)
PROMPTS_SHARE = 0.0625  # of a batch: prompts alone, of which the text model keeps what it knows
KEPT_WEIGHT = 0.25
HEEDING_MEAN = 1.5  # of the times' logit-normal distribution: what is drawn where is decided early
NEAR_SHARE, NEAR_GUIDANCE = 0.75, (1.5, 3.5)  # of the steps, and their guidance: what pictures are drawn with
WORDS_WEIGHT, GROUND_WEIGHT = 0.25, 0.25  # beside what the head asks of cells with objects
PATCHED_SCENES = 256  # whose patches the tower begins with
LEAST_VARIANCE = 1e-5  # of a patch's principal directions, of the largest
LONGEST_WAVE = 30.0  # of places, in cells over 2 pi
WEAK_SHARE, WEAK_STRENGTHS = 0.12, (0.05, 1.0)  # of the steps, with a strength in between, which takes over so much
LEFT_OUT = -1e4  # added to the logits of tokens that are left out
GROUND = -1  # the item of cells that show none


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


@torch.no_grad()
def start_tower(style: Style, views: Tensor) -> None:
    """Have the tower see patches by their principal directions and places by waves, in place.

    Most patches are of one colour. At random directions all are nearly alike but for it, and what a shape's outline
    does to them is long to find; so all directions begin with the same variance. Waves make neighbours alike, which
    lets attention find them.
    """
    embeddings: PatchEmbeddings = style.tower.vision_model.embeddings
    weight, bias = embeddings.patch_embedding.weight, embeddings.patch_embedding.bias
    places = embeddings.position_embedding
    assert bias is not None
    assert isinstance(places, nn.Embedding)
    patch = weight.shape[-1]
    patches = F.unfold(views, patch, stride=patch).transpose(1, 2).flatten(0, 1).double()
    mean = patches.mean(dim=0)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))
    variances, directions = variances[-len(weight) :], directions[:, -len(weight) :]
    rows = (directions / (variances + LEAST_VARIANCE * variances.max()).sqrt()).T
    weight.copy_(rows.reshape(weight.shape))
    bias.copy_(-rows @ mean)
    places.weight.copy_(_waves(SIGLIP_MINI.grid, len(weight)))


def _waves(grid: int, width: int) -> Tensor:
    """Sines and cosines (grid * grid, width) of rows and columns, of wavelengths from a few cells to many."""
    lengths = LONGEST_WAVE ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] / lengths
    axis = torch.cat((angles.sin(), angles.cos()), dim=-1)
    rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


class CellHead(nn.Module):
    """Answers from a token what its cell shows, the shape and the colour; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = nn.Linear(REDUX_MINI.text_width, len(SHAPES) + 1)  # the last is the ground
        self.colour = nn.Linear(REDUX_MINI.text_width, len(COLOURS))

    def forward(self, tokens: Tensor, answers: Tensor) -> Tensor:
        """Cross entropy (B, N) of both, for tokens (B, N, D) and ``cell_answers`` of each scene (B, N, 2)."""
        shape, colour = answers.unbind(-1)
        return _entropy(self.shape(tokens), shape) + _entropy(self.colour(tokens), colour)


def _entropy(logits: Tensor, answers: Tensor) -> Tensor:
    return F.cross_entropy(logits.movedim(-1, 1), answers, reduction="none")


def cell_answers(scene: Scene, grid: int) -> list[tuple[int, int]]:
    """For each cell of a grid over a scene which shape and which colour it shows; the ground's shape is one more."""
    kinds = [(SHAPES.index(item.shape), COLOURS.index(item.colour)) for item in scene.items]
    kinds.append((len(SHAPES), COLOURS.index(scene.background)))  # found by ``GROUND``
    return [kinds[item] for item in cells_of(scene, grid)]


def train_words(folder: Path, bench: Bench, recipe: FlowRecipe, *, seed: int, report: Report) -> Style:
    """Train tower and adapter to say what they see; returns them with averaged weights.

    A head asks for shapes and colours, and counts most: the words of different shapes are nearly alike, and taught a
    tower colours only.
    """
    torch.manual_seed(seed)
    style = Style()
    rng = random.Random(f"words/{seed}")
    examples = [scene_example(rng, NATIVE, sign_share=0.0) for _ in range(PATCHED_SCENES)]
    start_tower(style, torch.stack([vision_view(draw(scene)) for _, scene in examples]))
    style, head = style.to(bench.device), CellHead().to(bench.device)

    def loss(step: int) -> Tensor:
        rng = random.Random(f"words/{seed}/{step}")
        canvas = random_canvas(rng)
        seen = [scene_example(rng, canvas, sign_share=0.0) for _ in range(recipe.batch)]
        views = torch.stack([vision_view(draw(scene)) for _, scene in seen]).to(bench.device)
        wanted = words_of(seen, bench, SIGLIP_MINI.grid)
        answers = torch.tensor([cell_answers(scene, SIGLIP_MINI.grid) for _, scene in seen], device=views.device)
        things = answers[..., 0] < len(SHAPES)
        with mixed_precision(views.device):
            tokens = style(views)
        tokens = tokens.float()
        words = WORDS_WEIGHT * (tokens - wanted).square().mean(dim=-1) / wanted.var()
        errors = words + head(tokens, answers)
        total: Tensor = errors[things].mean() + GROUND_WEIGHT * errors[~things].mean()
        return total

    return run_stage("style-words", style, loss, folder / "style-words.safetensors", recipe, seed, report, head)


class Listener(nn.Module):
    """A text model and what it learns to heed, trained together."""

    def __init__(self, text: Flux1, style: Style) -> None:
        super().__init__()
        self.text, self.style = text, style


@dataclass(frozen=True)
class Told:
    """Latents with the prompts that ask for them."""

    latents: Tensor
    text: TextBatch


@dataclass(frozen=True)
class Shown(Told):
    """Also what stands in the prompts' place: other prompts, what the tower sees, and which of it counts (B, N)."""

    asked: TextBatch
    views: Tensor
    keep: Tensor


def _told(bench: Bench, size: int, canvas: tuple[int, int], rng: random.Random) -> Told:
    width, height = canvas
    requests = [random_request(rng) for _ in range(size)]
    pictures = [draw(lay_out(request, rng, width, height)) for request in requests]
    return Told(bench.latents(pictures), bench.text([text_of(phrase(request, rng)) for request in requests], rng))


def _shown(bench: Bench, size: int, canvas: tuple[int, int], rng: random.Random) -> Shown:
    examples = [style_example(rng, canvas) for _ in range(size)]
    kept = torch.from_numpy(np.stack([example.keep for example in examples]))
    return Shown(
        bench.latents([example.picture for example in examples]),
        bench.encoders.encode([example.told for example in examples]),
        bench.encoders.encode([example.prompt for example in examples]),
        torch.stack([vision_view(example.reference) for example in examples]).to(bench.device),
        F.adaptive_max_pool2d(kept, SIGLIP_MINI.grid).to(bench.device),
    )


def train_style(
    folder: Path, teacher: Flux1, start: Listener, bench: Bench, recipe: FlowRecipe, *, seed: int, report: Report
) -> Listener:
    """Train tower, adapter and text model together; returns them with averaged weights.

    A text model this small heeds no more tokens than a prompt has, nor any without CLIP's vector: with the very words
    of a scene behind an empty prompt, it draws every third object. So it learns from what it was: to predict from
    tokens for a picture what that predicted from the words for it, and from words what that did. With a strength in
    between it learns to go that far from what that predicted without them.

    Args:
        folder: Of the checkpoint.
        teacher: The text model.
        start: A copy of it with what ``train_words`` gave, or what was trained so before.
        bench: Encoders.
        recipe: Steps and rates.
        seed: Of what is drawn.
        report: Told how far it is.
    """
    teacher = teacher.requires_grad_(False).to(bench.device)
    model = start.train().to(bench.device)
    for embedder in (model.text.time_in, model.text.vector_in, model.text.guidance_in):
        if embedder is not None:
            embedder.requires_grad_(False)  # numbers mean what they did; steps of this size move the guidance's far
    prompts = max(1, round(recipe.batch * PROMPTS_SHARE))
    drawn: dict[int, tuple[Told, Shown]] = {}

    def kept(batch: Told, rng: random.Random) -> Tensor:
        noisy, times, guidance, _ = noised(batch.latents, rng, TIME_MEAN)
        with torch.no_grad():
            wanted = predict_velocity(teacher, noisy, times, batch.text, guidance)
        return _apart(predict_velocity(model.text, noisy, times, batch.text, guidance), wanted, guidance)

    def followed(batch: Shown, rng: random.Random) -> Tensor:
        near = NEAR_GUIDANCE if rng.random() < NEAR_SHARE else GUIDANCE_RANGE
        noisy, times, guidance, _ = noised(batch.latents, rng, HEEDING_MEAN, near)
        strength = rng.uniform(*WEAK_STRENGTHS) if rng.random() < WEAK_SHARE else 1.0
        with torch.no_grad():
            wanted = predict_velocity(teacher, noisy, times, batch.text, guidance)
            if strength < 1:
                without = predict_velocity(teacher, noisy, times, batch.asked, guidance)
                wanted = torch.lerp(without, wanted, strength)
        grid = rng.choice(COARSE_GRIDS) if rng.random() < COARSE_SHARE else None
        keep = batch.keep if grid is None else F.adaptive_max_pool2d(batch.keep, grid)
        joined = torch.cat((batch.asked.tokens, model.style(batch.views, grid)), dim=1)
        bias = _weighed(keep.flatten(1), strength, batch.asked.tokens.shape[1], token_grid(*batch.latents.shape[-2:]))
        text = TextBatch(joined, batch.asked.pooled)
        return _apart(predict_velocity(model.text, noisy, times, text, guidance, bias=bias), wanted, guidance)

    def loss(step: int) -> Tensor:
        index, rng = step % DRAWN_BATCHES, random.Random(f"style/{seed}/{step}")
        if index not in drawn:
            own = random.Random(f"style/{seed}/drawn/{index}")
            canvases = random.Random(f"style/canvases/{index}")  # whatever the seed: processes wait for the slowest
            drawn[index] = (
                _told(bench, prompts, random_canvas(canvases), own),
                _shown(bench, recipe.batch - prompts, random_canvas(canvases), own),
            )
        told, shown = drawn[index]
        with mixed_precision(bench.device):
            return followed(shown, rng) + KEPT_WEIGHT * kept(told, rng)

    return run_stage("style", model, loss, folder / "style.safetensors", recipe, seed, report)


def _apart(predicted: Tensor, wanted: Tensor, guidance: Tensor) -> Tensor:
    """Mean square of how far velocities (B, I, 4C) are apart, over the guidance (B,), as which words' effect grows."""
    return ((predicted.float() - wanted.float()) / guidance[:, None, None]).square().mean()


def _weighed(keep: Tensor, strength: float, before: int, grid: tuple[int, int]) -> Tensor:
    """The attention bias of style tokens, which stand between text and image, as a run has it.

    Args:
        keep: (B, N); tokens are left out where it is 0.
        strength: Of the others.
        before: Text tokens.
        grid: Rows and columns of image tokens.

    Returns:
        (B, 1, 1, L), or (B, 1, L, L) where the strength is not 1.
    """
    count, cells = keep.shape[1], grid[0] * grid[1]
    left_out = F.pad((keep == 0).float() * LEFT_OUT, (before, cells))[:, None, None]
    span = attending.Span(before, torch.full((count,), strength, device=keep.device))
    weighed = attending.attention_bias([span], before + count, grid, before + count + cells)
    return left_out if weighed is None else left_out + weighed
