"""What the host's objects are as far as planning goes, and plans of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import numpy as np
import torch
from torch import Tensor

from ...flux.adapters.channels import CELL
from ...flux.errors import UserError
from ...flux.memory.accounts import Accounts
from ...flux.memory.metering import StageActual
from ...flux.memory.outlines import Outlines
from ...flux.memory.plan import RunPlan
from ...flux.memory.policy import Policy
from ...flux.memory.rates import measure_rates
from ...flux.memory.report import RunReport
from ...flux.pipelines.modules import block_names
from ...flux.pipelines.parts import bind_part, title_of
from ...flux.pipelines.plan_picture import draw_plan
from ...flux.pipelines.plan_text import plan_lines, report_lines
from ...flux.pipelines.planning import Job, Planned, plan_run
from ...flux.pipelines.text_to_image import round_size
from ...flux.specs.fit import Given
from .experts import our_spec
from .ledger import AS_LOADED, report_of
from .residents import outlines_of, residents_of
from .step_cache import has_step_cache
from .weights import HOSTS

__all__ = [
    "further_tokens", "job_of", "parts_of", "plan_graph", "planned_encoder", "planned_encoders", "planned_model",
    "planned_tower", "planned_vae", "reachable", "references_of", "report", "shown", "transformers_of",
]  # fmt: skip

# What gives a part as it was loaded, or as if it had been loaded under a policy; it holds no model.
Later = Callable[[Policy | None], Planned]

REFERENCES = "reference_latents"  # the host's key
BYTE_MAX = 255


def transformers_of(patcher: Any) -> list[Any]:
    """A MODEL, and those of ours that are loaded with it: FLUX Combine's."""
    return [patcher, *(own for own in patcher.get_nested_additional_models() if our_spec(own) is not None)]


def planned_model(patcher: Any) -> Later:
    """A MODEL.

    Raises:
        UserError: Another loader's.
    """
    model = patcher.model
    given = _given(model, "MODEL", "Load FLUX Model")
    return _planned(model, given, model.get_dtype_inference(), stored=model.get_dtype())


def planned_encoders(clip: Any) -> list[Later]:
    """Both text encoders of a CLIP.

    Raises:
        UserError: Another loader's.
    """
    model = clip.cond_stage_model
    found = getattr(model, "given", None)
    if not isinstance(found, tuple):
        _given(model, "CLIP", "Load FLUX Text Encoders")
    return [planned_encoder(model, given) for given in found]


def planned_encoder(model: Any, given: Given) -> Later:
    """A text encoder or vision tower of a host's model."""
    return _planned(model, given, torch.float32, stored=torch.float32)


def planned_vae(vae: Any) -> Later:
    """A VAE.

    Raises:
        UserError: Another loader's.
    """
    given, dtype, memory = _given(vae, "VAE", "Load FLUX Autoencoder"), vae.vae_dtype, vae.memory
    return lambda policy: replace(_of_file(given, dtype, dtype, None), policy=policy or memory)


def planned_tower(tower: Any) -> Later:
    """A CLIP_VISION.

    Raises:
        UserError: Another loader's.
    """
    return planned_encoder(tower.patcher.model, _given(tower, "CLIP_VISION", "Load FLUX Redux"))


def _given(owner: Any, kind: str, loader: str) -> Given:
    given = getattr(owner, "given", None)
    if not isinstance(given, Given):
        raise UserError(f"this {kind} was not loaded by FLUX Foundry, which plans its own; use {loader}")
    return given


def _planned(model: Any, given: Given, dtype: torch.dtype, *, stored: torch.dtype) -> Later:
    """A part of a host's model, under its policy where it has one, else as the host's own layers keep it."""
    own = next((one for one in residents_of(model) if one.title == title_of(given.found.spec)), None)
    if own is None:
        return functools.partial(_of_file, given, dtype, stored)
    planned = Planned(given.found.spec, own.accounts, dtype, own.policy, own.apart, outlines=own.outlines)
    return lambda policy: replace(planned, policy=policy or planned.policy)


def _of_file(given: Given, dtype: torch.dtype, stored: torch.dtype, policy: Policy | None) -> Planned:
    """A part of a file.

    Args:
        given: The file.
        dtype: That it computes with.
        stored: That the host keeps its weights in, modulation layers among them.
        policy: Under which its weights would stay as the file has them, modulation layers apart; None for the host's.
    """
    spec, kind = given.found.spec, given.found.kind
    if policy is None or kind == "autoencoder":
        accounts, _ = _weights_of(given.path, kind, spec.name, stored, packed=False)
        return Planned(spec, accounts, dtype, HOSTS, ())
    accounts, outlines = _weights_of(given.path, kind, spec.name, dtype, packed=True)
    return Planned(spec, accounts, dtype, policy, outlines=outlines)


Found = tuple[Accounts, Outlines | None]


def _weights_of(path: Path, kind: str, variant: str, dtype: torch.dtype, *, packed: bool) -> Found:
    """Of one part of a file as it is now: what they take, and how they are stored."""
    return _found_in(path, path.stat().st_mtime_ns, kind, variant, dtype, packed=packed)


@functools.lru_cache(16)
def _found_in(path: Path, _: int, kind: str, variant: str, dtype: torch.dtype, *, packed: bool) -> Found:
    bound = bind_part(path, kind, variant if kind == "transformer" else None)
    blocks = block_names(bound.module)
    accounts = Accounts(bound.module, bound.bindings, item=dtype.itemsize, keeps_packed=packed, blocks=blocks)
    management = comfy.model_management
    device = management.get_torch_device() if kind == "transformer" else management.text_encoder_device()
    return accounts, outlines_of(bound.bindings, accounts, dtype, device) if packed else None


def parts_of(model: Any, clip: Any, vae: Any, tower: Any, policy: Policy | None) -> list[Planned]:
    """What a graph has, as far as planning goes; None for what it has not.

    Args:
        model: A MODEL.
        clip: A CLIP.
        vae: A VAE.
        tower: A CLIP_VISION.
        policy: Under which all would be loaded; None for what each was loaded under.

    Raises:
        UserError: Something was loaded by another loader.
    """
    later = [planned_model(own) for own in transformers_of(model)]
    later += [] if clip is None else planned_encoders(clip)
    later += [] if vae is None else [planned_vae(vae)]
    later += [] if tower is None else [planned_tower(tower)]
    return [part(policy) for part in later]


def job_of(
    model: Any,
    size: tuple[int, int],
    batch: int,
    steps: int,
    conditioning: Sequence[Any] | None,
    *,
    sees: bool,
    both: bool,
) -> Job:
    """What a graph will draw.

    Args:
        model: A MODEL of ours.
        size: Width and height in pixels.
        batch: Pictures at once.
        steps: Of the schedule.
        conditioning: What guides the run, of which references and further text tokens take room.
        sees: Whether a vision tower looks at a picture.
        both: Whether a negative prompt runs beside, for which the host takes twice as much at once.
    """
    width, height = (round_size(side) for side in size)
    entries = [extra for _, extra in conditioning or ()]
    references = references_of(entries)
    return Job(
        width=width, height=height, batch=2 * batch if both else batch, steps=steps, references=references,
        views=int(sees), styles=further_tokens(model, [text for text, _ in conditioning or ()]),
        starts=bool(references), cached=has_step_cache(model),
    )  # fmt: skip


def further_tokens(model: Any, texts: Iterable[Tensor]) -> int:
    """How many tokens stand behind the prompt's, at most, in texts (B, T, width): those of Redux."""
    return max([0, *(text.shape[1] - model.model.spec.t5_length for text in texts)])


def references_of(entries: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, int], ...]:
    """Width and height in pixels of what the entries of a CONDITIONING look at, the most that one has."""
    found = [
        tuple((latent.shape[-1] * CELL, latent.shape[-2] * CELL) for latent in entry.get(REFERENCES) or ())
        for entry in entries
    ]
    return max(found, key=len, default=())


def plan_graph(parts: Sequence[Planned], job: Job, policy: Policy | None, device: torch.device) -> tuple[str, RunPlan]:
    """A plan of parts, and as text; see ``parts_of``.

    Raises:
        UserError: A budget is below what a stage can do with.
    """
    rates = measure_rates(device, parts[0].dtype)
    plan = plan_run(parts, job, policy or AS_LOADED, device=str(device), available=reachable(device), rates=rates)
    return "\n".join(plan_lines(plan)), plan


def reachable(device: torch.device) -> int:
    """Bytes on a device that are free, or that the host could free."""
    management = comfy.model_management
    alive = (own for own in management.current_loaded_models if own.model is not None)
    loaded = (own for own in alive if own.device == device)
    taken = 0 if management.is_device_cpu(device) else sum(int(own.model_loaded_memory()) for own in loaded)
    return int(management.get_free_memory(device)) + taken


def shown(plan: RunPlan, taken: Mapping[str, StageActual] | None = None) -> Tensor:
    """A plan's picture as an IMAGE."""
    pixels = np.asarray(draw_plan(plan, taken).convert("RGB"))
    return torch.from_numpy(pixels.copy()).float()[None] / BYTE_MAX


def report(prompt: Collection[str]) -> tuple[str, RunReport]:
    """What the running prompt's stages took, and as text; see ``ledger.report_of``.

    Args:
        prompt: Ids of its nodes.

    Raises:
        UserError: None ran that is ours.
    """
    found, earlier = report_of(reachable, prompt)
    if not found.taken:
        raise UserError(
            "no stage of FLUX Foundry's ran before this report: it tells of models from this pack's loaders only"
        )
    lines = report_lines(found)
    if earlier:
        lines.append(f"Not run this time, for ComfyUI had the result: {', '.join(earlier)}; told of the last time.")
    return "\n".join(lines), found
