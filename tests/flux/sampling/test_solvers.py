"""Solvers against exact flows, diffusers' schedulers, and their equations written out in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from flux.errors import UserError
from flux.sampling.schedules import make_schedule
from flux.sampling.solvers import SOLVERS, evaluation_sigmas, solver

MEAN, SPREAD = 0.7, 0.4  # of the data in the Gaussian flow
MIXING = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)) / 3


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian_velocity(x: Tensor, sigma: float) -> Tensor:
    """E[noise - data | x] for data ~ N(MEAN, SPREAD^2) and x = (1 - sigma) data + sigma noise."""
    variance = ((1 - sigma) * SPREAD) ** 2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * SPREAD**2) / variance * (x - (1 - sigma) * MEAN)


def gaussian_flow(noise: Tensor, sigma: float) -> Tensor:
    """Where the exact flow takes ``noise`` by time ``sigma``."""
    return (1 - sigma) * MEAN + math.sqrt(((1 - sigma) * SPREAD) ** 2 + sigma**2) * noise


def tangled_velocity(x: Tensor, sigma: float) -> Tensor:
    """No flow of anything: nonlinear, mixing and time-dependent, so that no error can cancel by luck."""
    return torch.tanh(x @ MIXING.to(x) + sigma) + (x - 0.3) * sigma


def error(name: str, steps: int, start: float = 1.0, end: float = 0.0) -> float:
    """Largest error of a solver on the Gaussian flow over even steps, in double precision."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    sigmas = [start + (end - start) * i / steps for i in range(steps)] + [end]
    result = solver(name)(gaussian_velocity, gaussian_flow(noise, start), sigmas)
    return float((result - gaussian_flow(noise, end)).abs().max())


def orders(name: str, start: float, end: float) -> list[float]:
    """Observed orders of convergence from 40 to 640 steps."""
    errors = [error(name, steps, start, end) for steps in (40, 80, 160, 320, 640)]
    return [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]


def test_the_flow_used_as_truth_moves_along_its_own_velocity() -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for sigma in (0.9, 0.5, 0.1):
        slope = (gaussian_flow(noise, sigma + 1e-6) - gaussian_flow(noise, sigma - 1e-6)) / 2e-6
        torch.testing.assert_close(slope, gaussian_velocity(gaussian_flow(noise, sigma), sigma), atol=1e-8, rtol=0)


ORDERS = [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_2m_snr", 2)]


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_between_the_ends_the_error_falls_with_the_solvers_order(name: str, order: int) -> None:
    assert orders(name, 0.9, 0.1) == pytest.approx([order] * 4, abs=0.15)


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_the_ends_do_not_spoil_the_order(name: str, order: int) -> None:
    """Down to 0 the clocks of the two-step solvers stretch without bound: their error is of h^2 log(1/h)."""
    found = orders(name, 1.0, 0.0)
    assert found[-1] == pytest.approx(order, abs=0.25)
    assert abs(found[-1] - order) <= abs(found[0] - order)


@pytest.mark.parametrize("steps", [8, 20, 50])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_snr"])
def test_dpmpp_2m_beats_euler_at_the_same_number_of_model_calls(name: str, steps: int) -> None:
    assert error(name, steps) < 0.5 * error("euler", steps)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_straight_flow_is_solved_exactly_in_any_number_of_steps(name: str) -> None:
    data, noise = normal(2, 16, 4, 4, seed=3), normal(2, 16, 4, 4, seed=4)
    for steps in (1, 2, 7):
        result = solver(name)(lambda x, sigma: noise - data, noise, make_schedule("flux", steps, 1.15))
        torch.testing.assert_close(result, data, atol=2e-6, rtol=0)


@pytest.mark.parametrize("mu", [0.5, 1.15])
def test_euler_walks_with_diffusers_over_eight_steps(mu: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)], mu=mu)
    x, theirs = normal(4, 6), []
    for t in scheduler.timesteps:
        x = scheduler.step(tangled_velocity(x, t.item() / 1000), t, x).prev_sample
        theirs.append(x)
    ours: list[Tensor] = []
    solver("euler")(tangled_velocity, normal(4, 6), make_schedule("flux", 8, mu), lambda i, x, x0, s: ours.append(x))
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-6, rtol=0)


def test_heun_walks_with_diffusers() -> None:
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(8)
    sigmas = [*dict.fromkeys(scheduler.sigmas.tolist())]
    assert len(sigmas) == 9
    x = normal(4, 6)
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        x = scheduler.step(tangled_velocity(x, t.item() / 1000), t, x).prev_sample
    # Theirs takes v through the data estimate and back, which at its last sigma, 0.001, costs three digits.
    torch.testing.assert_close(solver("heun")(tangled_velocity, normal(4, 6), sigmas), x, atol=1e-5, rtol=0)


def test_dpmpp_2m_snr_walks_with_diffusers() -> None:
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(0)
    sigmas = scheduler.sigmas.tolist()
    x = normal(4, 6)
    for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        x = scheduler.step(tangled_velocity(x, sigma), t, x).prev_sample
    torch.testing.assert_close(solver("dpmpp_2m_snr")(tangled_velocity, normal(4, 6), sigmas), x, atol=3e-6, rtol=0)


def test_dpmpp_2m_snr_walks_with_diffusers_from_pure_noise() -> None:
    sigmas = make_schedule("flux", 20, 1.15)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
    scheduler.set_timesteps(20)
    scheduler.sigmas = torch.tensor(sigmas)
    scheduler.set_begin_index(0)
    x = normal(4, 6)
    for t, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        x = scheduler.step(tangled_velocity(x, sigma), t, x).prev_sample
    torch.testing.assert_close(solver("dpmpp_2m_snr")(tangled_velocity, normal(4, 6), sigmas), x, atol=3e-6, rtol=0)


def dpmpp_2m_by_the_paper(x: Tensor, sigmas: list[float], clock: Callable[[float], float]) -> Tensor:
    """Algorithm 2 of Lu et al. 2022b with exponentials of the clock, k-diffusion's way, in double precision."""
    before: list[tuple[float, Tensor]] = []
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        data = x - sigma * tangled_velocity(x, sigma)
        if sigma_next == 0:
            return data
        target, h = data, clock(sigma_next) - clock(sigma)
        if before:
            r = (clock(sigma) - clock(before[-1][0])) / h
            target = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * before[-1][1]
        # -log t is the clock of alpha = 1, the other that of alpha = 1 - t: x_s = (s / t) x - alpha_s (e^-h - 1) target
        alpha = 1.0 if clock is CLOCKS["dpmpp_2m"] else 1 - sigma_next
        x = sigma_next / sigma * x - alpha * math.expm1(-h) * target
        before.append((sigma, data))
    return x


CLOCKS: dict[str, Callable[[float], float]] = {
    "dpmpp_2m": lambda t: -math.log(t),
    "dpmpp_2m_snr": lambda t: math.log1p(-t) - math.log(t),
}


@pytest.mark.parametrize("name", CLOCKS)
@pytest.mark.parametrize("end", ["zero", "midway"])
def test_dpmpp_2m_is_the_papers_algorithm(name: str, end: str) -> None:
    sigmas = make_schedule("beta", 12, 1.15)
    sigmas = sigmas[1:] if end == "zero" else sigmas[1:-3]  # from below 1, where both clocks are finite
    x = normal(4, 6, dtype=torch.float64)
    expected = dpmpp_2m_by_the_paper(x, sigmas, CLOCKS[name])
    torch.testing.assert_close(solver(name)(tangled_velocity, x, sigmas), expected, atol=1e-12, rtol=0)
    single = solver(name)(tangled_velocity, x.float(), sigmas)
    torch.testing.assert_close(single.double(), expected, atol=2e-6, rtol=0)


def test_comfyuis_dpmpp_2m_uses_both_estimates_from_the_second_step_on() -> None:
    sigmas = make_schedule("flux", 6, 1.15)
    x = normal(4, 6, dtype=torch.float64)
    expected = dpmpp_2m_by_the_paper(x, sigmas, CLOCKS["dpmpp_2m"])
    torch.testing.assert_close(solver("dpmpp_2m")(tangled_velocity, x, sigmas), expected, atol=1e-12, rtol=0)


def test_the_snr_clock_gives_no_weight_to_what_was_seen_in_pure_noise() -> None:
    sigmas = make_schedule("flux", 6, 1.15)[:3]
    x = normal(4, 6, dtype=torch.float64)
    euler = solver("euler")(tangled_velocity, x, sigmas)
    torch.testing.assert_close(solver("dpmpp_2m_snr")(tangled_velocity, x, sigmas), euler, atol=1e-14, rtol=0)
    assert (solver("dpmpp_2m")(tangled_velocity, x, sigmas) - euler).abs().max() > 1e-3


@pytest.mark.parametrize("name", SOLVERS)
def test_on_step_is_told_index_latent_estimate_and_next_sigma(name: str) -> None:
    sigmas = make_schedule("flux", 5, 1.15)
    told: list[tuple[int, Tensor, Tensor, float]] = []
    result = solver(name)(tangled_velocity, normal(4, 6), sigmas, lambda *told_now: told.append(told_now))
    copies = [x.clone() for _, x, _, _ in told]
    assert [index for index, *_ in told] == [0, 1, 2, 3, 4]
    assert [sigma for *_, sigma in told] == sigmas[1:]
    assert torch.equal(told[-1][1], result)
    starts = [normal(4, 6), *copies]
    for start, (_, _, estimate, _), sigma in zip(starts, told, sigmas, strict=False):
        torch.testing.assert_close(estimate, start - sigma * tangled_velocity(start, sigma), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_latents_are_carried_in_fp32_whatever_the_model_computes_in(name: str) -> None:
    seen: list[torch.dtype] = []

    def half_velocity(x: Tensor, sigma: float) -> Tensor:
        seen.append(x.dtype)
        return gaussian_velocity(x, sigma).bfloat16()

    start = normal(4, 6).bfloat16()
    result = solver(name)(half_velocity, start, make_schedule("linear", 4, None))
    assert result.dtype == torch.float32
    assert set(seen) == {torch.float32}
    assert not torch.equal(result, result.bfloat16().float())


@pytest.mark.parametrize("name", SOLVERS)
def test_the_start_is_left_untouched_and_an_empty_schedule_changes_nothing(name: str) -> None:
    start = normal(4, 6)
    solver(name)(tangled_velocity, start, make_schedule("flux", 3, 1.15))
    assert torch.equal(start, normal(4, 6))
    for nothing in ([], [0.5]):
        assert torch.equal(solver(name)(tangled_velocity, start, nothing), start)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_run_may_be_split_at_any_step_where_the_solver_has_no_memory(name: str) -> None:
    sigmas = make_schedule("flux", 6, 1.15)
    whole = solver(name)(tangled_velocity, normal(4, 6), sigmas)
    first = solver(name)(tangled_velocity, normal(4, 6), sigmas[:4])
    second = solver(name)(tangled_velocity, first, sigmas[3:])
    assert torch.equal(whole, second) == (name in ("euler", "heun"))


def test_evaluation_sigmas_list_every_model_call_in_order() -> None:
    sigmas = [1.0, 0.8, 0.5, 0.0]
    assert evaluation_sigmas("euler", sigmas) == [1.0, 0.8, 0.5]
    assert evaluation_sigmas("dpmpp_2m", sigmas) == [1.0, 0.8, 0.5]
    assert evaluation_sigmas("heun", sigmas) == [1.0, 0.8, 0.8, 0.5, 0.5]
    assert evaluation_sigmas("heun", [1.0, 0.8, 0.5]) == [1.0, 0.8, 0.8, 0.5]
    assert evaluation_sigmas("euler", []) == []


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", ["flux", "beta"])
def test_evaluation_sigmas_are_the_very_numbers_the_model_gets(name: str, schedule: str) -> None:
    sigmas = make_schedule(schedule, 9, 1.15)
    called: list[float] = []

    def velocity(x: Tensor, sigma: float) -> Tensor:
        called.append(sigma)
        return tangled_velocity(x, sigma)

    solver(name)(velocity, normal(4, 6), sigmas)
    assert called == evaluation_sigmas(name, sigmas)
    assert set(called) <= set(sigmas)


def test_an_unknown_sampler_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'ddim'.*euler, heun, dpmpp_2m, dpmpp_2m_snr"):
        solver("ddim")
    with pytest.raises(UserError, match="'ddim'"):
        evaluation_sigmas("ddim", [1.0, 0.0])
