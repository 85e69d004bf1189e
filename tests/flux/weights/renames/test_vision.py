"""SigLIP's and Redux' names against transformers' and diffusers' modules."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from flux.errors import FileError
from flux.models.redux import Redux
from flux.models.vision.siglip import SiglipVision
from flux.specs.vision import REDUX, SIGLIP_SO400M
from flux.weights.renames import find_layouts
from flux.weights.renames import vision as layouts
from tests.fixtures.listings import clip_l, redux, siglip, siglip_head, siglip_whole

SIZES = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
}  # fmt: skip
TOWER_SIZES = {**SIZES, "image_size": 384, "patch_size": 14}
PREFIXES = ("", "vision_tower.", "model.vision_tower.vision_tower.", "image_encoder.")


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def on_meta(build, *args):
    with torch.device("meta"):
        return build(*args)


def without_head(listing, tower="vision_model."):
    return {name: shape for name, shape in listing.items() if name not in siglip_head(tower)}


def test_our_modules_have_the_listed_names_and_shapes():
    assert shapes_of(on_meta(SiglipVision, SIGLIP_SO400M)) == without_head(siglip())
    assert shapes_of(on_meta(Redux, REDUX)) == redux()


def test_transformers_tower_becomes_ours_without_its_head():
    theirs = shapes_of(on_meta(SiglipVisionModel, SiglipVisionConfig(**TOWER_SIZES)))
    assert theirs == siglip("")
    plan = layouts.SIGLIP_BARE.table.to_ours(theirs)
    assert plan.shapes(theirs.__getitem__) == without_head(siglip())
    assert set(plan.dropped) == set(siglip_head(""))
    assert set(layouts.SIGLIP_BARE.table.to_foreign(plan)) == set(without_head(siglip(""), ""))


def test_a_whole_siglip_gives_its_tower_and_drops_the_rest_on_purpose():
    config = SiglipConfig(vision_config=TOWER_SIZES, text_config=SIZES)
    theirs = shapes_of(on_meta(SiglipModel, config))
    assert theirs == siglip_whole()
    (found,) = find_layouts(theirs)
    plan = found.to_ours(theirs)
    assert plan.shapes(theirs.__getitem__) == without_head(siglip())
    assert set(plan.dropped) == set(theirs) - set(without_head(siglip()))


def test_diffusers_redux_has_our_names():
    theirs = shapes_of(on_meta(ReduxImageEncoder, 1152, 4096))
    assert theirs == redux()
    assert layouts.REDUX.table.to_ours(theirs).shapes(theirs.__getitem__) == redux()


def test_a_list_of_places_that_old_files_have_is_left_out():
    name = "vision_model.embeddings.position_ids"
    assert layouts.SIGLIP.table.to_ours([*siglip(), name]).dropped[-1] == name


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("layout", "listing"), [("siglip-hf", siglip()), ("redux-bfl", redux())])
def test_parts_are_found_below_every_prefix(prefix, layout, listing):
    names = [prefix + name for name in listing]
    (found,) = find_layouts(names)
    assert (found.layout.name, found.prefix) == (layout, prefix)
    found.to_ours(names)


@pytest.mark.parametrize("prefix", layouts.BARE_PREFIXES)
def test_the_names_of_transformers_5_are_found_below_known_prefixes(prefix):
    (found,) = find_layouts([prefix + name for name in siglip("")])
    assert (found.layout.name, found.prefix) == ("siglip-hf5", prefix)


@pytest.mark.parametrize("mark", ["embeddings.class_embedding", "pre_layrnorm.weight"])
def test_clip_s_towers_are_no_siglip(mark):
    assert find_layouts([*siglip(), f"vision_model.{mark}"]) == []
    assert find_layouts([*siglip(""), mark]) == []


def test_an_encoder_for_text_beside_a_tower_is_still_found():
    """Files of several parts without prefixes: each leaves the other out."""
    names = [*clip_l(), *siglip()]
    assert {found.layout.name for found in find_layouts(names)} == {"clip-hf", "siglip-hf"}
    assert all(found.to_ours(names) for found in find_layouts(names))


@pytest.mark.parametrize("name", ["vision_model.encoder.layers.3.self_attn.qkv.weight", "redux_up.lora_A.weight"])
def test_names_that_no_row_knows_stop_the_load(name):
    listing = siglip() if name.startswith("vision") else redux()
    (found,) = find_layouts([*listing, name])
    with pytest.raises(FileError, match=name):
        found.to_ours([*listing, name])
