"""What is done where memory runs out in a step: weights leave the device, until none is left that could."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch

from ...flux.adapters.channels import CELL
from ...flux.errors import ExhaustedError, UserError
from ...flux.memory.exhaustion import is_exhausted
from ...flux.memory.policy import SAVE, Policy
from ...flux.pipelines.fitting import what_would_fit
from ...flux.pipelines.plan_picture import spelled
from ...flux.pipelines.planning import Job
from .planning import planned_model, reachable, transformers_of
from .progress import say
from .residents import residents_of

__all__ = ["HostExhaustedError", "give_way"]

SHARE_THAT_LEAVES = 0.5  # of what stays, each time that memory runs out
LEAST = 1 << 20  # bytes that a model which the host manages has to give back, for another try to be worth while


class HostExhaustedError(ExhaustedError, torch.OutOfMemoryError):
    """``ExhaustedError`` that the host takes for what it is too, and frees its memory after."""


def give_way(patcher: Any, fault: Exception, shape: Sequence[int]) -> None:
    """Have weights leave the device after memory ran out in a step: other models', then half of what stays of these.

    Args:
        patcher: The MODEL that is sampled, and with it FLUX Combine's.
        fault: What ran out.
        shape: Of the latents (B, C, h, w).

    Raises:
        HostExhaustedError: Nothing can leave any more.
    """
    models = transformers_of(patcher)
    others = _others_leave(models)
    freed = others or sum(_half_leaves(own) for own in models)
    comfy.model_management.soft_empty_cache()
    if not freed:
        raise HostExhaustedError(
            f"memory ran out though no more weights can leave the device{_told(models, shape)}"
        ) from fault
    whose = "of other models' weights" if others else "of the weights"
    say(f"memory ran out in a step: {spelled(freed)} {whose} left the device, and the step is repeated")


def _others_leave(models: Sequence[Any]) -> int:
    """Bytes of what the host has on the device besides, which it frees for as much as half of ours."""
    management, device = comfy.model_management, models[0].load_device
    if management.is_device_cpu(device):  # where nothing can leave to
        return 0
    ours = [own.model for own in models]
    loaded = [own for own in management.current_loaded_models if own.model is not None and own.device == device]
    others = [own for own in loaded if not own.currently_used and not any(own.model.model is one for one in ours)]
    patchers = [own.model for own in others]  # which the host holds weakly, and collects garbage first
    before = sum(int(one.loaded_size()) for one in patchers)
    if before < LEAST:
        return 0
    wanted = sum(int(SHARE_THAT_LEAVES * own.loaded_size()) for own in models)
    kept = [own for own in loaded if own not in others]
    try:
        management.free_memory(management.get_free_memory(device) + wanted, device, keep_loaded=kept)
    except Exception as error:  # another of ours that found no room for its ring
        if not is_exhausted(error):
            raise
    return max(0, before - sum(int(one.loaded_size()) for one in patchers))


def _half_leaves(patcher: Any) -> int:
    """Bytes that left; a model that the host manages itself gives way as it can."""
    own = [one.footprint.blocks.resident_bytes for one in residents_of(patcher.model) if one.footprint is not None]
    all_there_is = int(patcher.loaded_size())
    half = int(SHARE_THAT_LEAVES * (sum(own) or all_there_is))
    for asked in (half, all_there_is):
        _give(patcher, asked)
        freed = all_there_is - int(patcher.loaded_size())
        if freed:
            break
    return freed if own or freed >= LEAST else 0


def _give(patcher: Any, asked: int) -> None:
    """Have so many bytes leave, or fewer where so little is free that even what is streamed finds no room."""
    try:
        patcher.partially_unload(patcher.offload_device, asked)
    except Exception as error:
        if not is_exhausted(error):
            raise
        comfy.model_management.soft_empty_cache()


def _told(models: Sequence[Any], shape: Sequence[int]) -> str:
    """What would have fitted, as the end of a sentence."""
    device = models[0].load_device
    job = Job(width=shape[-1] * CELL, height=shape[-2] * CELL, batch=shape[0])
    try:
        parts = [planned_model(own)(Policy(SAVE)) for own in models]
    except UserError:  # not planned, as a model without a file
        return ""
    return f"; loaded with memory save, {what_would_fit(parts, job, device, reachable(device))}"
