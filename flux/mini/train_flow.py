"""Train Foundry Mini's transformers: a base model, then the two that ship.

1. ``base``: flow matching on latents, one prompt in ten empty, so that classifier-free guidance works.
2. ``guided``: the base distilled to give in one pass what guidance gives in two, for any strength (guidance
   distillation, Meng et al. 2023); this is ``flux1-mini``.
3. ``schnell``: the guided model's trajectories cut into four straight pieces (progressive distillation, Salimans and Ho
   2022, to a fixed grid); this is ``flux1-mini-schnell``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.flux1 import Flux1
from ..models.text.clip import ClipText
from ..models.text.t5 import T5Encoder
from ..ops.dtypes import mixed_precision
from ..sampling.packing import pack, unpack
from ..sampling.schedules import make_schedule
from ..specs.flux1 import MINI, MINI_SCHNELL
from ..training.flow import TextBatch, flow_targets, predict_velocity, sample_times
from ..weights.readers.tokenizer import ClipTokenizer, T5Tokenizer
from .dataset import NATIVE, LatentSet
from .labels import IGNORED, QUESTIONS
from .language import phrase, text_of
from .loop import FlowRecipe, Report, run_stage

__all__ = ["FlowRecipe", "FrozenEncoders", "train_base", "train_guided", "train_schnell"]

EMPTY_SHARE = 0.1
# How often a scene is drawn, by the number of its objects: the more a prompt names, the more there is to get wrong. A
# sign (no objects) has its letters at columns that differ with the canvas's width, and needs as much.
DRAW_WEIGHTS = (2.0, 1.5, 1.5, 2.0)
OTHER_SIZES_SHARE = 0.75  # of the steps, on one of the 48 sizes other than the native one
TAPPED_BLOCK = 1  # the single block whose image tokens answer questions, about midway
ANSWERS_WEIGHT = 0.5
# Of the logit-normal times. What a picture shows is decided while it is nearly all noise: at t = 0.9 the 400 latent
# values of an object have a signal-to-noise ratio of 5 in all. A third of the samples lie above t = 0.85.
TIME_MEAN, TIME_DEVIATION = 1.2, 1.4
GUIDANCE_RANGE = (1.0, 6.0)
SCHNELL_GUIDANCE = 3.0
SCHNELL_SUBSTEPS = 4  # teacher steps for each of the student's
SCHNELL_STEPS = 4


@dataclass(frozen=True)
class FrozenEncoders:
    """Frozen encoders with their tokenizers."""

    t5: T5Encoder
    clip: ClipText
    t5_tokenizer: T5Tokenizer
    clip_tokenizer: ClipTokenizer

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextBatch:
        """Encode prompts, all to the T5 spec's length."""
        device = next(self.t5.parameters()).device
        t5_ids = torch.tensor([self.t5_tokenizer(p).ids for p in prompts], device=device)
        clip_ids = torch.tensor([self.clip_tokenizer(p).ids for p in prompts], device=device)
        with mixed_precision(device):
            tokens, pooled = self.t5(t5_ids), self.clip(clip_ids)[1]
        return TextBatch(tokens.float(), pooled.float())


class Batches:
    """Endless training batches: latents, encoded prompts, and the encoding of the empty prompt."""

    def __init__(self, data: LatentSet, encoders: FrozenEncoders, size: int, seed: str) -> None:
        self.data, self.encoders, self.size, self.seed = data, encoders, size, seed
        self.empty = encoders.encode([""])
        self.weights = {
            canvas: list(accumulate(DRAW_WEIGHTS[sum(o.count for o in request.objects)] for request in requests))
            for canvas, requests in data.requests.items()
        }

    def at(self, step: int) -> tuple[Tensor, TextBatch, random.Random]:
        """Latents and prompts of one step; see ``labelled_at``."""
        latents, text, _, rng = self.labelled_at(step)
        return latents, text, rng

    def labelled_at(self, step: int) -> tuple[Tensor, TextBatch, Tensor, random.Random]:
        """The batch of one step with its labels: a function of seed and step, so that resumed runs go on unchanged."""
        rng = random.Random(f"{self.seed}/{step}")
        canvas = (
            NATIVE if rng.random() > OTHER_SIZES_SHARE else rng.choice([c for c in self.data.latents if c != NATIVE])
        )
        pool = self.data.latents[canvas]
        picks = rng.choices(range(len(pool)), cum_weights=self.weights[canvas], k=self.size)
        prompts = [text_of(phrase(self.data.requests[canvas][i], rng)) for i in picks]
        device = self.empty.tokens.device
        labels = self.data.labels[canvas][picks].to(device)
        return pool[picks].float().to(device), self.encoders.encode(prompts), labels, rng


def train_base(
    folder: Path,
    data: LatentSet,
    encoders: FrozenEncoders,
    recipe: FlowRecipe,
    *,
    seed: int,
    device: str,
    report: Report,
    start: Mapping[str, Tensor] | None = None,
) -> Flux1:
    """Stage 1. Returns the model with averaged weights.

    Without ``start``, a state dict to go on from, it begins from nothing.
    """
    torch.manual_seed(seed)
    model = Flux1(MINI).to(device)
    if start is None:
        initialise(model)
    else:
        model.load_state_dict(start)
    batches = Batches(data, encoders, recipe.batch, f"base/{seed}")
    head = SceneHead(MINI.hidden).to(device)
    seen: list[Tensor] = []
    tap = model.single_blocks[TAPPED_BLOCK].register_forward_hook(lambda _block, _inputs, output: seen.append(output))
    velocity = _compiled(model, recipe)

    def loss(step: int) -> Tensor:
        latents, text, labels, rng = batches.labelled_at(step)
        drop = torch.tensor([rng.random() < EMPTY_SHARE for _ in range(len(latents))], device=device)
        text = text.select(drop, batches.empty)
        times = sample_times(len(latents), mean=TIME_MEAN, deviation=TIME_DEVIATION).to(device)
        noisy, target = flow_targets(latents, torch.randn_like(latents), times)
        seen.clear()
        error = F.mse_loss(velocity(noisy, times, text, None).float(), pack(target))
        answers = head.loss(seen[0][:, text.tokens.shape[1] :].float(), labels)
        return error + ANSWERS_WEIGHT * answers

    try:
        return run_stage("base", model, loss, folder / "base.safetensors", recipe, seed, report, head)
    finally:
        tap.remove()


def train_guided(
    folder: Path,
    base: Flux1,
    data: LatentSet,
    encoders: FrozenEncoders,
    recipe: FlowRecipe,
    *,
    seed: int,
    device: str,
    report: Report,
) -> Flux1:
    """Stage 2: a copy of ``base`` learns guidance as an input."""
    model = Flux1(MINI).to(device)
    model.load_state_dict(base.state_dict())
    batches = Batches(data, encoders, recipe.batch, f"guided/{seed}")
    teach, learn = _compiled(base.requires_grad_(False), recipe), _compiled(model, recipe)

    def loss(step: int) -> Tensor:
        latents, text, rng = batches.at(step)
        count = len(latents)
        times = sample_times(count, mean=TIME_MEAN, deviation=TIME_DEVIATION).to(device)
        noisy, _ = flow_targets(latents, torch.randn_like(latents), times)
        guidance = torch.tensor([rng.uniform(*GUIDANCE_RANGE) for _ in range(count)], device=device)
        with torch.no_grad():
            both = text.joined(batches.empty.repeated(count))
            answers = teach(noisy.repeat(2, 1, 1, 1), times.repeat(2), both, None).float()
            positive, negative = answers.chunk(2)
            target = negative + guidance[:, None, None] * (positive - negative)
        return F.mse_loss(learn(noisy, times, text, guidance).float(), target)

    return run_stage("guided", model, loss, folder / "guided.safetensors", recipe, seed, report)


def train_schnell(
    folder: Path,
    guided: Flux1,
    data: LatentSet,
    encoders: FrozenEncoders,
    recipe: FlowRecipe,
    *,
    seed: int,
    device: str,
    report: Report,
) -> Flux1:
    """Stage 3: each of four steps learns to go where the guided model arrives in several."""
    model = Flux1(MINI_SCHNELL).to(device)
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in guided.state_dict().items() if k in own})
    batches = Batches(data, encoders, recipe.batch, f"schnell/{seed}")
    teach, learn = _compiled(guided.requires_grad_(False), recipe), _compiled(model, recipe)
    grid = make_schedule("linear", SCHNELL_STEPS, None)

    def loss(step: int) -> Tensor:
        latents, text, rng = batches.at(step)
        count, (height, width) = len(latents), latents.shape[-2:]
        guidance = torch.full((count,), SCHNELL_GUIDANCE, device=device)
        noise = torch.randn_like(latents)
        x = noise
        # The student meets its own states, not only data with noise: it walks to the step that it is taught.
        index = rng.choices(range(SCHNELL_STEPS), weights=(4, 3, 2, 2))[0]
        with torch.no_grad():
            for i in range(index):
                times = torch.full((count,), grid[i], device=device)
                x = x + (grid[i + 1] - grid[i]) * unpack(learn(x, times, text, None).float(), height, width)
            start, end = grid[index], grid[index + 1]
            y = x
            for k in range(SCHNELL_SUBSTEPS):
                t = start + (end - start) * k / SCHNELL_SUBSTEPS
                times = torch.full((count,), t, device=device)
                y = y + (end - start) / SCHNELL_SUBSTEPS * unpack(
                    teach(y, times, text, guidance).float(), height, width
                )
            target = pack((y - x) / (end - start))
        return F.mse_loss(learn(x, torch.full((count,), start, device=device), text, None).float(), target)

    return run_stage("schnell", model, loss, folder / "schnell.safetensors", recipe, seed, report)


class SceneHead(nn.Module):
    """Answers ``labels.QUESTIONS`` from a block's image tokens; used in training only."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.sizes = tuple(QUESTIONS.values())
        self.norm = nn.LayerNorm(hidden)
        self.answers = nn.Linear(hidden, sum(self.sizes))

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over the questions; hidden (B, tokens, h), labels (B, tokens, questions)."""
        logits = self.answers(self.norm(hidden)).split(self.sizes, dim=-1)
        losses = []
        for each, answers in zip(logits, labels.long().unbind(-1), strict=True):
            entropy = F.cross_entropy(each.flatten(0, 1), answers.flatten(), ignore_index=IGNORED, reduction="sum")
            # Each over its own tokens, so that the few letters count as much as the wide background.
            losses.append(entropy / (answers != IGNORED).sum().clamp(min=1))
        return torch.stack(losses).mean()


def initialise(model: Flux1) -> None:
    """Modulation, the guidance input and the output start at zero, so that the network starts as nothing but skips."""
    quiet = [*model.modulation_layers().values(), model.final_layer.linear]
    if model.guidance_in is not None:
        quiet.append(model.guidance_in.out_layer)
    for layer in quiet:
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)


def _compiled(model: Flux1, recipe: FlowRecipe) -> Callable[[Tensor, Tensor, TextBatch, Tensor | None], Tensor]:
    """The velocity in mixed precision, compiled for the native size where the recipe says so."""
    fast = torch.compile(predict_velocity, dynamic=False) if recipe.compile else predict_velocity
    native = (NATIVE[1] // 8, NATIVE[0] // 8)

    def velocity(noisy: Tensor, times: Tensor, text: TextBatch, guidance: Tensor | None) -> Tensor:
        run = fast if noisy.shape[-2:] == native else predict_velocity
        with mixed_precision(noisy.device):
            return run(model, noisy, times, text, guidance)

    return velocity
