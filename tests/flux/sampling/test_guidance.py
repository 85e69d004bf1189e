"""Guidance against its formula, and masks against ComfyUI's rule for denoisers written out in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flux.sampling.guidance import masked, true_cfg
from flux.sampling.schedules import make_schedule
from flux.sampling.solvers import SOLVERS, solver

SHAPE = (2, 16, 6, 4)
SIGMAS = make_schedule("flux", 7, 1.15)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def velocity(x: Tensor, sigma: float) -> Tensor:
    """Every cell depends on its neighbours, so that what stands outside the mask matters inside."""
    around = x + x.roll(1, -1) - 0.5 * x.roll(1, -2) + x.roll(1, 1)
    return torch.tanh(around + sigma) + sigma * x


def hard_mask(channels: int = 1) -> Tensor:
    mask = torch.zeros(SHAPE[0], channels, *SHAPE[2:])
    mask[0, :, 1:4, :2] = 1
    mask[1, :, :, 3] = 1
    return mask


def awkward_clean() -> Tensor:
    """Values of every size, so that x - t v could not meet them all by luck."""
    clean = normal(*SHAPE, seed=5)
    clean[:, 0] *= 1e-30
    clean[:, 1] *= 1e4
    clean[:, 2] = 0
    return clean


def test_true_cfg_extrapolates_from_the_negative() -> None:
    positive, negative = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    expected = negative.double() + 4.0 * (positive.double() - negative.double())
    torch.testing.assert_close(true_cfg(positive, negative, 4.0).double(), expected, atol=2e-6, rtol=0)
    assert torch.equal(true_cfg(positive, negative, 1.0), positive)
    assert torch.equal(true_cfg(positive, negative, 0.0), negative)


def test_true_cfg_takes_half_precision_and_answers_in_fp32() -> None:
    positive, negative = normal(*SHAPE, seed=1).bfloat16(), normal(*SHAPE, seed=2).bfloat16()
    guided = true_cfg(positive, negative, 3.5)
    assert guided.dtype == torch.float32
    assert torch.equal(guided, negative.float() + 3.5 * (positive.float() - negative.float()))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("schedule", ["flux", "beta"])
def test_where_the_mask_is_zero_the_run_ends_in_the_clean_latent_bit_for_bit(
    name: str, steps: int, schedule: str
) -> None:
    clean, noise, mask = awkward_clean(), normal(*SHAPE, seed=6), hard_mask()
    result = solver(name)(masked(velocity, mask, clean, noise), noise, make_schedule(schedule, steps, 1.15))
    kept = (mask == 0).expand(SHAPE)
    assert torch.equal(result[kept], clean[kept])
    assert not torch.isclose(result[~kept], clean[~kept]).any()


@pytest.mark.parametrize("name", SOLVERS)
def test_the_kept_part_is_exact_from_a_partly_noised_start_too(name: str) -> None:
    clean, noise, mask = awkward_clean(), normal(*SHAPE, seed=6), hard_mask(channels=16)
    sigmas = SIGMAS[3:]
    start = sigmas[0] * noise + (1 - sigmas[0]) * clean
    result = solver(name)(masked(velocity, mask, clean, noise), start, sigmas)
    assert torch.equal(result[mask == 0], clean[mask == 0])


@pytest.mark.parametrize("name", SOLVERS)
def test_the_estimate_shown_after_each_step_holds_the_clean_latent(name: str) -> None:
    clean, noise, mask = awkward_clean(), normal(*SHAPE, seed=6), hard_mask()
    estimates: list[Tensor] = []
    solver(name)(masked(velocity, mask, clean, noise), noise, SIGMAS, lambda i, x, x0, s: estimates.append(x0))
    kept = (mask == 0).expand(SHAPE)
    assert len(estimates) == 7
    assert all(torch.equal(estimate[kept], clean[kept]) for estimate in estimates)


def test_without_the_anchor_rounding_would_spoil_the_kept_part() -> None:
    clean, noise, mask = awkward_clean(), normal(*SHAPE, seed=6), hard_mask()
    wrapped = masked(velocity, mask, clean, noise)
    result = solver("euler")(lambda x, sigma: wrapped(x, sigma), noise, SIGMAS)
    kept = (mask == 0).expand(SHAPE)
    assert not torch.equal(result[kept], clean[kept])
    torch.testing.assert_close(result[kept], clean[kept], atol=1e-5, rtol=1e-6)


def test_masked_euler_is_comfyuis_inpainting_of_the_denoiser() -> None:
    clean, noise = normal(*SHAPE, seed=5, dtype=torch.float64), normal(*SHAPE, seed=6, dtype=torch.float64)
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = noise
    for sigma, sigma_next in zip(SIGMAS, SIGMAS[1:], strict=False):
        seen = x * mask + (sigma * noise + (1 - sigma) * clean) * (1 - mask)
        denoised = (seen - sigma * velocity(seen, sigma)) * mask + clean * (1 - mask)
        x = x + (x - denoised) / sigma * (sigma_next - sigma)
    ours = solver("euler")(masked(velocity, mask, clean, noise), noise, SIGMAS)
    torch.testing.assert_close(ours, x, atol=1e-12, rtol=0)
    single = solver("euler")(masked(velocity, mask.float(), clean.float(), noise.float()), noise.float(), SIGMAS)
    torch.testing.assert_close(single.double(), x, atol=1e-5, rtol=0)


def test_outside_the_mask_the_model_sees_the_clean_latent_noised_to_its_time() -> None:
    clean, noise, mask = normal(*SHAPE, seed=5), normal(*SHAPE, seed=6), hard_mask()
    seen: list[tuple[Tensor, float]] = []

    def watching(x: Tensor, sigma: float) -> Tensor:
        seen.append((x, sigma))
        return velocity(x, sigma)

    solver("heun")(masked(watching, mask, clean, noise), noise, SIGMAS)
    kept = (mask == 0).expand(SHAPE)
    for x, sigma in seen:
        torch.testing.assert_close(x[kept], ((1 - sigma) * clean + sigma * noise)[kept], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_mask_of_ones_is_no_mask(name: str) -> None:
    noise = normal(*SHAPE, seed=6)
    free = solver(name)(velocity, noise, SIGMAS)
    whole = solver(name)(masked(velocity, torch.ones(1, 1, 1, 1), awkward_clean(), noise), noise, SIGMAS)
    torch.testing.assert_close(whole, free, atol=1e-5, rtol=0)


def test_masks_work_on_tokens_and_with_a_half_precision_model() -> None:
    clean, noise = normal(1, 6, 64, seed=8), normal(1, 6, 64, seed=9)
    mask = torch.tensor([1.0, 0, 0, 1, 0, 1]).view(1, 6, 1)
    tokens = masked(lambda x, sigma: torch.tanh(x).bfloat16(), mask, clean, noise)
    result = solver("dpmpp_2m")(tokens, noise, SIGMAS)
    assert result.dtype == torch.float32
    assert torch.equal(result[:, [1, 2, 4]], clean[:, [1, 2, 4]])
