"""FLUX.2's names against diffusers' own module, small and at real size, and the parameters of each part."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from flux.specs.flux2 import FLUX2
from flux.weights.renames import assemble
from flux.weights.renames.flux2 import BFL, DIFFUSERS
from tests.fixtures.listings import FLUX2_SIZES, flux2_bfl, flux2_diffusers
from tests.oracles import randomise

HIDDEN = 32  # of the small model
SIZES = {
    spec.name: next(size for size in FLUX2_SIZES if size in spec.name.replace("base-", "")) for spec in FLUX2.values()
}
# Parameters of each part: names that begin so and contain the other.
PARTS = {
    ("img_in.", ""): (786_432, 393_216, 524_288),
    ("txt_in.", ""): (94_371_840, 23_592_960, 50_331_648),
    ("time_in.", ""): (39_321_600, 10_223_616, 17_825_792),
    ("guidance_in.", ""): (39_321_600, 0, 0),
    ("", "stream_modulation"): (566_231_040, 141_557_760, 251_658_240),
    ("final_layer.adaLN_modulation.", ""): (75_497_472, 18_874_368, 33_554_432),
    ("double_blocks.", "_attn."): (2_415_923_200, 377_489_920, 1_073_745_920),
    ("double_blocks.", "_mlp."): (5_435_817_984, 849_346_560, 2_415_919_104),
    ("single_blocks.", ".linear1."): (16_307_453_952, 1_698_693_120, 3_623_878_656),
    ("single_blocks.", ".linear2."): (7_247_757_312, 754_974_720, 1_610_612_736),
    ("single_blocks.", ".norm."): (12_288, 5_120, 6_144),
    ("final_layer.linear.", ""): (786_432, 393_216, 524_288),
}
TOTALS = {"dev": (32_223_281_152, 299), "klein-4b": (3_875_544_576, 149), "klein-9b": (9_078_581_248, 201)}


@functools.cache
def theirs(guidance):
    return randomise(
        Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=HIDDEN // 2,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=8,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance,
        )
    )


def carried_out(plan, state):
    return {name: assemble(recipe, state.__getitem__) for name, recipe in plan.items()}


@pytest.mark.parametrize("guidance", [True, False])
def test_diffusers_weights_come_back_to_the_bit(guidance):
    state = theirs(guidance).state_dict()
    ours = carried_out(DIFFUSERS.table.to_ours(state), state)
    back = carried_out(DIFFUSERS.table.to_foreign(ours), ours)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_attention_is_fused_and_the_final_modulation_swapped():
    state = theirs(True).state_dict()
    ours = carried_out(DIFFUSERS.table.to_ours(state), state)
    block = "transformer_blocks.1.attn."
    assert torch.equal(
        ours["double_blocks.1.img_attn.qkv.weight"], torch.cat([state[f"{block}to_{x}.weight"] for x in "qkv"])
    )
    assert torch.equal(
        ours["double_blocks.1.txt_attn.qkv.weight"], torch.cat([state[f"{block}add_{x}_proj.weight"] for x in "qkv"])
    )
    scale, shift = state["norm_out.linear.weight"].split(HIDDEN)
    assert torch.equal(ours["final_layer.adaLN_modulation.1.weight"], torch.cat((shift, scale)))


@pytest.mark.parametrize(("ours", "diffusers"), [
    ("single_blocks.2.linear1", "single_transformer_blocks.2.attn.to_qkv_mlp_proj"),
    ("single_blocks.2.linear2", "single_transformer_blocks.2.attn.to_out"),
    ("double_blocks.1.img_mlp.0", "transformer_blocks.1.ff.linear_in"),
    ("double_blocks.1.txt_mlp.2", "transformer_blocks.1.ff_context.linear_out"),
    ("double_blocks.0.txt_attn.proj", "transformer_blocks.0.attn.to_add_out"),
    ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
])  # fmt: skip
def test_layers_that_both_keep_fused_are_only_renamed(ours, diffusers):
    recipe = DIFFUSERS.table.to_ours(theirs(True).state_dict())[f"{ours}.weight"]
    assert recipe.only_renames
    assert recipe.sources == (f"{diffusers}.weight",)


@pytest.mark.parametrize("name", FLUX2)
def test_diffusers_own_module_has_the_listed_names_and_shapes_of_every_variant(name):
    spec = FLUX2[name]
    with torch.device("meta"):
        model = Flux2Transformer2DModel(
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            num_layers=spec.double_blocks,
            num_single_layers=spec.single_blocks,
            attention_head_dim=spec.hidden // spec.heads,
            num_attention_heads=spec.heads,
            joint_attention_dim=spec.context_width,
            mlp_ratio=spec.mlp_ratio,
            axes_dims_rope=spec.axes,
            guidance_embeds=spec.guidance_embedding,
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == flux2_diffusers(SIZES[name])
    assert DIFFUSERS.table.to_ours(shapes).shapes(shapes.__getitem__) == flux2_bfl(SIZES[name])


@pytest.mark.parametrize("size", FLUX2_SIZES)
def test_a_releases_names_and_shapes_are_the_same_release_in_the_other_layout(size):
    bfl = flux2_bfl(size)
    assert DIFFUSERS.table.to_foreign(bfl).shapes(bfl.__getitem__) == flux2_diffusers(size)


@pytest.mark.parametrize("size", TOTALS)
def test_releases_have_the_published_parameters_and_tensors(size):
    listing = flux2_bfl(size)
    assert (sum(map(math.prod, listing.values())), len(listing)) == TOTALS[size]
    column = list(TOTALS).index(size)
    for (start, part), counts in PARTS.items():
        found = [shape for name, shape in listing.items() if name.startswith(start) and part in name]
        assert sum(map(math.prod, found)) == counts[column], (start, part)
    assert sum(counts[column] for counts in PARTS.values()) == TOTALS[size][0]


@pytest.mark.parametrize("size", FLUX2_SIZES)
def test_black_forest_labs_names_are_ours_and_norms_have_two(size):
    listing = flux2_bfl(size)
    assert all(recipe.sources == (name,) for name, recipe in BFL.table.to_ours(listing).items())
    renamed = [name.replace("_norm.scale", "_norm.weight") for name in listing]
    assert set(renamed) != set(listing)
    assert set(BFL.table.to_ours(renamed)) == set(listing)
