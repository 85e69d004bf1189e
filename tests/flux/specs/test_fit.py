"""What does not fit is refused by the names of both files, with what would fit among the user's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flux.errors import MismatchError
from flux.models.vision.siglip import SiglipVision
from flux.ops.layers import on_meta
from flux.specs.autoencoder import AUTOENCODERS
from flux.specs.fit import Given, check_fit, check_kind, check_redux, faults_between, redux_faults
from flux.specs.flux1 import FLUX1
from flux.specs.flux2 import FLUX2
from flux.specs.recognition import Recognised, recognise_foreign, recognise_part
from flux.specs.releases import FILE_NAMES, FLUX2_FILE_NAMES, PAGES, PART_TITLES, where_to_get
from flux.specs.text import CLIP_TEXT, T5_ENCODERS
from flux.specs.vision import REDUXES, SIGLIP_SO400M, VISION_TOWERS
from flux.weights.renames import find_layouts
from tests.fixtures.listings import LISTINGS, flux2_bfl
from tests.flux.specs.test_foreign import Shaped, kohya, language_model

FOLDER = Path("models")


def given(release, file_name=None):
    """A release as the user's file, recognised by its shapes and this name."""
    _, listing, _ = LISTINGS[release]
    (layout,) = find_layouts(listing)
    name = file_name or f"{release}.safetensors"
    shapes = layout.to_ours(listing).shapes(listing.__getitem__)
    return Given(FOLDER / name, recognise_part(layout.layout.part, layout.layout.family, shapes, file_name=name))


def foreign(file_name, shapes):
    found = recognise_foreign({name: Shaped(tuple(shape)) for name, shape in shapes.items()})
    return Given(FOLDER / file_name, found)


def mini(kind, spec_name, file_name):
    """A part of the embedded model."""
    spec = {**FLUX1, **AUTOENCODERS, **CLIP_TEXT, **T5_ENCODERS, **VISION_TOWERS, **REDUXES}[spec_name]
    title = f"the {spec.title} diffusion model" if kind == "transformer" else PART_TITLES[spec_name]
    return Given(FOLDER / file_name, Recognised(kind, title, spec))


DEV, SCHNELL = given("flux1-dev"), given("flux1-schnell")
KLEIN, KLEIN_4B = given("flux2-klein-9b"), given("flux2-klein-4b")
CLIP, T5, AE, VAE = given("clip-l"), given("t5xxl"), given("flux1-ae", "ae.safetensors"), given("flux2-vae")
QWEN4 = foreign("qwen_3_4b.safetensors", language_model(2560, 36, 151936, query_norm=True))
QWEN8 = foreign("qwen_3_8b.safetensors", language_model(4096, 36, 151936, query_norm=True))
MINI = mini("transformer", "flux1-mini", "mini.safetensors")
MINI_T5 = mini("t5", "t5-mini", "t5.safetensors")
MINI_AE = mini("autoencoder", "flux1-mini-ae", "mini-ae.safetensors")
REDUX, SIGLIP = given("flux1-redux-dev", "redux.safetensors"), given("siglip-so400m-384", "sigclip.safetensors")
REDUX_MINI = mini("redux", "flux1-redux-mini", "redux-mini.safetensors")
SIGLIP_MINI = mini("vision", "siglip-mini", "siglip-mini.safetensors")
KLEIN_4B_LORA = foreign("style.safetensors", kohya(flux2_bfl("klein-4b")))
KLEIN_9B_LORA = foreign("look.safetensors", kohya(flux2_bfl("klein-9b")))
FLUX1_LORA = foreign("paint.safetensors", kohya(LISTINGS["flux1-dev"][1]))


def on_meta_shapes(build, spec):
    with on_meta():
        return {name: tuple(parameter.shape) for name, parameter in build(spec).named_parameters()}


def refusal(transformer, others, candidates=()):
    with pytest.raises(MismatchError) as caught:
        check_fit(transformer, others, candidates)
    return str(caught.value)


@pytest.mark.parametrize(
    ("transformer", "others"),
    [
        (DEV, [CLIP, T5, AE, FLUX1_LORA, REDUX]),
        (SCHNELL, [CLIP, T5, AE]),
        (given("flux1-fill-dev"), [CLIP, T5, AE]),
        (KLEIN, [QWEN8, VAE, KLEIN_9B_LORA]),
        (KLEIN_4B, [QWEN4, VAE, KLEIN_4B_LORA]),
        (MINI, [MINI_T5, MINI_AE, mini("clip", "clip-mini", "clip.safetensors")]),
        (DEV, []),
    ],
)
def test_parts_that_belong_together_have_no_fault(transformer, others):
    assert faults_between(transformer, others) == []
    check_fit(transformer, others)


@pytest.mark.parametrize(
    ("transformer", "other", "fault"),
    [
        (
            DEV, MINI_T5,
            "t5.safetensors is Foundry Mini's T5 text encoder, but flux1-dev.safetensors is the FLUX.1 [dev] diffusion "
            "model, which takes the T5-XXL text encoder: 4096 wide, not 192",
        ),
        (
            DEV, MINI_AE,
            "mini-ae.safetensors is Foundry Mini's autoencoder (VAE), but flux1-dev.safetensors is the FLUX.1 [dev] "
            "diffusion model, which takes the FLUX.1 autoencoder (VAE)",
        ),
        (
            DEV, VAE,
            "flux2-vae.safetensors is the FLUX.2 autoencoder (VAE), but flux1-dev.safetensors is the FLUX.1 [dev] "
            "diffusion model, which takes the FLUX.1 autoencoder (VAE): 16 latent channels, not 32",
        ),
        (
            DEV, QWEN4,
            "qwen_3_4b.safetensors is the Qwen3 4B text encoder (of FLUX.2 [klein] 4B), but flux1-dev.safetensors is "
            "the FLUX.1 [dev] diffusion model, which takes the CLIP-L text encoder and the T5-XXL text encoder",
        ),
        (
            KLEIN, T5,
            "t5xxl.safetensors is the T5-XXL text encoder, but flux2-klein-9b.safetensors is the FLUX.2 [klein] 9B "
            "diffusion model, which takes the Qwen3 8B text encoder",
        ),
        (
            KLEIN, QWEN4,
            "qwen_3_4b.safetensors is the Qwen3 4B text encoder (of FLUX.2 [klein] 4B), but flux2-klein-9b.safetensors "
            "is the FLUX.2 [klein] 9B diffusion model, which takes the Qwen3 8B text encoder: 4096 wide, not 2560",
        ),
        (
            KLEIN, KLEIN_4B_LORA,
            "style.safetensors is a LoRA for FLUX.2 [klein] 4B in kohya's names, but flux2-klein-9b.safetensors is the "
            "FLUX.2 [klein] 9B diffusion model, whose tokens are 4096 wide, not 3072",
        ),
        (
            DEV, KLEIN_9B_LORA,
            "look.safetensors is a LoRA for FLUX.2 [klein] 9B in kohya's names, but flux1-dev.safetensors is the "
            "FLUX.1 [dev] diffusion model",
        ),
        (
            KLEIN_4B, FLUX1_LORA,
            "paint.safetensors is a LoRA for FLUX.1 in kohya's names, but flux2-klein-4b.safetensors is the FLUX.2 "
            "[klein] 4B diffusion model",
        ),
        (
            MINI, REDUX,
            "redux.safetensors is the FLUX.1 Redux [dev] adapter (image prompts), but mini.safetensors is the Foundry "
            "Mini diffusion model, whose text tokens are 192 wide, not 4096",
        ),
        (
            KLEIN, REDUX,
            "redux.safetensors is the FLUX.1 Redux [dev] adapter (image prompts), but flux2-klein-9b.safetensors is "
            "the FLUX.2 [klein] 9B diffusion model",
        ),
    ],
)  # fmt: skip
def test_a_fault_names_both_files_what_each_is_and_why(transformer, other, fault):
    assert faults_between(transformer, [other]) == [fault]


def test_every_fault_is_told_at_once():
    message = refusal(DEV, [CLIP, MINI_T5, VAE])
    assert message.count("but flux1-dev.safetensors is the FLUX.1 [dev] diffusion model") == 2
    assert "clip-l.safetensors" not in message


def test_files_of_the_user_that_fit_are_named():
    message = refusal(DEV, [MINI_T5], [CLIP, MINI_T5, T5, AE, MINI, KLEIN])
    assert message.endswith("; of your files these fit: t5xxl.safetensors (t5.safetensors goes with mini.safetensors)")


def test_for_an_encoder_of_another_family_every_encoder_of_this_one_fits():
    message = refusal(DEV, [QWEN8], [CLIP, T5, AE, QWEN4])
    assert message.endswith("; of your files these fit: clip-l.safetensors, t5xxl.safetensors")


def test_without_a_file_that_fits_it_is_said_what_to_get_and_where():
    assert refusal(DEV, [MINI_T5], [MINI_T5, AE]).endswith(
        "; get t5xxl_fp16.safetensors from https://huggingface.co/comfyanonymous/flux_text_encoders"
    )
    assert "get clip_l.safetensors from https://huggingface.co/" in refusal(DEV, [QWEN8])
    assert "get t5.safetensors, which is inside the pack" in refusal(MINI, [T5])


def test_an_adapter_is_to_be_replaced_by_one_for_the_model_or_left_out():
    assert refusal(KLEIN, [KLEIN_4B_LORA]).endswith("; choose one that was made for FLUX.2 [klein] 9B, or leave it out")
    assert refusal(KLEIN, [KLEIN_4B_LORA], [KLEIN_9B_LORA, FLUX1_LORA, KLEIN_4B]).endswith(
        "; of your files these fit: look.safetensors (style.safetensors goes with flux2-klein-4b.safetensors)"
    )


def test_redux_for_a_model_of_other_text_tokens_is_to_be_replaced_by_the_one_for_it():
    assert refusal(MINI, [REDUX]).endswith(
        "; get flux1-redux-mini.safetensors, which is inside the pack, or leave it out"
    )
    assert refusal(MINI, [REDUX], [REDUX_MINI, DEV]).endswith(
        "; of your files these fit: redux-mini.safetensors (redux.safetensors goes with flux1-dev.safetensors)"
    )


def test_a_model_of_other_text_tokens_than_any_encoder_makes_is_told_so():
    spec = replace(FLUX1["flux1-dev"], name="flux1-dev-variant", context_width=2048)
    odd = Given(FOLDER / "odd.safetensors", Recognised("transformer", "an odd one", spec))
    message = refusal(odd, [T5])
    assert "which takes another: 2048 wide, not 4096" in message
    assert "no release fits odd.safetensors" in message


def test_a_pruned_model_takes_what_its_release_takes():
    spec = replace(FLUX1["flux1-dev"], name="flux1-dev-variant", double_blocks=8)
    lite = Given(FOLDER / "lite.safetensors", Recognised("transformer", "lite", spec))
    assert faults_between(lite, [CLIP, T5, AE, FLUX1_LORA]) == []


def test_what_is_not_a_diffusion_model_fits_nothing():
    assert faults_between(CLIP, [T5]) == [
        "clip-l.safetensors is the CLIP-L text encoder, but a FLUX.1 diffusion model is needed here"
    ]
    assert refusal(CLIP, [T5], [DEV, KLEIN]).endswith("of your files these fit: flux1-dev.safetensors")


def test_what_is_not_known_to_be_wrong_is_let_through():
    unknown = foreign("x.safetensors", {"something.lora_A.weight": (8, 8)})
    vision = foreign("v.safetensors", {"vision_model.encoder.layers.0.layer_norm1.weight": (8,)})
    assert faults_between(DEV, [unknown, vision, SIGLIP]) == []


# Redux and its vision tower.

BASE = Given(
    FOLDER / "siglip-base.safetensors",
    recognise_part(
        "vision", "", on_meta_shapes(SiglipVision, replace(SIGLIP_SO400M, width=768, layers=12, patch=16, side=224))
    ),
)
CLIP_H = foreign(
    "clip_h.safetensors",
    {
        "vision_model.embeddings.class_embedding": (1280,),
        "vision_model.post_layernorm.weight": (1280,),
        **{f"vision_model.encoder.layers.{n}.layer_norm1.weight": (1280,) for n in range(32)},
    },
)


def redux_refusal(*args, **candidates):
    with pytest.raises(MismatchError) as caught:
        check_redux(*args, **candidates)
    return str(caught.value)


@pytest.mark.parametrize(
    ("redux", "tower", "transformer"),
    [(REDUX, SIGLIP, None), (REDUX, SIGLIP, DEV), (REDUX_MINI, SIGLIP_MINI, MINI), (REDUX, SIGLIP, SCHNELL)],
)
def test_redux_with_its_tower_has_no_fault(redux, tower, transformer):
    assert redux_faults(redux, tower, transformer) == []
    check_redux(redux, tower, transformer)


@pytest.mark.parametrize(
    ("redux", "tower", "message"),
    [
        (
            REDUX, None,
            "redux.safetensors is the FLUX.1 Redux [dev] adapter (image prompts), which needs the SigLIP so400m vision "
            "tower (patch 14, 384 pixels), and there is none; get sigclip_vision_patch14_384.safetensors from "
            "https://huggingface.co/Comfy-Org/sigclip_vision_384",
        ),
        (
            REDUX, BASE,
            "siglip-base.safetensors is the SigLIP base vision tower (patch 16, 224 pixels), but redux.safetensors is "
            "the FLUX.1 Redux [dev] adapter (image prompts), which takes the SigLIP so400m vision tower (patch 14, 384 "
            "pixels): 1152 wide, not 768; get sigclip_vision_patch14_384.safetensors from "
            "https://huggingface.co/Comfy-Org/sigclip_vision_384",
        ),
        (
            REDUX, CLIP_H,
            "clip_h.safetensors is the CLIP-H vision tower, but redux.safetensors is the FLUX.1 Redux [dev] adapter "
            "(image prompts), which takes the SigLIP so400m vision tower (patch 14, 384 pixels): 1152 wide, not 1280; "
            "get sigclip_vision_patch14_384.safetensors from https://huggingface.co/Comfy-Org/sigclip_vision_384",
        ),
        (
            REDUX_MINI, SIGLIP,
            "sigclip.safetensors is the SigLIP so400m vision tower (patch 14, 384 pixels), but redux-mini.safetensors "
            "is Foundry Mini's Redux adapter (image prompts), which takes Foundry Mini's SigLIP vision tower: 128 "
            "wide, not 1152; get siglip-mini.safetensors, which is inside the pack",
        ),
        (
            REDUX, T5,
            "t5xxl.safetensors is the T5-XXL text encoder, but redux.safetensors is the FLUX.1 Redux [dev] adapter "
            "(image prompts), which takes the SigLIP so400m vision tower (patch 14, 384 pixels); get "
            "sigclip_vision_patch14_384.safetensors from https://huggingface.co/Comfy-Org/sigclip_vision_384",
        ),
        (
            DEV, SIGLIP,
            "flux1-dev.safetensors is the FLUX.1 [dev] diffusion model, but a Redux adapter is needed here; choose "
            "another file, such as flux1-redux-dev.safetensors from "
            "https://huggingface.co/black-forest-labs/FLUX.1-Redux-dev",
        ),
    ],
)  # fmt: skip
def test_redux_without_its_tower_or_with_another_is_refused_with_what_is_needed(redux, tower, message):
    assert redux_refusal(redux, tower) == message


def test_towers_and_adapters_among_the_user_s_files_that_would_fit_are_named():
    files = [T5, SIGLIP, SIGLIP_MINI, REDUX, REDUX_MINI, BASE]
    assert redux_refusal(REDUX, None, candidates=files).endswith("; of your files these fit: sigclip.safetensors")
    assert redux_refusal(REDUX, SIGLIP_MINI, candidates=files).endswith(
        "; of your files these fit: sigclip.safetensors (siglip-mini.safetensors goes with redux-mini.safetensors)"
    )
    assert redux_refusal(CLIP, None, candidates=files).endswith(
        "; of your files these fit: redux.safetensors, redux-mini.safetensors"
    )


def test_a_tower_and_a_model_that_do_not_fit_are_told_at_once():
    message = redux_refusal(REDUX, None, MINI)
    assert "which needs the SigLIP so400m vision tower" in message
    assert "mini.safetensors is the Foundry Mini diffusion model, whose text tokens are 192 wide, not 4096" in message
    assert len(redux_faults(REDUX, None, MINI)) == 2


# One file in its place.


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        (DEV, "transformer"), (CLIP, "clip"), (T5, "t5"), (AE, "autoencoder"), (MINI_AE, "autoencoder"),
        (SIGLIP, "vision"), (REDUX, "redux"),
    ],
)  # fmt: skip
def test_the_part_that_is_wanted_passes(file, kind):
    check_kind(file, kind)


@pytest.mark.parametrize(
    ("file", "kind", "message"),
    [
        (
            T5, "transformer",
            "t5xxl.safetensors is the T5-XXL text encoder, but a FLUX.1 diffusion model is needed here; "
            "choose another file, such as flux1-dev.safetensors from https://huggingface.co/black-forest-labs/FLUX.1-dev",
        ),
        (
            KLEIN, "transformer",
            "flux2-klein-9b.safetensors is the FLUX.2 [klein] 9B diffusion model, which this version does not run yet, "
            "but a FLUX.1 diffusion model is needed here; choose another file, such as flux1-dev.safetensors from "
            "https://huggingface.co/black-forest-labs/FLUX.1-dev",
        ),
        (
            VAE, "autoencoder",
            "flux2-vae.safetensors is the FLUX.2 autoencoder (VAE), which this version does not run yet, but a FLUX.1 "
            "autoencoder (VAE) is needed here; choose another file, such as ae.safetensors from "
            "https://huggingface.co/black-forest-labs/FLUX.1-schnell",
        ),
        (
            KLEIN_4B_LORA, "clip",
            "style.safetensors is a LoRA for FLUX.2 [klein] 4B in kohya's names, but a CLIP-L text encoder is needed "
            "here; choose another file, such as clip_l.safetensors from "
            "https://huggingface.co/comfyanonymous/flux_text_encoders",
        ),
        (
            BASE, "vision",
            "siglip-base.safetensors is the SigLIP base vision tower (patch 16, 224 pixels), but a vision tower that a "
            "Redux adapter takes is needed here; choose another file, such as sigclip_vision_patch14_384.safetensors "
            "from https://huggingface.co/Comfy-Org/sigclip_vision_384",
        ),
        (
            SIGLIP, "redux",
            "sigclip.safetensors is the SigLIP so400m vision tower (patch 14, 384 pixels), but a Redux adapter is "
            "needed here; choose another file, such as flux1-redux-dev.safetensors from "
            "https://huggingface.co/black-forest-labs/FLUX.1-Redux-dev",
        ),
    ],
)  # fmt: skip
def test_a_file_in_the_wrong_place_is_named_with_what_is_wanted(file, kind, message):
    with pytest.raises(MismatchError) as caught:
        check_kind(file, kind)
    assert str(caught.value) == message


def test_five_files_of_the_user_that_are_wanted_are_listed_each_once():
    models = [given("flux1-dev", f"{name}.gguf") for name in "abcdefg"]
    with pytest.raises(MismatchError) as caught:
        check_kind(T5, "transformer", [CLIP, KLEIN, models[0], *models])
    assert str(caught.value).endswith("; of your files these fit: a.gguf, b.gguf, c.gguf, d.gguf, e.gguf and 2 more")


# Releases.


def test_every_part_that_a_model_asks_for_has_a_title_a_file_and_a_place():
    wanted = {name for spec in FLUX1.values() for name in (*spec.text_encoders, spec.autoencoder)}
    wanted |= {name for spec in FLUX2.values() for name in (spec.text_encoder, spec.autoencoder)}
    wanted |= {name for spec in REDUXES.values() for name in (spec.name, spec.tower)}
    assert wanted == set(PART_TITLES) == {*FILE_NAMES, *FLUX2_FILE_NAMES}
    for name in (*wanted, *FLUX1, *FLUX2):
        assert " from https://" in where_to_get(name) or "inside the pack" in where_to_get(name)
        assert ("inside the pack" in where_to_get(name)) == ("mini" in name)


def test_pages_are_known_names_and_an_unknown_name_has_none():
    assert set(PAGES) - {"tokenizers"} <= {*FLUX1, *FLUX2, *PART_TITLES}
    assert where_to_get("flux1-prod") == ""
