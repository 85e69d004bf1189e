"""What a file is, from names and shapes: every release, its prefixes, other sizes, and the families beside it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest

from flux.errors import MismatchError
from flux.models.autoencoder import Autoencoder
from flux.models.flux1 import Flux1
from flux.models.text.clip import ClipText
from flux.models.text.t5 import T5Encoder
from flux.ops.layers import on_meta
from flux.specs.autoencoder import AUTOENCODERS
from flux.specs.flux1 import FLUX1
from flux.specs.recognise import recognise, recognise_kind
from flux.specs.text import CLIP_L, CLIP_MINI, CLIP_TEXT, T5_ENCODERS, T5_MINI, T5_XXL
from tests.tiny import TINY


@dataclass(frozen=True)
class Shaped:
    shape: tuple[int, ...]


@functools.cache
def listing(build, spec):
    with on_meta():
        return {name: Shaped(tuple(parameter.shape)) for name, parameter in build(spec).named_parameters()}


def named(*names):
    return {name: Shaped((8, 8)) for name in names}


def only(tensors, file_name="", metadata=None):
    (part,) = recognise(tensors, file_name, metadata)
    return part


@pytest.mark.parametrize("name", FLUX1)
def test_each_release_is_recognised_under_its_own_file_name(name):
    spec = FLUX1[name]
    part = only(listing(Flux1, spec), spec.files[0])
    assert (part.kind, part.spec, part.prefix) == ("transformer", spec, "")


@pytest.mark.parametrize("name", ["flux1-schnell", "flux1-fill-dev", "flux1-mini", "flux1-mini-schnell"])
def test_what_shapes_tell_needs_no_file_name_and_no_note(name):
    part = only(listing(Flux1, FLUX1[name]), "model.safetensors")
    assert part.spec == FLUX1[name]
    assert part.notes == ()


def test_what_shapes_cannot_tell_is_assumed_and_said():
    part = only(listing(Flux1, FLUX1["flux1-dev"]), "model.safetensors")
    assert part.spec == FLUX1["flux1-dev"]
    assert part.notes == (
        "taken for FLUX.1 [dev]; by its tensors it could also be FLUX.1 Krea [dev], FLUX.1 Kontext [dev]",
    )


def test_metadata_decides_what_shapes_cannot():
    metadata = {"modelspec.title": "FLUX.1 Kontext dev"}
    part = only(listing(Flux1, FLUX1["flux1-dev"]), "model.safetensors", metadata)
    assert part.spec == FLUX1["flux1-kontext-dev"]
    assert "by its name" in part.notes[0]


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer."])
def test_prefixes_of_other_programs_are_found(prefix):
    tensors = {prefix + name: shape for name, shape in listing(Flux1, TINY).items()}
    assert only(tensors).prefix == prefix


def test_the_hosts_name_for_norm_scales_is_known():
    tensors = {
        name.replace("norm.scale", "norm.weight"): shape for name, shape in listing(Flux1, FLUX1["flux1-dev"]).items()
    }
    assert only(tensors, "flux1-dev.safetensors").spec == FLUX1["flux1-dev"]


def test_another_size_is_run_and_said():
    part = only(listing(Flux1, TINY))
    assert part.title == "the Foundry Mini, another size diffusion model"
    assert part.spec == replace(
        TINY, name="flux1-mini-variant", title="Foundry Mini, another size", files=part.spec.files
    )
    assert "1 double and 1 single blocks of width 128; treated as Foundry Mini" in part.notes[0]


def test_another_feed_forward_width_is_read_off():
    part = only(listing(Flux1, replace(TINY, mlp_ratio=2.0)))
    assert part.spec.mlp_ratio == 2.0


def test_a_transformer_of_other_heads_is_foreign_with_the_reason():
    part = only(listing(Flux1, replace(TINY, hidden=128, heads=2, axes=(8, 28, 28))))
    assert part.kind == "foreign"
    assert "rope axes" in part.title


def test_a_transformer_without_its_last_layer_is_foreign_with_the_reason():
    tensors = {name: shape for name, shape in listing(Flux1, TINY).items() if not name.startswith("final_layer")}
    part = only(tensors)
    assert part.kind == "foreign"
    assert "out_channels" in part.title


@pytest.mark.parametrize("rank", [0, 1])
def test_shapes_of_too_few_sides_crash_nothing(rank):
    for build, spec in (
        (Flux1, TINY),
        (Autoencoder, AUTOENCODERS["flux1-ae"]),
        (ClipText, CLIP_L),
        (T5Encoder, T5_MINI),
    ):
        assert all(p.spec is None for p in recognise({n: Shaped((1,) * rank) for n in listing(build, spec)}))


@pytest.mark.parametrize("spec", AUTOENCODERS.values(), ids=AUTOENCODERS)
def test_autoencoders_are_recognised(spec):
    part = only(listing(Autoencoder, spec))
    assert (part.kind, part.spec) == ("autoencoder", spec)


@pytest.mark.parametrize("spec", CLIP_TEXT.values(), ids=CLIP_TEXT)
def test_clip_encoders_are_recognised(spec):
    part = only(listing(ClipText, spec))
    assert (part.kind, part.spec) == ("clip", spec)


@pytest.mark.parametrize("spec", T5_ENCODERS.values(), ids=T5_ENCODERS)
def test_t5_encoders_are_recognised(spec):
    part = only(listing(T5Encoder, spec))
    assert (part.kind, part.spec) == ("t5", spec)


def test_other_encoders_are_told_from_flux_s_own():
    big = only(listing(ClipText, replace(CLIP_MINI, width=1280, heads=20, layers=3)))
    assert big.title == "a CLIP text encoder of width 1280, which FLUX does not use"
    many_words = only(listing(T5Encoder, replace(T5_XXL, vocabulary=256_384)))  # umT5, of Wan
    assert many_words.kind == "foreign"
    assert "256384 words" in many_words.title


def test_a_checkpoint_of_everything_names_every_part():
    tensors = {f"model.diffusion_model.{n}": s for n, s in listing(Flux1, TINY).items()}
    tensors |= {f"first_stage_model.{n}": s for n, s in listing(Autoencoder, AUTOENCODERS["flux1-ae"]).items()}
    tensors |= {f"text_encoders.clip_l.transformer.{n}": s for n, s in listing(ClipText, CLIP_L).items()}
    tensors |= {f"text_encoders.t5xxl.transformer.{n}": s for n, s in listing(T5Encoder, T5_XXL).items()}
    assert [part.kind for part in recognise(tensors)] == ["transformer", "autoencoder", "clip", "t5"]


FAMILIES = {
    "Chroma": ("double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"),
    "FLUX.2 diffusion": ("double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"),
    "FLUX.3": ("early_stream_modulations.image.weight",),
    "diffusers' layout": ("transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.attn.to_q.weight"),
    "LoRA": ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",),
    "Redux": ("redux_up.weight", "redux_down.weight"),
    "ControlNet": ("controlnet_x_embedder.weight", "single_transformer_blocks.0.attn.to_q.weight"),
    "Stable Diffusion 3": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",),
    "Stable Diffusion XL": (
        "model.diffusion_model.label_emb.0.0.weight",
        "conditioner.embedders.1.model.positional_embedding",
    ),
    "Stable Diffusion 1 or 2": ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",),
    "Qwen-Image": ("transformer_blocks.0.img_mod.1.weight",),
    "HunyuanVideo": ("double_blocks.0.img_mod.linear.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight"),
    "Wan": ("blocks.0.cross_attn.norm_k.weight",),
    "vision": ("vision_model.encoder.layers.0.self_attn.q_proj.weight",),
    "autoencoder of another family": ("decoder.up_blocks.0.resnets.0.conv1.weight",),
    "language model": ("model.layers.0.self_attn.q_proj.weight",),
}


@pytest.mark.parametrize("words", FAMILIES)
def test_foreign_families_are_named(words):
    part = only(named(*FAMILIES[words]))
    assert part.kind == "foreign"
    assert words in part.title


def test_the_autoencoder_inside_stable_diffusion_3_is_not_taken_for_flux_s():
    tensors = {f"first_stage_model.{n}": s for n, s in listing(Autoencoder, AUTOENCODERS["flux1-ae"]).items()}
    tensors |= named("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight")
    assert only(tensors).title == "a Stable Diffusion 3 model"


def test_the_flux_2_autoencoder_is_told_by_its_channels():
    assert "FLUX.2 autoencoder" in only({"decoder.conv_in.weight": Shaped((512, 32, 3, 3))}).title


def test_nothing_known_is_nothing():
    assert recognise({}) == []
    assert recognise(named("a.b.c")) == []


@pytest.mark.parametrize(
    ("kind", "build", "spec", "words"),
    [
        ("transformer", T5Encoder, T5_XXL, "the text encoder t5xxl, but a FLUX.1 diffusion model is needed"),
        ("clip", Flux1, TINY, "another size diffusion model, but a CLIP-L text encoder is needed"),
        ("t5", ClipText, CLIP_L, "the text encoder clip-l, but a T5 text encoder is needed"),
        ("autoencoder", Flux1, TINY, "but a FLUX.1 autoencoder (VAE) is needed"),
    ],
)
def test_a_file_in_the_wrong_place_is_named_with_what_is_wanted(kind, build, spec, words):
    with pytest.raises(MismatchError) as caught:
        recognise_kind(kind, listing(build, spec), "x.safetensors", {})
    assert words in str(caught.value)
    assert str(caught.value).startswith("x.safetensors is ")
    assert "choose another file" in str(caught.value)
