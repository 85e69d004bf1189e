"""From options to the engine's own terms: device, dtype, the opened model, and the request."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..images import read_mask, read_picture
from ..memory.metering import Meter, NoMeter
from ..memory.plan import StagePlan
from ..memory.policy import read_policy
from ..pipelines.parts import open_autoencoder, open_transformer
from ..pipelines.prompt_cache import PromptCache
from ..pipelines.prompt_folder import FolderStore
from ..pipelines.prompts import open_text_encoders
from ..pipelines.step_cache import StepCache
from ..pipelines.text_to_image import FluxModel, Request
from .files import ModelFiles

__all__ = [
    "Desk", "Job", "Warn", "as_numbers", "as_pixels", "beginning_of", "channels_first", "guide_of", "make", "make_job",
    "mask_of", "open_model", "picture_of", "request_of", "resolve_device", "strengths_of",
]  # fmt: skip

Warn = Callable[[str], None]

BYTE_MAX = 255
MAKERS = {  # modules whose ``make`` turns options and an opened model into a job
    "generate": ".engine",
    "fill": ".filling",
    "outpaint": ".filling",
    "control": ".controlling",
    "redux": ".styling",
    "edit": ".editing",
}
DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class Job:
    """What a command draws.

    Attributes:
        model: Opened.
        request: What to draw and how.
        finish: Makes of a picture (H, W, 3), in bytes, what is written; None for the picture itself.
        facts: Further settings, which go into the picture.
        files: That were read beside the model's and the pictures, by role.
        profile: ICC profile of what is written; None for none.
        before: What was planned of stages that ran while the job was made.
        meter: Of those and of the ones to come.
    """

    model: FluxModel
    request: Request
    finish: Callable[[Tensor], Tensor] | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    profile: bytes | None = None
    before: tuple[StagePlan, ...] = ()
    meter: Meter | NoMeter = field(default_factory=NoMeter)


@dataclass(frozen=True)
class Desk:
    """What a command makes its job of, beside its options."""

    model: FluxModel
    files: ModelFiles
    seed: int
    warn: Warn
    meter: Meter | NoMeter

    @property
    def device(self) -> torch.device:
        return self.model.transformer.device

    @property
    def side(self) -> int:
        """Of the pictures that the model is used to, in pixels."""
        return self.model.transformer.spec.native_side


def open_model(
    files: ModelFiles, device: str, dtype: str, variant: str | None = None, cache: PromptCache | None = None
) -> FluxModel:
    """Open every part; reads headers only.

    Args:
        files: From ``model_files``.
        device: As the user named it.
        dtype: A key of ``DTYPES``.
        variant: What the transformer is, where its tensors cannot tell.
        cache: Of prompts' embeddings.

    Raises:
        UserError: A file is missing, damaged or another part, the parts do not fit, or there is no such device.
    """
    place, chosen = resolve_device(device), DTYPES[dtype]
    transformer = open_transformer(files.transformer, place, chosen, variant=variant)
    autoencoder = open_autoencoder(files.autoencoder, place, chosen)
    text = open_text_encoders(
        files.clip, files.t5, files.clip_tokenizer, files.t5_tokenizer, place, chosen, transformer.given, cache
    )
    return FluxModel(transformer, text, autoencoder)


def resolve_device(name: str) -> torch.device:
    """The device of a name that ``arguments.DEVICES`` lists.

    Raises:
        UserError: There is no such device here.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"there is no device {name!r}; choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= available:
        found = f"torch sees {available} CUDA devices" if available else "torch sees no CUDA device"
        raise UserError(f"{name} was asked for, but {found} here; use --device cpu, or install torch for your GPU")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("mps was asked for, but torch sees no Apple GPU here; use --device cpu")
    return device


def make_job(arguments: argparse.Namespace, files: ModelFiles, seed: int, warn: Warn) -> Job:
    """Open the model, and make of a command's options what it will draw.

    Args:
        arguments: Of one of the commands that draw.
        files: From ``model_files``.
        seed: Of the first picture.
        warn: Told what is done otherwise than asked.

    Raises:
        UserError: Something cannot be opened, or the options do not fit each other.
    """
    module = importlib.import_module(MAKERS[arguments.command], __package__)
    cache = None if arguments.prompt_cache is None else PromptCache(FolderStore(arguments.prompt_cache, tell=warn))
    model = open_model(files, arguments.device, arguments.dtype, arguments.variant, cache)
    meter = Meter(model.transformer.device) if arguments.report else NoMeter()
    job: Job = module.make(arguments, Desk(model, files, seed, warn, meter))
    return replace(job, meter=meter)


def make(arguments: argparse.Namespace, desk: Desk) -> Job:
    """What ``generate`` draws."""
    image = None if arguments.image is None else channels_first(picture_of(arguments.image))
    mask = None if arguments.mask is None else mask_of(arguments.mask)[None]
    size = {"width": arguments.width, "height": arguments.height}
    return Job(desk.model, request_of(arguments, desk.seed, image=image, mask=mask, denoise=arguments.denoise, **size))


def request_of(arguments: argparse.Namespace, seed: int, **fields: Any) -> Request:
    """The request that the options make which all commands have, with further fields."""
    return Request(
        prompt=arguments.prompt,
        clip_prompt=arguments.clip_prompt,
        negative=arguments.negative,
        steps=arguments.steps,
        guidance=arguments.guidance,
        cfg=arguments.cfg,
        seed=seed,
        count=arguments.count,
        schedule=arguments.scheduler,
        mu=arguments.mu,
        sigmas=arguments.sigmas,
        solver=arguments.solver,
        noise=arguments.noise,
        memory=read_policy(arguments.policy),
        step_cache=step_cache_of(arguments),
        attention=arguments.attention,
        compiled=arguments.compile,
        **fields,
    )


def step_cache_of(arguments: argparse.Namespace) -> StepCache | None:
    """When steps may be skipped, by the options; None where they ask for no step cache.

    Raises:
        UserError: A number is out of range, or there is one for a cache that was not asked for.
    """
    limits = {"max_skips": arguments.step_cache_skips, "warmup": arguments.step_cache_warmup}
    given = {name: value for name, value in limits.items() if value is not None}
    if arguments.step_cache is not None:
        return StepCache(threshold=arguments.step_cache, **given)
    if given:
        raise UserError("--step-cache-skips and --step-cache-warmup say how --step-cache works; give --step-cache 0.1")
    return None


def guide_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """When and where an input acts, by the options."""
    region = getattr(arguments, "region", None)
    return {
        "start": arguments.start,
        "end": arguments.end,
        "region": None if region is None else mask_of(region)[None],
    }


def beginning_of(arguments: argparse.Namespace, picture: Tensor) -> dict[str, Any]:
    """What a request begins with by ``--denoise``: a picture (1, H, W, 3), or noise alone at 1."""
    return {} if arguments.denoise == 1 else {"image": channels_first(picture), "denoise": arguments.denoise}


def strengths_of(arguments: argparse.Namespace, count: int) -> list[float]:
    """A strength for each of several pictures.

    Raises:
        UserError: There is neither one for all nor one for each.
    """
    given: list[float] = arguments.strength
    if len(given) not in (1, count):
        raise UserError(
            f"--strength has {len(given)} numbers for {count} picture{'s' if count > 1 else ''}; give one for all, or "
            "one for each"
        )
    return given * count if len(given) == 1 else given


def picture_of(path: Path) -> Tensor:
    """A picture (1, H, W, 3) in 0..1.

    Raises:
        UserError: It cannot be read.
    """
    return torch.from_numpy(read_picture(path))[None]


def mask_of(path: Path) -> Tensor:
    """A mask (1, H, W) in 0..1, white is 1.

    Raises:
        UserError: It cannot be read.
    """
    return torch.from_numpy(read_mask(path))[None]


def channels_first(picture: Tensor) -> Tensor:
    """(B, H, W, 3) to (B, 3, H, W)."""
    return picture.permute(0, 3, 1, 2).contiguous()


def as_numbers(pixels: Tensor) -> Tensor:
    """Bytes (H, W, 3) to (1, H, W, 3) in 0..1."""
    return pixels[None].float() / BYTE_MAX


def as_pixels(picture: Tensor) -> Tensor:
    """(1, H, W, 3) in 0..1 to bytes (H, W, 3); of what came from bytes, the same again."""
    return (picture[0].clamp(0, 1) * BYTE_MAX).round().to(torch.uint8)
