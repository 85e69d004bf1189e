"""What a run is asked for, and every setting of it as it will be used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError
from ..memory.policy import Policy
from ..models.flux1 import Flux1
from ..models.positions import LAYOUTS
from ..ops.attention_backends import AUTO
from ..preprocess.control import check_finite
from ..sampling.noise import NOISE_STYLES, image_seeds
from ..sampling.schedules import MAX_MU, check_sigmas, flux1_mu, flux1_tokens, make_schedule, shorten
from ..sampling.solvers import solver
from ..specs.flux1 import Flux1Spec, check_draws
from .denoising import attention_of
from .given import check_unit
from .guided import AnyInput, check_inputs, check_sizes, size_of_inputs
from .parts import Part
from .step_cache import StepCache, check_few, check_steps

__all__ = ["GRID", "NOISES", "Request", "Settled", "check_side", "plan_sigmas", "round_size", "settle"]

GRID = 16  # pixels that a token covers along each side
MAX_SIDE = 8192
MAX_COUNT = 10_000
MAX_GUIDANCE = 1000  # far beyond use: 3.5 and 30 are usual, and above some hundred numbers overflow
MEGA = 1e6
DEFAULT_CFG = 3.0  # beside a negative prompt
NOISES = tuple(style for style in NOISE_STYLES if style != "comfyui_batch")  # that is no noise of a seed by itself

Warn = Callable[[str], None]


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
        memory: How much the run may take; see ``memory.policy``. Pictures are the same under any, but for the last bit
            of a byte where the autoencoder works in strips.
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
class Settled:
    """Every setting as it will be used."""

    width: int
    height: int
    sigmas: list[float]
    guidance: float | None
    cfg: float
    seeds: list[int]
    attention: str


def settle(transformer: Part[Flux1Spec, Flux1], request: Request, warn: Warn) -> Settled:
    """Every setting of a request, checked.

    Args:
        transformer: That will draw.
        request: What to draw.
        warn: Told of what has no effect, and of what looks like a mistake.

    Raises:
        UserError: Something asked for cannot be done.
    """
    spec = transformer.spec
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
    return Settled(
        width=width,
        height=height,
        sigmas=sigmas,
        guidance=guidance,
        cfg=cfg,
        seeds=image_seeds(request.seed, request.count),
        attention=attention_of(transformer, request.attention).backend.name,
    )


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


def _check_ends(request: Request, sigmas: list[float], warn: Warn) -> None:
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


def _check(spec: Flux1Spec, request: Request, warn: Warn) -> None:
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


def _size(request: Request, spec: Flux1Spec, warn: Warn) -> tuple[int, int]:
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
