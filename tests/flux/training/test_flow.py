"""Flow matching: targets by hand, velocities against diffusers' transformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from einops import rearrange

from flux.models.flux1 import Flux1
from flux.specs.flux1 import FLUX1
from flux.training.flow import TextBatch, flow_targets, predict_velocity, sample_times
from tests.oracles import TOLERANCE, flux1_oracle, randomise, relative_error, rows

TINY = replace(
    FLUX1["flux1-dev"],
    name="tiny",
    context_width=24,
    pooled_width=16,
    hidden=32,
    heads=2,
    axes=(4, 6, 6),
    double_blocks=1,
    single_blocks=1,
)


def test_targets_go_from_data_to_noise_at_constant_velocity():
    data, noise = rows(3, 2, 4, 6, seed=1), rows(3, 2, 4, 6, seed=2)
    noisy, velocity = flow_targets(data, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(noisy[0], data[0])
    torch.testing.assert_close(noisy[1], 0.75 * data[1] + 0.25 * noise[1])
    assert torch.equal(noisy[2], noise[2])
    assert torch.equal(velocity, noise - data)
    # One Euler step of any length along the velocity stays on the line.
    later, _ = flow_targets(data, noise, torch.tensor([0.5, 0.5, 0.5]))
    torch.testing.assert_close(later[1], noisy[1] + 0.25 * velocity[1])


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.4, 1.1), (-1.0, 0.3)])
def test_times_are_logit_normal(mean, deviation):
    times = sample_times(20_000, mean=mean, deviation=deviation, generator=torch.Generator().manual_seed(0)).double()
    assert times.shape == (20_000,)
    assert float(times.min()) > 0
    assert float(times.max()) < 1
    logits = torch.logit(times)
    assert float(logits.mean()) == pytest.approx(mean, abs=0.03)
    assert float(logits.std()) == pytest.approx(deviation, rel=0.03)
    # Normal, not of another shape: the quartiles are where the error function puts them.
    quartiles = torch.quantile(logits, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    expected = mean + deviation * torch.tensor([-0.6745, 0.0, 0.6745], dtype=torch.float64)
    torch.testing.assert_close(quartiles, expected, rtol=0, atol=0.04 * deviation)


def test_times_follow_the_generator_or_the_global_seed():
    def drawn(seed):
        return sample_times(5, mean=0.4, deviation=1.1, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(sample_times(5, mean=0.4, deviation=1.1), drawn(1))


def text(batch, seed=5):
    return TextBatch(rows(batch, 7, TINY.context_width, seed=seed), rows(batch, TINY.pooled_width, seed=seed + 1))


def test_selecting_takes_other_rows_where_the_mask_is_true():
    own, empty = text(3), text(1, seed=9)
    mixed = own.select(torch.tensor([False, True, False]), empty)
    for name in ("tokens", "pooled"):
        assert torch.equal(getattr(mixed, name)[[0, 2]], getattr(own, name)[[0, 2]])
        assert torch.equal(getattr(mixed, name)[1], getattr(empty, name)[0])


def oracle_velocity(model, noisy, times, prompt, guidance=None):
    """diffusers' transformer with the same weights; without guidance it has no embedder for it."""
    rows_, columns = noisy.shape[-2] // 2, noisy.shape[-1] // 2
    places = [[0.0, row, column] for row in range(rows_) for column in range(columns)]
    return flux1_oracle(model, guidance_embedding=guidance is not None)(
        hidden_states=rearrange(noisy, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
        encoder_hidden_states=prompt.tokens,
        pooled_projections=prompt.pooled,
        timestep=times,
        guidance=guidance,
        img_ids=torch.tensor(places),
        txt_ids=torch.zeros(prompt.tokens.shape[1], 3),
    ).sample


@pytest.mark.parametrize("size", [(4, 4), (4, 10), (8, 2)])
@pytest.mark.parametrize("guidance", [None, (3.5, 1.0)])
def test_velocities_equal_those_of_diffusers(guidance, size):
    model = randomise(Flux1(TINY))
    given = rows(2, 16, *size, seed=1), torch.tensor([0.9, 0.2]), text(2)
    strength = None if guidance is None else torch.tensor(guidance)
    theirs = oracle_velocity(model, *given, strength)
    assert relative_error(predict_velocity(model, *given, strength), theirs) <= TOLERANCE


def gathered(model, noisy, prompt, behind=None, references=(), places=(), bias=None):
    """diffusers' velocity of what training may give besides: channels, and references with the places of each's tokens.

    A bias is added to the logits of each of diffusers' attentions.
    """
    patches = "b c (h p) (w q) -> b (h w) (c p q)"
    tokens = rearrange(noisy if behind is None else torch.cat((noisy, behind), dim=1), patches, p=2, q=2)
    count, columns = tokens.shape[1], noisy.shape[-1] // 2
    ids = [[0.0, index // columns, index % columns] for index in range(count)]
    tokens = torch.cat([tokens, *(rearrange(each, patches, p=2, q=2) for each in references)], dim=1)
    velocity = flux1_oracle(model, guidance_embedding=False)(
        hidden_states=tokens,
        encoder_hidden_states=prompt.tokens,
        pooled_projections=prompt.pooled,
        timestep=torch.tensor([0.9, 0.2]),
        img_ids=torch.tensor([*ids, *places]),
        txt_ids=torch.zeros(prompt.tokens.shape[1], 3),
        joint_attention_kwargs=None if bias is None else {"attention_mask": bias},
    ).sample
    return velocity[:, :count]


def grid(place, top, left, rows_, columns):
    return [[float(place), float(top + row), float(left + column)] for row in range(rows_) for column in range(columns)]


TIMES = torch.tensor([0.9, 0.2])


@pytest.mark.parametrize("channels", [16, 80])
def test_channels_stand_behind_the_noisy_latents(channels):
    model = randomise(Flux1(replace(TINY, in_channels=64 + 4 * channels)))
    noisy, behind = rows(2, 16, 4, 6, seed=1), rows(2, channels, 4, 6, seed=2)
    ours = predict_velocity(model, noisy, TIMES, text(2), channels=behind)
    assert relative_error(ours, gathered(model, noisy, text(2), behind)) <= TOLERANCE


def test_references_stand_behind_the_image_and_only_the_images_velocity_comes_back():
    model = randomise(Flux1(TINY))
    noisy, references = rows(2, 16, 4, 6, seed=1), [rows(2, 16, 4, 2, seed=2), rows(2, 16, 2, 6, seed=3)]
    places = [*grid(1, 0, 0, 2, 1), *grid(1, 2, 0, 1, 3)]  # the second is wide: it lies below the first
    ours = predict_velocity(model, noisy, TIMES, text(2), references=references)
    assert ours.shape == (2, 6, 64)
    assert relative_error(ours, gathered(model, noisy, text(2), None, references, places)) <= TOLERANCE
    assert relative_error(ours, predict_velocity(model, noisy, TIMES, text(2))) > 1e-3


def test_a_bias_weighs_tokens_in_every_attention():
    model = randomise(Flux1(TINY))
    noisy, reference = rows(2, 16, 4, 6, seed=1), rows(2, 16, 4, 2, seed=2)
    length = text(2).tokens.shape[1] + 6 + 2
    bias = rows(2, 1, length, length, seed=3)
    ours = predict_velocity(model, noisy, TIMES, text(2), references=[reference], bias=bias)
    theirs = gathered(model, noisy, text(2), None, [reference], grid(1, 0, 0, 2, 1), bias)
    assert relative_error(ours, theirs) <= TOLERANCE
    assert relative_error(ours, predict_velocity(model, noisy, TIMES, text(2), references=[reference])) > 1e-3


def test_a_reference_that_a_bias_hides_is_not_there():
    model = randomise(Flux1(TINY))
    noisy, reference = rows(2, 16, 4, 6, seed=1), rows(2, 16, 4, 2, seed=2)
    length = text(2).tokens.shape[1] + 6 + 2
    bias = torch.zeros(1, 1, length, length)
    bias[..., :-2, -2:] = -torch.inf
    hidden = predict_velocity(model, noisy, TIMES, text(2), references=[reference], bias=bias)
    assert relative_error(hidden, predict_velocity(model, noisy, TIMES, text(2))) <= TOLERANCE


def test_gradients_reach_channels_references_and_bias():
    model = randomise(Flux1(replace(TINY, in_channels=64)))
    noisy, reference = rows(1, 16, 4, 4, seed=1), rows(1, 16, 4, 4, seed=2).requires_grad_()
    bias = torch.zeros(1, 1, 7 + 4 + 4, 7 + 4 + 4).requires_grad_()
    predict_velocity(
        model, noisy, torch.tensor([0.5]), text(1), references=[reference], bias=bias
    ).square().sum().backward()
    assert float(reference.grad.abs().sum()) > 0
    assert float(bias.grad.abs().sum()) > 0


def test_no_guidance_is_not_guidance_zero():
    """The base stage trains without it: the embedder must have no part in that."""
    model = randomise(Flux1(TINY))
    given = rows(1, 16, 4, 4, seed=1), torch.tensor([0.5]), text(1)
    zero = predict_velocity(model, *given, torch.zeros(1))
    assert relative_error(predict_velocity(model, *given, None), zero) > 1e-3


def test_gradients_reach_the_weights_the_latents_and_the_text():
    model = randomise(Flux1(TINY)).requires_grad_(True)
    noisy, prompt = rows(1, 16, 4, 4, seed=1).requires_grad_(), text(1)
    prompt.tokens.requires_grad_()
    prompt.pooled.requires_grad_()
    predict_velocity(model, noisy, torch.tensor([0.5]), prompt, torch.tensor([3.0])).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for tensor in (noisy, prompt.tokens, prompt.pooled):
        assert tensor.grad is not None
        assert float(tensor.grad.abs().sum()) > 0
