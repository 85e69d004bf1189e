"""Which layout a file has, and below which prefix, of every release that is listed."""

from __future__ import annotations

import pytest

from flux.errors import FileError
from flux.weights.renames import LAYOUTS, find_layout, find_layouts
from tests.fixtures.listings import LISTINGS, clip_l, flux1_ae_bfl, flux1_bfl, flux1_diffusers, flux2_bfl, t5_hf

TRANSFORMER_PREFIXES = (
    "", "model.diffusion_model.", "diffusion_model.", "model.", "model.model.", "transformer.", "net.",
)  # fmt: skip
TRANSFORMERS = ["flux1-schnell", "flux1-dev, diffusers", "flux2-klein-4b", "flux2-dev, diffusers"]  # one a layout
AUTOENCODERS = [name for name, (layout, _, _) in LISTINGS.items() if LAYOUTS[layout].part == "autoencoder"]


def below(prefix, listing):
    return {prefix + name: shape for name, shape in listing.items()}


def everything(prefix="model.diffusion_model."):
    """An all-in-one checkpoint."""
    return {
        **below(prefix, flux1_bfl()),
        **below("vae.", flux1_ae_bfl()),
        **below("text_encoders.clip_l.transformer.", clip_l()),
        "text_encoders.clip_l.logit_scale": (),
        **below("text_encoders.t5xxl.transformer.", t5_hf()),
    }


@pytest.mark.parametrize("release", LISTINGS)
def test_every_release_has_its_layout_its_tensors_and_a_plan_for_all_of_them(release):
    layout, listing, count = LISTINGS[release]
    assert len(listing) == count
    found = find_layouts(listing)
    assert [(part.layout.name, part.prefix) for part in found] == [(layout, "")]
    plan = found[0].to_ours(listing, release)
    used = {name for recipe in plan.values() for name in recipe.sources}
    assert used | set(plan.dropped) == set(listing)
    assert not used & set(plan.dropped)


def test_every_layout_is_a_releases():
    assert {layout for layout, _, _ in LISTINGS.values()} == set(LAYOUTS)


@pytest.mark.parametrize("prefix", TRANSFORMER_PREFIXES)
@pytest.mark.parametrize("release", TRANSFORMERS)
def test_transformers_are_found_below_every_prefix(release, prefix):
    layout, listing, _ = LISTINGS[release]
    names = below(prefix, listing)
    found = find_layout(names)
    assert (found.layout.name, found.prefix) == (layout, prefix)
    plan = found.to_ours(names)
    assert set(plan) == set(found.layout.table.to_ours(listing))
    assert {name for recipe in plan.values() for name in recipe.sources} == set(names)
    assert set(found.to_foreign(plan)) == set(names)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("release", AUTOENCODERS)
def test_autoencoders_are_found_below_every_prefix(release, prefix):
    layout, listing, _ = LISTINGS[release]
    found = find_layout(below(prefix, listing))
    assert (found.layout.name, found.prefix) == (layout, prefix)


@pytest.mark.parametrize("prefix", TRANSFORMER_PREFIXES)
def test_every_part_of_an_all_in_one_file_is_found_and_sees_its_own_tensors(prefix):
    names = everything(prefix)
    found = {part.layout.part: part for part in find_layouts(names)}
    assert {kind: (part.layout.name, part.prefix) for kind, part in found.items()} == {
        "transformer": ("flux1-bfl", prefix),
        "autoencoder": ("flux1-ae-bfl", "vae."),
        "clip": ("clip-hf", "text_encoders.clip_l.transformer."),
        "t5": ("t5-hf", "text_encoders.t5xxl.transformer."),
    }
    listings = {"transformer": flux1_bfl(), "autoencoder": flux1_ae_bfl(), "clip": clip_l(), "t5": t5_hf()}
    for kind, listing in listings.items():
        assert set(found[kind].to_ours(names)) == set(listing)
        assert find_layout(names, kind) == found[kind]


def test_the_longest_prefix_counts():
    inner, outer = flux1_bfl(), flux1_diffusers()
    assert find_layout({**below("model.diffusion_model.", inner), **inner}).prefix == "model.diffusion_model."
    assert find_layout({**below("model.model.", outer), **below("model.", outer)}).prefix == "model.model."


def test_names_below_the_prefix_that_no_row_knows_stop_the_load():
    names = [*everything(), "model.diffusion_model.double_blocks.0.img_attn.lora.weight"]
    with pytest.raises(FileError, match=r"all\.safetensors has tensors .*: double_blocks\.0\.img_attn\.lora\.weight;"):
        find_layout(names).to_ours(names, "all.safetensors")


def test_a_lost_part_of_a_fused_tensor_is_named():
    names = [name for name in flux1_diffusers() if name != "single_transformer_blocks.5.attn.to_k.weight"]
    with pytest.raises(FileError, match=r"\.5\.attn\.to_q\.weight without single_transformer_blocks\.5\.attn\.to_k\."):
        find_layout(names).to_ours(names)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([], id="nothing"),
        pytest.param(["img_in.weight"], id="one name"),
        pytest.param([name for name in flux1_bfl() if "vector_in" not in name], id="LongCat"),
        pytest.param([name for name in flux1_bfl() if "_mod." not in name and "vector_in" not in name], id="Chroma"),
        pytest.param([*flux1_ae_bfl(), "quant_conv.weight", "post_quant_conv.weight"], id="Stable Diffusion's VAE"),
        pytest.param(
            [
                "controlnet_x_embedder.weight",
                *(name for name in flux1_diffusers() if not name.startswith(("norm_out.", "proj_out."))),
            ],
            id="a ControlNet",
        ),
        pytest.param([f"{name}.lora_A.weight" for name in flux1_diffusers()], id="a LoRA"),
        pytest.param(
            [*t5_hf(), *(f"encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias.weight" for n in range(24))],
            id="UMT5",
        ),
        pytest.param(below("text_encoders.clip_g.transformer.", clip_l()), id="another CLIP in an all-in-one file"),
        pytest.param([f"x{name}" for name in flux2_bfl("klein-4b")], id="a prefix that is no level"),
    ],
)
def test_files_of_another_kind_have_no_layout(names):
    assert find_layouts(names) == []
    assert find_layout(names) is None
