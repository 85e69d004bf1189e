"""A prompt to pictures, in numbered steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import MismatchError, UserError
from ..models.autoencoder import Autoencoder
from ..models.flux1 import Flux1
from ..sampling.noise import draw_noise, image_seeds
from ..sampling.schedules import check_sigmas, flux1_mu, make_schedule, shorten
from ..specs.autoencoder import AutoencoderSpec
from ..specs.flux1 import Flux1Spec
from .denoising import Hooks, denoise
from .parts import Part
from .prompts import EncodedPrompt, TextEncoders

__all__ = ["FluxModel", "Picture", "Request", "generate", "plan_sigmas", "round_size"]

GRID = 16  # pixels that a token covers along each side
MAX_SIDE = 8192
MAX_COUNT = 10_000


@dataclass(frozen=True)
class FluxModel:
    """The parts of one model, opened."""

    transformer: Part[Flux1Spec, Flux1]
    text: TextEncoders
    autoencoder: Part[AutoencoderSpec, Autoencoder]

    def __post_init__(self) -> None:
        spec = self.transformer.spec
        channels = self.autoencoder.spec.latent_channels
        if channels != spec.latent_channels:
            raise MismatchError(
                f"{self.autoencoder.path.name} has {channels} latent channels, {spec.title} works on "
                f"{spec.latent_channels}; choose {spec.autoencoder}"
            )
        widths = (self.text.t5.spec.width, self.text.clip.spec.width)
        if widths != (spec.context_width, spec.pooled_width):
            raise MismatchError(
                f"{spec.title} takes text of width {spec.context_width} and {spec.pooled_width}, but "
                f"{self.text.t5.path.name} and {self.text.clip.path.name} give {widths[0]} and {widths[1]}; "
                f"choose {' and '.join(spec.text_encoders)}"
            )


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw and how. ``None`` means the model's own default.

    Attributes:
        prompt: What to draw.
        clip_prompt: A prompt of its own for CLIP.
        negative: What to stay away from; takes effect with ``cfg`` other than 1.
        width: Pixels, rounded to a multiple of 16.
        height: Likewise.
        steps: Model evaluations, more for Heun.
        guidance: Of guidance-distilled models.
        cfg: True classifier-free guidance, two passes a step; 1 is off.
        seed: Of the first picture; each further one counts up.
        count: How many pictures.
        schedule: One of ``sampling.schedules.SCHEDULES``.
        mu: Shift of the schedule; None derives it from the size, as the model was trained.
        sigmas: Explicit times in place of steps and schedule.
        solver: One of ``sampling.solvers.SOLVERS``.
        noise: Whose noise to draw: one of ``sampling.noise.NOISE_STYLES``.
        image: Picture (1 or B, 3, H, W) in 0..1 to start from.
        denoise: How much of it to change, 0..1; 1 starts from pure noise.
        mask: (1 or B, 1, H, W) in 0..1, 1 where the picture may change.
    """

    prompt: str
    clip_prompt: str | None = None
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    cfg: float | None = None
    seed: int = 0
    count: int = 1
    schedule: str = "flux"
    mu: float | None = None
    sigmas: Sequence[float] | None = None
    solver: str = "euler"
    noise: str = "comfyui"
    image: Tensor | None = None
    denoise: float = 1.0
    mask: Tensor | None = None


@dataclass(frozen=True)
class Picture:
    """One result: ``pixels`` (H, W, 3) as bytes on the CPU, its seed, and every setting as it was used."""

    pixels: Tensor
    seed: int
    settings: dict[str, object] = field(default_factory=dict)


def generate(model: FluxModel, request: Request, hooks: Hooks | None = None) -> list[Picture]:
    """Draw a request's pictures, one after the other, so that each equals a run of its own with its seed.

    Raises:
        UserError: Something asked for cannot be done.
        Cancelled: The hooks said so.
        NumericError: A result was not finite.
    """
    hooks = hooks or Hooks()
    spec = model.transformer.spec
    warn = hooks.warn or (lambda _: None)
    # 1. Settle every setting.
    _check(request)
    width, height = _size(request, model.autoencoder.spec, warn)
    sigmas = plan_sigmas(spec, request, (width // GRID) * (height // GRID))
    guidance = request.guidance if request.guidance is not None else spec.guidance
    if request.guidance is not None and not spec.guidance_embedding:
        warn(f"{spec.title} has no guidance input: guidance {request.guidance:g} has no effect")
    cfg = _cfg(request)
    seeds = image_seeds(request.seed, request.count)
    # 2. Text.
    positive = model.text.encode(request.prompt, clip_prompt=request.clip_prompt, length=spec.t5_length, warn=warn)
    negative: EncodedPrompt | None = None
    if cfg != 1.0:
        negative = model.text.encode(request.negative or "", length=spec.t5_length, warn=warn)
    # 3. The picture to start from.
    start = _encode_start(model, request, width, height)
    cells = (height // model.autoencoder.spec.downscale, width // model.autoencoder.spec.downscale)
    mask = None if request.mask is None else _latent_mask(request.mask, cells)
    # 4. Each picture: noise, steps, pixels.
    pictures = []
    for index, seed in enumerate(seeds):
        hooks.check()
        noise = draw_noise((spec.latent_channels, *cells), [seed], request.noise)
        latents = None if start is None else start[index % len(start)][None]
        part_mask = None if mask is None else mask[index % len(mask)][None]
        if len(sigmas) > 1:
            result = denoise(
                model.transformer, positive, noise, sigmas, guidance=guidance, negative=negative, cfg=cfg,
                solver_name=request.solver, latents=latents, mask=part_mask, hooks=hooks,
            )  # fmt: skip
        else:
            result = latents if latents is not None else torch.zeros_like(noise)
        pictures.append(
            Picture(
                decode(model, result)[0], seed, _settings(request, spec, width, height, guidance, cfg, sigmas, seed)
            )
        )
    return pictures


@torch.inference_mode()
def decode(model: FluxModel, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) in the transformer's space to bytes (B, H, W, 3)."""
    part = model.autoencoder
    with part.resident() as autoencoder:
        pixels = autoencoder.decode(latents.to(part.device, part.dtype)).float().cpu()
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def plan_sigmas(spec: Flux1Spec, request: Request, tokens: int) -> list[float]:
    """The times of a run, from the request or the model's defaults; empty when there is nothing to do."""
    if request.sigmas is not None:
        return check_sigmas(request.sigmas)
    mu = request.mu
    if mu is None and spec.shifted_schedule:
        mu = flux1_mu(tokens)
    steps = spec.steps if request.steps is None else request.steps
    return shorten(lambda n: make_schedule(request.schedule, n, mu), steps, request.denoise)


def round_size(value: int) -> int:
    """The nearest multiple of 16, at least 16."""
    return max(GRID, int(math.floor(value / GRID + 0.5)) * GRID)


def _check(request: Request) -> None:
    if not 1 <= request.count <= MAX_COUNT:
        raise UserError(f"count is {request.count}; ask for 1 to {MAX_COUNT} pictures")
    for name in ("guidance", "cfg"):
        value = getattr(request, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name} is {value}; give a number from 0 up")
    if request.mask is not None and request.image is None:
        raise UserError("a mask was given without a picture; give the picture whose masked part is to change")
    if request.denoise < 1 and request.image is None:
        raise UserError(f"denoise is {request.denoise:g} without a picture to start from; give one, or use denoise 1")


def _size(request: Request, autoencoder: AutoencoderSpec, warn: object) -> tuple[int, int]:
    native = NATIVE_SIDES.get(autoencoder.name, 1024)
    given = (request.width, request.height)
    if request.image is not None:
        given = (request.width or request.image.shape[-1], request.height or request.image.shape[-2])
    sides = []
    for name, value in zip(("width", "height"), given, strict=True):
        asked = native if value is None else value
        if not 1 <= asked <= MAX_SIDE:
            raise UserError(f"{name} is {asked}; give 16 to {MAX_SIDE} pixels")
        side = round_size(asked)
        if side != asked and callable(warn):
            warn(f"{name} {asked} is not a multiple of {GRID}: {side} is used")
        sides.append(side)
    return sides[0], sides[1]


NATIVE_SIDES = {"flux1-mini-ae": 128}


def _cfg(request: Request) -> float:
    """True guidance: as asked for, else on (at a usual strength) when there is a negative prompt."""
    if request.cfg is not None:
        return request.cfg
    return DEFAULT_CFG if request.negative else 1.0


DEFAULT_CFG = 3.0


@torch.inference_mode()
def _encode_start(model: FluxModel, request: Request, width: int, height: int) -> Tensor | None:
    if request.image is None:
        return None
    image = request.image.float()
    if image.shape[-2:] != (height, width):
        image = torch.nn.functional.interpolate(image, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    part = model.autoencoder
    with part.resident() as autoencoder:
        return autoencoder.encode((image * 2 - 1).to(part.device, part.dtype)).float().cpu()


def _latent_mask(mask: Tensor, cells: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(mask.float(), cells, mode="bilinear", antialias=True)


def _settings(
    request: Request, spec: Flux1Spec, width: int, height: int, guidance: float | None, cfg: float,
    sigmas: Sequence[float], seed: int,
) -> dict[str, object]:  # fmt: skip
    """Everything that made a picture, as plain values."""
    return {
        "prompt": request.prompt,
        **({"clip_prompt": request.clip_prompt} if request.clip_prompt is not None else {}),
        **({"negative": request.negative or "", "cfg": cfg} if cfg != 1.0 else {}),
        "model": spec.name,
        "width": width,
        "height": height,
        "steps": max(0, len(sigmas) - 1),
        "guidance": guidance if spec.guidance_embedding else None,
        "seed": seed,
        "schedule": "explicit" if request.sigmas is not None else request.schedule,
        "solver": request.solver,
        "noise": request.noise,
        "denoise": request.denoise,
        "sigmas": [round(s, 6) for s in sigmas],
    }
