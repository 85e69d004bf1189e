"""Random weights without a file: the same each time, and the same bits whether they stay or are streamed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.random_weights import STORED, draw, open_random
from flux.pipelines.denoising import denoise
from tests.guides import PROMPT, SIGMAS, noise
from tests.tiny import TINY

CPU = torch.device("cpu")
DEEP = replace(TINY, name="deep", double_blocks=2, single_blocks=4)
FP8_ERROR = 0.15  # of the result's norm


@pytest.fixture(scope="module", params=STORED)
def stored(request):
    return request.param


@pytest.fixture(scope="module")
def weights(stored):
    return draw(DEEP, CPU, stored)


def run(weights, limit=None):
    return denoise(open_random(DEEP, weights, CPU, torch.float32), PROMPT, noise(), SIGMAS, guidance=3.0, limit=limit)


def test_streamed_weights_give_the_bits_of_those_that_stay(weights):
    resident = run(weights)
    assert resident.isfinite().all()
    assert torch.equal(run(weights, limit=0), resident)


def test_they_are_the_same_each_time(weights, stored):
    again = draw(DEEP, CPU, stored)
    assert weights.keys() == again.keys()
    for name, own in weights.items():
        assert torch.equal(own.numbers(torch.float32), again[name].numbers(torch.float32))
    assert not torch.equal(run(draw(DEEP, CPU, stored, seed=1)), run(weights))


def test_a_signal_keeps_its_size(weights):
    name = "single_blocks.0.linear1.weight"
    assert float(weights[name].numbers(torch.float32).std()) == pytest.approx(DEEP.hidden**-0.5, rel=0.02)


def test_fp8_takes_half_and_is_near(weights, stored):
    plain = draw(DEEP, CPU, "bf16")
    name = "single_blocks.0.linear1.weight"
    assert plain[name].nbytes == 2 * plain[name].parameters
    if stored == "fp8":
        assert weights[name].nbytes == weights[name].parameters + 4
        exact = run(plain)
        assert (run(weights) - exact).norm() <= FP8_ERROR * exact.norm()
        residency = open_random(DEEP, weights, CPU, torch.bfloat16).residency
        assert name in residency.accounts.packable
