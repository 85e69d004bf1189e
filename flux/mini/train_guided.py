"""Train the embedded models that pictures guide, each from ``flux1-mini``: Fill, Canny, Depth, Kontext and Redux.

All learn by flow matching on ``examples`` drawn as they are needed. Guidance is drawn at random, so that they do as
well with any; one prompt in ten is empty, so that classifier-free guidance works. Canny and Depth see no control in one
case of ten, so that a strength between 0 and 1 has something to blend with. As in the text model's training, a middle
block is asked what lies at every token, of the picture and of references alike: what a thing in a picture is called,
which an instruction needs, is learned early that way.

Shapes: B batch, C latent channels, h and w in latent cells.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.channels import fill_channels
from ..adapters.control_lora import ControlLora, attached, control_lora_of, control_lora_tensors
from ..models.autoencoder import Autoencoder
from ..models.flux1 import Flux1
from ..ops.dtypes import mixed_precision
from ..sampling.packing import pack
from ..specs.flux1 import MINI, Flux1Spec
from ..training.flow import TextBatch, flow_targets, predict_velocity, sample_times
from .dataset import CANVASES, NATIVE
from .examples import Image, control_example, edit_example, fill_example
from .labels import IGNORED, QUESTIONS, TOKEN, token_labels
from .loop import FlowRecipe, Report, run_stage
from .scenes import Scene
from .train_autoencoder import pixels_from_bytes
from .train_flow import ANSWERS_WEIGHT, TAPPED_BLOCK, FrozenEncoders, SceneHead

__all__ = [
    "DRAWN_BATCHES", "GUIDANCE_RANGE", "Bench", "Trainee", "channels_of_hole", "cut_lora", "extracted_lora", "noised",
    "random_canvas", "train_control_lora", "train_variant", "trained_lora_tensors", "widened_start",
]  # fmt: skip

OTHER_SIZES_SHARE = 0.4  # of the steps, on another canvas than the native one
DRAWN_BATCHES = 600  # then they come again, with other noise: to draw and encode them takes a third of a step
EMPTY_SHARE = 0.1
UNGUIDED_SHARE = 0.1
GUIDANCE_RANGE = (1.0, 6.0)
# Lower than the text model's: where things are is told, edges are still to be drawn.
TIME_MEAN, TIME_DEVIATION = 0.6, 1.4
BYTE = 255


@dataclass(frozen=True)
class Batch:
    """What a guided model is shown: latents to learn, prompts, and what guides it.

    Attributes:
        labels: What lies at each image token and each reference token (B, tokens, questions); see ``labels``.
    """

    latents: Tensor
    text: TextBatch
    labels: Tensor
    channels: Tensor | None = None
    references: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Bench:
    """What every stage works with: frozen encoders, autoencoder, and where it runs."""

    autoencoder: Autoencoder
    encoders: FrozenEncoders
    device: str

    @torch.no_grad()
    def latents(self, pictures: Sequence[Image]) -> Tensor:
        """Latents (B, C, h, w) of pictures (H, W, 3) of one size, in the transformer's space."""
        pixels = torch.stack([pixels_from_bytes(picture) for picture in pictures])
        return self.autoencoder.encode(pixels.contiguous(memory_format=torch.channels_last)).to(self.device)

    def text(self, prompts: Sequence[str], rng: random.Random) -> TextBatch:
        """Encoded prompts, a share of them empty."""
        return self.encoders.encode(["" if rng.random() < EMPTY_SHARE else prompt for prompt in prompts])

    @cached_property
    def unasked(self) -> TextBatch:
        """The empty prompt."""
        return self.encoders.encode([""])


def random_canvas(rng: random.Random) -> tuple[int, int]:
    """Width and height of a step's pictures."""
    return NATIVE if rng.random() > OTHER_SIZES_SHARE else rng.choice(CANVASES)


class Trainee:
    """Makes a variant's batches.

    Args:
        task: What it learns: a spec's ``task``.
        bench: Encoders.
        size: Examples a batch.
        seed: Of what is drawn.
    """

    def __init__(self, task: str, bench: Bench, size: int, seed: str) -> None:
        self.task, self.bench, self.size, self.seed = task, bench, size, seed
        self._kept: dict[int, Batch] = {}

    def at(self, step: int) -> tuple[Batch, random.Random]:
        """The batch of one step, and a random state for its noise: functions of seed and step alone."""
        index = step % DRAWN_BATCHES
        if index not in self._kept:
            self._kept[index] = self._drawn(random.Random(f"{self.seed}/{index}"))
        return self._kept[index], random.Random(f"{self.seed}/noise/{step}")

    def _drawn(self, rng: random.Random) -> Batch:
        canvas = random_canvas(rng)
        makers: dict[str, Callable[[random.Random, tuple[int, int]], Batch]] = {
            "fill": self._fill, "canny": self._control, "depth": self._control, "edit": self._edit,
        }  # fmt: skip
        return makers[self.task](rng, canvas)

    def _fill(self, rng: random.Random, canvas: tuple[int, int]) -> Batch:
        examples = [fill_example(rng, canvas) for _ in range(self.size)]
        masks = torch.from_numpy(np.stack([example.mask for example in examples]))[:, None]
        pictures = [example.picture for example in examples]
        channels = channels_of_hole(self.bench, pictures, masks)
        return Batch(
            self.bench.latents(pictures),
            self.bench.text([e.prompt for e in examples], rng),
            self._labels([[example.scene] for example in examples], canvas),
            channels=channels,
        )

    def _control(self, rng: random.Random, canvas: tuple[int, int]) -> Batch:
        examples = [control_example(rng, canvas, self.task) for _ in range(self.size)]
        channels = self.bench.latents([example.control for example in examples])
        seen = torch.tensor([rng.random() >= UNGUIDED_SHARE for _ in examples], device=channels.device)
        return Batch(
            self.bench.latents([example.picture for example in examples]),
            self.bench.text([example.prompt for example in examples], rng),
            self._labels([[example.scene] for example in examples], canvas),
            channels=channels * seen[:, None, None, None],
        )

    def _edit(self, rng: random.Random, canvas: tuple[int, int]) -> Batch:
        """Instructions; pairs of references are few, and go into batches of their own."""
        joins = rng.random() < JOINS_SHARE
        kinds = ("join",) if joins else ALONE
        examples = [edit_example(rng, canvas, kind=rng.choices(kinds, WEIGHTS[kinds])[0]) for _ in range(self.size)]
        references = [
            self.bench.latents([example.references[k] for example in examples]) for k in range(2 if joins else 1)
        ]
        prompts = self.bench.encoders.encode([example.prompt for example in examples])
        labels = self._labels([[example.after, *example.sources] for example in examples], canvas)
        pictures = self.bench.latents([example.picture for example in examples])
        return Batch(pictures, prompts, labels, references=references)

    def _labels(self, scenes: Sequence[Sequence[Scene | None]], canvas: tuple[int, int]) -> Tensor:
        """Labels of each example's pictures one behind another; none of a picture that shows no scene."""
        tokens = (canvas[0] // TOKEN) * (canvas[1] // TOKEN)
        unknown = np.full((tokens, len(QUESTIONS)), IGNORED, np.uint8)
        rows = [[unknown if scene is None else token_labels(scene) for scene in own] for own in scenes]
        return torch.from_numpy(np.stack([np.concatenate(own) for own in rows])).to(self.bench.device)


JOINS_SHARE = 0.1
ALONE = ("recolour", "remove", "add", "background", "nothing")
WEIGHTS = {("join",): (1.0,), ALONE: (4.0, 3.0, 4.0, 3.0, 1.5)}


def channels_of_hole(bench: Bench, pictures: Sequence[Image], masks: Tensor) -> Tensor:
    """Fill's further channels (B, C + 64, h, w): the picture without what is masked, and the mask 8 x 8 to a cell.

    Args:
        bench: Encodes.
        pictures: (H, W, 3) each.
        masks: (B, 1, H, W), 1 where the picture is painted anew.
    """
    pixels = torch.stack([pixels_from_bytes(picture) for picture in pictures])
    with torch.no_grad():
        hidden = bench.autoencoder.encode((pixels * (1 - masks)).contiguous(memory_format=torch.channels_last))
    return fill_channels(hidden, masks).to(bench.device)


def widened_start(spec: Flux1Spec, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights for a variant with more input channels, which do nothing at first."""
    start = {name: tensor.float().clone() for name, tensor in base.items()}
    weight = start["img_in.weight"]
    start["img_in.weight"] = F.pad(weight, (0, spec.in_channels - weight.shape[1]))
    return start


def train_variant(
    folder: Path,
    spec: Flux1Spec,
    start: Mapping[str, Tensor],
    bench: Bench,
    recipe: FlowRecipe,
    *,
    seed: int,
    report: Report,
    pull: float = 0.0,
) -> Flux1:
    """Train a variant from another model's weights; returns it with averaged weights.

    With a ``pull`` it learns to give in one pass what classifier-free guidance of 1 / (1 - pull) gives in two: what the
    prompt changes in its own prediction is added to what it learns (Tang et al. 2025, model guidance).

    Args:
        folder: Of its checkpoint.
        spec: Which variant.
        start: Weights of a FLUX.1 of the same sizes; further input channels begin at zero.
        bench: Encoders.
        recipe: Steps and rates.
        seed: Of what is drawn.
        report: Told how far it is.
        pull: 0 to less than 1.
    """
    torch.manual_seed(seed)
    model = Flux1(spec).to(bench.device)
    model.load_state_dict(widened_start(spec, start))
    batches = Trainee(spec.task, bench, recipe.batch, f"{spec.name}/{seed}")
    head = SceneHead(spec.hidden).to(bench.device)
    seen: list[Tensor] = []
    tap = model.single_blocks[TAPPED_BLOCK].register_forward_hook(lambda _block, _inputs, output: seen.append(output))

    def loss(step: int) -> Tensor:
        batch, rng = batches.at(step)
        noisy, times, guidance, target = noised(batch.latents, rng)
        seen.clear()
        with mixed_precision(noisy.device):
            predict = partial(
                predict_velocity, model, noisy, times,
                guidance=guidance, channels=batch.channels, references=batch.references,
            )  # fmt: skip
            error = _error(predict, batch, target, bench, pull)
        answers = head.loss(seen[0][:, batch.text.tokens.shape[1] :].float(), batch.labels)
        return error + ANSWERS_WEIGHT * answers

    try:
        return run_stage(spec.name, model, loss, folder / f"{spec.name}.safetensors", recipe, seed, report, head)
    finally:
        tap.remove()


def _error(predict: Callable[..., Tensor], batch: Batch, target: Tensor, bench: Bench, pull: float) -> Tensor:
    """Of the velocity that ``predict`` gives for a batch's prompts; see ``train_variant`` for ``pull``."""
    velocity = predict(text=batch.text)
    if pull:
        with torch.no_grad():
            target = target + pull * (velocity - predict(text=bench.unasked.repeated(len(target))))
    return F.mse_loss(velocity.float(), target)


def noised(
    latents: Tensor, rng: random.Random, mean: float = TIME_MEAN, strengths: tuple[float, float] = GUIDANCE_RANGE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, times of a logit-normal distribution with this mean, guidance of a range, and packed targets."""
    count, device = len(latents), latents.device
    times = sample_times(count, mean=mean, deviation=TIME_DEVIATION).to(device)
    noisy, target = flow_targets(latents, torch.randn_like(latents), times)
    guidance = torch.tensor([rng.uniform(*strengths) for _ in range(count)], device=device)
    return noisy, times, guidance, pack(target)


LORA_RANK = 48  # in training
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
STROKE = "/"  # in place of the dots, which torch has for itself


class TrainedLora(nn.Module):
    """A control LoRA's tensors as the parameters of a module, and the LoRA itself over them."""

    def __init__(self, lora: ControlLora) -> None:
        super().__init__()
        for name, tensor in control_lora_tensors(lora).items():
            self.register_parameter(name.replace(".", STROKE), nn.Parameter(tensor.detach().clone()))

    def named(self) -> dict[str, Tensor]:
        """The tensors by Black Forest Labs' names."""
        return {name.replace(STROKE, "."): tensor for name, tensor in self.named_parameters()}

    def lora(self, name: str) -> ControlLora:
        """The LoRA whose tensors these are."""
        return control_lora_of(self.named(), name)


def trained_lora_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A trained LoRA's state dict by Black Forest Labs' names."""
    return {name.replace(STROKE, "."): tensor for name, tensor in state.items()}


def extracted_lora(base: Mapping[str, Tensor], full: Mapping[str, Tensor], rank: int, name: str) -> ControlLora:
    """What sets a control model apart from a text model, as a control LoRA: of each matrix the best approximation.

    The difference of two weights is cut to ``rank`` by its singular values (Eckart and Young 1936), which are shared
    out evenly between both factors; differences of biases and the control model's norms are taken as they are.

    Args:
        base: A text model's weights by name.
        full: Those of a control model of the same sizes, whose ``img_in`` has more columns.
        rank: Of every branch, less where a matrix has fewer rows or columns.
        name: What the LoRA is called.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in full.items():
        if key.endswith(".scale"):
            tensors[key] = tensor.clone()
        elif key.endswith(".weight"):
            layer = key.removesuffix(".weight")
            own = F.pad(base[key], (0, tensor.shape[1] - base[key].shape[1]))
            tensors[f"{layer}{DOWN}"], tensors[f"{layer}{UP}"] = _factors(tensor - own, rank)
            tensors[f"{layer}.lora_B.bias"] = full[f"{layer}.bias"] - base[f"{layer}.bias"]
    return control_lora_of(tensors, name)


def cut_lora(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A LoRA's tensors by Black Forest Labs' names, each branch cut to ``rank`` by its product's singular values.

    Args:
        tensors: Of a higher rank.
        rank: Of every branch, less where a matrix has fewer rows or columns.
    """
    cut = dict(tensors)
    for key in tensors:
        if key.endswith(DOWN):
            up = f"{key.removesuffix(DOWN)}{UP}"
            cut[key], cut[up] = _factors(tensors[up] @ tensors[key], rank)
    return cut


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Down (r, in) and up (out, r), whose product is the nearest to a matrix (out, in) of this rank."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def train_control_lora(
    folder: Path,
    task: str,
    base: Mapping[str, Tensor],
    full: Mapping[str, Tensor],
    bench: Bench,
    recipe: FlowRecipe,
    *,
    seed: int,
    report: Report,
    pull: float = 0.0,
) -> dict[str, Tensor]:
    """Train a control LoRA on the text model, from what can be extracted of the control model.

    Args:
        folder: Of its checkpoint.
        task: What it follows.
        base: The text model's weights.
        full: The control model's.
        bench: Encoders.
        recipe: Steps and rates.
        seed: Of what is drawn.
        report: Told how far it is.
        pull: See ``train_variant``.

    Returns:
        Its averaged tensors by Black Forest Labs' names.
    """
    torch.manual_seed(seed)
    model = Flux1(MINI).to(bench.device).requires_grad_(False)
    model.load_state_dict(base)
    name = f"{task}-lora"
    trained = TrainedLora(extracted_lora(base, full, LORA_RANK, name)).to(bench.device)
    batches = Trainee(task, bench, recipe.batch, f"{name}/{seed}")

    def loss(step: int) -> Tensor:
        batch, rng = batches.at(step)
        noisy, times, guidance, target = noised(batch.latents, rng)
        with (
            mixed_precision(noisy.device),
            attached(model, [trained.lora(name)]),
        ):
            predict = partial(predict_velocity, model, noisy, times, guidance=guidance, channels=batch.channels)
            return _error(predict, batch, target, bench, pull)

    run_stage(name, trained, loss, folder / f"{name}.safetensors", recipe, seed, report)
    return {key: tensor.detach() for key, tensor in trained.named().items()}
