"""What differs between the ComfyUI releases that the pack runs on (0.9 and newer), in one place.

Each function does what a recent host does and falls back where an older one lacks the name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.utils
import torch
from torch import Tensor, nn

__all__ = ["archive_dtypes", "fit_empty_latent", "is_dynamic", "patch", "register_reload", "to_intermediate"]


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


def is_dynamic(patcher: Any) -> bool:
    """Whether the host streams this patcher's weights itself."""
    ask = getattr(patcher, "is_dynamic", None)
    return bool(ask()) if ask is not None else False


def register_reload(patcher: Any, factory: Callable[..., Any], *args: object) -> None:
    """Tell the host how to load the same model again, called as ``factory(*args, disable_dynamic=True)``."""
    patcher.cached_patcher_init = (factory, args)


def to_intermediate(tensor: Tensor) -> Tensor:
    """A tensor in the dtype and on the device of everything that passes between nodes."""
    dtype = getattr(comfy.model_management, "intermediate_dtype", lambda: torch.float32)()
    return tensor.to(comfy.model_management.intermediate_device(), dtype)


def fit_empty_latent(patcher: Any, latent: dict[str, Any]) -> Tensor:
    """The latent's samples; an all-zero one is given the model's channels and, where it says its own, ratio."""
    samples = latent["samples"]
    samples = comfy.sample.fix_empty_latent_channels(patcher, samples)
    ratio, wanted = latent.get("downscale_ratio_spacial"), 8
    if ratio is not None and ratio != wanted and torch.count_nonzero(samples) == 0:
        height, width = (round(side * ratio / wanted) for side in samples.shape[-2:])
        samples = comfy.utils.common_upscale(samples, width, height, "nearest-exact", crop="disabled")
    return samples
