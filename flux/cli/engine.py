"""From options to the engine's own terms: device, dtype, the opened model, and the request."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from ..errors import UserError
from ..images import read_mask, read_picture
from ..pipelines.parts import open_autoencoder, open_transformer
from ..pipelines.prompts import open_text_encoders
from ..pipelines.text_to_image import FluxModel, Request
from .files import ModelFiles

__all__ = ["open_model", "request_of", "resolve_device"]

DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def open_model(files: ModelFiles, device: str, dtype: str, variant: str | None = None) -> FluxModel:
    """Open every part; reads headers only.

    Args:
        files: From ``model_files``.
        device: As the user named it.
        dtype: A key of ``DTYPES``.
        variant: What the transformer is, where its tensors cannot tell.

    Raises:
        UserError: A file is missing, damaged or another part, the parts do not fit, or there is no such device.
    """
    place, chosen = resolve_device(device), DTYPES[dtype]
    transformer = open_transformer(files.transformer, place, chosen, variant=variant)
    autoencoder = open_autoencoder(files.autoencoder, place, chosen)
    text = open_text_encoders(
        files.clip, files.t5, files.clip_tokenizer, files.t5_tokenizer, place, chosen, transformer.given
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
    return device


def request_of(arguments: argparse.Namespace, seed: int) -> Request:
    """The request that the options of ``generate`` make.

    Raises:
        UserError: A picture cannot be read.
    """
    return Request(
        prompt=arguments.prompt,
        clip_prompt=arguments.clip_prompt,
        negative=arguments.negative,
        width=arguments.width,
        height=arguments.height,
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
        image=None if arguments.image is None else _channels_first(torch.from_numpy(read_picture(arguments.image))),
        denoise=arguments.denoise,
        mask=None if arguments.mask is None else torch.from_numpy(read_mask(arguments.mask))[None, None],
    )


def _channels_first(picture: Tensor) -> Tensor:
    """(H, W, 3) to (1, 3, H, W)."""
    return picture.permute(2, 0, 1)[None].contiguous()
