"""A prompt to pictures, in numbered steps."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..adapters.blending import Prediction, predictions_of
from ..adapters.channels import CELL
from ..adapters.guides import Channels, Reference, StyleTokens
from ..errors import ExhaustedError, NumericError
from ..memory.available import available_bytes
from ..memory.plan import RunPlan, StagePlan
from ..models.autoencoder import Autoencoder
from ..models.flux1 import Flux1
from ..ops.attention_backends import PLAIN
from ..sampling.noise import draw_noise
from ..sampling.solvers import evaluation_sigmas
from ..specs.autoencoder import AutoencoderSpec
from ..specs.flux1 import Flux1Spec
from .denoising import Guidance, Hooks, Velocity, metered, prepared, walk
from .fitting import what_would_fit
from .guided import (
    ControlInput,
    FillInput,
    ReferenceInput,
    described,
    encode_picture,
    guidance_of,
    resized,
    stand_ins,
)
from .parts import MeteredPart, Part, check_beside
from .planning import Grant, Job, Planned, grant_to, plan_run, planned_of_part
from .prompts import EncodedPrompt, TextEncoders
from .requests import GRID, NOISES, Request, Settled, check_side, plan_sigmas, round_size, settle
from .step_cache import CachedSteps, Skipped
from .strips import AnyPart, StripedPart, in_strips_if_need

__all__ = [
    "GRID",
    "NOISES",
    "FluxModel",
    "Picture",
    "Request",
    "check_side",
    "decode",
    "generate",
    "generate_each",
    "plan_of",
    "plan_sigmas",
    "round_size",
]

SIGMA_DIGITS = 6  # of the sigmas in a picture's settings


@dataclass(frozen=True)
class FluxModel:
    """The parts of one model, opened."""

    transformer: Part[Flux1Spec, Flux1]
    text: TextEncoders
    autoencoder: Part[AutoencoderSpec, Autoencoder]

    def __post_init__(self) -> None:
        check_beside(self.transformer.given, (self.autoencoder.given, self.text.clip.given, self.text.t5.given))


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
    return list(generate_each(model, request, hooks))


def generate_each(model: FluxModel, request: Request, hooks: Hooks | None = None) -> Iterator[Picture]:
    """The pictures of ``generate``, each as soon as it is there.

    ``hooks.progress`` hears of the stages "text", "encoding" (of a picture to start from), "loading" (of the
    transformer's weights, once for all pictures where they have room beside decoding), "sampling" and "decoding".
    """
    hooks = hooks or Hooks()
    plan = settle(model.transformer, request, hooks.warn or _nothing)
    planned, job, device = _planned(model, request), _job(request, plan), model.transformer.device
    granted = grant_to(planned, job, request.memory, device)
    try:
        yield from _drawn(model, request, plan, granted, hooks)
    except ExhaustedError as error:
        raise ExhaustedError(f"{error}; {what_would_fit(planned, job, device)}") from error


def _drawn(model: FluxModel, request: Request, plan: Settled, granted: Grant, hooks: Hooks) -> Iterator[Picture]:
    """The pictures of a request whose settings are settled, within what it was granted."""
    # 1. Text, the picture to start from, and those that guide.
    given = _encoded(model, request, plan, hooks, granted)
    decoder = _autoencoder(model, hooks, granted, "decode")
    with ExitStack() as held:
        velocity: Velocity | None = None

        def make_room() -> bool:
            nonlocal velocity
            had, velocity = velocity is not None, None
            held.close()
            return had

        for index, seed in enumerate(plan.seeds):
            hooks.check()
            # 2. The transformer's weights and tables, once for all pictures where they have room beside decoding.
            if velocity is None and len(plan.sigmas) > 1:
                velocity = _ready(held, model, request, plan, given, hooks, granted.limits.get("transformer"))
            # 3. Each picture: noise, steps, pixels.
            result, skipped = _sampled(velocity, model, request, plan, given, hooks, index)
            if granted.decodes_alone or index == len(plan.seeds) - 1:
                make_room()  # decoding has the memory for itself
            with _stage(hooks, "decoding"):
                pixels = in_strips_if_need(decoder, functools.partial(decode, latents=result), make_room)[0]
            if skipped is not None and hooks.tell is not None:
                hooks.tell(skipped.sentence())
            yield Picture(pixels, seed, _settings(model, request, plan, seed, skipped))


@dataclass(frozen=True)
class _Given:
    """What a request gives the transformer, encoded.

    Attributes:
        positive: The prompt.
        negative: The negative one; None where it has no effect.
        start: Latents (1 or B, C, h, w) to start from; None for noise alone.
        mask: (1 or B, 1, h, w), 1 where the picture may change; None for everywhere.
        guided: What guides the run beside its prompts; None for nothing.
        cached: The run's step cache; None for none.
    """

    positive: EncodedPrompt
    negative: EncodedPrompt | None
    start: Tensor | None
    mask: Tensor | None
    guided: Guidance | None
    cached: CachedSteps | None


def _encoded(model: FluxModel, request: Request, plan: Settled, hooks: Hooks, granted: Grant) -> _Given:
    encoder, size = _autoencoder(model, hooks, granted, "encode"), (plan.height, plan.width)
    with _stage(hooks, "text"):
        positive, negative = _encode_prompts(model, request, plan, hooks, granted.limits)
    start = guided = None
    if request.image is not None:
        with _stage(hooks, "encoding"):
            start = encode_picture(encoder, resized(request.image, size))
    if request.inputs:
        with _stage(hooks, "encoding"):
            guided = guidance_of(
                request.inputs, encoder, size,
                layout=request.layout, norms_by_strength=request.norms_by_strength,
            )  # fmt: skip
    mask = None if request.mask is None else _latent_mask(request.mask, _cells(model, plan))
    cached = None if request.step_cache is None else CachedSteps(request.step_cache, plan.sigmas)
    return _Given(positive, negative, start, mask, guided, cached)


def _cells(model: FluxModel, plan: Settled) -> tuple[int, int]:
    """Rows and columns of latent cells."""
    downscale = model.autoencoder.spec.downscale
    return plan.height // downscale, plan.width // downscale


def _ready(
    held: ExitStack, model: FluxModel, request: Request, plan: Settled, given: _Given, hooks: Hooks, limit: int | None
) -> Velocity:
    """The transformer, in memory as long as ``held`` is open."""
    ready = prepared(
        model.transformer, given.positive, plan.sigmas,
        guidance=plan.guidance, negative=given.negative, cfg=plan.cfg, solver_name=request.solver, hooks=hooks,
        guided=given.guided, limit=limit, cached=given.cached, attention=request.attention, compiled=request.compiled,
    )  # fmt: skip
    with metered(model.transformer, given.guided, hooks):
        return held.enter_context(ready)


def _sampled(
    velocity: Velocity | None,
    model: FluxModel,
    request: Request,
    plan: Settled,
    given: _Given,
    hooks: Hooks,
    index: int,
) -> tuple[Tensor, Skipped | None]:
    """One picture's latents (1, C, h, w), and what its step cache skipped; without a velocity what it starts from."""
    spec, seed = model.transformer.spec, plan.seeds[index]
    noise = draw_noise((spec.latent_channels, *_cells(model, plan)), [seed], request.noise, dtype=model.text.t5.dtype)
    latents = None if given.start is None else given.start[index % len(given.start)][None]
    mask = None if given.mask is None else given.mask[index % len(given.mask)][None]
    if velocity is None:
        return torch.zeros_like(noise) if latents is None else latents, None
    if given.cached is not None:
        given.cached.begin()
    with metered(model.transformer, given.guided, hooks):
        result = walk(
            velocity, noise, plan.sigmas,
            device=model.transformer.device, solver_name=request.solver, latents=latents, mask=mask, hooks=hooks,
        )  # fmt: skip
    return result, None if given.cached is None else given.cached.skipped


def _job(request: Request, plan: Settled) -> Job:
    """What is drawn, as memory goes: pictures one after the other."""
    sizes = [given.picture.shape[-2:] for given in request.inputs if isinstance(given, ReferenceInput)]
    cells = [given.latents.shape[-2:] for given in request.inputs if isinstance(given, Reference)]
    sizes += [torch.Size((CELL * height, CELL * width)) for height, width in cells]
    return Job(
        width=plan.width,
        height=plan.height,
        steps=max(0, len(plan.sigmas) - 1),
        prompts=1 if plan.cfg == 1.0 else 2,
        references=tuple((width, height) for height, width in sizes),
        styles=sum(given.tokens.shape[1] for given in request.inputs if isinstance(given, StyleTokens)),
        starts=request.image is not None or any(isinstance(g, FillInput | ControlInput) for g in request.inputs),
        evaluations=len(evaluation_sigmas(request.solver, plan.sigmas)) if len(plan.sigmas) > 1 else 0,
        cached=request.step_cache is not None,
        pictures=len(plan.seeds),
    )


def plan_of(model: FluxModel, request: Request, before: Sequence[StagePlan] = ()) -> RunPlan:
    """What a request will take, stage by stage, under its policy.

    Args:
        model: That draws.
        request: What to draw.
        before: Stages of the run that come before, such as a vision tower's.

    Raises:
        UserError: Something asked for cannot be done.
    """
    device = model.transformer.device
    plan = plan_run(
        _planned(model, request), _job(request, settle(model.transformer, request, _nothing)), request.memory,
        device=str(device), available=available_bytes(device),
    )  # fmt: skip
    return replace(plan, stages=(*before, *plan.stages))


def _planned(model: FluxModel, request: Request) -> list[Planned]:
    """What a run will have in memory: the transformers that make its predictions, the run's own first, and the rest."""
    guides, models = stand_ins(request.inputs)
    found: dict[Part[Flux1Spec, Flux1], list[Prediction]] = {model.transformer: []}
    for prediction in predictions_of(guides):
        part = model.transformer if prediction.model is None else models[prediction.model]
        found.setdefault(part, []).append(prediction)
    loras = [guide.lora for guide in guides if isinstance(guide, Channels) and guide.lora and guide.strength > 0]
    transformers = [
        replace(
            planned_of_part(part),
            predictions=sum(one.end - one.start for one in own),
            flows=len(own),
            further=part.dtype.itemsize * sum(lora.parameters for lora in loras) if part is model.transformer else 0,
        )
        for part, own in found.items()
        if own
    ]
    return [*transformers, *(planned_of_part(part) for part in (model.text.clip, model.text.t5, model.autoencoder))]


def _encode_prompts(
    model: FluxModel, request: Request, plan: Settled, hooks: Hooks, limits: Mapping[str, int | None]
) -> tuple[EncodedPrompt, EncodedPrompt | None]:
    """The prompt, and the negative one where guidance will use it; both in one stay of each encoder."""
    length = model.transformer.spec.t5_length
    prompts: list[tuple[str, str | None]] = [(request.prompt, request.clip_prompt)]
    if plan.cfg != 1.0:
        prompts.append((request.negative or "", None))
    encoded = model.text.encode_all(
        prompts,
        length=length,
        warn=hooks.warn,
        watch=lambda *_: hooks.check(),
        titles=("prompt", "negative prompt"),
        limits=limits,
        meter=hooks.meter,
    )
    for prompt in encoded:
        if not _finite(prompt.tokens, prompt.pooled):
            raise NumericError(
                f"the text encoders gave numbers that are not finite; {model.text.t5.path.name} or "
                f"{model.text.clip.path.name} is damaged, or the number format overflows: try bf16 or fp32"
            )
    return encoded[0], encoded[1] if len(encoded) > 1 else None


@contextmanager
def _stage(hooks: Hooks, name: str) -> Iterator[None]:
    """Tell the caller of a stage that is one step."""
    hooks.check()
    if hooks.progress is not None:
        hooks.progress(name, 0, 1)
    yield
    if hooks.progress is not None:
        hooks.progress(name, 1, 1)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _autoencoder(model: FluxModel, hooks: Hooks, granted: Grant, stage: str) -> AnyPart | StripedPart:
    """The autoencoder as a stage uses it."""
    part = MeteredPart(model.autoencoder, hooks.meter, stage, hooks.warn)
    return StripedPart(part) if stage in granted.in_strips else part


@torch.inference_mode()
def decode(part: AnyPart | StripedPart, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) in the transformer's space to bytes (B, H, W, 3).

    Args:
        part: The autoencoder.
        latents: Any number of them.

    Raises:
        NumericError: The result was not finite.
    """
    with part.resident() as autoencoder:
        pixels = autoencoder.decode(latents.to(part.device, part.dtype)).float().cpu()
    if not _finite(pixels):
        raise NumericError(
            f"decoding gave numbers that are not finite; {part.path.name} is damaged, or the number format overflows: "
            "try another dtype (bf16 or fp32), or a fresh copy of the file"
        )
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _nothing(_: str) -> None:
    """Tell nobody."""


def _latent_mask(mask: Tensor, cells: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(mask.float(), cells, mode="bilinear", antialias=True)


def _settings(
    model: FluxModel, request: Request, plan: Settled, seed: int, skipped: Skipped | None
) -> dict[str, object]:
    """Everything that made a picture, as plain values."""
    spec = model.transformer.spec
    return {
        "prompt": request.prompt,
        **({"clip_prompt": request.clip_prompt} if request.clip_prompt is not None else {}),
        **({"negative": request.negative or "", "cfg": plan.cfg} if plan.cfg != 1.0 else {}),
        "model": spec.name,
        "model_file": model.transformer.path.name,
        "width": plan.width,
        "height": plan.height,
        "steps": max(0, len(plan.sigmas) - 1),
        "guidance": plan.guidance if spec.guidance_embedding else None,
        "seed": seed,
        "schedule": "explicit" if request.sigmas is not None else request.schedule,
        **({"mu": request.mu} if request.mu is not None else {}),
        "solver": request.solver,
        "noise": request.noise,
        "denoise": request.denoise,
        "sigmas": [round(sigma, SIGMA_DIGITS) for sigma in plan.sigmas],
        **(
            {"inputs": [described(given) for given in request.inputs], "layout": request.layout}
            if request.inputs
            else {}
        ),
        **({"norms_by_strength": True} if request.norms_by_strength else {}),
        **({"step_cache": skipped.described()} if skipped is not None else {}),
        **({"attention": plan.attention} if plan.attention != PLAIN.name else {}),
        **({"compiled": True} if request.compiled else {}),
    }
