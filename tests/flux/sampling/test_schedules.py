"""Schedules against printed tables, diffusers' scheduler, scipy's quantiles and ComfyUI's own values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from diffusers import FlowMatchEulerDiscreteScheduler

from flux.errors import UserError
from flux.sampling.schedules import (
    MAX_STEPS,
    SCHEDULES,
    SHORTENING_RULES,
    beta_quantile,
    beta_schedule,
    check_sigmas,
    flux1_mu,
    flux_schedule,
    fraction_done,
    make_schedule,
    shift,
    shift_from_factor,
    shorten,
)

PRINTED = 5.1e-7  # tables are printed to six digits

# As ComfyUI 0.33's own scheduler functions gave them, rounded to six digits: (name, mu, sigmas). ModelSamplingFlux
# with that shift; None is schnell's ModelSamplingDiscreteFlow.
COMFYUI = [
    ("simple", 1.15, [1, 0.949895, 0.88759, 0.808141, 0.703169, 0.558266, 0.344928, 0]),
    ("simple", None, [1, 0.834, 0.667, 0.5, 0.334, 0.167, 0]),
    ("beta", 1.15, [1, 0.936776, 0.759584, 0.402498, 0]),
    ("beta", 1.15, [1, 0.981152, 0.936776, 0.865455, 0.759584, 0.608045, 0.402498, 0.161048, 0]),
    ("beta", None, [1, 0.909, 0.725, 0.501, 0.276, 0.092, 0]),
]


def diffusers_sigmas(steps: int, mu: float) -> list[float]:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    return scheduler.sigmas.tolist()


def comfyui_table(mu: float | None) -> np.ndarray:
    """The model's table of sigmas, by the formulas of flux-family.md 6.2, in the linear form of the shift."""
    t = np.arange(1, (1000 if mu is None else 10000) + 1) / (1000 if mu is None else 10000)
    factor = 1.0 if mu is None else math.exp(mu)
    return factor * t / (1 + (factor - 1) * t)


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, 0.63), (4096, 1.15), (8100, 1.8278), (16384, 3.23)])
def test_flux1_mu_lies_on_the_reference_line_beyond_its_ends_too(tokens: int, mu: float) -> None:
    assert flux1_mu(tokens) == pytest.approx(mu, abs=5e-5)
    assert flux1_mu(tokens) == pytest.approx(0.00016927083 * tokens + 0.45666667, abs=1e-6)


@pytest.mark.parametrize(
    ("tokens", "steps", "printed"),
    [
        (4096, 4, [1, 0.904531, 0.759511, 0.512844, 0]),
        (1024, 4, [1, 0.849235, 0.652489, 0.384945, 0]),
        (4096, 28, [1, 0.988409, 0.976222, 0.963394, 0.949873, 0.935599]),
    ],
)
def test_flux_schedule_gives_the_reference_table(tokens: int, steps: int, printed: list[float]) -> None:
    sigmas = make_schedule("flux", steps, flux1_mu(tokens))
    assert len(sigmas) == steps + 1
    assert sigmas[: len(printed)] == pytest.approx(printed, abs=PRINTED)


def test_without_mu_the_flux_schedule_is_schnells() -> None:
    assert make_schedule("flux", 4, None) == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("mu", "steps", "printed"),
    [
        (2.29118, 4, [1, 0.967384, 0.908144, 0.767200, 0]),
        (2.26789, 8, [1, 0.985426, 0.966641, 0.941515, 0.906183, 0.852842, 0.763015, 0.579807, 0]),
    ],
)
def test_flux_schedule_gives_flux2s_table_at_its_mu(mu: float, steps: int, printed: list[float]) -> None:
    assert make_schedule("flux", steps, mu) == pytest.approx(printed, abs=2e-6)  # mu itself is printed to 5 digits


@pytest.mark.parametrize("tokens", [64, 256, 1024, 1530, 4096, 8100, 16384])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_flux_schedule_equals_diffusers_dynamic_shifting(tokens: int, steps: int) -> None:
    mu = flux1_mu(tokens)
    assert make_schedule("flux", steps, mu) == pytest.approx(diffusers_sigmas(steps, mu), abs=2e-7)


def test_shift_keeps_the_ends_and_equals_the_linear_form() -> None:
    assert shift(0.0, 1.15) == 0.0
    assert shift(1.0, 1.15) == 1.0
    factor = 6.93
    for t in (0.001, 0.25, 0.5, 0.999):
        linear = factor * t / (1 + (factor - 1) * t)
        assert shift(t, shift_from_factor(factor)) == pytest.approx(linear, rel=1e-14)
        assert shift(t, 0.0) == pytest.approx(t, rel=1e-14)
    assert shift(0.5, 1.0) > shift(0.5, 0.5) > 0.5


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_shift_factor_without_logarithm_is_refused(factor: float) -> None:
    with pytest.raises(UserError, match="number above 0"):
        shift_from_factor(factor)


@pytest.mark.parametrize(("name", "mu", "expected"), COMFYUI)
def test_comfyui_schedules_give_comfyuis_own_values(name: str, mu: float | None, expected: list[float]) -> None:
    assert make_schedule(name, len(expected) - 1, mu) == pytest.approx(expected, abs=PRINTED)


@pytest.mark.parametrize("mu", [None, 0.0, 1.15, 2.02])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 28, 98, 100, 600, 1000])
def test_simple_takes_table_entries_at_a_stride(steps: int, mu: float | None) -> None:
    table = comfyui_table(mu)
    stride = len(table) / steps
    expected = [table[-1 - int(i * stride)] for i in range(steps)] + [0.0]
    assert make_schedule("simple", steps, mu) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("mu", [None, 0.0, 1.15, 2.02])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 28, 98, 100, 139, 552, 600, 1000])
def test_beta_takes_table_entries_at_scipys_quantiles(steps: int, mu: float | None) -> None:
    table = comfyui_table(mu)
    places = 1 - np.linspace(0, 1, steps, endpoint=False)
    indices = np.rint(scipy.stats.beta.ppf(places, 0.6, 0.6) * (len(table) - 1)).astype(int)
    kept = indices[np.concatenate(([True], np.diff(indices) != 0))]
    expected = [*table[kept], 0.0]
    assert make_schedule("beta", steps, mu) == pytest.approx(expected, abs=1e-12)


def test_simple_is_the_flux_schedule_up_to_the_tables_grain() -> None:
    for steps in (4, 7, 28):
        flux, simple = make_schedule("flux", steps, 1.15), make_schedule("simple", steps, 1.15)
        assert max(abs(a - b) for a, b in zip(flux, simple, strict=True)) < 4e-4


def test_linear_ignores_the_shift() -> None:
    assert make_schedule("linear", 5, 1.15) == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


@pytest.mark.parametrize("shape", [0.3, 0.6, 1.0])
def test_beta_quantile_agrees_with_scipy(shape: float) -> None:
    places = np.concatenate((np.linspace(0, 1, 401), [1e-12, 1e-6, 1 - 1e-6, 0.5 + 1e-15]))
    ours = np.array([beta_quantile(float(p), shape) for p in places])
    assert np.abs(ours - scipy.stats.beta.ppf(places, shape, shape)).max() < 1e-12
    lower = places <= 0.5  # near 1, x itself is too coarse in floating point
    assert np.abs(scipy.special.betainc(shape, shape, ours) - places)[lower].max() < 1e-12


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("mu", [None, -3.0, 0.0, 1.15, 3.23, 20.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 50, 551])
def test_every_schedule_falls_strictly_from_at_most_one_to_zero(name: str, mu: float | None, steps: int) -> None:
    sigmas = make_schedule(name, steps, mu)
    assert sigmas[0] <= 1
    assert sigmas[-1] == 0.0
    assert all(after < before for before, after in zip(sigmas, sigmas[1:], strict=False))
    if not (name == "beta" and mu is None and steps >= 139):
        assert len(sigmas) == steps + 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_longest_schedule_still_falls(name: str) -> None:
    for mu in (None, 20.0):
        sigmas = make_schedule(name, MAX_STEPS, mu)
        assert all(after < before for before, after in zip(sigmas, sigmas[1:], strict=False))


def test_an_unknown_schedule_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'karras'.*flux, simple, beta, linear"):
        make_schedule("karras", 4, None)


@pytest.mark.parametrize("steps", [0, -3, 10_001])
def test_step_counts_out_of_range_are_refused_with_the_number(steps: int) -> None:
    with pytest.raises(UserError, match=rf"{steps} steps.*1 to 10000"):
        make_schedule("flux", steps, None)
    with pytest.raises(UserError, match=rf"{steps} steps"):
        shorten(lambda n: make_schedule("flux", n, None), steps, 0.5, "bfl")


@pytest.mark.parametrize("mu", [math.nan, math.inf, 178.0, -20.5])
def test_a_mu_that_collapses_the_schedule_is_refused(mu: float) -> None:
    with pytest.raises(UserError, match="mu ="):
        make_schedule("flux", 4, mu)


def test_explicit_sigmas_come_back_as_floats_and_need_not_end_at_zero() -> None:
    assert check_sigmas(np.float32([1, 0.5, 0.25])) == [1.0, 0.5, 0.25]
    assert check_sigmas((1, 0)) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "at least two sigmas.*0 given"),
        ([1.0], "at least two sigmas.*1 given"),
        ([1.0, math.nan, 0.0], "Sigma 2 of 3 is nan"),
        ([1.0, -math.inf], "Sigma 2 of 2 is -inf"),
        ([14.6, 1.0, 0.0], "Sigma 1 of 3 is 14.6.*between 1"),
        ([1.0, 0.5, -0.1], "Sigma 3 of 3 is -0.1"),
        ([1.0, 0.5, 0.5, 0.0], "Sigma 3 of 4 is 0.5, not below the 0.5"),
        ([0.0, 0.5, 1.0], "Sigma 2 of 3 is 0.5, not below the 0.0"),
    ],
)
def test_wrong_explicit_sigmas_are_named(values: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_sigmas(values)


def even(steps: int) -> list[float]:
    """A schedule that shows its own length."""
    return make_schedule("linear", steps, None)


@pytest.mark.parametrize(
    ("steps", "denoise", "total"), [(20, 0.75, 26), (20, 0.5, 40), (4, 0.3, 13), (20, 0.99995, 20)]
)
def test_comfyuis_rule_runs_all_steps_of_the_end_of_a_longer_schedule(steps: int, denoise: float, total: int) -> None:
    sigmas = shorten(even, steps, denoise)
    assert sigmas == even(total)[-steps - 1 :]
    assert len(sigmas) == steps + 1


@pytest.mark.parametrize(
    ("steps", "strength", "skipped"), [(20, 0.75, 5), (4, 0.3, 2), (10, 0.9, 0), (10, 0.7, 3), (4, 0.01, 3)]
)
def test_bfls_rule_skips_a_truncated_number_of_steps(steps: int, strength: float, skipped: int) -> None:
    assert shorten(even, steps, strength, "bfl") == even(steps)[skipped:]


@pytest.mark.parametrize(
    ("steps", "strength", "skipped"), [(20, 0.75, 5), (4, 0.3, 2), (10, 0.9, 1), (28, 0.6, 11), (4, 0.01, 3)]
)
def test_diffusers_rule_skips_what_strength_leaves(steps: int, strength: float, skipped: int) -> None:
    assert shorten(even, steps, strength, "diffusers") == even(steps)[skipped:]


@pytest.mark.parametrize("rule", SHORTENING_RULES)
def test_full_denoise_is_the_whole_schedule_and_none_is_nothing_to_do(rule: str) -> None:
    assert shorten(even, 8, 1.0, rule) == even(8)
    assert shorten(even, 8, 0.0, rule) == []


@pytest.mark.parametrize("rule", ["bfl", "diffusers"])
def test_a_denoise_below_all_rounding_is_nothing_to_do(rule: str) -> None:
    assert shorten(even, 8, 1e-30, rule) == []


@pytest.mark.parametrize("denoise", [-0.1, 1.01, math.nan, math.inf])
def test_denoise_out_of_range_is_refused(denoise: float) -> None:
    with pytest.raises(UserError, match="Denoise is"):
        shorten(even, 8, denoise)


def test_an_unknown_image_to_image_rule_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'a1111'.*comfyui, bfl, diffusers"):
        shorten(even, 8, 0.5, "a1111")


def test_a_denoise_that_needs_too_long_a_schedule_says_how_long() -> None:
    assert len(shorten(even, 100, 0.01)) == 101
    with pytest.raises(UserError, match="20 steps at denoise 0.001.*20000 steps"):
        shorten(even, 20, 0.001)


@pytest.mark.parametrize("mu", [None, -1.0, 0.0, 0.63, 1.15, 3.23])
@pytest.mark.parametrize("steps", [1, 4, 7, 28])
@pytest.mark.parametrize("name", SCHEDULES)
def test_at_step_i_of_n_the_fraction_that_is_done_is_i_of_n(name: str, steps: int, mu: float | None) -> None:
    sigmas = make_schedule(name, steps, mu)
    assert [fraction_done(sigma, sigmas) for sigma in sigmas] == [i / steps for i in range(steps + 1)]


@pytest.mark.parametrize("mu", [0.5, 1.15, 3.0])
def test_on_a_fine_flux_schedule_the_fraction_that_is_done_inverts_the_shift(mu: float) -> None:
    """Which is what ComfyUI makes of a percentage: ``percent_to_sigma`` shifts 1 - percent."""
    fine = flux_schedule(10_000, mu)
    asked = [i / 97 for i in range(98)]
    assert [fraction_done(shift(1 - done, mu), fine) for done in asked] == pytest.approx(asked, abs=1e-6)


@pytest.mark.parametrize("sigmas", [[1.0, 0.9, 0.2, 0.0], [0.5, 0.1], beta_schedule(9, 1.15), flux_schedule(3, None)])
def test_the_fraction_that_is_done_grows_between_steps_and_is_a_fraction_beyond_them(sigmas: list[float]) -> None:
    done = [fraction_done(1 - i / 500, sigmas) for i in range(501)]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 1)
    middle = (sigmas[0] + sigmas[1]) / 2
    assert fraction_done(middle, sigmas) == pytest.approx(0.5 / (len(sigmas) - 1))
