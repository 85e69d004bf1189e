"""Starting noise, drawn on the CPU so that one seed gives one picture on every device.

Shapes: B images, C latent channels, h and w latent height and width.

torch's CPU generator (mt19937) reads only the low 32 bits of a seed: seeds 2^32 apart draw the same noise. Every
implementation that draws on the CPU shares this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["NOISE_STYLES", "NoiseStyle", "check_seed", "comfyui_batch_noise", "draw_noise", "image_seeds"]

LatentShape = tuple[int, int, int]
NoiseStyle = Callable[[LatentShape, Sequence[int], torch.dtype], Tensor]

SEEDS = 2**64  # seeds are 0 .. SEEDS - 1, all that torch.Generator takes without a sign


def check_seed(seed: int) -> int:
    """The seed, checked.

    Raises:
        UserError: If it is outside 0..2**64 - 1.
    """
    if not 0 <= seed < SEEDS:
        raise UserError(f"Seed {seed} is outside 0 to {SEEDS - 1} (2^64 - 1). Choose one in that range.")
    return seed


def image_seeds(seed: int, count: int) -> list[int]:
    """Seeds of a batch's images: seed, seed + 1, ..., going on at 0 after 2**64 - 1.

    Raises:
        UserError: If the first seed is outside 0..2**64 - 1.
    """
    check_seed(seed)
    return [(seed + index) % SEEDS for index in range(count)]


def draw_noise(
    shape: LatentShape, seeds: Sequence[int], style: str = "comfyui", *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Standard normal noise for a batch.

    Args:
        shape: One latent's (C, h, w). FLUX.1 latents are unpacked here: (16, H/8, W/8) for H x W pixels.
        seeds: One for each image. But for "comfyui_batch", image k equals a single run with its seed.
        style: A key of ``NOISE_STYLES``.

            - "comfyui": fp32 for each image, as ComfyUI draws for a batch of one.
            - "comfyui_batch": ComfyUI's single draw for a whole batch, from the first seed; the others only count.
            - "bfl": bf16 for each image, as Black Forest Labs' FLUX.1 code. Equal to "comfyui" rounded to bf16 when a
              latent's size is a multiple of 16, as FLUX's are.
            - "diffusers": in ``dtype`` for each image, as FluxPipeline with a list of CPU generators, before packing.
        dtype: What "diffusers" draws in: there the dtype of the prompt's embeddings. Other styles do not read it.

    Returns:
        Noise (B, C, h, w) in fp32 on the CPU.

    Raises:
        UserError: If the style is unknown, there is no seed, or a seed is outside its range.
    """
    if style not in NOISE_STYLES:
        raise UserError(f"There is no noise style {style!r}. Choose one of: {', '.join(NOISE_STYLES)}.")
    if not seeds:
        raise UserError("There is no seed to draw noise from. Give one for each image.")
    return NOISE_STYLES[style](shape, [check_seed(seed) for seed in seeds], dtype)


def comfyui_batch_noise(shape: LatentShape, seed: int, batch: int) -> Tensor:
    """ComfyUI's noise for a batch: one draw (batch, C, h, w) in fp32 (comfy/sample.py, prepare_noise).

    Args:
        shape: One latent's (C, h, w).
        seed: Seed of the whole batch.
        batch: Images.

    Raises:
        UserError: If the seed is outside 0..2**64 - 1.
    """
    return _normal((batch, *shape), check_seed(seed), torch.float32)


def _draw_comfyui(shape: LatentShape, seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
    del dtype
    return _draw_each(shape, seeds, torch.float32)


def _draw_comfyui_batch(shape: LatentShape, seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
    del dtype
    return comfyui_batch_noise(shape, seeds[0], len(seeds))


def _draw_bfl(shape: LatentShape, seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
    del dtype
    return _draw_each(shape, seeds, torch.bfloat16)


def _draw_each(shape: LatentShape, seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.cat([_normal((1, *shape), seed, dtype) for seed in seeds]).float()


def _normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")


NOISE_STYLES: dict[str, NoiseStyle] = {
    "comfyui": _draw_comfyui,
    "comfyui_batch": _draw_comfyui_batch,
    "bfl": _draw_bfl,
    "diffusers": _draw_each,
}
