"""The autoencoder against diffusers', both ways."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flux.models.autoencoder import Autoencoder
from flux.specs.autoencoder import AUTOENCODERS
from tests.oracles import TOLERANCE, autoencoder_oracle, randomise, relative_error, rows

SMALL = replace(AUTOENCODERS["flux1-ae"], name="small", base_channels=16, norm_groups=8)
SPECS = {
    "two-blocks": SMALL,
    "one-block": replace(SMALL, res_blocks=1, channel_multipliers=(1, 2, 3, 4)),
    "no-widening": replace(SMALL, channel_multipliers=(1, 1, 1), norm_groups=4, latent_channels=5),
    "other-scale": replace(SMALL, base_channels=8, norm_groups=2, scale=1.7, shift=-0.4),
}
SIZES = [(32, 32), (24, 72), (80, 40)]  # pixels


def build(spec):
    return randomise(Autoencoder(spec))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", SPECS)
def test_encoding_equals_the_scaled_mode_of_diffusers(variant, size):
    model = build(SPECS[variant])
    oracle = autoencoder_oracle(model)
    pixels = rows(2, 3, *size, seed=1)
    mode = oracle.encode(pixels).latent_dist.mode()
    assert relative_error(model.encode_mean(pixels), mode) <= TOLERANCE
    theirs = (mode - oracle.config.shift_factor) * oracle.config.scaling_factor
    assert relative_error(model.encode(pixels), theirs) <= TOLERANCE


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", SPECS)
def test_a_sample_of_the_posterior_equals_that_of_diffusers_with_the_same_generator(variant, size):
    model = build(SPECS[variant])
    oracle = autoencoder_oracle(model)
    pixels = rows(2, 3, *size, seed=1)
    sample = oracle.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(6))
    theirs = (sample - oracle.config.shift_factor) * oracle.config.scaling_factor
    ours = model.encode_sample(pixels, torch.Generator().manual_seed(6))
    assert relative_error(ours, theirs) <= TOLERANCE
    assert relative_error(model.encode(pixels), theirs) > 0.01
    assert not torch.equal(model.encode_sample(pixels, torch.Generator().manual_seed(7)), ours)


@pytest.mark.parametrize("log_variance", [-80.0, 50.0])
def test_a_posteriors_extreme_variances_are_cut_as_in_diffusers(log_variance):
    model = build(SMALL)
    model.encoder.conv_out.bias[model.spec.latent_channels :] = log_variance
    oracle = autoencoder_oracle(model)
    pixels = rows(1, 3, 16, 24, seed=1)
    sample = oracle.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(6))
    theirs = (sample - oracle.config.shift_factor) * oracle.config.scaling_factor
    assert relative_error(model.encode_sample(pixels, torch.Generator().manual_seed(6)), theirs) <= TOLERANCE


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", SPECS)
def test_decoding_equals_diffusers(variant, size):
    model = build(SPECS[variant])
    oracle = autoencoder_oracle(model)
    latents = rows(2, model.spec.latent_channels, *(side // model.spec.downscale for side in size), seed=2)
    assert relative_error(model.decode_mean(latents), oracle.decode(latents).sample) <= TOLERANCE
    theirs = oracle.decode(latents / oracle.config.scaling_factor + oracle.config.shift_factor).sample
    assert relative_error(model.decode(latents), theirs) <= TOLERANCE


def test_both_ways_equal_diffusers_for_small_activations():
    """Small enough for the epsilon of the norms to show."""
    model = build(SMALL)
    for name, parameter in model.named_parameters():
        if "conv" in name:
            parameter *= 0.01
    oracle = autoencoder_oracle(model)
    pixels, latents = rows(1, 3, 24, 40, seed=1), rows(1, 16, 3, 5, seed=2)
    assert relative_error(model.encode_mean(pixels), oracle.encode(pixels).latent_dist.mode()) <= TOLERANCE
    assert relative_error(model.decode_mean(latents), oracle.decode(latents).sample) <= TOLERANCE


def test_decoding_returns_the_size_that_was_encoded():
    model = build(SMALL)
    latents = model.encode(rows(1, 3, 24, 72, seed=1))
    assert latents.shape == (1, 16, 3, 9)
    assert model.decode(latents).shape == (1, 3, 24, 72)


def test_encoder_pads_right_and_below_for_sizes_that_do_not_divide():
    model = build(SMALL)
    pixels = rows(1, 3, 37, 50, seed=1)
    theirs = autoencoder_oracle(model).encode(pixels).latent_dist.mode()
    assert relative_error(model.encode_mean(pixels), theirs) <= TOLERANCE


def test_flux1_latents_are_shifted_then_scaled():
    model = build(SMALL)
    assert float(model.to_model(torch.tensor(1.1159))) == pytest.approx(0.3611, rel=1e-6)
    latents = rows(1, 16, 4, 4, seed=3)
    torch.testing.assert_close(model.from_model(model.to_model(latents)), latents)
