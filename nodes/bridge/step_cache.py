"""Step caching of a MODEL: settings on the MODEL, what is remembered in the run, and what was skipped on its node."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from functools import partial
from typing import Any

import comfy.patcher_extension
from torch import Tensor

from ...flux.errors import MismatchError
from ...flux.models.flux1 import Flux1
from ...flux.pipelines.step_cache import CachedSteps, Evaluation, StepCache, check_few, check_steps
from .experts import STEP_CACHE, our_spec
from .progress import show

__all__ = ["evaluation_of", "has_step_cache", "put_step_cache", "settle"]

logger = logging.getLogger(__name__)

Options = dict[str, Any]
SAMPLER_SAMPLE = comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE


def put_step_cache(patcher: Any, settings: StepCache) -> Any:
    """A clone of a MODEL that skips steps, in place of what it may have skipped before.

    Raises:
        MismatchError: The MODEL is another loader's.
        UserError: It is made for few steps.
    """
    spec = our_spec(patcher)
    if spec is None:
        raise MismatchError(
            "the MODEL was not loaded by FLUX Foundry; load it with Load FLUX Model, or take ComfyUI's EasyCache, "
            "which goes with any MODEL"
        )
    check_few(spec)
    model = patcher.clone()
    model.remove_wrappers_with_key(SAMPLER_SAMPLE, STEP_CACHE)
    model.add_wrapper_with_key(SAMPLER_SAMPLE, STEP_CACHE, partial(sample_with_cache, settings))
    return model


def has_step_cache(patcher: Any) -> bool:
    """Whether a MODEL skips steps."""
    return bool(patcher.get_wrappers(SAMPLER_SAMPLE, STEP_CACHE))


def sample_with_cache(
    settings: StepCache, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], *rest: Any
) -> Any:
    """Wrapper of a sampling run, of any sampler node, that gives it a step cache and shows what was skipped.

    Raises:
        UserError: The run is too short.
    """
    check_steps(len(sigmas) - 1)
    cached = CachedSteps(settings, sigmas.tolist())
    extra_args["model_options"].setdefault("transformer_options", {})[STEP_CACHE] = cached
    samples = executor(guider, sigmas, extra_args, *rest)
    sentence = cached.skipped.sentence()
    logger.info("FLUX Foundry: %s", sentence)
    show(sentence)
    return samples


def evaluation_of(model: Flux1, options: Options, times: Tensor, own: int) -> Evaluation | None:
    """What the run's step cache has to do with a call of a denoiser; None where there is no cache.

    Args:
        model: The denoiser.
        options: The host's transformer options.
        times: Of each picture (B,), all the same.
        own: The picture's own tokens.
    """
    cached: CachedSteps | None = options.get(STEP_CACHE)
    if cached is None:
        return None
    return cached.evaluation(streams_of(options, len(times)), float(times[0]), own=own, blocks=len(model.block_names()))


def streams_of(options: Options, batch: int) -> list[Hashable]:
    """Who predicts each equal part of a batch: the CONDITIONING's entries, as the host numbers them.

    A pass in which blocks are replaced, as by nodes that compare with some left out, is another than that without.
    """
    replaced = frozenset(options.get("patches_replace", {}).get("dit", ()))
    entries = options.get("uuids") or ()
    if not entries or batch % len(entries):
        return [replaced]
    return [(entry, replaced) for entry in entries]


def settle(options: Options, evaluation: Evaluation | None) -> None:
    """A call of a denoiser has succeeded."""
    if evaluation is not None:
        options[STEP_CACHE].settle(evaluation)
