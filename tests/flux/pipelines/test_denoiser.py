"""What a Fill model sees where its picture is left out, and how a run's control LoRAs bring in their norms."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from flux.pipelines.denoiser import Guidance
from flux.pipelines.denoising import prepared
from flux.pipelines.guided import ControlInput, FillInput, empty_fill, fill_latents, guidance_of
from tests.guides import CELLS, CLOSE, GUIDANCE, PROMPT, SIGMAS, fill, lora, noise
from tests.oracles import relative_error, rows

SIZE = (32, 48)


def velocity(part, guided):
    with torch.inference_mode(), prepared(part, PROMPT, SIGMAS, guidance=GUIDANCE, guided=guided) as flow:
        return flow(noise(), SIGMAS[1])


class Greys:
    """An autoencoder's part whose latent is the picture's mean."""

    path, device, dtype = None, torch.device("cpu"), torch.float32

    def resident(self):
        return nullcontext(self)

    def encode(self, pixels):
        return pixels.mean((1, 2, 3), keepdim=True) + torch.ones(len(pixels), 16, SIZE[0] // 8, SIZE[1] // 8)


def some_fill(**settings):
    return FillInput(picture=torch.rand(1, 3, *SIZE), mask=torch.ones(1, 1, *SIZE), **settings)


def test_an_empty_picture_is_grey_and_all_of_it_is_painted():
    empty = empty_fill(Greys(), SIZE)
    assert torch.equal(empty[:, :16], torch.ones(1, 16, 4, 6))  # grey is 0 in -1..1
    assert torch.equal(empty[:, 16:], torch.ones(1, 64, 4, 6))
    assert torch.equal(empty, fill_latents(some_fill(), Greys(), SIZE))


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, False), ({"strength": 0.5}, True), ({"start": 0.2}, True), ({"end": 0.9}, True),
        ({"region": torch.ones(1, 1, *SIZE)}, True),
    ],
)  # fmt: skip
def test_it_is_encoded_where_the_picture_does_not_act_throughout(settings, needed):
    guided = guidance_of([some_fill(**settings)], Greys(), SIZE)
    assert (guided.empty is not None) == needed
    assert guidance_of([ControlInput(picture=torch.rand(1, 3, *SIZE), strength=0.5)], Greys(), SIZE).empty is None


def test_a_weaker_fill_is_blended_with_what_the_empty_picture_gives(parts):  # noqa: F811
    empty = rows(1, 80, *CELLS, seed=40)
    whole, none, half = (
        velocity(parts["fill"], Guidance(guides=guides, empty=empty))
        for guides in ([fill()], [replace(fill(), latents=empty)], [fill(strength=0.5)])
    )
    assert relative_error(half, (whole + none) / 2) <= CLOSE
    assert relative_error(half, velocity(parts["fill"], Guidance(guides=[fill(strength=0.5)]))) > CLOSE


@pytest.mark.parametrize("strength", [0.3, 1.5])
def test_norms_of_a_control_lora_come_in_whole_unless_asked_otherwise(parts, strength):  # noqa: F811
    guides = [lora(strength=strength)]
    whole, by_strength = (
        velocity(parts["draw"], Guidance(guides=guides, norms_by_strength=choice)) for choice in (False, True)
    )
    assert torch.equal(whole, velocity(parts["draw"], Guidance(guides=guides)))
    assert relative_error(whole, by_strength) > CLOSE
