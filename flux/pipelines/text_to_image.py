"""A prompt to pictures, in numbered steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.channels import CELL
from ..adapters.guides import Channels, Reference, StyleTokens
from ..errors import NumericError, UserError
from ..memory.available import available_bytes
from ..memory.plan import RunPlan, StagePlan
from ..memory.policy import Policy
from ..models.autoencoder import Autoencoder
from ..models.flux1 import Flux1
from ..models.positions import LAYOUTS
from ..ops.attention_backends import AUTO, PLAIN
from ..preprocess.control import check_finite
from ..sampling.noise import NOISE_STYLES, draw_noise, image_seeds
from ..sampling.schedules import MAX_MU, check_sigmas, flux1_mu, flux1_tokens, make_schedule, shorten
from ..sampling.solvers import solver
from ..specs.autoencoder import AutoencoderSpec
from ..specs.flux1 import Flux1Spec, check_draws
from .denoising import Guidance, Hooks, Velocity, attention_of, metered, prepared, walk
from .given import check_unit
from .guided import (
    AnyInput,
    ControlInput,
    ReferenceInput,
    check_inputs,
    check_sizes,
    described,
    encode_picture,
    guidance_of,
    resized,
    size_of_inputs,
)
from .parts import MeteredPart, Part, check_beside
from .planning import Grant, Job, grant, plan_run, planned_of_parts
from .prompts import EncodedPrompt, TextEncoders
from .step_cache import CachedSteps, Skipped, StepCache, check_few, check_steps
from .strips import AnyPart, StripedPart, in_strips_if_need

__all__ = [
    "NOISES",
    "FluxModel",
    "Picture",
    "Request",
    "decode",
    "generate",
    "generate_each",
    "plan_of",
    "plan_sigmas",
    "round_size",
]

GRID = 16  # pixels that a token covers along each side
MAX_SIDE = 8192
MAX_COUNT = 10_000
MAX_GUIDANCE = 1000  # far beyond use: 3.5 and 30 are usual, and above some hundred numbers overflow
MEGA = 1e6
DEFAULT_CFG = 3.0  # beside a negative prompt
SIGMA_DIGITS = 6  # of the sigmas in a picture's settings
NOISES = tuple(style for style in NOISE_STYLES if style != "comfyui_batch")  # that is no noise of a seed by itself


@dataclass(frozen=True)
class FluxModel:
    """The parts of one model, opened."""

    transformer: Part[Flux1Spec, Flux1]
    text: TextEncoders
    autoencoder: Part[AutoencoderSpec, Autoencoder]

    def __post_init__(self) -> None:
        check_beside(self.transformer.given, (self.autoencoder.given, self.text.clip.given, self.text.t5.given))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw and how. ``None`` means the model's own default.

    Attributes:
        prompt: What to draw.
        clip_prompt: A prompt of its own for CLIP.
        negative: What to stay away from; takes effect with ``cfg`` other than 1.
        width: Pixels, rounded to a multiple of 16.
        height: Likewise.
        steps: Model evaluations, more for Heun.
        guidance: Of guidance-distilled models.
        cfg: True classifier-free guidance, two passes a step; 1 is off.
        seed: Of the first picture; each further one counts up.
        count: How many pictures.
        schedule: One of ``sampling.schedules.SCHEDULES``.
        mu: Shift of the schedule; None derives it from the size, as the model was trained.
        sigmas: Explicit times in place of steps and schedule.
        solver: One of ``sampling.solvers.SOLVERS``.
        noise: Whose noise to draw: one of ``NOISES``.
        image: Picture (1 or B, 3, H, W) in 0..1 to start from.
        denoise: How much of it to change, 0..1; 1 starts from pure noise.
        mask: (1 or B, 1, H, W) in 0..1, 1 where the picture may change.
        inputs: What else guides the run: holes to fill, controls, styles, references, in any order.
        layout: Of several references: one of ``models.positions.LAYOUTS``.
        norms_by_strength: Whether norms of control LoRAs come in as far as their strength goes, and not whole (as Black
            Forest Labs' code has it).
        memory: How much the run may take; see ``memory.policy``. Pictures are the same under any.
        step_cache: When steps that change little may be skipped; None for never.
        attention: What computes the transformer's attention: one of ``ops.attention_backends.CHOICES``.
        compiled: Whether its blocks run compiled; see the module ``compiled``.
    """

    prompt: str
    clip_prompt: str | None = None
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    cfg: float | None = None
    seed: int = 0
    count: int = 1
    schedule: str = "flux"
    mu: float | None = None
    sigmas: Sequence[float] | None = None
    solver: str = "euler"
    noise: str = "comfyui"
    image: Tensor | None = None
    denoise: float = 1.0
    mask: Tensor | None = None
    inputs: Sequence[AnyInput] = ()
    layout: str = "offset"
    norms_by_strength: bool = False
    memory: Policy = Policy()
    step_cache: StepCache | None = None
    attention: str = AUTO
    compiled: bool = False


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
    # 1. Settle every setting.
    plan = _plan(model, request, hooks)
    granted = grant(_parts(model, request), _job(request, plan), request.memory, _lora_bytes(model, request))
    # 2. Text, the picture to start from, and those that guide.
    given = _encoded(model, request, plan, hooks, granted)
    decoder = _autoencoder(model, hooks, granted, "decode")
    with ExitStack() as held:
        velocity = None
        for index, seed in enumerate(plan.seeds):
            hooks.check()
            # 3. The transformer's weights and tables, once for all pictures where they have room beside decoding.
            if velocity is None and len(plan.sigmas) > 1:
                velocity = _ready(held, model, request, plan, given, hooks, granted.limits.get("transformer"))
            # 4. Each picture: noise, steps, pixels.
            result, skipped = _sampled(velocity, model, request, plan, given, hooks, index)
            if granted.decodes_alone or index == len(plan.seeds) - 1:
                held.close()  # decoding has the memory for itself
                velocity = None
            with _stage(hooks, "decoding"):
                pixels = in_strips_if_need(decoder, functools.partial(decode, latents=result))[0]
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


def _encoded(model: FluxModel, request: Request, plan: _Plan, hooks: Hooks, granted: Grant) -> _Given:
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


def _cells(model: FluxModel, plan: _Plan) -> tuple[int, int]:
    """Rows and columns of latent cells."""
    downscale = model.autoencoder.spec.downscale
    return plan.height // downscale, plan.width // downscale


def _ready(
    held: ExitStack, model: FluxModel, request: Request, plan: _Plan, given: _Given, hooks: Hooks, limit: int | None
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
    velocity: Velocity | None, model: FluxModel, request: Request, plan: _Plan, given: _Given, hooks: Hooks, index: int
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


@dataclass(frozen=True)
class _Plan:
    """Every setting as it will be used."""

    width: int
    height: int
    sigmas: list[float]
    guidance: float | None
    cfg: float
    seeds: list[int]
    attention: str


def _plan(model: FluxModel, request: Request, hooks: Hooks) -> _Plan:
    spec = model.transformer.spec
    warn = hooks.warn or (lambda _: None)
    _check(spec, request, warn)
    width, height = _size(request, spec, warn)
    check_sizes(request.inputs, (height, width), warn)
    guidance = request.guidance if request.guidance is not None else spec.guidance
    cfg = _cfg(request)
    if request.guidance is not None and not spec.guidance_embedding:
        warn(f"{spec.title} has no guidance input: guidance {request.guidance:g} has no effect")
    if request.negative and cfg == 1.0:
        warn("the negative prompt has no effect at cfg 1; give a cfg above 1 (2 to 5 is usual)")
    if request.sigmas is not None and (request.steps is not None or request.denoise < 1):
        warn("steps and denoise have no effect beside explicit sigmas")
    sigmas = plan_sigmas(spec, request, (width // GRID) * (height // GRID))
    _check_ends(request, sigmas, warn)
    if request.step_cache is not None and sigmas:
        check_few(spec)
        check_steps(len(sigmas) - 1)
    return _Plan(
        width=width,
        height=height,
        sigmas=sigmas,
        guidance=guidance,
        cfg=cfg,
        seeds=image_seeds(request.seed, request.count),
        attention=attention_of(model.transformer, request.attention).backend.name,
    )


def _job(request: Request, plan: _Plan) -> Job:
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
        starts=request.image is not None or bool(request.inputs),
        cached=request.step_cache is not None,
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
        planned_of_parts(_parts(model, request), _lora_bytes(model, request)),
        _job(request, _plan(model, request, Hooks())), request.memory,
        device=str(device), available=available_bytes(device),
    )  # fmt: skip
    return replace(plan, stages=(*before, *plan.stages))


def _parts(model: FluxModel, request: Request) -> list[Part[Any, Any]]:
    """Of a run, its own transformer first and those that controls have of their own behind it."""
    further = (given.model for given in request.inputs if isinstance(given, ControlInput) and given.model is not None)
    transformers = dict.fromkeys((model.transformer, *further))
    return [*transformers, model.text.clip, model.text.t5, model.autoencoder]


def _lora_bytes(model: FluxModel, request: Request) -> int:
    """What control LoRAs take on the transformer, each as often as a picture follows it."""
    takers = (given for given in request.inputs if isinstance(given, ControlInput | Channels) and given.strength > 0)
    return model.transformer.dtype.itemsize * sum(own.lora.parameters for own in takers if own.lora is not None)


def _encode_prompts(
    model: FluxModel, request: Request, plan: _Plan, hooks: Hooks, limits: Mapping[str, int | None]
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


def plan_sigmas(spec: Flux1Spec, request: Request, tokens: int) -> list[float]:
    """The times of a run, from the request or the model's defaults; empty when there is nothing to do."""
    if request.sigmas is not None:
        return check_sigmas(request.sigmas)
    mu = _mu(spec, request, tokens)
    steps = spec.steps if request.steps is None else request.steps
    return shorten(lambda n: make_schedule(request.schedule, n, mu), steps, request.denoise)


def _mu(spec: Flux1Spec, request: Request, tokens: int) -> float | None:
    """The shift of a run's schedule: the request's, or the size's; None for models without one."""
    if request.mu is not None or not spec.shifted_schedule:
        return request.mu
    mu = flux1_mu(tokens)
    if mu > MAX_MU:
        raise UserError(
            f"a picture of {tokens * GRID**2 / MEGA:.1f} megapixels is larger than the schedule can be "
            f"shifted for; ask for {flux1_tokens(MAX_MU) * GRID**2 / MEGA:.1f} at most, or give a mu"
        )
    return mu


def _check_ends(request: Request, sigmas: list[float], warn: Callable[[str], None]) -> None:
    """Explicit sigmas must begin where the run does, and are told of where they leave noise in the picture."""
    if request.sigmas is None:
        return
    if request.image is None and sigmas[0] < 1:
        raise UserError(
            f"the sigmas begin at {sigmas[0]:g} without a picture to start from; give one, or begin at 1, which is "
            "pure noise"
        )
    if sigmas[-1] > 0:
        warn(f"the sigmas end at {sigmas[-1]:g}, not at 0: that much noise stays in the picture")


def round_size(value: int) -> int:
    """The nearest multiple of 16, at least 16."""
    return max(GRID, int(math.floor(value / GRID + 0.5)) * GRID)


def _check(spec: Flux1Spec, request: Request, warn: Callable[[str], None]) -> None:
    if request.inputs:
        check_inputs(spec, request.inputs, warn)
    else:
        check_draws(spec)
    if request.layout not in LAYOUTS:
        raise UserError(f"there is no layout {request.layout!r} of references; choose one of: {', '.join(LAYOUTS)}")
    solver(request.solver)
    if request.noise not in NOISES:
        raise UserError(f"there is no noise style {request.noise!r}; choose one of: {', '.join(NOISES)}")
    _check_shapes(request)
    for name in ("seed", "count", "steps", "width", "height"):
        value = getattr(request, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UserError(f"{name} is {value!r}; give a whole number")
    if not 1 <= request.count <= MAX_COUNT:
        raise UserError(f"count is {request.count}; ask for 1 to {MAX_COUNT} pictures")
    for name in ("guidance", "cfg"):
        value = getattr(request, name)
        if value is not None and not 0 <= value <= MAX_GUIDANCE:
            raise UserError(f"{name} is {value}; give a number from 0 to {MAX_GUIDANCE}")
    if request.mask is not None and request.image is None:
        raise UserError("a mask was given without a picture; give the picture whose masked part is to change")
    if request.denoise < 1 and request.image is None:
        raise UserError(f"denoise is {request.denoise:g} without a picture to start from; give one, or use denoise 1")


def _check_shapes(request: Request) -> None:
    """Refuse a picture or a mask of another shape than ``Request`` says, or of numbers that are none."""
    for name, tensor, channels in (("image", request.image, 3), ("mask", request.mask, 1)):
        if tensor is not None and (tensor.ndim != 4 or tensor.shape[1] != channels or 0 in tensor.shape):
            raise UserError(
                f"the {name} has shape {tuple(tensor.shape)}; give (B, {channels}, H, W) with values in 0..1"
            )
    if request.image is not None:
        check_finite("image", request.image)
    if request.mask is not None:
        check_unit("mask", request.mask)


def check_side(name: str, value: int) -> None:
    """Refuse a side that no picture has.

    Raises:
        UserError: It is not in 1..``MAX_SIDE`` pixels.
    """
    if not 1 <= value <= MAX_SIDE:
        raise UserError(f"{name} is {value}; give {GRID} to {MAX_SIDE} pixels")


def _size(request: Request, spec: Flux1Spec, warn: Callable[[str], None]) -> tuple[int, int]:
    """Width and height: as asked for, else the start picture's, else an input's, else what the model is used to."""
    given = size_of_inputs(request.inputs) if request.image is None else request.image.shape[-2:]
    height, width = given or (spec.native_side, spec.native_side)
    asked = {
        "width": width if request.width is None else request.width,
        "height": height if request.height is None else request.height,
    }
    for name, value in asked.items():
        check_side(name, value)
        if round_size(value) != value:
            warn(f"{name} {value} is not a multiple of {GRID}: {round_size(value)} is used")
    return round_size(asked["width"]), round_size(asked["height"])


def _cfg(request: Request) -> float:
    """True guidance: as asked for, else on (at a usual strength) when there is a negative prompt."""
    if request.cfg is not None:
        return request.cfg
    return DEFAULT_CFG if request.negative else 1.0


def _latent_mask(mask: Tensor, cells: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(mask.float(), cells, mode="bilinear", antialias=True)


def _settings(model: FluxModel, request: Request, plan: _Plan, seed: int, skipped: Skipped | None) -> dict[str, object]:
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
