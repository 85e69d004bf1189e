"""The autoencoder's trainer learns, repeats itself, and goes on where it was interrupted."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from flux.mini import train_autoencoder
from flux.mini.train_autoencoder import AutoencoderRecipe, crops, pixels_from_bytes, psnr_on_fresh_scenes
from flux.models.autoencoder import Autoencoder
from flux.training.checkpoints import load_checkpoint
from tests.training import (
    FORMATS,
    TINY_AUTOENCODER,
    assert_equal_checkpoints,
    assert_equal_models,
    interruption,
    set_format,
)

pytestmark = pytest.mark.usefixtures("tiny")


def run_autoencoder(path, joint=6, decoder=4, seed=0, report=lambda line: None, **numbers):
    recipe = AutoencoderRecipe(joint_steps=joint, decoder_steps=decoder, batch=4, crop=32, save_every=4, **numbers)
    return train_autoencoder.train_autoencoder(path, recipe, seed=seed, report=report)


def test_autoencoder_learns(tmp_path):
    numbers = {"learning_rate": 1e-2, "ema_decay": 0.5}
    untrained = psnr_on_fresh_scenes(run_autoencoder(tmp_path / "short.safetensors", 1, 0, **numbers), count=4)
    trained = psnr_on_fresh_scenes(run_autoencoder(tmp_path / "long.safetensors", 30, 10, **numbers), count=4)
    assert untrained + 1 < trained < 60


@pytest.mark.parametrize("dtype", FORMATS)
def test_autoencoder_trains_in_each_format_to_finite_fp32_weights(dtype, tmp_path, monkeypatch):
    set_format(monkeypatch, dtype)
    model = run_autoencoder(tmp_path / "ae.safetensors", 2, 1)
    assert not model.training
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert bool(parameter.isfinite().all())


def test_autoencoder_repeats_itself(tmp_path):
    one, same, other = (
        run_autoencoder(tmp_path / f"{name}.safetensors", 2, 1, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert_equal_models(one, same)
    assert not torch.equal(one.encoder.conv_in.weight, other.encoder.conv_in.weight)


def test_an_interrupted_autoencoder_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Interrupted in the first phase, between the two, and in the second."""
    whole = run_autoencoder(tmp_path / "whole.safetensors")
    lines = []
    for call in (5, 2, 3):
        with interruption(monkeypatch, train_autoencoder, "_loss", call):
            run_autoencoder(tmp_path / "broken.safetensors", report=lines.append)
    resumed = run_autoencoder(tmp_path / "broken.safetensors", report=lines.append)
    assert lines == [f"autoencoder: resumed at step {step}" for step in (4, 6, 8)]
    assert_equal_checkpoints(tmp_path / "whole.safetensors", tmp_path / "broken.safetensors")
    assert_equal_models(whole, resumed)


def test_the_second_phase_trains_the_decoder_alone(tmp_path):
    """Latents may be cached between the phases: what makes them must stay."""
    path = tmp_path / "ae.safetensors"
    run_autoencoder(path, 3, 0)
    first, _ = load_checkpoint(path)
    path.unlink()
    model = run_autoencoder(path, 3, 3)
    second, _ = load_checkpoint(path)
    encoder = [name for name in model.state_dict() if name.startswith("encoder.")]
    decoder = [name for name in model.state_dict() if name.startswith("decoder.")]
    for name in encoder:
        assert torch.equal(second[f"model.{name}"], second[f"average.{name}"])
        # The latents are evened out in the encoder's last layer; all before it is the first phase's average.
        assert torch.equal(second[f"model.{name}"], first[f"average.{name}"]) == ("conv_out" not in name)
    assert any(not torch.equal(second[f"average.{name}"], first[f"average.{name}"]) for name in decoder)


def test_the_posterior_has_the_noise_that_the_decoder_is_trained_to_forgive():
    model = Autoencoder(TINY_AUTOENCODER)
    train_autoencoder._fix_posterior(model)
    log_variance = model.encoder(torch.rand(1, 3, 32, 32)).chunk(2, dim=1)[1]
    deviation = (log_variance / 2).exp() * TINY_AUTOENCODER.scale
    torch.testing.assert_close(deviation, torch.full_like(deviation, 0.08))


def test_crops_are_pieces_of_scenes():
    batch = crops(random.Random(0), 5, 48)
    assert batch.shape == (5, 3, 48, 48)
    assert -1 <= float(batch.min()) < float(batch.max()) <= 1
    assert torch.equal(batch, crops(random.Random(0), 5, 48))
    assert not torch.equal(batch, crops(random.Random(1), 5, 48))


def test_bytes_become_pixels_from_minus_one_to_one():
    image = torch.tensor([[[0, 255, 51]]], dtype=torch.uint8).numpy()
    assert pixels_from_bytes(image).flatten().tolist() == pytest.approx([-1, 1, -0.6])


def test_psnr_is_that_of_the_error_in_bytes():
    """An autoencoder that is 5 of 255 too bright everywhere."""
    brighter = SimpleNamespace(encode=lambda pixels: pixels, decode=lambda latents: latents + 2 * 5 / 255)
    assert psnr_on_fresh_scenes(brighter, count=3) == pytest.approx(34.15, abs=0.01)
