"""SigLIP's tower is transformers' to the last digits that two orders of summing allow."""

from __future__ import annotations

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from flux.models.redux import Redux
from flux.models.vision.siglip import SiglipVision
from flux.ops.layers import on_meta
from flux.specs.vision import REDUX, SIGLIP_SO400M, ReduxSpec, SiglipSpec

SMALL = SiglipSpec(name="small", width=48, layers=3, heads=4, mlp_width=112, patch=7, side=56)
TOLERANCE = 1e-5


def oracle(spec):
    config = SiglipVisionConfig(
        hidden_size=spec.width, intermediate_size=spec.mlp_width, num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads, image_size=spec.side, patch_size=spec.patch, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    return SiglipVisionModel(config).eval()


@torch.no_grad()
def test_hidden_states_are_transformers():
    theirs = oracle(SMALL)
    for parameter in theirs.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    state = {name: tensor for name, tensor in theirs.state_dict().items() if ".head." not in name}
    ours = SiglipVision(SMALL)
    if not next(iter(state)).startswith("vision_model."):
        state = {f"vision_model.{name}": tensor for name, tensor in state.items() if not name.startswith("head.")}
    ours.load_state_dict(state)
    pixels = torch.rand(2, 3, SMALL.side, SMALL.side) * 2 - 1
    expected = theirs(pixels).last_hidden_state
    found = ours(pixels)
    assert found.shape == (2, SMALL.grid**2, SMALL.width)
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize(
    ("build", "spec", "count"), [(SiglipVision, SIGLIP_SO400M, 412_987_248), (Redux, REDUX, 64_503_808)]
)
def test_the_released_sizes(build, spec, count):
    with on_meta():
        assert sum(parameter.numel() for parameter in build(spec).parameters()) == count


@torch.no_grad()
def test_redux_is_two_layers_with_silu_between():
    spec = ReduxSpec(name="small", vision_width=48, text_width=32, tower="small")
    model = Redux(spec)
    x = torch.randn(2, 9, 48)
    hidden = x @ model.redux_up.weight.T + model.redux_up.bias
    expected = (hidden * torch.sigmoid(hidden)) @ model.redux_down.weight.T + model.redux_down.bias
    assert torch.allclose(model(x), expected, atol=1e-5)
