"""Schedules: the falling flow times at which a sampler works. Numbers in, numbers out.

A schedule of N steps is a list of N + 1 falling floats (sigmas), the first at most 1 (pure noise), the last 0 (data).
``mu`` is the shift in FLUX's exponential form: it moves the steps towards the noise, more for more image tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import SupportsFloat

from ..errors import UserError

__all__ = [
    "MAX_MU",
    "MAX_STEPS",
    "SCHEDULES",
    "SHORTENING_RULES",
    "Schedule",
    "beta_quantile",
    "beta_schedule",
    "check_sigmas",
    "flux1_mu",
    "flux1_tokens",
    "flux_schedule",
    "fraction_done",
    "linear_schedule",
    "make_schedule",
    "shift",
    "shift_from_factor",
    "shorten",
    "simple_schedule",
]

Schedule = Callable[[int, "float | None"], list[float]]

MAX_STEPS = 10_000  # ComfyUI's limit too, and the length of its table
MAX_MU = 20.0  # beyond it neighbouring steps near 1 or 0 begin to coincide in floating point

# FLUX.1's line of mu over image tokens: black-forest-labs/flux, sampling.py, get_schedule and get_lin_function.
FLUX1_FEW_TOKENS, FLUX1_FEW_MU = 256, 0.5
FLUX1_MANY_TOKENS, FLUX1_MANY_MU = 4096, 1.15
FLUX1_SLOPE = (FLUX1_MANY_MU - FLUX1_FEW_MU) / (FLUX1_MANY_TOKENS - FLUX1_FEW_TOKENS)

# ComfyUI, comfy/model_sampling.py.
SHIFTED_TABLE = 10_000  # ModelSamplingFlux
UNSHIFTED_TABLE = 1_000  # ModelSamplingDiscreteFlow, which models without a shift (schnell) get

NEWTON_STEPS = 30
NEWTON_TOLERANCE = 1e-15  # of x
SERIES_TERMS = 60  # x is at most 1/2, so that the terms fall below 2^-60 of the first
BETA_SHAPE = 0.6  # both parameters of ComfyUI's beta schedule; Lee et al. 2024, arXiv 2407.12173


def flux1_mu(image_tokens: int) -> float:
    """FLUX.1's shift for an image, linear in its tokens and not clamped, as the reference has it.

    Args:
        image_tokens: Packed tokens of the output image, height * width / 256 in pixels. References do not count.
    """
    return FLUX1_FEW_MU + FLUX1_SLOPE * (image_tokens - FLUX1_FEW_TOKENS)


def flux1_tokens(mu: float) -> float:
    """Image tokens whose shift is ``mu``: the inverse of ``flux1_mu``."""
    return FLUX1_FEW_TOKENS + (mu - FLUX1_FEW_MU) / FLUX1_SLOPE


def shift(t: float, mu: float) -> float:
    """Shift one flow time: e^mu / (e^mu + 1/t - 1), with 0 and 1 kept (Esser et al. 2024, section 5.3.2, s = e^mu).

    The linear form s t / (1 + (s - 1) t) is the same function.

    Args:
        t: Flow time in 0..1.
        mu: Shift; 0 leaves t as it is, more moves it towards 1.
    """
    return 0.0 if t <= 0 else 1 / (1 + math.exp(-mu) * (1 / t - 1))


def fraction_done(sigma: float, sigmas: Sequence[float]) -> float:
    """How far a run is at a time, 0 where it begins and 1 at its end: what it has at step i is i / steps.

    Steps are what counts, not how far each goes, so that half of a run is half of its steps whatever made them. A time
    within a step lies as far in it as in sigma.

    Args:
        sigma: Flow time in 0..1.
        sigmas: The run's falling times, at least two.
    """
    if sigma >= sigmas[0]:
        return 0.0
    if sigma <= sigmas[-1]:
        return 1.0
    after = bisect_left(sigmas, -sigma, key=lambda time: -time)  # the first of them that is not before it
    begin, end = sigmas[after - 1], sigmas[after]
    return (after - 1 + (begin - sigma) / (begin - end)) / (len(sigmas) - 1)


def shift_from_factor(factor: float) -> float:
    """The ``mu`` of a linear shift factor s (ComfyUI's and diffusers' ``shift``): ln s.

    Raises:
        UserError: If the factor is not a finite number above 0.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise UserError(f"A shift factor of {factor} has no meaning. Use a number above 0; 1 is no shift.")
    return math.log(factor)


def flux_schedule(steps: int, mu: float | None) -> list[float]:
    """Evenly spaced times from 1 to 0, each shifted: Black Forest Labs' ``get_schedule``.

    diffusers' FlowMatchEulerDiscreteScheduler makes the same grid as linspace(1, 1/N, N), shifted, with 0 appended.
    """
    return [_shifted((steps - i) / steps, mu) for i in range(steps + 1)]


def simple_schedule(steps: int, mu: float | None) -> list[float]:
    """ComfyUI's "simple": entries of a shifted table, from its noisy end at a stride of table / steps, then 0.

    Equal to the flux schedule up to the table's grain: before the shift a time is at most one entry off.
    """
    entries = _table_entries(steps, mu)
    stride = entries / steps
    return [_shifted((entries - int(i * stride)) / entries, mu) for i in range(steps)] + [0.0]


def beta_schedule(steps: int, mu: float | None) -> list[float]:
    """ComfyUI's "beta": table entries at quantiles of Beta(0.6, 0.6), dense at both ends (arXiv 2407.12173), then 0.

    As in ComfyUI, quantiles that fall on one table entry become one step: from 552 steps on (with mu None, whose table
    is coarser, from 139) schedules may come out shorter than asked.
    """
    entries = _table_entries(steps, mu)
    width = 1 / steps
    # Not 1 - i / steps: the middle quantile lies on a rounding tie, which that last bit decides, here as in ComfyUI.
    quantiles = [beta_quantile(1 - i * width) for i in range(steps)]
    indices = dict.fromkeys(round(q * (entries - 1)) for q in quantiles)  # a dict keeps the order, a set does not
    return [_shifted((index + 1) / entries, mu) for index in indices] + [0.0]


def linear_schedule(steps: int, mu: float | None = None) -> list[float]:
    """Evenly spaced times from 1 to 0 whatever ``mu`` is: schnell's schedule, for a model of any kind."""
    del mu
    return flux_schedule(steps, None)


SCHEDULES: dict[str, Schedule] = {
    "flux": flux_schedule,
    "simple": simple_schedule,
    "beta": beta_schedule,
    "linear": linear_schedule,
}


def make_schedule(name: str, steps: int, mu: float | None) -> list[float]:
    """A schedule by name.

    Args:
        name: A key of ``SCHEDULES``.
        steps: Steps, 1..10000.
        mu: Shift; None for none, as schnell is trained.

    Returns:
        steps + 1 falling sigmas, the last 0.0 ("beta" may give fewer at hundreds of steps).

    Raises:
        UserError: If the name is unknown, or a number is outside its range.
    """
    if name not in SCHEDULES:
        raise UserError(f"There is no schedule named {name!r}. Choose one of: {', '.join(SCHEDULES)}.")
    _check_steps(steps)
    if mu is not None and not abs(mu) <= MAX_MU:
        raise UserError(
            f"A shift of mu = {mu} puts the steps so close together that they cannot be told apart. "
            f"Use -{MAX_MU:g} to {MAX_MU:g}; FLUX.1 takes 1.15 at 1024x1024."
        )
    return SCHEDULES[name](steps, mu)


def check_sigmas(values: Iterable[SupportsFloat]) -> list[float]:
    """Explicit sigmas, checked.

    Args:
        values: At least two numbers in 0..1, each below the one before it. The last need not be 0.

    Raises:
        UserError: If they are not that; the message names the first wrong value.
    """
    sigmas = [float(value) for value in values]
    if len(sigmas) < 2:
        raise UserError(f"A run needs at least two sigmas, from one to the next; {len(sigmas)} given.")
    for index, sigma in enumerate(sigmas):
        found = f"Sigma {index + 1} of {len(sigmas)} is {sigma}"
        if not math.isfinite(sigma):
            raise UserError(f"{found}, which is no number to sample at. Give finite values.")
        if not 0 <= sigma <= 1:
            raise UserError(f"{found}. FLUX works between 1 (noise) and 0 (image); scale the values into that range.")
        if index > 0 and sigma >= sigmas[index - 1]:
            raise UserError(f"{found}, not below the {sigmas[index - 1]} before it. Sigmas must fall at every step.")
    return sigmas


def shorten(make: Callable[[int], list[float]], steps: int, denoise: float, rule: str = "comfyui") -> list[float]:
    """The part of a schedule that image-to-image runs: from partly noised to clean.

    Args:
        make: Gives the full schedule for a number of steps.
        steps: Steps as the user set them, 1..10000.
        denoise: How much of the picture to make anew: 1 all of it, towards 0 less and less, 0 nothing.
        rule: What ``steps`` means when denoise is below 1, a key of ``SHORTENING_RULES``.

            - "comfyui": run ``steps`` steps, the last of a schedule of floor(steps / denoise).
            - "bfl": skip the first int((1 - denoise) * steps) of ``steps`` (black-forest-labs/flux, demo_gr.py).
            - "diffusers": skip int(max(steps - min(steps * denoise, steps), 0)) (FluxImg2ImgPipeline).

    Returns:
        Falling sigmas; empty when denoise is 0, for there is nothing to do.

    Raises:
        UserError: If the rule is unknown, denoise is outside 0..1, or the full schedule would be too long.
    """
    if rule not in SHORTENING_RULES:
        raise UserError(f"There is no image-to-image rule {rule!r}. Choose one of: {', '.join(SHORTENING_RULES)}.")
    if not 0 <= denoise <= 1:
        raise UserError(f"Denoise is {denoise}. Use 0 (keep the picture) to 1 (make all of it anew).")
    _check_steps(steps)
    if denoise == 0:
        return []
    sigmas = SHORTENING_RULES[rule](make, steps, denoise)
    return sigmas if len(sigmas) > 1 else []


def beta_quantile(p: float, shape: float = BETA_SHAPE) -> float:
    """Quantile of the symmetric Beta(shape, shape): the x whose regularised incomplete beta I_x(shape, shape) is p.

    Newton's method on the power series of I_x. Below the middle the density falls, so that from its second point on the
    iteration rises to the root without passing it; the upper half follows by symmetry.

    Args:
        p: Probability in 0..1.
        shape: Both parameters of the distribution, above 0 and at most 1.
    """
    if p <= 0:
        return 0.0
    if p >= 0.5:
        return 0.5 if p == 0.5 else 1 - beta_quantile(1 - p, shape)
    norm = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    x = min(math.pow(p * shape * norm, 1 / shape), 0.5)  # by the series' first term alone: a little too large
    for _ in range(NEWTON_STEPS):
        density = math.pow(x * (1 - x), shape - 1) / norm
        step = (p - _beta_cdf(x, shape, norm)) / density
        x += step
        if abs(step) <= NEWTON_TOLERANCE * x:
            break
    return x


def _beta_cdf(x: float, shape: float, norm: float) -> float:
    """I_x(shape, shape) for x <= 1/2: x^a / B * sum of (1 - a)_n / (n! (a + n)) x^n (DLMF 8.17.7, expanded)."""
    total, term = 0.0, 1.0
    for n in range(SERIES_TERMS):
        total += term / (shape + n)
        term *= (n + 1 - shape) / (n + 1) * x
    return math.pow(x, shape) * total / norm


def _shifted(t: float, mu: float | None) -> float:
    return t if mu is None else shift(t, mu)


def _table_entries(steps: int, mu: float | None) -> int:
    """Length of ComfyUI's table, long enough for all steps to differ."""
    return UNSHIFTED_TABLE if mu is None and steps <= UNSHIFTED_TABLE else SHIFTED_TABLE


def _check_steps(steps: int) -> None:
    if not 1 <= steps <= MAX_STEPS:
        raise UserError(f"{steps} steps asked for. Use 1 to {MAX_STEPS}.")


def _last_steps(make: Callable[[int], list[float]], steps: int, denoise: float) -> list[float]:
    if steps / denoise >= MAX_STEPS + 1:
        raise UserError(
            f"{steps} steps at denoise {denoise} are the end of a schedule of {steps / denoise:.0f} steps, and "
            f"{MAX_STEPS} is the most. Use fewer steps or more denoise."
        )
    return make(int(steps / denoise))[-(steps + 1) :]


def _skip_by_index(make: Callable[[int], list[float]], steps: int, denoise: float) -> list[float]:
    return make(steps)[int((1 - denoise) * steps) :]  # in floats: 0.9 of 10 steps skips none, as the reference does


def _skip_by_rest(make: Callable[[int], list[float]], steps: int, denoise: float) -> list[float]:
    return make(steps)[int(max(steps - min(steps * denoise, steps), 0)) :]


SHORTENING_RULES: dict[str, Callable[[Callable[[int], list[float]], int, float], list[float]]] = {
    "comfyui": _last_steps,
    "bfl": _skip_by_index,
    "diffusers": _skip_by_rest,
}
