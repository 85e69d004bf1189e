"""Further MODELs of a run: each predicts the CONDITIONING entries that are tagged with it.

The MODEL that is sampled carries them as the host's additional models, so that the host loads them with it and their
own patches (LoRA) are on their weights. Its denoiser hands a call on where the entry says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
import torch
from torch import Tensor

from ...flux.errors import MismatchError, UserError
from ...flux.specs.flux1 import Flux1Spec
from .entries import END, START, STRENGTH, Conditioning
from .pictures import lacks_guide
from .progress import say

__all__ = ["EXPERT", "STEP_CACHE", "TABLE", "Expert", "combine", "expert_of", "our_spec", "receiver"]

EXPERT = "fluxfoundry_expert"  # our key in a CONDITIONING, and of the denoiser's inputs
TABLE = "fluxfoundry_modulations"  # our key in the host's transformer_options
STEP_CACHE = "fluxfoundry_step_cache"  # likewise, and of the wrapper that puts it there
MODELS = "fluxfoundry"  # of the host's additional models
LOCAL = ("mask", "area")  # the host's keys of an entry that acts in a part of the picture
FAINT = 1e-6  # of an entry's weight: so little that it counts only where there is no other
# What the sampler tells a denoiser of the run, whichever model it is.
OF_THE_RUN = ("cond_or_uncond", "uuids", "sigmas", "sample_sigmas", TABLE, STEP_CACHE)
# Of a MODEL that is loaded once more: all that other nodes did to it.
COPIED = ("patches", "patches_uuid", "object_patches", "model_options", "attachments", "wrappers", "callbacks")

Key = tuple[int, Any]  # a module, and which patches are on it


class Expert:
    """A MODEL that predicts some entries.

    Args:
        patcher: The MODEL.
    """

    def __init__(self, patcher: Any) -> None:
        self.patcher = patcher

    @property
    def model(self) -> Any:
        """The host's model around the denoiser, the same in every clone of the MODEL."""
        return self.patcher.model

    def options(self, run: dict[str, Any]) -> dict[str, Any]:
        """The MODEL's own transformer options, with what they tell of the run.

        Args:
            run: Those of the MODEL that is sampled.
        """
        own = dict(self.patcher.model_options.get("transformer_options", {}))
        own["wrappers"] = comfy.patcher_extension.merge_nested_dicts(own.get("wrappers", {}), self.patcher.wrappers)
        return own | {name: run[name] for name in OF_THE_RUN if name in run}

    def __call__(self, x: Tensor, timestep: Tensor, *inputs: Any, **more: Any) -> Tensor:
        """The velocity, in the type of ``x``; inputs are those of the host's denoisers."""
        dtype = self.model.get_dtype_inference()
        given = [_cast(value, dtype) for value in inputs]
        rest = {name: _cast(value, dtype) for name, value in more.items()}
        velocity: Tensor = self.model.diffusion_model(x.to(dtype), timestep, *given, **rest)
        return velocity.to(x.dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_cast(one, dtype) for one in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def expert_of(extra: dict[str, Any]) -> Expert | None:
    """Which further MODEL predicts a CONDITIONING's entry; None for the one that is sampled."""
    expert = extra.get(EXPERT)
    return expert if isinstance(expert, Expert) else None


def receiver(conditioning: Conditioning, takes: Callable[[Any], bool]) -> Callable[[dict[str, Any]], bool | None]:
    """Which entries a picture is for, where further MODELs predict some of them.

    Args:
        conditioning: All entries.
        takes: Whether a MODEL has a place for the picture.

    Returns:
        A function of an entry: True where it is given, False where its MODEL has no place for it, and None where its
        MODEL is not known and another one has: it may leave it alone.
    """
    fits = {id(expert): takes(expert.patcher) for _, extra in conditioning if (expert := expert_of(extra)) is not None}
    otherwise = None if any(fits.values()) else True

    def given(extra: dict[str, Any]) -> bool | None:
        expert = expert_of(extra)
        return otherwise if expert is None else fits[id(expert)]

    return given


def our_spec(patcher: Any) -> Flux1Spec | None:
    """What a MODEL is, if this pack loaded it."""
    spec = getattr(patcher.model, "spec", None)
    return spec if isinstance(spec, Flux1Spec) else None


def combine(
    first: Any, first_conditioning: Conditioning, second: Any, second_conditioning: Conditioning, balance: float
) -> tuple[Any, Conditioning]:
    """One MODEL and one CONDITIONING that give the weighted mean of two MODELs' predictions under any sampler.

    While the second's guide does not act, all of the picture is the first's, as in the engine's own runs: a control
    model without a control is no help.

    Args:
        first: MODEL; what acts on whole predictions (its schedule, a CFG patch) holds for both.
        first_conditioning: For it.
        second: MODEL of the same latents.
        second_conditioning: For it.
        balance: Share of the second's predictions, 0..1.

    Raises:
        MismatchError: A MODEL is another loader's, or their latents differ.
        UserError: The balance is outside of 0..1.
    """
    if not 0 <= balance <= 1:
        raise UserError(f"the balance is {balance:g}; give the second model's share, from 0 to 1")
    check_pair(first, second)
    if _skips_steps(second) and not _skips_steps(first):
        say("FLUX Step Cache has no effect on model_2 of FLUX Combine: put it on model_1, or behind, for both")
    model, moved = join(first, second)
    tag = None if _predict_alike(first, second) else moved.get(_key(second), Expert(second))
    tagged: Conditioning = []
    for text, extra in second_conditioning:
        own = expert_of(extra)
        expert = tag if own is None else moved.get(_key(own.patcher), own)
        tagged.append([text, extra if expert is None else {**extra, EXPERT: expert}])
    firsts = weighed(first_conditioning, 1 - balance)
    return model, [*firsts, *weighed(_guided(tagged, firsts) if firsts else tagged, balance)]


def _guided(tagged: Conditioning, beside: Conditioning) -> Conditioning:
    """Entries of further MODELs, without those that lack their guide where others are beside them."""
    kept: Conditioning = []
    for text, extra in tagged:
        if expert_of(extra) is None or not lacks_guide(extra):
            kept.append([text, extra])
        elif not _covered(extra, beside):
            kept += weighed([[text, extra]], FAINT)
    return kept


def _covered(extra: dict[str, Any], beside: Conditioning) -> bool:
    """Whether others act everywhere and all the time that an entry does."""
    everywhere = [other for _, other in beside if all(other.get(key) is None for key in LOCAL)]
    reached = extra.get(START, 0.0)
    for begins, ends in sorted((other.get(START, 0.0), other.get(END, 1.0)) for other in everywhere):
        if begins <= reached:
            reached = max(reached, ends)
    return bool(reached >= extra.get(END, 1.0))


def join(first: Any, second: Any) -> tuple[Any, dict[Key, Expert]]:
    """A clone of a MODEL that carries another, and those that the other carries.

    Returns:
        The clone; and, for a MODEL that had to be loaded once more because other patches are on its module, the new
        one.
    """
    taken = [first, *first.get_nested_additional_models()]
    moved: dict[Key, Expert] = {}
    for patcher in (second, *second.get_nested_additional_models()):
        twins = [other for other in taken if other.model is patcher.model]
        if any(_same_weights(twin, patcher) for twin in twins):
            continue
        bare = own_copy(patcher) if twins else patcher.clone()
        bare.remove_additional_models(MODELS)  # they are carried beside it
        if twins:
            moved[_key(patcher)] = Expert(bare)
        taken.append(bare)
    model = first.clone()
    further = [patcher for patcher in taken[1:] if patcher.model is not first.model]
    if further:
        model.set_additional_models(MODELS, further)
    return model, moved


def _key(patcher: Any) -> Key:
    return id(patcher.model), patcher.patches_uuid


def weighed(conditioning: Conditioning, share: float) -> Conditioning:
    """Every entry with its weight multiplied; without any where that is 0."""
    if share == 0:
        return []
    return [[text, {**extra, STRENGTH: extra.get(STRENGTH, 1.0) * share}] for text, extra in conditioning]


def check_pair(first: Any, second: Any) -> None:
    """Refuse MODELs whose predictions cannot be mixed.

    Raises:
        MismatchError: One is another loader's, or their latents differ.
    """
    specs = []
    for name, patcher in (("model_1", first), ("model_2", second)):
        spec = our_spec(patcher)
        if spec is None:
            raise MismatchError(
                f"{name} was not loaded by FLUX Foundry, and FLUX Combine cannot run two of another loader's together; "
                "load it with Load FLUX Model"
            )
        specs.append(spec)
    one, two = specs
    if (one.latent_channels, one.autoencoder) != (two.latent_channels, two.autoencoder):
        raise MismatchError(
            f"{one.title} draws in the latents of {one.autoencoder}, and {two.title} in those of {two.autoencoder}; "
            "combine models of one family"
        )


def own_copy(patcher: Any) -> Any:
    """A MODEL with weights of its own, loaded once more, because two sets of LoRAs cannot be on the same ones."""
    factory, arguments, *_ = patcher.cached_patcher_init
    say(
        "both models of FLUX Combine are of one file with different LoRAs, so that it is loaded twice; two control "
        "LoRAs on one MODEL, one Load FLUX Control LoRA behind the other, take no more memory"
    )
    fresh, source = factory(*arguments), patcher.clone()
    for name in COPIED:
        setattr(fresh, name, getattr(source, name))
    return fresh


def _skips_steps(patcher: Any) -> bool:
    """Whether FLUX Step Cache was put on a MODEL, which acts where it is sampled."""
    return STEP_CACHE in patcher.wrappers.get(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, {})


def _same_weights(first: Any, second: Any) -> bool:
    """Whether two MODELs of one module have the same patches on it."""
    unpatched = not (first.patches or second.patches)
    return (unpatched or first.patches_uuid == second.patches_uuid) and not (first.injections or second.injections)


def _predict_alike(first: Any, second: Any) -> bool:
    """Whether two MODELs are of one module, with nothing between them that could make a difference."""
    options = [patcher.model_options.get("transformer_options") for patcher in (first, second)]
    return (
        first.model is second.model
        and _same_weights(first, second)
        and not any(options)
        and first.wrappers == second.wrappers
    )
