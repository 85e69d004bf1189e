"""A whole walk from noise to latents against diffusers: its transformer under its own scheduler, step by step."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flux.models.flux1 import Flux1
from flux.pipelines.denoising import Hooks, denoise
from flux.pipelines.parts import open_transformer
from flux.pipelines.prompts import EncodedPrompt
from flux.sampling.noise import draw_noise
from flux.sampling.packing import pack
from flux.sampling.schedules import flux1_mu, flux_schedule
from flux.specs.flux1 import FLUX1
from tests.oracles import flux1_oracle, relative_error, rows
from tests.tiny import TINY, TINY_SCHNELL, write_module

STEPS = 8
TEXT_TOKENS = 12
GUIDANCE = 3.5
TRAJECTORY_TOLERANCE = 1e-4  # of relative_error, after every step
SIZES = {"square": (8, 8), "wide": (4, 14), "odd": (10, 14)}  # latent cells; "odd" is 5 x 7 tokens
SPECS = {"dev": TINY, "schnell": TINY_SCHNELL, "embedded": FLUX1["flux1-mini"]}


@pytest.fixture(scope="module", params=SPECS)
def part(request, tmp_path_factory):
    spec = SPECS[request.param]
    path = write_module(tmp_path_factory.mktemp("walk") / "model.safetensors", Flux1(spec), seed=1)
    return open_transformer(path, torch.device("cpu"), torch.float32)


def oracle_walk(model, prompt, noise, mu):
    """Each step's estimate of the final latents, and the final ones, packed, computed as diffusers' pipeline does."""
    oracle = flux1_oracle(model)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=mu is not None)
    sigmas = torch.linspace(1, 1 / STEPS, STEPS).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    batch, _, height, width = noise.shape
    tokens = pack(noise)
    places = torch.zeros(height // 2, width // 2, 3)
    places[..., 1] = torch.arange(height // 2)[:, None]
    places[..., 2] = torch.arange(width // 2)[None]
    walk = []
    for time in scheduler.timesteps:
        velocity = oracle(
            hidden_states=tokens,
            encoder_hidden_states=prompt.tokens.expand(batch, -1, -1),
            pooled_projections=prompt.pooled.expand(batch, -1),
            timestep=(time / 1000).expand(batch),
            guidance=torch.full((batch,), GUIDANCE) if model.spec.guidance_embedding else None,
            img_ids=places.flatten(0, 1),
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
        ).sample
        walk.append(tokens - time / 1000 * velocity)
        tokens = scheduler.step(velocity, time, tokens).prev_sample
    return [*walk, tokens]


@pytest.mark.parametrize("size", SIZES)
def test_every_step_of_a_walk_equals_diffusers(part, size):
    spec = part.spec
    height, width = SIZES[size]
    noise = draw_noise((spec.latent_channels, height, width), [11, 12])
    prompt = EncodedPrompt(
        tokens=rows(1, TEXT_TOKENS, spec.context_width, seed=2), pooled=rows(1, spec.pooled_width, seed=3)
    )
    mu = flux1_mu(height * width // 4) if spec.shifted_schedule else None
    ours = []
    end = denoise(
        part,
        prompt,
        noise,
        flux_schedule(STEPS, mu),
        guidance=GUIDANCE,
        hooks=Hooks(preview=lambda _step, estimate: ours.append(estimate)),
    )
    with part.resident() as model, torch.inference_mode():
        theirs = oracle_walk(model, prompt, noise, mu)
    errors = [relative_error(pack(a), b) for a, b in zip([*ours, end], theirs, strict=True)]
    assert len(errors) == STEPS + 1
    assert max(errors) <= TRAJECTORY_TOLERANCE
    assert relative_error(theirs[0], theirs[-1]) > 0.1  # the walk leads somewhere
