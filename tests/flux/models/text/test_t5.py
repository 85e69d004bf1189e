"""T5's encoder against transformers'."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from flux.models.text.t5 import T5Encoder, relative_buckets
from flux.specs.text import T5_XXL
from tests.oracles import TOLERANCE, randomise, relative_error, t5_oracle

SMALL = replace(T5_XXL, name="small", width=32, layers=3, heads=4, head_width=8, mlp_width=80, vocabulary=100)
SPECS = {
    "small": SMALL,
    "narrow-heads": replace(SMALL, heads=3, head_width=6),
    "wide-heads": replace(SMALL, layers=1, heads=5, head_width=16),
    "large": replace(SMALL, width=256, layers=1, mlp_width=320, heads=4, head_width=64),  # for oneDNN's product
    "near-only": replace(SMALL, layers=2, buckets=16, max_distance=40),
}
LENGTHS = [5, 64, 300]


def tokens(length, batch=2):
    return torch.randint(2, 100, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.usefixtures("as_run")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("variant", SPECS)
def test_hidden_states_equal_transformers_without_a_mask(variant, length):
    model = randomise(T5Encoder(SPECS[variant]))
    ids = tokens(length)
    ids[1, length // 2 :] = SMALL.pad  # attended to, as FLUX.1 does
    theirs = t5_oracle(model)(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert relative_error(model(ids), theirs) <= TOLERANCE


@pytest.mark.usefixtures("as_run")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("variant", SPECS)
def test_hidden_states_equal_transformers_with_a_mask(variant, length):
    model = randomise(T5Encoder(SPECS[variant]))
    ids = tokens(length)
    mask = torch.ones_like(ids)
    mask[0, -2:] = mask[1, length // 2 :] = 0
    theirs = t5_oracle(model)(input_ids=ids, attention_mask=mask).last_hidden_state
    ours = model(ids, mask.bool())
    assert relative_error(ours, theirs) <= TOLERANCE
    assert relative_error(ours, model(ids)) > 1e-3


@pytest.mark.usefixtures("as_run")
def test_hidden_states_equal_transformers_for_small_activations():
    """Small enough for the epsilon of the norms to show."""
    model = randomise(T5Encoder(SMALL))
    for name, parameter in model.named_parameters():
        if "shared" in name or ".o." in name or ".wo." in name:
            parameter *= 0.01
    ids = tokens(9)
    assert relative_error(model(ids), t5_oracle(model)(input_ids=ids).last_hidden_state) <= TOLERANCE


@torch.inference_mode()
def test_fp16_whose_gated_products_overflow_equals_fp32():
    """T5-XXL's do; the norm in front makes their size the weights' own."""
    model = randomise(T5Encoder(SMALL))
    for name, parameter in model.named_parameters():
        if "wi_" in name:
            parameter *= 300
        if "wo" in name:
            parameter *= 1e-4
    half = T5Encoder(SMALL).requires_grad_(False).half()
    half.load_state_dict(model.state_dict())
    low, exact = half(tokens(9)), model(tokens(9))
    products = 300**2 * 4  # what a gate and a feature of two standard deviations make
    assert products > torch.finfo(torch.float16).max
    assert relative_error(low.float(), exact) < 0.02


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 256), (16, 40), (8, 20), (64, 1000)])
def test_buckets_equal_those_of_transformers(buckets, max_distance):
    relative = torch.arange(-2000, 2001)
    theirs = T5Attention._relative_position_bucket(relative, True, buckets, max_distance)
    assert torch.equal(relative_buckets(relative, buckets, max_distance), theirs)


def test_buckets_are_exact_near_and_shared_far():
    places = torch.tensor([0, -1, -7, -8, -127, -128, -5000, 1, 7, 8, 5000])
    assert relative_buckets(places, 32, 128).tolist() == [0, 1, 7, 8, 15, 15, 15, 17, 23, 24, 31]


def test_far_tokens_matter_by_distance():
    """Were the far buckets one, moving a token among them would change nothing."""
    model = randomise(T5Encoder(replace(SMALL, layers=1)))
    ids = torch.full((1, 100), 3)
    near, far = ids.clone(), ids.clone()
    near[0, 20] = far[0, 90] = 7
    assert relative_error(model(near)[:, 0], model(far)[:, 0]) > 1e-3


def test_fp16_overflow_of_the_feed_forward_is_held_back():
    model = randomise(T5Encoder(SMALL))
    model.encoder.block[0].layer[1].DenseReluDense.wo.weight *= 3e4
    half = model.half()
    assert half(tokens(9)).isfinite().all()
