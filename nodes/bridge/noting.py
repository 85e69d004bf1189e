"""Where stages of the host's prompts are noted as they run: sampling, encoding of text and pictures, decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ...flux.adapters.channels import CELL
from ...flux.errors import NumericError
from ...flux.memory.metering import Meter, Several
from ...flux.pipelines.parts import title_of
from ...flux.pipelines.planning import Job
from ...flux.specs.fit import Given
from .ledger import Loaded, Whole, noted
from .planning import further_tokens, planned_encoder, planned_model, planned_vae, references_of, transformers_of
from .residents import files_held, residents_of
from .step_cache import has_step_cache

__all__ = ["check_step", "job_of_latent", "noted_autoencoder", "noted_encoder", "noted_sampling"]

PROMPT = Job(width=16, height=16)  # what a text encoder does is the same for any picture


def noted_sampling(
    executor: Any, guider: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *rest: Any
) -> Any:
    """Wrapper of a sampling run, of any sampler node, that notes what it takes and each step, and looks after it."""
    patcher = guider.model_patcher
    entries = [entry for entries in guider.conds.values() for entry in entries or ()]
    job = Job(
        width=noise.shape[-1] * CELL, height=noise.shape[-2] * CELL, batch=len(noise) * _at_once(guider),
        steps=max(0, len(sigmas) - 1), references=references_of(entries), cached=has_step_cache(patcher),
        styles=further_tokens(patcher, [entry["cross_attn"] for entry in entries if "cross_attn" in entry]),
    )  # fmt: skip
    together = transformers_of(patcher)
    parts, weights = [planned_model(own) for own in together], Several([Loaded(own) for own in together])
    title, held = title_of(patcher.model.spec), files_held(own.model for own in together)
    with noted("transformer", title, patcher.load_device, weights, parts, job) as meter, held as check:

        def after_step(index: int, clean: Tensor, *given: Any) -> Any:
            meter.tick()
            check()
            check_step(clean, index, job.steps)
            return None if callback is None else callback(index, clean, *given)

        return executor(guider, sigmas, extra_args, after_step, noise, *rest)


def check_step(latent: Tensor, index: int, steps: int) -> None:
    """Refuse to go on from a step that went wrong.

    Args:
        latent: That it gave, or expects at the end.
        index: Of the step, from 0.
        steps: Of the run.

    Raises:
        NumericError: It is not finite.
    """
    if not bool(torch.isfinite(latent).all()):
        raise NumericError(
            f"step {index + 1} of {steps} gave numbers that are not finite; most often the weights are damaged or the "
            "number format overflows: try dtype bf16 or fp32 in Load FLUX Model, or a fresh copy of the file"
        )


def _at_once(guider: Any) -> int:
    """Prompts that the host runs side by side where memory allows: two with true guidance."""
    return 1 if getattr(guider, "cfg", 1.0) == 1.0 else sum(1 for entries in guider.conds.values() if entries)


def job_of_latent(samples: Tensor) -> Job:
    """An autoencoder's work on latents (B, C, h, w)."""
    return Job(width=samples.shape[-1] * CELL, height=samples.shape[-2] * CELL, batch=len(samples), starts=True)


@contextmanager
def noted_autoencoder(vae: Any, stage: str, job: Job) -> Iterator[None]:
    """Note what encoding or decoding takes inside the block."""
    title = title_of(vae.spec)
    with noted(stage, title, vae.device, Loaded(vae.patcher), [planned_vae(vae)], job) as meter:
        yield
        meter.tick()


@contextmanager
def noted_encoder(stage: str, model: nn.Module, part: nn.Module, given: Given, device: torch.device) -> Iterator[Meter]:
    """Note what a text encoder or a vision tower takes inside the block, which tells of passes.

    Args:
        stage: Its key.
        model: The host's, of which it is a part.
        part: The encoder itself.
        given: What it was loaded from.
        device: Where it runs.
    """
    title = title_of(given.found.spec)
    own = next((one for one in residents_of(model) if one.title == title), None)
    weights = own or Whole(comfy.model_management.module_size(part))
    planned = [planned_encoder(model, given)]
    with noted(stage, title, device, weights, planned, PROMPT) as meter, files_held([model]):
        yield meter
