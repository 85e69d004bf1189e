"""Train Foundry Mini's autoencoder on drawn scenes.

Two phases. First encoder and decoder together: L1 + L2 on random crops, a little noise on the latents so that the
decoder forgives the transformer's errors, and a pull of every latent channel towards mean 0 and variance 1 in the
transformer's space, so that FLUX.1's fixed scale and shift fit. Then the latents are evened out, and the decoder goes
on alone, on a frozen encoder, so that latents cached after the first phase stay valid.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.autoencoder import Autoencoder
from ..ops.dtypes import mixed_precision
from ..specs.autoencoder import MINI
from ..training.checkpoints import load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer
from ..training.ema import Ema
from ..training.muon import Muon, split_parameters
from .language import random_request
from .scenes import draw, lay_out
from .whitening import evening_map, fold_map

__all__ = ["AutoencoderRecipe", "pixels_from_bytes", "psnr_on_fresh_scenes", "train_autoencoder"]

log = logging.getLogger(__name__)

LATENT_NOISE = 0.08  # standard deviation in the transformer's space, where latents have variance 1
MOMENT_WEIGHT = 0.02
SQUARED_WEIGHT = 4.0  # of L2 beside L1
CANVASES = ((128, 128), (128, 128), (128, 128), (96, 96), (160, 128), (192, 192))
CROPS_PER_SCENE = 2
GRADIENT_NORM = 1.0
SEED_STRIDE = 1_000_003  # between the seeds of two runs, more than any run has steps
EVENING_BATCH, EVENING_BATCHES, EVENING_SIDE = 32, 16, 96  # scenes that the latents' spread is measured on


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """Numbers of one training run.

    Attributes:
        joint_steps: Steps that train encoder and decoder.
        decoder_steps: Steps after them that train the decoder alone.
        batch: Crops a step.
        crop: Side of a crop in pixels, a multiple of 8.
        learning_rate: Peak of Muon's; one warm-up and one cosine descent in each phase.
        ema_decay: Of the averaged weights that are kept.
        save_every: Steps between checkpoints.
    """

    joint_steps: int = 2000
    decoder_steps: int = 4000
    batch: int = 32
    crop: int = 64
    learning_rate: float = 4e-3
    ema_decay: float = 0.998
    save_every: int = 250


def pixels_from_bytes(image: np.ndarray) -> Tensor:
    """RGB bytes (H, W, 3) to floats (3, H, W) in [-1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1


def crops(rng: random.Random, count: int, side: int) -> Tensor:
    """Random crops (count, 3, side, side) of fresh scenes, in channels-last memory."""
    pieces: list[Tensor] = []
    while len(pieces) < count:
        width, height = rng.choice(CANVASES)
        scene = draw(lay_out(random_request(rng), rng, width, height))
        for _ in range(CROPS_PER_SCENE):
            top, left = rng.randint(0, height - side), rng.randint(0, width - side)
            pieces.append(pixels_from_bytes(scene[top : top + side, left : left + side]))
    return torch.stack(pieces[:count]).contiguous(memory_format=torch.channels_last)


def train_autoencoder(
    checkpoint: Path,
    recipe: AutoencoderRecipe,
    *,
    seed: int = 0,
    device: str = "cpu",
    report: Callable[[str], None] = log.info,
) -> Autoencoder:
    """Train to the recipe's end, from ``checkpoint`` if it exists.

    Returns:
        The autoencoder with its averaged weights.
    """
    torch.manual_seed(seed)
    model = Autoencoder(MINI).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    _fix_posterior(model)
    average = Ema(model, recipe.ema_decay)
    optimizer = Muon(split_parameters(model, _is_matrix), recipe.learning_rate)
    start = 0
    if checkpoint.exists():
        tensors, meta = load_checkpoint(checkpoint)
        start = int(meta["step"])
        model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        average.load({k[8:]: v for k, v in tensors.items() if k.startswith("average.")}, int(meta["updates"]))
        unpack_optimizer(optimizer, tensors, "optimizer.")
        report(f"autoencoder: resumed at step {start}")
    last = recipe.joint_steps + recipe.decoder_steps
    began = time.monotonic()
    for step in range(start, last):
        joint = step < recipe.joint_steps
        if step == recipe.joint_steps:
            average.copy_to(model)  # the encoder that stays is the averaged one
            _even_out(model, seed)
            average = Ema(model, recipe.ema_decay)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        model.encoder.requires_grad_(joint)
        # Streams of their own for each step: a resumed run draws what an unbroken one would have.
        torch.manual_seed(seed * SEED_STRIDE + step)
        batch = crops(random.Random(f"{seed}/{step}"), recipe.batch, recipe.crop).to(device)
        loss, error = _loss(model, batch, joint=joint)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        average.update(model)
        done = step + 1
        if done % 50 == 0:
            rate = (done - start) / (time.monotonic() - began)
            report(f"autoencoder {done}/{last}: {_psnr(error):.2f} dB on the batch, {rate:.2f} steps/s")
        if done % recipe.save_every == 0 or done == last or done == recipe.joint_steps:
            save_checkpoint(
                checkpoint,
                {f"model.{k}": v for k, v in model.state_dict().items()}
                | {f"average.{k}": v for k, v in average.weights.items()}
                | pack_optimizer(optimizer, "optimizer."),
                {"step": done, "joint_steps": recipe.joint_steps, "updates": average.updates},
            )
    average.copy_to(model)
    return model.eval()


@torch.no_grad()
def _even_out(model: Autoencoder, seed: int) -> None:
    """Fold the map that evens out the latents into the model; see ``whitening``."""
    rng = random.Random(f"even/{seed}")
    device = next(model.parameters()).device
    batches = [model.encode(crops(rng, EVENING_BATCH, EVENING_SIDE).to(device)) for _ in range(EVENING_BATCHES)]
    fold_map(model, *evening_map(torch.cat(batches)))


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Convolutions between hidden layers; the outermost ones and all vectors are AdamW's."""
    return parameter.ndim == 4 and "conv_in" not in name and "conv_out" not in name


def _fix_posterior(model: Autoencoder) -> None:
    """Make the encoder's log-variance the constant that the latent noise has."""
    channels = model.spec.latent_channels
    own_space = LATENT_NOISE / model.spec.scale
    conv = model.encoder.conv_out
    with torch.no_grad():
        conv.weight[channels:] = 0
        assert conv.bias is not None
        conv.bias[channels:] = 2 * math.log(own_space)


def _loss(model: Autoencoder, batch: Tensor, *, joint: bool) -> tuple[Tensor, Tensor]:
    """Training loss, and the mean squared error of pixels in 0..1."""
    with mixed_precision(batch.device):
        latents = model.to_model(model.encode_mean(batch).float())
        noisy = latents + LATENT_NOISE * torch.randn_like(latents)
        decoded = model.decode(noisy).float()
    difference = (decoded - batch) / 2
    squared = difference.square().mean()
    loss = difference.abs().mean() + SQUARED_WEIGHT * squared
    if joint:
        mean = latents.mean(dim=(0, 2, 3))
        variance = latents.var(dim=(0, 2, 3))
        loss = loss + MOMENT_WEIGHT * (mean.square() + (variance - 1).square()).mean()
    return loss, squared.detach()


def _schedule(step: int, recipe: AutoencoderRecipe) -> float:
    """Warm-up over 2 % of the phase, then a cosine to 2 % of the peak."""
    joint = step < recipe.joint_steps
    length = recipe.joint_steps if joint else recipe.decoder_steps
    done = (step if joint else step - recipe.joint_steps) / length
    return min(1.0, done / 0.02 + 0.01) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def _psnr(squared_error: Tensor) -> float:
    return -10 * math.log10(max(float(squared_error), 1e-12))


@torch.inference_mode()
def psnr_on_fresh_scenes(
    model: Autoencoder, count: int = 64, seed: int = 1_000_000, device: torch.device | str = "cpu"
) -> float:
    """PSNR in dB over whole 128x128 scenes that training never drew, after clamping and rounding to bytes."""
    rng = random.Random(seed)
    total = 0.0
    for _ in range(count):
        image = draw(lay_out(random_request(rng, held_out=True), rng))
        pixels = pixels_from_bytes(image)[None].to(device).contiguous(memory_format=torch.channels_last)
        decoded = model.decode(model.encode(pixels)).clamp(-1, 1)
        restored = ((decoded + 1) * 127.5).round()
        total += float(F.mse_loss(restored / 255, (pixels + 1) / 2))
    return -10 * math.log10(total / count)
