"""What a GPU computes beside what was computed without its shortcuts: attention, compiled blocks, fp8, strips."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.random_weights import STORED, draw, open_random
from flux.errors import UserError
from flux.models.autoencoder import Autoencoder
from flux.ops.attention_backends import BACKENDS
from flux.pipelines.denoising import denoise
from flux.pipelines.strips import decode_in_strips
from flux.specs.autoencoder import AUTOENCODERS
from tests.guides import PROMPT, SIGMAS, noise
from tests.oracles import relative_error
from tests.tiny import TINY

pytestmark = pytest.mark.gpu

DEEP = replace(TINY, name="deep", hidden=512, heads=4, double_blocks=3, single_blocks=6)
ROUNDING = 0.03  # of a run in bf16, by whatever way
EIGHT_BITS = 0.15  # of one with products in fp8, of what the same weights give in bf16
LEAST = 45  # dB, of strips beside one piece
MOST = 2.5 * (1 << 30)  # bytes for a picture of 2048x2048


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda")


def run(device, stored="bf16", **how):
    part = open_random(DEEP, draw(DEEP, device, stored), device, torch.bfloat16)
    return denoise(part, PROMPT, noise(), SIGMAS, guidance=3.0, **how)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_attention_that_runs_here_gives_what_torchs_own_does(device, name):
    plain = run(device, attention="sdpa")
    try:
        given = run(device, attention=name)
    except UserError as reason:
        pytest.skip(str(reason))
    assert relative_error(given, plain) <= ROUNDING


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("limit", [None, 0])
def test_compiled_blocks_give_what_uncompiled_ones_do(device, stored, limit):
    assert relative_error(run(device, stored, limit=limit, compiled=True), run(device, stored)) <= ROUNDING


def test_products_in_fp8_give_what_the_same_weights_give_unpacked(device):
    on_a_cpu = run_on_cpu(draw(DEEP, device, "fp8"))
    assert relative_error(run(device, "fp8"), on_a_cpu) <= EIGHT_BITS


def run_on_cpu(weights):
    part = open_random(DEEP, weights, torch.device("cpu"), torch.float32)
    return denoise(part, PROMPT, noise(), SIGMAS, guidance=3.0)


@torch.inference_mode()
def test_strips_are_what_one_piece_is_and_a_large_picture_fits_into_them(device):
    torch.manual_seed(4)
    autoencoder = Autoencoder(AUTOENCODERS["flux1-ae"]).to(device, torch.bfloat16).eval()
    latents = torch.randn(1, 16, 128, 128).to(device, torch.bfloat16)
    whole, striped = autoencoder.decode(latents).float(), decode_in_strips(autoencoder, latents).float()
    peak, error = float(whole.max() - whole.min()), float((whole - striped).square().mean().sqrt())
    assert error == 0 or 20 * math.log10(peak / error) >= LEAST
    del whole, striped
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    decode_in_strips(autoencoder, torch.randn(1, 16, 256, 256).to(device, torch.bfloat16))
    assert torch.cuda.max_memory_allocated(device) - before <= MOST
