"""What style tokens and references add to the attention."""

from __future__ import annotations

import math

import pytest
import torch

from flux.adapters.attending import gather
from flux.adapters.guides import Reference, StyleTokens
from flux.models.flux1 import Conditions, Flux1
from flux.ops.attention import attention
from flux.sampling.packing import pack
from tests.oracles import randomise, relative_error, rows
from tests.tiny import TINY

SIZE = (8, 6)  # latent cells: 4 x 3 tokens
PROMPT = rows(1, 5, TINY.context_width, seed=1)
STYLE = rows(1, 4, TINY.context_width, seed=2)
LATENTS = rows(1, 16, 4, 6, seed=3)


def test_without_guides_there_is_the_prompt_and_the_image():
    found = gather(PROMPT, [], SIZE)
    assert torch.equal(found.text, PROMPT)
    assert (found.image_ids.shape, found.text_ids.shape) == ((12, 3), (5, 3))
    assert found.references is None
    assert found.bias is None


def test_full_strength_needs_no_bias():
    found = gather(PROMPT, [StyleTokens(tokens=STYLE), Reference(latents=LATENTS)], SIZE)
    assert torch.equal(found.text, torch.cat((PROMPT, STYLE), dim=1))
    assert torch.equal(found.references, pack(LATENTS))
    assert found.bias is None


def test_references_have_their_own_place_on_the_first_axis():
    found = gather(PROMPT, [Reference(latents=LATENTS)], SIZE)
    assert found.image_ids[:12, 0].eq(0).all()
    assert found.image_ids[12:].tolist() == [[1, row, column] for row in range(2) for column in range(3)]


def test_a_strength_multiplies_a_styles_share_before_the_softmax_divides():
    found = gather(PROMPT, [StyleTokens(tokens=STYLE, strength=0.3)], SIZE)
    length = 5 + 4 + 12
    q, k, v = (rows(1, 2, length, 16, seed=seed) for seed in (4, 5, 6))
    exponents = torch.exp(q @ k.mT / 4)
    exponents[..., 5:9] *= 0.3
    exponents[..., 5:9, 5:9] /= 0.3
    expected = (exponents / exponents.sum(-1, keepdim=True)) @ v
    assert relative_error(attention(q, k, v, found.bias), expected) < 1e-6


def test_tokens_without_weight_are_not_there():
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0])
    found = gather(PROMPT, [StyleTokens(tokens=STYLE, weights=weights)], SIZE)
    assert torch.equal(found.text[:, 5:], STYLE[:, [0, 2]])
    assert found.bias[0, 0, 0, 5:7].tolist() == pytest.approx([0.0, math.log(0.5)])


def test_outside_of_a_region_nothing_sees_a_style():
    region = torch.zeros(1, 1, 64, 48)
    region[..., :16, :] = 1  # the first row of tokens
    bias = gather(PROMPT, [StyleTokens(tokens=STYLE, region=region)], SIZE).bias[0, 0]
    assert bias[9:12, 5:9].eq(0).all()
    assert bias[12:, 5:9].eq(-math.inf).all()
    assert bias[:5, 5:9].eq(-math.inf).all()  # else the prompt's tokens would carry it out
    assert bias[5:9, 5:9].eq(0).all()
    assert bias[:, 9:].eq(0).all()


def test_a_style_has_no_effect_at_all_outside_of_its_region_in_one_block():
    """A block's image tokens outside are the same, whatever the style is; inside they are not."""
    model = randomise(Flux1(TINY))
    region = torch.zeros(1, 1, 8, 6)
    region[..., :2, :] = 1
    image, times = rows(1, 12, 64, seed=7), torch.tensor([0.5])
    seen = []
    model.double_blocks[0].register_forward_hook(lambda _block, _given, out: seen.append(out[0]))
    for style in (STYLE, rows(1, 4, TINY.context_width, seed=8)):
        found = gather(PROMPT, [StyleTokens(tokens=style, region=region)], SIZE)
        vec = model.embed(times, rows(1, TINY.pooled_width, seed=9), torch.tensor([3.0]))
        conditions = Conditions(found.text, found.text_ids, found.image_ids, found.bias)
        model(image, conditions, model.modulate(vec))
    one, other = seen
    assert torch.equal(one[:, 3:], other[:, 3:])
    assert not torch.allclose(one[:, :3], other[:, :3])


def test_two_styles_and_two_references_weigh_each_for_itself():
    guides = [
        StyleTokens(tokens=STYLE, strength=0.5),
        StyleTokens(tokens=STYLE[:, :2], strength=2.0),
        Reference(latents=LATENTS, strength=0.25),
        Reference(latents=LATENTS, strength=1.0),
    ]
    bias = gather(PROMPT, guides, SIZE).bias[0, 0]
    image = bias[5 + 4 + 2]
    assert image[5:9].tolist() == pytest.approx([math.log(0.5)] * 4)
    assert image[9:11].tolist() == pytest.approx([math.log(2.0)] * 2)
    assert image[23:29].tolist() == pytest.approx([math.log(0.25)] * 6)
    assert image[29:35].eq(0).all()
    assert bias[23:29, 23:29].eq(0).all()
    assert bias[29:35, 23:29].flatten().tolist() == pytest.approx([math.log(0.25)] * 36)
