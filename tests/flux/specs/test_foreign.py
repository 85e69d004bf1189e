"""What is no part of the engine's own is named with what it is for: adapters by their model, encoders by their user."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from flux.specs.recognition import recognise_foreign
from tests.fixtures.listings import FLUX2_SIZES, clip_l, flux1_bfl, flux1_diffusers, flux2_bfl, flux2_diffusers

RANK = 16


@dataclass(frozen=True)
class Shaped:
    shape: tuple[int, ...]


def found(shapes):
    return recognise_foreign({name: Shaped(tuple(shape)) for name, shape in shapes.items()})


def named(*names):
    return found(dict.fromkeys(names, (8, 8)))


def lora(listing, prefix="", separator=".", down="lora_A", up="lora_B", only=""):
    """A LoRA of every matrix of a model."""
    out = {}
    for name, shape in listing.items():
        if len(shape) == 2 and name.endswith(".weight") and only in name:
            layer = prefix + name.removesuffix(".weight").replace(".", separator)
            out[f"{layer}.{down}.weight"] = (RANK, shape[1])
            out[f"{layer}.{up}.weight"] = (shape[0], RANK)
    return out


def kohya(listing, only=""):
    return lora(listing, "lora_unet_", "_", "lora_down", "lora_up", only)


# LoRA.


@pytest.mark.parametrize("only", ["", "linear1", "linear2", "img_mlp"])
def test_a_lora_of_flux_1_in_kohya_s_names_is_told_from_flux_2_s(only):
    part = found(kohya(flux1_bfl(), only))
    assert (part.kind, part.role, part.runs, part.is_model) == ("foreign", "lora", False, False)
    assert part.title == "a LoRA for FLUX.1 in kohya's names"
    assert part.foreign.family == "flux1"


@pytest.mark.parametrize(
    ("size", "title"),
    [("dev", "FLUX.2 [dev]"), ("klein-4b", "FLUX.2 [klein] 4B"), ("klein-9b", "FLUX.2 [klein] 9B")],
)
@pytest.mark.parametrize(
    ("build", "prefix", "program"),
    [
        (flux2_diffusers, "transformer.", "diffusers' names"),
        (flux2_bfl, "diffusion_model.", "ComfyUI's names"),
        (flux2_bfl, "base_model.model.", "fal's names"),
    ],
)
def test_a_lora_of_flux_2_names_the_model_of_its_width(size, title, build, prefix, program):
    part = found(lora(build(size), prefix))
    assert part.title == f"a LoRA for {title} in {program}"
    assert (part.foreign.family, part.foreign.width) == ("flux2", FLUX2_SIZES[size][0])


def test_rows_of_the_single_blocks_tell_families_of_the_same_width_apart():
    one_layer = kohya(flux2_bfl("klein-4b"), "single_blocks.0.linear1")
    assert found(one_layer).title == "a LoRA for FLUX.2 [klein] 4B in kohya's names"


@pytest.mark.parametrize("only", ["linear2", "img_mlp", "img_attn.proj"])
def test_any_layer_tells_the_width(only):
    assert found(kohya(flux2_bfl("klein-9b"), only)).foreign.width == 4096


def test_a_lora_of_what_both_families_have_alike_says_so():
    part = found(kohya(flux2_bfl("klein-4b"), "img_attn.qkv"))
    assert part.title == "a LoRA for FLUX.1 or FLUX.2 [klein] 4B in kohya's names"
    assert (part.foreign.family, part.foreign.width) == ("", 3072)


def test_blocks_beyond_a_family_s_depth_tell_the_other():
    part = found(kohya(flux1_bfl(), "img_attn.qkv"))
    assert part.foreign.family == "flux1"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (lora(flux1_diffusers(), "transformer."), "a LoRA for FLUX.1 in diffusers' names"),
        (lora(flux1_diffusers(), down="lora_A.default", up="lora_B.default"), "FLUX.1 in DiffSynth's names"),
        (lora(flux1_diffusers(), "lora_transformer_", "_", "lora_down", "lora_up"), "FLUX.1 in OneTrainer's names"),
        (
            {
                f"double_blocks.{n}.processor.qkv_lora{k}.{way}.weight": shape
                for n in range(19)
                for k in (1, 2)
                for way, shape in {"down": (RANK, 3072), "up": (9216, RANK)}.items()
            },
            "FLUX.1 in XLabs' names",
        ),
        (lora(flux1_bfl(256)) | {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)}, "a control LoRA for FLUX.1"),
        ({"lora_unet_double_blocks_7_img_attn_qkv.lokr_w1": (8, 8)}, "a LoKr for FLUX.1 or FLUX.2 in"),
        ({"lora_unet_double_blocks_9_img_mlp_0.hada_w1_a": (8, 8)}, "a LoHa for FLUX.1 in"),
        (kohya({"double_blocks.0.img_attn.qkv.weight": (1536, 512)}), "a model like FLUX of width 512"),
        ({"lora_unet_down_blocks_1_attentions_0_attn2_to_k.lora_down.weight": (8, 768)}, "LoRA for Stable Diffusion 1"),
        (
            {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (8, 2048)},
            "LoRA for Stable Diffusion XL",
        ),
        ({"transformer_blocks.0.img_mlp.net.2.lora_A.weight": (8, 8)}, "LoRA for Qwen-Image"),
        ({"diffusion_model.blocks.0.cross_attn.k.lora_A.weight": (8, 8)}, "LoRA for Wan"),
        ({"lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight": (8, 8)}, "LoRA for HunyuanVideo"),
        ({"diffusion_model.content_mode_blocks.image.0.q_proj.lora_A.weight": (8, 8)}, "LoRA for FLUX.3"),
        ({"something.lora_A.weight": (8, 8)}, "a LoRA"),
    ],
)  # fmt: skip
def test_loras_are_named_with_their_model(names, words):
    part = found(names)
    assert part.role == "lora"
    assert words in part.title


# Other adapters.


@pytest.mark.parametrize(
    ("names", "role", "title", "family", "width"),
    [
        (
            {"redux_down.weight": (4096, 12288)},
            "redux", "some tensors of a Redux adapter, without the rest: one file of several, or a damaged one",
            "flux1", 4096,
        ),
        (
            {"controlnet_x_embedder.weight": (3072, 64), "controlnet_mode_embedder.weight": (10, 3072),
             "single_transformer_blocks.0.attn.to_q.weight": (3072, 3072)},
            "controlnet", "a ControlNet for FLUX.1 (diffusers' layout, a union of 10 modes)", "flux1", 3072,
        ),
        (
            {"controlnet_blocks.0.weight": (3072, 3072), "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
             "img_in.weight": (3072, 64), "input_hint_block.0.weight": (16, 3, 3, 3)},
            "controlnet", "a ControlNet for FLUX.1 (XLabs' layout)", "flux1", 3072,
        ),
        (
            {"control_img_in.weight": (6144, 260), "control_transformer_blocks.0.ff.linear_in.weight": (36864, 6144)},
            "controlnet", "a ControlNet for FLUX.2 [dev] (VideoX-Fun's layout)", "flux2", 6144,
        ),
        (
            {"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": (3072, 4096)},
            "ip-adapter", "an IP-Adapter for FLUX.1 (XLabs' layout)", "flux1", 3072,
        ),
        ({"ip_adapter.0.to_k_ip.weight": (3072, 4096)}, "ip-adapter", "an IP-Adapter for FLUX.1 (InstantX' layout)",
         "flux1", 3072),
        ({"ip_adapter.1.to_k_ip.weight": (320, 768)}, "ip-adapter", "an IP-Adapter for Stable Diffusion", "other", 0),
        ({"control_model.input_blocks.0.0.weight": (8, 8)}, "controlnet", "a ControlNet for Stable Diffusion",
         "other", 0),
        ({"controlnet_x_embedder.weight": (3072, 64), "transformer_blocks.0.img_mod.1.weight": (8, 8)}, "controlnet",
         "a ControlNet for Qwen-Image", "other", 0),
    ],
)  # fmt: skip
def test_adapters_are_named_with_family_and_width(names, role, title, family, width):
    part = found(names)
    assert (part.role, part.title) == (role, title)
    assert (part.foreign.family, part.foreign.width) == (family, width)


# Encoders.


def language_model(width, layers, words, query_norm, lead="model."):
    names = {f"{lead}embed_tokens.weight": (words, width), f"{lead}norm.weight": (width,)}
    for n in range(layers):
        names |= {f"{lead}layers.{n}.input_layernorm.weight": (width,)}
        names |= {f"{lead}layers.{n}.self_attn.q_proj.weight": (4096, width)}
        if query_norm:
            names |= {f"{lead}layers.{n}.self_attn.q_norm.weight": (128,)}
    return names


@pytest.mark.parametrize(
    ("model", "title", "family", "name"),
    [
        ((2560, 36, 151936, True), "the Qwen3 4B text encoder (of FLUX.2 [klein] 4B)", "flux2", "qwen3-4b"),
        ((4096, 36, 151936, True), "the Qwen3 8B text encoder (of FLUX.2 [klein] 9B)", "flux2", "qwen3-8b"),
        ((5120, 40, 131072, False), "Mistral Small 24B text encoder (of FLUX.2 [dev])", "flux2", "mistral-small-24b"),
        ((5120, 30, 131072, False), "Mistral Small 24B text encoder (of FLUX.2 [dev])", "flux2", "mistral-small-24b"),
        ((4096, 32, 128256, False), "the Llama 3 8B text encoder (of HunyuanVideo and HiDream)", "other", ""),
        ((2560, 34, 262208, True), "a language model of width 2560 with 34 layers, which no", "other", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lead", ["model.", "language_model.model.", "text_encoders.qwen3_4b.transformer.model."])
def test_language_models_are_named_with_whose_text_encoder_they_are(model, title, family, name, lead):
    part = found(language_model(*model, lead))
    assert part.role == "text-encoder"
    assert title in part.title
    assert (part.foreign.family, part.foreign.name, part.foreign.width) == (family, name, model[0])


def test_language_models_in_llama_cpp_s_names_are_known_too():
    names = {"token_embd.weight": (151936, 4096), "output_norm.weight": (4096,)}
    for n in range(36):
        names |= {f"blk.{n}.attn_norm.weight": (4096,), f"blk.{n}.attn_q_norm.weight": (128,)}
    assert found(names).foreign.name == "qwen3-8b"


def test_a_qwen_that_sees_is_flux_3_s():
    names = language_model(2560, 36, 151936, query_norm=True, lead="model.language_model.")
    part = found(names | {"model.visual.blocks.0.attn.qkv.weight": (8, 8)})
    assert part.title == "the Qwen3-VL 4B text encoder (of FLUX.3)"
    assert part.foreign.name == ""


def test_umt5_in_llama_cpp_s_names_is_no_language_model():
    assert "umT5" in named("enc.blk.0.attn_norm.weight", "enc.blk.1.attn_rel_b.weight").title


@pytest.mark.parametrize(
    ("width", "layers", "title"),
    [
        (1024, 24, "the CLIP-L vision tower, which XLabs' IP-Adapter needs"),
        (1280, 32, "the CLIP-H vision tower"),
        (1664, 48, "the CLIP-G vision tower"),
        (512, 2, "a CLIP vision tower of width 512 with 2 layers"),
    ],
)
@pytest.mark.parametrize("level", ["vision_model.", ""])
def test_clip_s_vision_towers_are_named_by_width_and_layers(width, layers, title, level):
    names = {f"{level}encoder.layers.{n}.layer_norm1.weight": (width,) for n in range(layers)}
    names |= {f"{level}post_layernorm.weight": (width,), f"{level}embeddings.class_embedding": (width,)}
    part = found(names)
    assert (part.role, part.title, part.foreign.width) == ("vision", title, width)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("visual.trunk.blocks.0.attn.qkv.weight", "a SigLIP vision tower in OpenCLIP's layout, which this version"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", "a CLIP vision tower in OpenCLIP's layout"),
        ("vision_model.encoder.layers.3.mlp.fc1.weight", "some tensors of a SigLIP vision tower, without the rest"),
    ],
)
def test_other_vision_towers_are_named(name, title):
    part = named(name)
    assert part.role == "vision"
    assert part.title.startswith(title)


def test_a_whole_clip_in_open_clip_s_layout_is_a_text_encoder_first():
    names = ("token_embedding.weight", "transformer.resblocks.0.mlp.c_fc.weight", "visual.transformer.resblocks.0.ln_1")
    assert named(*names).role == "clip"


# Models and what is left.

FAMILIES = {
    "a Chroma diffusion model": ("double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"),
    "a FLUX.3 diffusion model": ("early_stream_modulations.image.lin.weight", "single_blocks.0.q_proj.weight"),
    "a Stable Diffusion 3 model": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",),
    "a Stable Diffusion XL model": (
        "model.diffusion_model.label_emb.0.0.weight",
        "conditioner.embedders.1.model.positional_embedding",
    ),
    "a Stable Diffusion 1 or 2 model": (
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    ),
    "a Qwen-Image diffusion model": ("transformer_blocks.0.img_mod.1.weight",),
    "a HunyuanVideo diffusion model": (
        "double_blocks.0.img_mod.linear.weight",
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    ),
    "a Wan video model": ("blocks.0.cross_attn.norm_k.weight",),
    "a Z-Image diffusion model": ("cap_pad_token", "noise_refiner.0.attention.qkv.weight"),
    "a Lumina or Z-Image diffusion model": ("noise_refiner.0.attention.qkv.weight",),
    "an LTX video model": ("patchify_proj.weight",),
    "an AuraFlow diffusion model": ("double_layers.0.attn.w1q.weight",),
    "a PixArt diffusion model": ("y_embedder.y_proj.fc1.weight",),
    "a Stable Cascade model": ("clip_txt_mapper.weight",),
    "Nunchaku": ("transformer_blocks.0.qkv_proj.qweight", "transformer_blocks.0.qkv_proj.wscales"),
    "some tensors of a FLUX.2 diffusion model": ("double_stream_modulation_img.lin.weight", "single_blocks.0.linear1"),
    "some tensors of a FLUX diffusion model": ("single_transformer_blocks.30.attn.to_q.weight",),
}


@pytest.mark.parametrize("title", FAMILIES)
def test_models_of_other_families_are_named(title):
    part = named(*FAMILIES[title])
    assert part.is_model
    assert title in part.title


def test_a_nunchaku_model_is_not_taken_for_a_lora_for_the_low_rank_part_in_it():
    part = named(
        "transformer_blocks.0.qkv_proj.qweight",
        "transformer_blocks.0.qkv_proj.wscales",
        "transformer_blocks.0.qkv_proj.lora_down",
        "transformer_blocks.0.qkv_proj.lora_up",
    )
    assert part.is_model


def test_sizes_tell_stable_diffusion_s_versions():
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert found({key: (320, 768)}).title == "a Stable Diffusion 1 model"
    assert found({key: (320, 1024)}).title == "a Stable Diffusion 2 model"


def test_longcat_is_told_by_the_width_of_its_text_tokens():
    names = {"double_blocks.0.img_mod.lin.weight": (18432, 3072), "txt_in.weight": (3072, 3584)}
    assert found(names).title == "a LongCat-Image diffusion model"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"decoder.conv_in.weight": (512, 4, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)}, "4 latent channels"),
        ({"decoder.conv_in.weight": (512, 32, 3, 3), "bn.running_mean": (128,)}, "a FLUX.2 autoencoder that is not"),
        ({"decoder.conv_in.weight": (512, 16, 3, 3)}, "the decoder alone"),
        ({"decoder.conv_in.weight": (512, 16, 3, 3, 3)}, "for video"),
        ({"decoder.up_blocks.0.resnets.0.conv1.weight": (8, 8)}, "an autoencoder of another family"),
    ],
)  # fmt: skip
def test_other_autoencoders_are_named(names, words):
    part = found(names)
    assert part.role == "autoencoder"
    assert words in part.title


def test_nothing_known_is_nothing():
    assert found({}) is None
    assert named("a.b.c") is None


def test_a_line_break_within_a_name_ends_no_name():
    part = named("redux_up.weight", "redux_down.weight\nx")
    assert (part.role, part.foreign.width) == ("redux", 0)


def test_names_that_are_made_to_hurt_cost_nothing():
    names = [
        "lora_unet_double_blocks_0_img_attn_qkv" + "_a" * 200_000,
        "attn_qkv" + "_a" * 200,
        "x.lora_A.weight\ndecoder.conv_in.weight\ny",
        "single_blocks_" + "9" * 400,
        "",
    ]
    assert named(*names).role == "lora"


@pytest.mark.parametrize("rank", [0, 1])
def test_shapes_of_too_few_sides_crash_nothing(rank):
    for listing in (
        kohya(flux1_bfl()),
        lora(flux2_diffusers("dev"), "transformer."),
        language_model(8, 2, 8, query_norm=True),
        clip_l(),
        {"redux_down.weight": (8, 8), "redux_up.weight": (8, 8)},
        {"ip_adapter.0.to_k_ip.weight": (8, 8)},
        {"decoder.conv_in.weight": (8, 8)},
    ):
        found(dict.fromkeys(listing, (1,) * rank))
