"""FLUX.1's names against diffusers' own modules: the same numbers, and the same picture of the numbers."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import FluxTransformer2DModel

from flux.models.flux1 import Conditions, Flux1
from flux.models.positions import image_ids, text_ids
from flux.specs.flux1 import Flux1Spec
from flux.weights.renames import assemble, find_layout
from flux.weights.renames.flux1 import BFL, DIFFUSERS
from tests.fixtures.listings import flux1_bfl, flux1_diffusers
from tests.oracles import TOLERANCE, randomise, relative_error, rows

HEADS, HEAD, AXES = 2, 24, (4, 8, 12)
CONTEXT, POOLED = 40, 20
VARIANTS = {
    "dev": {},
    "schnell": {"guidance_embedding": False},
    "fill": {"in_channels": 384},
    "canny": {"in_channels": 128, "double_blocks": 1, "single_blocks": 11},
}
RELEASES = {"dev": {}, "schnell": {"guidance": False}, "fill": {"in_channels": 384}, "canny": {"in_channels": 128}}


def small_spec(**changes):
    sizes = {"double_blocks": 2, "single_blocks": 3} | changes
    return Flux1Spec(
        name="small",
        title="small",
        hidden=HEADS * HEAD,
        heads=HEADS,
        axes=AXES,
        context_width=CONTEXT,
        pooled_width=POOLED,
        **sizes,
    )


def their_model(spec):
    return FluxTransformer2DModel(
        in_channels=spec.in_channels,
        out_channels=spec.out_channels,
        num_layers=spec.double_blocks,
        num_single_layers=spec.single_blocks,
        attention_head_dim=spec.hidden // spec.heads,
        num_attention_heads=spec.heads,
        joint_attention_dim=spec.context_width,
        pooled_projection_dim=spec.pooled_width,
        guidance_embeds=spec.guidance_embedding,
        axes_dims_rope=spec.axes,
    )


@functools.cache
def theirs(variant):
    return randomise(their_model(small_spec(**VARIANTS[variant])))


def to_ours(state, layout=DIFFUSERS):
    plan = layout.table.to_ours(state)
    return {name: assemble(recipe, state.__getitem__) for name, recipe in plan.items()}


def to_foreign(state, layout=DIFFUSERS):
    plan = layout.table.to_foreign(state)
    return {name: assemble(recipe, state.__getitem__) for name, recipe in plan.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_weights_come_back_to_the_bit(variant):
    state = theirs(variant).state_dict()
    back = to_foreign(to_ours(state))
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_model_with_diffusers_weights_gives_diffusers_velocity(variant):
    spec = small_spec(**VARIANTS[variant])
    model = Flux1(spec)
    model.load_state_dict(to_ours(theirs(variant).state_dict()))
    image, text = rows(2, 12, spec.in_channels, seed=1), rows(2, 5, CONTEXT, seed=2)
    pooled, times = rows(2, POOLED, seed=3), torch.tensor([0.3, 0.9])
    guidance = torch.tensor([3.5, 1.0]) if spec.guidance_embedding else None
    with torch.no_grad():
        given = Conditions(text, text_ids(5), image_ids(3, 4))
        ours = model(image, given, model.modulate(model.embed(times, pooled, guidance)))
        expected = theirs(variant)(
            hidden_states=image,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=times,
            guidance=guidance,
            img_ids=given.image_ids,
            txt_ids=given.text_ids,
        ).sample
    assert relative_error(ours, expected) <= TOLERANCE


@pytest.mark.parametrize("release", RELEASES)
def test_a_releases_names_and_shapes_are_the_same_release_in_the_other_layout(release):
    bfl, diffusers = flux1_bfl(**RELEASES[release]), flux1_diffusers(**RELEASES[release])
    assert DIFFUSERS.table.to_ours(diffusers).shapes(diffusers.__getitem__) == bfl
    assert DIFFUSERS.table.to_foreign(bfl).shapes(bfl.__getitem__) == diffusers


def test_diffusers_own_module_has_the_listed_names_and_shapes():
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == flux1_diffusers()


@pytest.mark.parametrize("release", RELEASES)
def test_black_forest_labs_names_are_ours(release):
    listing = flux1_bfl(**RELEASES[release])
    for plan in (BFL.table.to_ours(listing), BFL.table.to_foreign(listing)):
        assert list(plan) == list(listing)
        assert all(recipe.only_renames and recipe.sources == (name,) for name, recipe in plan.items())


def test_norms_are_read_under_comfyuis_names_too():
    listing = {name.replace("_norm.scale", "_norm.weight"): shape for name, shape in flux1_bfl().items()}
    assert set(listing) != set(flux1_bfl())
    assert BFL.table.to_ours(listing).shapes(listing.__getitem__) == flux1_bfl()
    assert find_layout(listing).layout is BFL


def test_the_feed_forward_part_of_linear1_is_four_times_as_wide():
    plan = DIFFUSERS.table.to_foreign(flux1_bfl())
    spans = {
        name: plan[f"single_transformer_blocks.37.{name}.bias"].pieces[0].rows(21504)
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    }
    assert spans == {
        "attn.to_q": slice(0, 3072),
        "attn.to_k": slice(3072, 6144),
        "attn.to_v": slice(6144, 9216),
        "proj_mlp": slice(9216, 21504),
    }
