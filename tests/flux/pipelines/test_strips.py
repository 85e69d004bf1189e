"""An autoencoder in strips gives the pictures and latents of one in one piece, to the last bits, in less memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flux.memory.tracing import trace
from flux.mini import files
from flux.models.autoencoder import Autoencoder
from flux.ops.layers import on_meta
from flux.pipelines import strips
from flux.pipelines.parts import open_autoencoder
from flux.pipelines.strips import Striped, decode_in_strips
from flux.specs.autoencoder import AUTOENCODERS
from tests.oracles import rows

SIZES = [(1, 32, 32), (1, 40, 72), (2, 24, 16), (1, 8, 200)]  # batch, rows and columns of the latent, in halves
GIB = 1 << 30
SMALL = replace(AUTOENCODERS["flux1-ae"], name="small", base_channels=32, norm_groups=8)


@pytest.fixture
def low(monkeypatch):
    """Strips of as few rows as there can be, and few queries."""
    monkeypatch.setattr(strips, "STRIP_BYTES", 1)
    monkeypatch.setattr(strips, "QUERIES", 50)


@pytest.fixture(scope="module")
def embedded():
    part = open_autoencoder(files.MINI.autoencoder, torch.device("cpu"))
    with part.resident() as autoencoder:
        yield autoencoder


def decibels(one, other):
    peak = float(other.max() - other.min())
    error = float((one - other).square().mean().sqrt())
    return 20 * math.log10(peak / error) if error else math.inf


@torch.inference_mode()
@pytest.mark.usefixtures("low")
@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
def test_pictures_of_the_embedded_autoencoder_are_the_same(embedded, batch, height, width):
    latents = rows(batch, 16, height // 2, width // 2, seed=height)
    assert decibels(decode_in_strips(embedded, latents), embedded.decode(latents)) > 100
    pixels = rows(batch, 3, 4 * height, 4 * width, seed=width).clamp(-1, 1)
    assert decibels(Striped(embedded).encode(pixels), embedded.encode(pixels)) > 100
    samples = (own.encode_sample(pixels, torch.Generator().manual_seed(1)) for own in (Striped(embedded), embedded))
    assert decibels(*samples) > 100


@torch.inference_mode()
@pytest.mark.usefixtures("low")
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 100), (torch.bfloat16, 50)])
def test_so_are_those_of_random_weights(dtype, least):
    torch.manual_seed(3)
    autoencoder = Autoencoder(SMALL).to(dtype)
    latents = rows(1, 16, 20, 12, seed=1).to(dtype)
    apart = decibels(decode_in_strips(autoencoder, latents).float(), autoencoder.decode(latents).float())
    exact = Autoencoder(SMALL)
    exact.load_state_dict(autoencoder.state_dict())
    assert apart > least
    # No farther from the numbers in full precision than one piece is.
    whole, striped = (
        decibels(run.float(), exact.float().decode(latents.float()))
        for run in (autoencoder.decode(latents), decode_in_strips(autoencoder, latents))
    )
    assert striped > min(whole - 1, 100)


@pytest.fixture(scope="module")
def real():
    """Random weights of FLUX.1's own size."""
    torch.manual_seed(4)
    return Autoencoder(AUTOENCODERS["flux1-ae"]).eval()


@torch.inference_mode()
def test_so_are_those_of_random_weights_at_real_size(real, monkeypatch):
    latents = rows(1, 16, 32, 24, seed=2)
    whole = real.decode(latents)
    monkeypatch.setattr(strips, "STRIP_BYTES", 4 << 20)  # some twenty rows of the widest map
    apart = real.decode(latents) - Striped(real).decode(latents)
    assert decibels(Striped(real).decode(latents), whole) > 90
    rows_apart = apart.abs().mean(dim=(0, 1, 3))
    assert float(rows_apart.max()) < 4 * float(rows_apart.mean()) + 1e-6 * float(whole.std())
    pixels = rows(1, 3, 192, 128, seed=3).clamp(-1, 1)
    assert decibels(Striped(real).encode(pixels), real.encode(pixels)) > 90


@torch.inference_mode()
@pytest.mark.usefixtures("low")
def test_no_strip_shows(embedded):
    """What differs is nowhere more than elsewhere: no row of the picture stands out."""
    latents = rows(1, 16, 16, 16, seed=9)
    apart = (decode_in_strips(embedded, latents) - embedded.decode(latents)).abs().mean(dim=(0, 1, 3))
    assert float(apart.max()) < 1e-4


def peak(run, dtype=torch.bfloat16):
    with on_meta():
        autoencoder = Autoencoder(AUTOENCODERS["flux1-ae"]).to(dtype)
    return trace(autoencoder, lambda: run(autoencoder, dtype)).peak


def test_2048_pixels_square_need_two_and_a_half_gib():
    def striped(autoencoder, dtype):
        latents = torch.empty(1, 16, 256, 256, dtype=dtype)
        return lambda: decode_in_strips(autoencoder, latents)

    def whole(autoencoder, dtype):
        latents = torch.empty(1, 16, 256, 256, dtype=dtype)
        return lambda: autoencoder.decode(latents)

    weights = sum(p.numel() for p in Autoencoder(AUTOENCODERS["flux1-ae"]).decoder.parameters()) * 2
    assert peak(striped) + weights <= 2.5 * GIB < peak(whole)


def test_so_does_encoding():
    def striped(autoencoder, dtype):
        pixels = torch.empty(1, 3, 2048, 2048, dtype=dtype)
        return lambda: Striped(autoencoder).encode(pixels)

    assert peak(striped) <= 2.4 * GIB
