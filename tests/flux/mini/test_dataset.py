"""The cached latents: which scenes they are, and that they are encoded as they look."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from flux.mini import dataset
from flux.mini.dataset import CANVASES, NATIVE, build_latent_set, request_of
from flux.mini.labels import token_labels
from flux.mini.language import is_held_out
from flux.mini.scenes import draw, lay_out
from flux.models.autoencoder import Autoencoder
from flux.specs.autoencoder import MINI

SMALL = replace(MINI, base_channels=8, channel_multipliers=(1, 1, 1, 1), norm_groups=2)
TWO_CANVASES = (NATIVE, (96, 128))  # the second wider than high would be (128, 96)


@pytest.fixture
def autoencoder(monkeypatch):
    monkeypatch.setattr(dataset, "CANVASES", TWO_CANVASES)
    torch.manual_seed(0)
    return Autoencoder(SMALL).eval().requires_grad_(False)


class Unused(torch.nn.Module):
    """An autoencoder with the weights of another that must not be asked."""

    def __init__(self, other):
        super().__init__()
        self.encoder = other.encoder

    def encode(self, pixels):
        raise AssertionError("encoded again")


def build(folder, autoencoder, native=5, others=3, seed=0):
    lines = []
    made = build_latent_set(folder, autoencoder, native=native, others=others, seed=seed, report=lines.append)
    return made, lines


def test_canvases_are_the_native_one_and_all_others_that_divide_into_tokens():
    assert CANVASES[0] == NATIVE == (128, 128)
    assert len(set(CANVASES)) == len(CANVASES)
    assert set(CANVASES) == set(itertools.product(range(96, 193, 16), repeat=2))


def test_a_scene_is_a_function_of_seed_canvas_and_number():
    def scene(*key):
        request, rng = request_of(*key)
        return request, lay_out(request, rng, *key[1])

    assert scene(0, NATIVE, 3) == scene(0, NATIVE, 3)
    others = [scene(1, NATIVE, 3), scene(0, NATIVE, 4), scene(0, (96, 96), 3)]
    assert scene(0, NATIVE, 3) not in others
    # Sizes do not repeat each other's requests.
    assert [request_of(0, NATIVE, i)[0] for i in range(5)] != [request_of(0, (96, 96), i)[0] for i in range(5)]


def test_no_scene_of_the_set_is_held_out():
    assert not any(is_held_out(request_of(0, canvas, i)[0]) for canvas in CANVASES for i in range(100))


def test_latents_are_the_encoded_pictures_in_half_precision(tmp_path, autoencoder):
    made, lines = build(tmp_path, autoencoder)
    assert made.latents.keys() == made.requests.keys() == set(TWO_CANVASES)
    for canvas, count in zip(TWO_CANVASES, (5, 3), strict=True):
        latents = made.latents[canvas]
        width, height = canvas
        assert latents.shape == (count, 16, height // 8, width // 8)
        assert latents.dtype == torch.float16
        for index, request in enumerate(made.requests[canvas]):
            expected, rng = request_of(0, canvas, index)
            assert request == expected
            picture = torch.from_numpy(draw(lay_out(request, rng, width, height))).permute(2, 0, 1)
            latent = autoencoder.encode(picture[None].float() / 127.5 - 1)[0]
            torch.testing.assert_close(latents[index].float(), latent, rtol=2e-3, atol=2e-3)
            assert (
                made.labels[canvas][index].tolist()
                == token_labels(lay_out(*request_of(0, canvas, index), *canvas)).tolist()
            )
        assert made.labels[canvas].shape[:2] == (count, width * height // 256)
    assert lines == ["latents: 5 scenes of 128x128", "latents: 3 scenes of 96x128"]


def test_a_set_larger_than_a_batch_is_encoded_whole(tmp_path, autoencoder, monkeypatch):
    whole, _ = build(tmp_path / "whole", autoencoder)
    monkeypatch.setattr(dataset, "ENCODE_BATCH", 2)
    pieces, _ = build(tmp_path / "pieces", autoencoder)
    for canvas in TWO_CANVASES:
        torch.testing.assert_close(pieces.latents[canvas], whole.latents[canvas], rtol=2e-3, atol=2e-3)


def test_equal_seeds_give_equal_latents(tmp_path, autoencoder):
    one, same, other = (
        build(tmp_path / name, autoencoder, seed=seed)[0] for name, seed in zip("abc", (0, 0, 1), strict=True)
    )
    assert torch.equal(one.latents[NATIVE], same.latents[NATIVE])
    assert not torch.equal(one.latents[NATIVE], other.latents[NATIVE])
    assert one.requests[NATIVE] != other.requests[NATIVE]


def test_latents_on_disk_are_taken_as_they_are(tmp_path, autoencoder):
    first, _ = build(tmp_path, autoencoder)
    second, lines = build(tmp_path, Unused(autoencoder))
    assert second.requests == first.requests
    for canvas in TWO_CANVASES:
        assert torch.equal(second.latents[canvas], first.latents[canvas])
        assert torch.equal(second.labels[canvas], first.labels[canvas])
    assert len(lines) == 2


def test_only_the_missing_size_is_encoded(tmp_path, autoencoder):
    first, _ = build(tmp_path, autoencoder)
    (tmp_path / "latents-96x128.safetensors").unlink()
    with pytest.raises(AssertionError, match="encoded again"):
        build(tmp_path, Unused(autoencoder))
    second, _ = build(tmp_path, autoencoder)
    assert torch.equal(second.latents[96, 128], first.latents[96, 128])


def test_latents_of_other_scenes_seeds_or_encoders_are_made_again(tmp_path, autoencoder, monkeypatch):
    build(tmp_path, autoencoder)
    again, lines = build(tmp_path, autoencoder, seed=1)
    fresh, _ = build(tmp_path / "fresh", autoencoder, seed=1)
    assert torch.equal(again.latents[NATIVE], fresh.latents[NATIVE])
    assert lines[0] == "latents: latents-128x128.safetensors is of another seed; it is made again"
    _, lines = build(tmp_path, autoencoder, seed=1, native=6)
    assert "of another count" in lines[0]
    with torch.no_grad():
        autoencoder.encoder.conv_in.weight += 1
    _, lines = build(tmp_path, autoencoder, seed=1, native=6)
    assert "of another encoder" in lines[0]
    monkeypatch.setattr(dataset, "scenes", dataset.language)
    _, lines = build(tmp_path, autoencoder, seed=1, native=6)
    assert "of another scene code" in lines[0]
