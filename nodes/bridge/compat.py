"""What differs between the ComfyUI releases that the pack runs on (0.9 and newer), in one place.

Each function does what a recent host does and falls back where an older one lacks the name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.utils
import torch
from torch import Tensor, nn

__all__ = [
    "archive_dtypes", "asked_text_dtype", "brought", "cast_once", "fit_empty_latent", "forget", "is_dynamic",
    "latent_ratio",
    "patch", "register_reload", "streams_files", "to_intermediate",
]  # fmt: skip


FLUX1_RATIO = 8


def patch(module: nn.Module, load_device: torch.device, offload_device: torch.device, *, plain: bool = False) -> Any:
    """A patcher around a module.

    Args:
        module: What to manage.
        load_device: Where it runs.
        offload_device: Where it rests.
        plain: Without dynamic VRAM, also where the host would use it.
    """
    kind = comfy.model_patcher.ModelPatcher
    if not plain:  # since 0.12; read at call time, because the host rebinds it when it starts
        kind = getattr(comfy.model_patcher, "CoreModelPatcher", kind)
    return kind(module, load_device=load_device, offload_device=offload_device)


def archive_dtypes(module: nn.Module) -> None:
    """Let dynamic loading know each parameter's intended dtype."""
    archive = getattr(comfy.model_management, "archive_model_dtypes", None)
    if archive is not None:
        archive(module)


def asked_text_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that a flag of the host wants text encoders in; None without such a flag."""
    asked = any(value for name, value in vars(comfy.cli_args.args).items() if name.endswith("_text_enc"))
    return comfy.model_management.text_encoder_dtype(device) if asked else None


def is_dynamic(patcher: Any) -> bool:
    """Whether the host streams this patcher's weights itself."""
    ask = getattr(patcher, "is_dynamic", None)
    return bool(ask()) if ask is not None else False


def streams_files() -> bool:
    """Whether the host brings weights from their files while it runs (dynamic VRAM)."""
    return bool(getattr(getattr(comfy, "memory_management", None), "aimdo_enabled", False))


def forget(patcher: Any) -> None:
    """Have the host let go of a patcher that another one takes the place of, whatever it loaded."""
    loaded = comfy.model_management.current_loaded_models
    for own in [one for one in loaded if one.model is patcher]:
        own.model_unload()
        loaded.remove(own)


def register_reload(patcher: Any, factory: Callable[..., Any], *args: object) -> None:
    """Tell the host how to load the same model again, called as ``factory(*args, disable_dynamic=True)``."""
    patcher.cached_patcher_init = (factory, args)


@contextmanager
def cast_once(layer: Any, like: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight and bias of one of the host's layers, as its forward would have them, for the length of a block.

    Args:
        layer: Its weights may rest elsewhere, in another dtype, with patches on them.
        like: Has the dtype and device of the inputs.
    """
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)


@contextmanager
def brought(tensors: Mapping[str, Tensor], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Tensors on a device for the length of a block; those that rest elsewhere come on one of the host's streams."""
    management = comfy.model_management
    if all(tensor.device == device for tensor in tensors.values()):
        yield dict(tensors)
        return
    stream = management.get_offload_stream(device)
    move = partial(
        management.cast_to, device=device, non_blocking=management.device_supports_non_blocking(device), stream=stream
    )
    there = {name: move(tensor) for name, tensor in tensors.items()}
    management.sync_stream(device, stream)
    try:
        yield there
    finally:
        if stream is not None:  # so that their memory is not taken again before the work on them is done
            stream.wait_stream(management.current_stream(device))


def to_intermediate(tensor: Tensor) -> Tensor:
    """A tensor in the dtype and on the device of everything that passes between nodes."""
    dtype = getattr(comfy.model_management, "intermediate_dtype", lambda: torch.float32)()
    return tensor.to(comfy.model_management.intermediate_device(), dtype)


def latent_ratio(patcher: Any) -> int:
    """Pixels along each side of a cell of the model's latents: 8 for FLUX.1, 16 for FLUX.2."""
    return int(getattr(patcher.get_model_object("latent_format"), "spacial_downscale_ratio", FLUX1_RATIO))


def fit_empty_latent(patcher: Any, latent: dict[str, Any]) -> Tensor:
    """The latent's samples; an all-zero one is given the model's channels and, where it says its own, ratio."""
    samples = latent["samples"]
    samples = comfy.sample.fix_empty_latent_channels(patcher, samples)
    ratio, wanted = latent.get("downscale_ratio_spacial"), latent_ratio(patcher)
    if ratio is not None and ratio != wanted and torch.count_nonzero(samples) == 0:
        height, width = (round(side * ratio / wanted) for side in samples.shape[-2:])
        samples = comfy.utils.common_upscale(samples, width, height, "nearest-exact", crop="disabled")
    return samples
