"""Parts are recognised by shapes under our names: every release in every layout, other sizes, hints, and damage."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
from dataclasses import replace

import pytest

from flux.errors import MismatchError, UserError
from flux.models.autoencoder import Autoencoder
from flux.models.flux1 import Flux1
from flux.models.redux import Redux
from flux.models.text.clip import ClipText
from flux.models.text.t5 import T5Encoder
from flux.models.vision.siglip import SiglipVision
from flux.ops.layers import on_meta
from flux.specs.autoencoder import AUTOENCODERS, RECOGNISED_AUTOENCODERS
from flux.specs.flux1 import FLUX1
from flux.specs.flux2 import FLUX2
from flux.specs.recognition import recognise_part
from flux.specs.text import CLIP_L, CLIP_MINI, CLIP_TEXT, T5_ENCODERS, T5_XXL
from flux.specs.vision import REDUX, REDUXES, SIGLIP_SO400M, VISION_TOWERS
from flux.weights.renames import find_layouts
from tests.conftest import ROOT
from tests.fixtures.listings import LISTINGS
from tests.tiny import TINY

SPECS = {**FLUX1, **FLUX2, **RECOGNISED_AUTOENCODERS, **CLIP_TEXT, **T5_ENCODERS, **VISION_TOWERS, **REDUXES}
SAME_SHAPES = {"flux1-krea-dev": "flux1-dev", "flux1-kontext-dev": "flux1-dev", "flux1-depth-dev": "flux1-canny-dev"}
OTHER_NAMES = {"flux1-canny-dev": "flux1-depth-dev"}  # the first row of several that shapes cannot tell apart


@functools.cache
def shapes_of(release):
    """A release's part, family, and shapes under our names."""
    _, listing, _ = LISTINGS[release]
    (found,) = find_layouts(listing)
    return found.layout.part, found.layout.family, found.to_ours(listing).shapes(listing.__getitem__)


@functools.cache
def module_shapes(build, spec):
    with on_meta():
        return {name: tuple(parameter.shape) for name, parameter in build(spec).named_parameters()}


def recognised(release, change=None, **hints):
    part, family, shapes = shapes_of(release)
    shapes = dict(shapes)
    if change is not None:
        change(shapes)
    return recognise_part(part, family, shapes, **hints)


def without(*starts):
    """A change that leaves out what begins so."""

    def change(shapes):
        for name in [name for name in shapes if name.startswith(starts)]:
            del shapes[name]

    return change


# Releases.


@pytest.mark.parametrize("release", LISTINGS)
def test_every_release_in_every_layout_is_recognised_by_shapes_alone(release):
    name = release.split(",")[0]
    spec = SPECS[OTHER_NAMES.get(name, name)]
    part = recognised(release)
    assert part.kind == shapes_of(release)[0]
    assert part.spec == spec
    assert part.runs == (not name.startswith("flux2"))
    assert part.foreign is None


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_the_family_is_told_by_shapes_when_no_layout_does(family):
    part, _, shapes = shapes_of(f"{family}-dev")
    assert recognise_part(part, "", shapes).spec == SPECS[f"{family}-dev"]


@pytest.mark.parametrize("spec", [row for row in FLUX1.values() if "mini" in row.name], ids=lambda spec: spec.name)
def test_the_embedded_transformers_are_recognised_without_a_note(spec):
    titled = {"modelspec.title": spec.title}
    part = recognise_part("transformer", "flux1", module_shapes(Flux1, spec), metadata=titled)
    assert (part.spec, part.notes) == (spec, ())


@pytest.mark.parametrize(
    ("kind", "build", "spec"),
    [
        *(("autoencoder", Autoencoder, spec) for spec in AUTOENCODERS.values()),
        *(("clip", ClipText, spec) for spec in CLIP_TEXT.values()),
        *(("t5", T5Encoder, spec) for spec in T5_ENCODERS.values()),
        *(("vision", SiglipVision, spec) for spec in VISION_TOWERS.values()),
        *(("redux", Redux, spec) for spec in REDUXES.values()),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_parts_beside_the_transformer_are_recognised_as_the_engine_builds_them(kind, build, spec):
    part = recognise_part(kind, "", module_shapes(build, spec))
    assert (part.kind, part.spec, part.runs) == (kind, spec, True)


def test_norms_that_the_host_saved_under_its_own_name_still_tell_the_heads():
    def change(shapes):
        for name in [name for name in shapes if name.endswith("_norm.scale")]:
            shapes[name.replace("_norm.scale", "_norm.weight")] = shapes.pop(name)

    assert recognised("flux1-dev", change).spec == FLUX1["flux1-dev"]


# What shapes leave open.


def test_what_shapes_cannot_tell_is_the_usual_one_and_said():
    part = recognised("flux1-dev", file_name="model.safetensors")
    assert part.notes == (
        "taken for FLUX.1 [dev], since neither its metadata nor its name tells; "
        "by its tensors it could also be FLUX.1 Krea [dev], FLUX.1 Kontext [dev]",
    )


@pytest.mark.parametrize(
    ("release", "file_name", "spec"),
    [
        ("flux1-dev", "flux1-dev-kontext_fp8_scaled.safetensors", "flux1-kontext-dev"),
        ("flux1-dev", "FLUX.1-Krea-dev-Q4_K_S.gguf", "flux1-krea-dev"),
        ("flux1-dev", "fluxKreaDev_v1.safetensors", "flux1-krea-dev"),
        ("flux1-dev", "depth_of_field_canny.safetensors", "flux1-dev"),
        ("flux1-canny-dev", "flux1-canny-dev.safetensors", "flux1-canny-dev"),
        ("flux1-canny-dev", "flux1-depth-dev-nf4.safetensors", "flux1-depth-dev"),
        ("flux2-klein-4b", "flux-2-klein-base-4b-fp8.safetensors", "flux2-klein-base-4b"),
        ("flux2-klein-4b", "flux2Klein4BBase_v10.safetensors", "flux2-klein-base-4b"),
        ("flux2-klein-4b", "database_export.safetensors", "flux2-klein-4b"),
        ("flux2-klein-9b", "flux-2-klein-9b-kv-fp8.safetensors", "flux2-klein-9b-kv"),
        ("flux2-klein-9b", "flux2Klein9bKV.safetensors", "flux2-klein-9b-kv"),
        ("flux2-klein-9b", "flux-2-klein-base-9b.gguf", "flux2-klein-base-9b"),
        ("flux2-klein-9b", "flux-2-klein-9b-nvfp4.safetensors", "flux2-klein-9b"),
    ],
)
def test_file_names_of_releases_decide_what_shapes_cannot(release, file_name, spec):
    assert recognised(release, file_name=file_name).spec == SPECS[spec]


@pytest.mark.parametrize("name", [*FLUX1, *FLUX2])
def test_each_transformer_is_recognised_under_its_own_file_name(name):
    spec = SPECS[name]
    if "mini" in name:
        shapes = module_shapes(Flux1, spec)
    else:
        release = name.replace("-base", "").replace("-kv", "")
        release = SAME_SHAPES.get(release, release)
        shapes = shapes_of(release)[2]
    part = recognise_part("transformer", "", shapes, file_name=spec.files[0])
    assert part.spec == spec
    assert all(" by its name; " in note for note in part.notes)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("modelspec.title", "FLUX.1 Kontext dev"),
        ("modelspec.architecture", "flux-1-kontext"),
        ("general.name", "Flux Kontext"),
        ("general.basename", "flux1-kontext-dev"),
        ("general.finetune", "Kontext"),
    ],
)
def test_metadata_decide_before_the_file_name(key, text):
    part = recognised("flux1-dev", file_name="flux1-krea-dev.safetensors", metadata={key: text})
    assert part.spec == FLUX1["flux1-kontext-dev"]
    assert part.notes[0].startswith(f"taken for FLUX.1 Kontext [dev] by its metadata ({key}); ")
    assert "FLUX.1 [dev], FLUX.1 Krea [dev]" in part.notes[0]


def test_the_user_s_word_decides_before_everything():
    part = recognised(
        "flux1-dev", file_name="kontext.gguf", metadata={"general.name": "kontext"}, variant="flux1-krea-dev"
    )
    assert part.spec == FLUX1["flux1-krea-dev"]
    assert "as it was chosen" in part.notes[0]


@pytest.mark.parametrize(
    ("release", "variant", "words"),
    [
        ("flux1-dev", "flux1-schnell", "it has a guidance embedding; choose flux1-dev or flux1-krea-dev or"),
        ("flux1-schnell", "flux1-dev", "it has no guidance embedding; choose flux1-schnell, or leave"),
        ("flux1-dev", "flux1-fill-dev", "its input channels: 64, not 384"),
        ("flux1-dev", "flux1-mini", "its width of the text tokens: 4096, not 192"),
        ("flux1-dev", "flux2-dev", "is not FLUX.2 [dev]: its tensors are those of FLUX.1; choose one of flux1-schnell"),
        ("flux2-klein-9b", "flux2-klein-4b", "its width of the text tokens: 12288, not 7680"),
        ("flux2-dev", "flux1-dev", "is not FLUX.1 [dev]: its tensors are those of FLUX.2"),
    ],
)
def test_a_word_that_the_shapes_contradict_is_refused_with_the_reason(release, variant, words):
    with pytest.raises(MismatchError) as caught:
        recognised(release, file_name="x.gguf", variant=variant)
    assert words in str(caught.value)
    assert str(caught.value).startswith("x.gguf is not ")


def test_a_variant_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(UserError, match=r"no model named flux1-prod; choose one of flux1-schnell, flux1-dev"):
        recognised("flux1-dev", variant="flux1-prod")


def test_parts_beside_the_transformer_take_no_variant():
    assert recognised("clip-l", variant="flux1-dev").spec == CLIP_L


# Other sizes.


@pytest.mark.parametrize(
    ("release", "double", "single"), [("flux1-dev", 8, 38), ("flux1-schnell", 19, 10), ("flux2-dev", 8, 40)]
)
def test_pruned_models_are_read_by_their_depth(release, double, single):
    spec = SPECS[release]
    outside = [f"double_blocks.{n}." for n in range(double, 19)] + [f"single_blocks.{n}." for n in range(single, 48)]
    part = recognised(release, without(*outside), file_name="lite.safetensors")
    assert part.spec == replace(
        spec,
        name=f"{release}-variant",
        title=f"{spec.title} (another size)",
        double_blocks=double,
        single_blocks=single,
    )
    assert (
        f"{double} double and {single} single blocks of width {spec.hidden}; treated as {spec.title}" in part.notes[0]
    )


def test_a_pruned_model_is_treated_as_what_its_name_or_the_user_says():
    cut = without("single_blocks.37.")
    assert recognised("flux1-dev", cut, file_name="flux1-kontext-lite.gguf").spec.guidance == 2.5
    assert recognised("flux1-dev", cut, variant="flux1-kontext-dev").spec.name == "flux1-kontext-dev-variant"


def test_another_width_is_run_and_said():
    part = recognise_part("transformer", "flux1", module_shapes(Flux1, TINY))
    assert part.title == "the Foundry Mini (another size) diffusion model"
    assert part.spec == replace(
        TINY, name="flux1-mini-variant", title="Foundry Mini (another size)", files=part.spec.files, heeds_redux=True
    )
    assert part.runs


@pytest.mark.parametrize("width", [61, 453, 896, 5000])  # 61 / 896 * 896 is less than 61 in floating point
def test_any_feed_forward_width_comes_back_as_it_is(width):
    shapes = dict(module_shapes(Flux1, replace(TINY, hidden=896, heads=7)))
    for kind in ("weight", "bias"):
        name = f"double_blocks.0.img_mlp.0.{kind}"
        shapes[name] = (width, *shapes[name][1:])
    assert recognise_part("transformer", "flux1", shapes).spec.mlp_width == width


def test_another_width_of_clip_s_vector_is_read():
    def change(shapes):
        shapes["vector_in.in_layer.weight"] = (3072, 512)

    assert recognised("flux1-dev", change).spec.pooled_width == 512


def test_flux_2_of_another_text_width_keeps_what_the_shapes_say():
    def change(shapes):
        shapes["txt_in.weight"] = (3072, 6144)

    part = recognised("flux2-klein-4b", change)
    assert (part.spec.context_width, part.spec.hidden) == (6144, 3072)
    assert part.spec.name == "flux2-klein-4b-variant"
    assert not part.runs


def test_flux_2_without_guidance_is_still_told_by_its_text_tokens():
    part = recognised("flux2-dev", without("guidance_in."))
    assert part.spec.text_encoder == "mistral-small-24b"
    assert not part.spec.guidance_embedding


@pytest.mark.parametrize("release", ["flux1-dev", "flux2-klein-9b"])
@pytest.mark.parametrize("block", [16, 32])
def test_rows_and_columns_that_are_filled_up_to_blocks_change_nothing_of_a_release(release, block):
    def change(shapes):
        for name, shape in shapes.items():
            if len(shape) == 2:
                shapes[name] = tuple(-(-side // block) * block for side in shape)

    assert recognised(release, change).spec == recognised(release).spec


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_a_width_that_was_filled_up_is_read_off_what_is_never_packed(family):
    def change(shapes):
        shapes["img_in.weight"] = (3072 + 16, shapes["img_in.weight"][1])

    assert recognised({"flux1": "flux1-dev", "flux2": "flux2-klein-4b"}[family], change).spec.hidden == 3072


# What cannot be run.


def test_a_transformer_of_other_heads_is_foreign_with_the_reason():
    part = recognise_part("transformer", "flux1", module_shapes(Flux1, replace(TINY, heads=2, axes=(8, 28, 28))))
    assert part.kind == "foreign"
    assert part.is_model
    assert "rope axes" in part.title


def test_unknown_input_channels_are_foreign_with_the_number():
    def change(shapes):
        shapes["img_in.weight"] = (3072, 96)

    part = recognised("flux1-dev", change)
    assert (part.kind, part.spec, part.runs) == ("foreign", None, False)
    assert "96 input channels" in part.title


def test_missing_tensors_are_named_by_what_they_tell():
    assert "output channels" in recognised("flux1-dev", without("final_layer.")).title
    assert "width of the text tokens" in recognised("flux2-dev", without("txt_in.")).title


def test_a_block_that_is_missing_before_others_is_named():
    part = recognised("flux1-dev", without("single_blocks.5."))
    assert part.kind == "foreign"
    assert "single_blocks.5 is missing" in part.title
    assert "encoder.block.7 is missing" in recognised("t5xxl", without("encoder.block.7.")).title


def test_an_autoencoder_with_a_smaller_decoder_is_not_taken_for_the_whole_one():
    def change(shapes):
        for name, shape in shapes.items():
            if name.startswith("decoder.up."):
                shapes[name] = tuple(side * 3 // 4 for side in shape)

    part = recognised("flux2-vae", change)
    assert part.kind == "foreign"
    assert "decoder widths [96, 192, 384, 384]" in part.title


def test_an_autoencoder_that_is_stable_diffusion_3_s_by_name_is_noted():
    assert "Stable Diffusion 3" in recognised("flux1-ae", file_name="sd3_vae.safetensors").notes[0]
    assert recognised("flux2-vae", file_name="sd3_vae.safetensors").notes == ()


def test_other_encoders_are_told_from_flux_s_own():
    big = recognise_part("clip", "", module_shapes(ClipText, replace(CLIP_MINI, width=1280, heads=20, layers=3)))
    assert (big.kind, big.role, big.is_model) == ("foreign", "clip", False)
    assert "width 1280 with 3 layers" in big.title
    long_clip = recognise_part("clip", "", module_shapes(ClipText, replace(CLIP_L, positions=248)))
    assert "248 positions" in long_clip.title
    many_words = recognise_part("t5", "", module_shapes(T5Encoder, replace(T5_XXL, vocabulary=256_384)))
    assert "256384 words" in many_words.title


# Vision towers and Redux.


def tower(**changes):
    return recognise_part("vision", "", module_shapes(SiglipVision, replace(SIGLIP_SO400M, **changes)))


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        (
            {"width": 768, "layers": 12, "heads": 12, "mlp_width": 3072, "patch": 16, "side": 224},
            "the SigLIP base vision tower (patch 16, 224 pixels)",
        ),
        (
            {"width": 1024, "layers": 24, "mlp_width": 4096, "patch": 16, "side": 256},
            "the SigLIP large vision tower (patch 16, 256 pixels)",
        ),
        ({"side": 224}, "the SigLIP so400m vision tower (patch 14, 224 pixels)"),
        ({"patch": 16, "side": 512}, "the SigLIP so400m vision tower (patch 16, 512 pixels)"),
        (
            {"width": 1536, "layers": 40, "mlp_width": 6144, "patch": 16},
            "the SigLIP giant vision tower (patch 16, 384 pixels)",
        ),
        ({"layers": 26}, "a SigLIP vision tower of width 1152 with 26 layers, which no Redux adapter takes"),
    ],
)
def test_other_sizes_of_siglip_are_named_and_not_run(changes, title):
    part = tower(**changes)
    assert (part.kind, part.role, part.title, part.runs) == ("foreign", "vision", title, False)
    assert part.foreign.width == changes.get("width", 1152)


@pytest.mark.parametrize(("width", "layers", "size"), [(768, 12, "base"), (1152, 27, "so400m")])
def test_siglip_2_naflex_is_told_by_its_first_layer(width, layers, size):
    shapes = dict(module_shapes(SiglipVision, replace(SIGLIP_SO400M, width=width, layers=layers)))
    shapes["vision_model.embeddings.patch_embedding.weight"] = (width, 16 * 16 * 3)
    shapes["vision_model.embeddings.position_embedding.weight"] = (256, width)
    assert recognise_part("vision", "", shapes).title == f"the SigLIP 2 {size} vision tower (NaFlex, patch 16)"


@pytest.mark.parametrize(
    ("file_name", "notes"),
    [
        ("siglip2-so400m-patch14-384.safetensors", 1),
        ("SigLIP_v2_384.safetensors", 1),
        ("sigclip_vision_patch14_384.safetensors", 0),
        ("model.safetensors", 0),
    ],
)
def test_a_tower_that_is_siglip_2_s_by_name_is_noted(file_name, notes):
    part = recognised("siglip-so400m-384", file_name=file_name)
    assert part.spec == SIGLIP_SO400M
    assert len(part.notes) == notes
    assert all("with which Redux was not trained" in note for note in part.notes)


def test_a_tower_s_missing_layer_is_named():
    part = recognised("siglip-so400m-384", without("vision_model.encoder.layers.7."))
    assert "27 layers" not in part.title
    assert part.title.endswith("which is not whole: vision_model.encoder.layers.7 is missing")


def test_a_tower_without_its_places_is_still_known_so_that_they_can_be_named():
    part = recognised("siglip-so400m-384", without("vision_model.embeddings.position_embedding."))
    assert part.spec == SIGLIP_SO400M


@pytest.mark.parametrize("block", [16, 32])
def test_rows_and_columns_of_a_tower_may_be_filled_up_to_blocks(block):
    def change(shapes):
        for name, shape in shapes.items():
            if len(shape) == 2:
                shapes[name] = tuple(-(-side // block) * block for side in shape)

    assert recognised("siglip-so400m-384", change).spec == SIGLIP_SO400M
    assert recognised("flux1-redux-dev", change).spec == REDUX


def test_a_redux_adapter_of_other_widths_is_named_with_them():
    part = recognise_part("redux", "flux1", module_shapes(Redux, replace(REDUX, vision_width=1280, text_width=2048)))
    assert (part.kind, part.role, part.foreign.width) == ("foreign", "redux", 2048)
    assert part.title == "a Redux adapter from vision tokens of width 1280 to text tokens of width 2048"


PROPERTY_RELEASES = [
    "flux1-dev", "flux1-fill-dev", "flux2-klein-9b", "flux1-ae", "flux2-vae", "clip-l", "t5xxl", "siglip-so400m-384",
    "flux1-redux-dev",
]  # fmt: skip


def damaged(shapes, generator):
    """Some of the tensors, and some of them with other shapes."""
    kept = generator.random()
    out = {name: shape for name, shape in shapes.items() if generator.random() < kept}
    for name in list(out):
        if generator.random() < generator.choice((0.0, 0.05, 0.5)):
            out[name] = tuple(generator.choice((0, 1, 3, 64, 128, 3072, 2**40)) for _ in range(generator.randrange(5)))
    out["double_blocks.x.y"] = out["single_blocks."] = out["decoder.up.99999999.block.0.conv1.weight"] = ()
    out[f"double_blocks.{'9' * 5000}.a"] = (1,)
    return out


@pytest.mark.parametrize("release", PROPERTY_RELEASES)
def test_whatever_is_missing_or_misshapen_nothing_but_a_contradiction_is_raised(release):
    generator = random.Random(release)
    part, family, shapes = shapes_of(release)
    for _ in range(150):
        given = damaged(shapes, generator)
        found = recognise_part(part, generator.choice((family, "")), given, file_name=generator.choice(("", "krea")))
        assert found.title
        assert (found.spec is None) == (found.kind == "foreign") == (found.foreign is not None)
        assert found.kind in (part, "foreign")
        try:
            again = recognise_part(part, family, given, variant=generator.choice([*FLUX1, *FLUX2]))
        except MismatchError:
            assert part == "transformer"
        else:
            assert again.kind in (part, "foreign")


@pytest.mark.parametrize("part", ["transformer", "autoencoder", "clip", "t5", "vision", "redux"])
def test_no_tensor_at_all_is_foreign(part):
    assert recognise_part(part, "", {}).kind == "foreign"


def test_recognition_needs_no_torch():
    code = "import flux.specs.recognition, flux.specs.fit, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
