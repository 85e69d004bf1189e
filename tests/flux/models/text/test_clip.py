"""CLIP's text tower against transformers'."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flux.models.text.clip import ClipText
from flux.specs.text import CLIP_L
from tests.oracles import TOLERANCE, clip_oracle, randomise, relative_error

SMALL = replace(
    CLIP_L, name="small", width=48, layers=3, heads=3, mlp_width=160, vocabulary=100, bos=98, eos=99, pad=99
)
SPECS = {
    "small": SMALL,
    "one-layer": replace(SMALL, layers=1, heads=1, width=20, mlp_width=36),
    "large": replace(SMALL, layers=1, width=256, heads=4, mlp_width=512),  # for oneDNN's product
    "long": replace(SMALL, positions=130, heads=4, width=64, mlp_width=64),
}
LEGACY_EOS = 2  # in OpenAI's config.json, where the real end token is another


def prompts(spec, length):
    """Three rows: a short text padded with the end token, a full one, and one with text after its first end."""
    ids = torch.randint(0, spec.bos, (3, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = spec.bos
    ids[0, length // 3 :] = spec.eos
    ids[1, -1] = spec.eos
    ids[2, length // 2] = ids[2, -1] = spec.eos
    return ids


@pytest.mark.usefixtures("as_run")
@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("eos_in_config", [None, LEGACY_EOS])
@pytest.mark.parametrize("variant", SPECS)
def test_hidden_states_and_pooled_vector_equal_transformers(variant, eos_in_config, share):
    spec = SPECS[variant]
    model = randomise(ClipText(spec))
    ids = prompts(spec, int(spec.positions * share))
    theirs = clip_oracle(model, eos_in_config)(input_ids=ids)
    hidden, pooled = model(ids)
    assert relative_error(hidden, theirs.last_hidden_state) <= TOLERANCE
    assert relative_error(pooled, theirs.pooler_output) <= TOLERANCE


@pytest.mark.usefixtures("as_run")
def test_hidden_states_equal_transformers_for_small_activations():
    """Small enough for the epsilon of the norms to show."""
    model = randomise(ClipText(SMALL))
    for name, parameter in model.named_parameters():
        if "embedding" in name or "out_proj" in name or "fc2" in name:
            parameter *= 0.01
    ids = prompts(SMALL, 12)
    assert relative_error(model(ids)[0], clip_oracle(model)(input_ids=ids).last_hidden_state) <= TOLERANCE


def test_pooled_vector_is_the_hidden_state_at_the_first_end():
    model = randomise(ClipText(SMALL))
    hidden, pooled = model(prompts(SMALL, 12))
    assert torch.equal(pooled, torch.stack((hidden[0, 4], hidden[1, 11], hidden[2, 6])))


def test_text_after_the_first_end_does_not_reach_the_pooled_vector():
    model = randomise(ClipText(SMALL))
    ids = prompts(SMALL, 12)[2:]
    other = ids.clone()
    other[:, 7:-1] = 3
    torch.testing.assert_close(model(ids)[1], model(other)[1])
