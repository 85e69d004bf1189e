"""Samplers: solvers of the flow's equation dx/dt = v(x, t) from noise to data, behind one signature.

A solver takes a velocity model, a starting latent at ``sigmas[0]`` and falling sigmas, and gives the latent at the last
of them. The latent has any shape; it is carried in fp32 (wider when it comes wider). Below, t and s are the sigmas of
a step's start and end, and D = x - t v is the estimate of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import UserError

__all__ = [
    "SOLVERS",
    "Anchored",
    "OnStep",
    "Solver",
    "Velocity",
    "evaluation_sigmas",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_snr",
    "sample_euler",
    "sample_heun",
    "solver",
    "widened",
]

Velocity = Callable[[Tensor, float], Tensor]
"""(x, sigma) -> v = noise - data, of x's shape, in any floating dtype."""

OnStep = Callable[[int, Tensor, Tensor, float], None]
"""Called after each step with (index, new latent, data estimate, sigma of the new latent); may raise to stop."""


class Solver(Protocol):
    """The signature that all samplers share."""

    def __call__(
        self, velocity: Velocity, x: Tensor, sigmas: Sequence[float], on_step: OnStep | None = None
    ) -> Tensor: ...


@runtime_checkable
class Anchored(Protocol):
    """A velocity that knows parts of the data exactly.

    Rounding keeps x - t v from giving them bit for bit, so the solver asks for them where it estimates the data.
    """

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor: ...

    def anchor(self, data: Tensor) -> Tensor:
        """The data estimate with its known parts put in."""
        ...


def sample_euler(velocity: Velocity, x: Tensor, sigmas: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """Euler's method: x_s = x_t + (s - t) v(x_t, t). First order, one model call a step.

    The sampler of Black Forest Labs' code, diffusers' FlowMatchEulerDiscreteScheduler and ComfyUI's "euler" (Algorithm
    2 without churn, Karras et al. 2022).

    Args:
        velocity: The model.
        x: Latent at ``sigmas[0]``.
        sigmas: Falling times in 0..1. Fewer than two leave x as it is.
        on_step: Called after each step.
    """
    x = widened(x)
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v, data = _predict(velocity, x, sigma)
        x = x + (sigma_next - sigma) * v if sigma_next > 0 else data
        _report(on_step, index, x, data, sigma_next)
    return x


def sample_heun(velocity: Velocity, x: Tensor, sigmas: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """Heun's method: x_s = x_t + (s - t) (v(x_t, t) + v(x', s)) / 2 with Euler's x' (Algorithm 2, Karras et al. 2022).

    Second order, two model calls a step, but one in a step to 0, which is Euler's. The data estimate given to
    ``on_step`` is that of the first call.

    Args:
        velocity: The model.
        x: Latent at ``sigmas[0]``.
        sigmas: Falling times in 0..1. Fewer than two leave x as it is.
        on_step: Called after each step.
    """
    x = widened(x)
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v, data = _predict(velocity, x, sigma)
        if sigma_next > 0:
            step = sigma_next - sigma
            v_next, _ = _predict(velocity, x + step * v, sigma_next)
            x = x + step * (v + v_next) / 2
        else:
            x = data
        _report(on_step, index, x, data, sigma_next)
    return x


def sample_dpmpp_2m(velocity: Velocity, x: Tensor, sigmas: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++(2M) as ComfyUI's "dpmpp_2m" runs it on flow models. Second order, one model call a step.

    x_s = (s/t) x_t + (1 - s/t) (D + h / (2 h_last) (D - D_last)), where h is the step's length on a clock (Algorithm 2,
    Lu et al. 2022b, arXiv 2211.01095; k-diffusion, ``sample_dpmpp_2m``). ComfyUI's clock is -log t for flow models
    too, on which the flow reads dx = (D - x) dclock. It is 0 at t = 1, so that only the first step and a step to 0
    (where x becomes D) are first order.

    Args:
        velocity: The model.
        x: Latent at ``sigmas[0]``.
        sigmas: Falling times in 0..1. Fewer than two leave x as it is.
        on_step: Called after each step.
    """
    return _two_step(velocity, x, sigmas, on_step, clock=_negative_log)


def sample_dpmpp_2m_snr(
    velocity: Velocity, x: Tensor, sigmas: Sequence[float], on_step: OnStep | None = None
) -> Tensor:
    """DPM-Solver++(2M) on the paper's clock, half the log signal-to-noise ratio: log((1 - t) / t).

    The formula of ``sample_dpmpp_2m``, and diffusers' DPMSolverMultistepScheduler with flow sigmas. The clock is minus
    infinity at t = 1, which gives the estimate made there no weight: the first two steps from pure noise, and a step to
    0, are first order.

    Args:
        velocity: The model.
        x: Latent at ``sigmas[0]``.
        sigmas: Falling times in 0..1. Fewer than two leave x as it is.
        on_step: Called after each step.
    """
    return _two_step(velocity, x, sigmas, on_step, clock=_half_log_snr)


SOLVERS: dict[str, Solver] = {
    "euler": sample_euler,
    "heun": sample_heun,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_snr": sample_dpmpp_2m_snr,
}


def solver(name: str) -> Solver:
    """A sampler by name.

    Raises:
        UserError: If the name is unknown.
    """
    if name not in SOLVERS:
        raise UserError(f"There is no sampler named {name!r}. Choose one of: {', '.join(SOLVERS)}.")
    return SOLVERS[name]


def evaluation_sigmas(name: str, sigmas: Sequence[float]) -> list[float]:
    """The sigmas at which a sampler calls the model, in order, repeats included.

    Found by running the sampler on one number, so that it cannot disagree with the sampler. The values are those that
    the model will be given, bit for bit.

    Raises:
        UserError: If the name is unknown.
    """
    called: list[float] = []

    def record(x: Tensor, sigma: float) -> Tensor:
        called.append(sigma)
        return x

    solver(name)(record, torch.zeros(1), sigmas)
    return called


def _two_step(
    velocity: Velocity, x: Tensor, sigmas: Sequence[float], on_step: OnStep | None, clock: Callable[[float], float]
) -> Tensor:
    x = widened(x)
    last: tuple[Tensor, float] | None = None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        _, data = _predict(velocity, x, sigma)
        if sigma_next > 0:
            target = data
            if last is not None:
                data_last, sigma_last = last
                h, h_last = clock(sigma_next) - clock(sigma), clock(sigma) - clock(sigma_last)
                target = data + h / (2 * h_last) * (data - data_last)
            ratio = sigma_next / sigma
            x = ratio * x + (1 - ratio) * target
        else:
            x = data
        last = data, sigma
        _report(on_step, index, x, data, sigma_next)
    return x


def _negative_log(sigma: float) -> float:
    return -math.log(sigma)


def _half_log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


def widened(x: Tensor) -> Tensor:
    """The tensor in fp32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _predict(velocity: Velocity, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Velocity and data estimate, both in x's dtype."""
    v = velocity(x, sigma).to(x.dtype)
    data = x - sigma * v
    return v, velocity.anchor(data) if isinstance(velocity, Anchored) else data


def _report(on_step: OnStep | None, index: int, x: Tensor, data: Tensor, sigma_next: float) -> None:
    if on_step is not None:
        on_step(index, x, data, sigma_next)
