"""Evening out the latents, and folding the map into the autoencoder."""

from __future__ import annotations

import pytest
import torch

from flux.mini.whitening import evening_map, fold_map
from flux.models.autoencoder import Autoencoder
from flux.specs.autoencoder import MINI


@pytest.fixture
def latents() -> torch.Tensor:
    torch.manual_seed(0)
    mix = torch.randn(16, 16)
    return torch.einsum("ij,njhw->nihw", mix, torch.randn(64, 16, 8, 8)) + torch.randn(16)[:, None, None]


def principal_variances(latents: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigvalsh(torch.cov(latents.permute(1, 0, 2, 3).flatten(1)))


@pytest.mark.parametrize("exponent", [0.0, 0.25, 1.0])
def test_variances_become_their_power_with_mean_one(latents, exponent):
    matrix, mean = evening_map(latents, exponent)
    mapped = torch.einsum("ij,njhw->nihw", matrix, latents - mean[:, None, None])
    before, after = principal_variances(latents), principal_variances(mapped)
    wanted = before**exponent
    torch.testing.assert_close(after, wanted / wanted.mean(), rtol=1e-3, atol=1e-4)
    assert mapped.mean(dim=(0, 2, 3)).abs().max() < 1e-4


def test_folding_maps_the_latents_and_leaves_what_the_decoder_sees(latents):
    torch.manual_seed(1)
    autoencoder = Autoencoder(MINI).eval()
    matrix, mean = evening_map(latents)
    pixels = torch.rand(2, 3, 128, 128) * 2 - 1
    conv = autoencoder.decoder.conv_in
    with torch.no_grad():
        before, seen = autoencoder.encode(pixels), conv(autoencoder.encode_mean(pixels))
        fold_map(autoencoder, matrix, mean)
        after, sees = autoencoder.encode(pixels), conv(autoencoder.encode_mean(pixels))
    expected = torch.einsum("ij,njhw->nihw", matrix, before - mean[:, None, None])
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=0.1)
    inside = (..., slice(1, -1), slice(1, -1))  # at the edge the decoder's zero padding means something else now
    torch.testing.assert_close(sees[inside], seen[inside], rtol=1e-3, atol=1e-3)
