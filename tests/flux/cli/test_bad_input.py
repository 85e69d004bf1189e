"""Every mistake gets one clear sentence, exit code 2, and leaves no file behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from flux.models.autoencoder import Autoencoder
from flux.models.flux1 import Flux1
from flux.models.text.clip import ClipText
from flux.models.text.t5 import T5Encoder
from flux.ops.layers import on_meta
from flux.specs.autoencoder import AUTOENCODERS
from flux.specs.flux1 import FLUX1
from flux.specs.text import CLIP_L, T5_XXL
from tests.conftest import ROOT
from tests.tiny import TINY, write_header_only, write_module

FAMILIES = {
    "a Stable Diffusion 1 or 2 model": "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "a Stable Diffusion XL model": "conditioner.embedders.1.model.positional_embedding",
    "a Stable Diffusion 3 model": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "a Chroma diffusion model": "distilled_guidance_layer.in_proj.weight",
    "a LoRA": "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    "of no kind that is known here": "something.else",
}


def write_listing(path, build, spec):
    with on_meta():
        module = build(spec)
    return write_header_only(path, {name: tuple(p.shape) for name, p in module.named_parameters()})


@pytest.fixture
def refused(draw, tmp_path):
    """Draws with what must not work, and gives the one sentence that says so."""
    out = tmp_path / "out"
    out.mkdir()

    def call(*words, code=2, **changes):
        given = () if "out" in changes else ("--out", out / "a.png")
        said = draw("--quiet", *given, *words, **changes)
        assert (said.code, said.out) == (code, [])
        assert len(said.err) == 1, said.err
        assert said.err[0].startswith("error: ")
        assert os.listdir(out) == []
        return said.err[0]

    return call


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "0 steps asked for. Use 1 to 10000"),
        ({"steps": -4}, "-4 steps asked for"),
        ({"seed": -1}, "Seed -1 is outside 0 to 18446744073709551615"),
        ({"seed": 2**64}, "is outside 0 to"),
        ({"width": 0}, "width is 0; give 16 to 8192 pixels"),
        ({"height": -64}, "height is -64"),
        ({"width": 9000}, "width is 9000"),
        ({"count": 0}, "count is 0; ask for 1 to"),
        ({"guidance": "nan"}, "guidance is nan; give a number from 0 to 1000"),
        ({"cfg": -2}, "cfg is -2"),
        ({"denoise": 1.5}, "Denoise is 1.5"),
        ({"denoise": "nan"}, "Denoise is nan"),
        ({"denoise": 0.5}, "without a picture to start from"),
        ({"mu": "inf"}, "inf"),
        ({"solver": "leapfrog"}, "leapfrog"),
        ({"scheduler": "karras"}, "karras"),
        ({"noise": "pink"}, "no noise style 'pink'; choose one of: comfyui, bfl, diffusers"),
        ({"dtype": "int3"}, "no dtype 'int3'; choose one of: auto, fp32, bf16, fp16"),
        ({"attention": "xformers"}, "no attention 'xformers'; choose one of: auto, fast, sdpa, cudnn"),
        ({"attention": "cudnn", "device": "cpu"}, "attention by cudnn cannot run here: it needs an NVIDIA GPU"),
        ({"device": "tpu"}, "no device 'tpu'; choose one of: auto, cpu, cuda"),
        ({"device": "cpu:x"}, "no device 'cpu:x'"),
        ({"sigmas": "1,0.2,0.5,0"}, "0.5"),
        ({"sigmas": "1,zero"}, "'1,zero' is not a list of numbers"),
        ({"seed": "7.5"}, "invalid int value: '7.5'"),
        ({"steps": "many"}, "invalid int value: 'many'"),
        ({"prompt": "\udcff"}, "the prompt is not valid UTF-8"),
    ],
)
def test_settings_that_cannot_be(refused, changes, words):
    assert words in refused(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not here")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_device_that_is_not_here(refused, device):
    assert f"{device} was asked for, but torch sees no CUDA device here; use --device cpu" in refused(device=device)


def test_an_option_that_does_not_exist(refused):
    assert "unrecognized arguments: --colour" in refused("--colour", "red")


def test_no_command_and_no_prompt(flux):
    for words in ((), ("generate",), ("inspect",), ("paint", "x")):
        said = flux(*words)
        assert (said.code, said.out, len(said.err)) == (2, [], 1)
        assert "--help` shows what there is" in said.err[0]


@pytest.mark.parametrize("option", ["model", "clip", "t5", "vae"])
def test_a_file_that_is_missing(refused, tmp_path, option):
    message = refused(**{option: tmp_path / "nowhere.safetensors"})
    assert "nowhere.safetensors" in message
    assert "was not found" in message or "no model and no file" in message


def test_a_model_that_is_not_known(refused):
    message = refused(model="flux9")
    assert (
        "no model and no file named 'flux9'; give mini, mini-schnell, kontext-mini, redux-mini, or the path of"
        in message
    )


def test_a_known_model_without_its_file(refused):
    assert "FLUX.1 [dev] is not inside the pack; give --model the path of flux1-dev.safetensors" in refused(
        model="flux1-dev"
    )


@pytest.mark.parametrize("option", ["model", "clip", "t5", "vae"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "is empty (0 bytes); download it again", id="empty"),
        pytest.param(b"hello", "is not a safetensors file", id="text"),
        pytest.param((500).to_bytes(8, "little") + b"{", "is cut off", id="header cut off"),
        pytest.param(b"\x80\x02}q\x00.", "is a pickle file, which can run code", id="pickle"),
        pytest.param(b"GGUF\x03\0\0\0" + bytes(9), "is damaged or not a GGUF file", id="gguf cut off"),
        pytest.param(b"GGUF\x01\0\0\0" + bytes(99), "is GGUF version 1", id="old gguf"),
        pytest.param(b"<!DOCTYPE html>", "is a web page", id="web page"),
    ],
)
def test_a_file_that_is_no_safetensors(refused, tmp_path, option, content, words):
    (tmp_path / "bad.safetensors").write_bytes(content)
    message = refused(**{option: tmp_path / "bad.safetensors"})
    assert "bad.safetensors" in message
    assert words in message


def test_a_torch_checkpoint(refused, tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.ckpt")
    assert "model.ckpt is a pickle file" in refused(model=tmp_path / "model.ckpt")


@pytest.mark.parametrize("option", ["model", "clip", "t5", "vae"])
def test_a_file_that_is_cut_off(refused, tiny, tmp_path, option):
    source = {"model": tiny.transformer, "clip": tiny.clip, "t5": tiny.t5, "vae": tiny.autoencoder}[option]
    whole = source.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) * 2 // 3])
    message = refused(**{option: tmp_path / "cut.safetensors"})
    assert "cut.safetensors is cut off: tensor" in message
    assert "download the file again" in message


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("option", ["model", "clip", "vae"])
def test_a_file_of_another_family(refused, tmp_path, option, family):
    path = write_header_only(tmp_path / "other.safetensors", {FAMILIES[family]: (4, 4)})
    message = refused(**{option: path})
    assert f"other.safetensors is {family}" in message
    assert "is needed here; choose another file" in message


def test_parts_in_each_other_s_place(refused, tiny):
    for part in ("T5 text encoder", "CLIP text encoder", "autoencoder (VAE)"):
        path = {"T": tiny.t5, "C": tiny.clip, "a": tiny.autoencoder}[part[0]]
        message = refused(model=path)
        assert f"{path.name} is Foundry Mini's {part}, but a FLUX.1 diffusion model is needed here" in message
        assert "of your files these fit: tiny.safetensors" in message
    assert "diffusion model, but a CLIP-L text encoder is needed here" in refused(clip=tiny.transformer)
    assert "diffusion model, but a T5 text encoder is needed here" in refused(t5=tiny.transformer)
    assert "is Foundry Mini's CLIP text encoder, but a T5 text encoder is needed" in refused(t5=tiny.clip)
    assert "diffusion model, but a FLUX.1 autoencoder (VAE) is needed here" in refused(vae=tiny.transformer)


def test_the_autoencoder_of_another_model(refused, tmp_path):
    path = write_listing(tmp_path / "big.safetensors", Autoencoder, AUTOENCODERS["flux1-ae"])
    message = refused(vae=path)
    wanted = "diffusion model, which takes Foundry Mini's autoencoder (VAE); of your files these fit: ae.safetensors"
    assert "big.safetensors is the FLUX.1 autoencoder (VAE), but tiny.safetensors is the Foundry Mini" in message
    assert wanted in message


@pytest.mark.parametrize(("option", "build", "spec"), [("clip", ClipText, CLIP_L), ("t5", T5Encoder, T5_XXL)])
def test_encoders_of_another_model(refused, tmp_path, option, build, spec):
    path = write_listing(tmp_path / "other.safetensors", build, spec)
    message = refused(**{option: path})
    name, wide = {"clip": ("CLIP", "128 wide, not 768"), "t5": ("T5", "192 wide, not 4096")}[option]
    assert f"which takes Foundry Mini's {name} text encoder: {wide}; of your files" in message
    assert f"these fit: {option}.safetensors" in message


def test_a_real_model_alone_names_every_file_that_it_needs(refused, tmp_path):
    path = write_listing(tmp_path / "flux1-dev.safetensors", Flux1, FLUX1["flux1-dev"])
    message = refused(model=path, clip=None, t5=None, vae=None, tokenizers=None)
    for words in (
        "flux1-dev.safetensors is FLUX.1 [dev]", "clip_l.safetensors (--clip", "t5xxl_fp16.safetensors (--t5",
        "ae.safetensors (--vae", "vocab.json and merges.txt (--tokenizers", "tokenizer.json (--tokenizers",
        str(tmp_path),
    ):  # fmt: skip
        assert words in message


def test_files_beside_a_real_model_are_found_and_only_the_rest_is_named(refused, tmp_path):
    models = tmp_path / "models"
    for folder in ("diffusion_models", "text_encoders", "vae"):
        (models / folder).mkdir(parents=True)
    path = write_listing(models / "diffusion_models" / "flux1-schnell.safetensors", Flux1, FLUX1["flux1-schnell"])
    write_listing(models / "text_encoders" / "clip_l.safetensors", ClipText, CLIP_L)
    write_listing(models / "text_encoders" / "t5xxl_fp16.safetensors", T5Encoder, T5_XXL)
    write_listing(models / "vae" / "ae.safetensors", Autoencoder, AUTOENCODERS["flux1-ae"])
    message = refused(model=path, clip=None, t5=None, vae=None, tokenizers=tmp_path)
    assert "clip_l.safetensors" not in message
    assert f"vocab.json and merges.txt (in {tmp_path}" in message
    assert f"tokenizer.json (in {tmp_path}" in message


def test_a_tokenizer_that_is_missing_or_none(refused, tmp_path):
    assert "tokenizer" in refused(tokenizers=tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{not json")
    assert "tokenizer.json is not a tokenizer that can be read" in refused(tokenizers=tmp_path)


def test_the_tokenizer_of_another_model(refused, tmp_path):
    tokens = [["<unk>", 0.0], *([f"word{n}", -1.0] for n in range(300))]
    tokenizer = {"version": "1.0", "model": {"type": "Unigram", "unk_id": 0, "vocab": tokens}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": []}))
    assert "another model's tokenizer: it has 301 tokens, clip-mini knows 256" in refused(tokenizers=tmp_path)


def test_a_transformer_that_lacks_a_tensor(refused, tmp_path):
    path = write_module(tmp_path / "odd.safetensors", Flux1(TINY), change=lambda tensors: tensors.pop("txt_in.bias"))
    assert "odd.safetensors lacks tensors: txt_in.bias; use a whole file" in refused(model=path)


def test_a_model_that_edits_pictures(refused, tmp_path):
    path = write_module(tmp_path / "odd.safetensors", Flux1(replace(TINY, in_channels=128)))
    said = refused(model=path, clip=None, t5=None, vae=None, tokenizers=None)
    assert "(another size) follows the edges of a picture and cannot draw from a prompt alone" in said
    assert "choose a text-to-image model, or run this one by `python -m flux control --type canny`" in said
    assert "more files" not in said


def test_scales_beside_plain_numbers_are_named(refused, tmp_path):
    def pack(tensors):
        tensors["scaled_fp8"] = torch.zeros(2)
        tensors["img_in.scale_weight"] = torch.ones(())

    path = write_module(tmp_path / "odd.safetensors", Flux1(TINY), change=pack)
    assert "img_in.weight is F32 [128, 64] with img_in.scale_weight beside it" in refused(model=path)


@pytest.mark.parametrize("option", ["out", "model", "image", "t5", "vae", "tokenizers"])
def test_a_name_that_no_file_can_have(refused, tmp_path, option):
    said = refused(**{option: tmp_path / (300 * "a" + ".png")})
    assert "File name too long" in said
    assert "check the name" in said


def test_an_empty_output(refused):
    assert "--out is empty" in refused(out="")


def test_a_folder_where_the_record_would_go(refused, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.json").mkdir()
    assert "where the record would go, is a folder" in refused("--record", out=tmp_path / "pictures" / "a.png")
    assert os.listdir(tmp_path / "pictures") == ["a.json"]


def test_a_picture_that_is_too_large_for_its_schedule(refused):
    said = refused(width=5600, height=5600)
    assert "31.4 megapixels is larger than the schedule can be shifted for; ask for 29.6 at most" in said


@pytest.mark.parametrize("option", ["cfg", "guidance"])
def test_a_strength_that_overflows(refused, option):
    assert f"{option} is 1e+30; give a number from 0 to 1000" in refused(**{option: 1e30})


@pytest.mark.parametrize("option", ["image", "mask"])
def test_a_picture_that_cannot_be_read(refused, tmp_path, option):
    Image.new("RGB", (32, 32)).save(tmp_path / "start.png")
    (tmp_path / "bad.png").write_text("no picture")
    start = {"image": tmp_path / "start.png"}
    assert "bad.png cannot be read as a picture" in refused(**(start | {option: tmp_path / "bad.png"}))
    assert "none.png was not found" in refused(**(start | {option: tmp_path / "none.png"}))


def test_a_mask_without_a_picture(refused, tmp_path):
    Image.new("L", (32, 32)).save(tmp_path / "mask.png")
    assert "a mask was given without a picture" in refused(mask=tmp_path / "mask.png")


def test_an_output_that_cannot_be(refused, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dir.png").mkdir()
    assert "the suffix '.bmp'; name a picture that ends in .png" in refused(out=tmp_path / "a.bmp")
    assert "has no suffix" in refused(out=tmp_path / "a")
    assert "does not take files" in refused(out=tmp_path / "file" / "a.png")
    assert sorted(os.listdir(tmp_path)) == ["dir.png", "file", "out"]


def test_numbers_that_are_not_finite_end_with_2_at_their_step(refused, tmp_path):
    def spoil(tensors):
        tensors["final_layer.linear.bias"][0] = float("inf")

    path = write_module(tmp_path / "nan.safetensors", Flux1(TINY), change=spoil)
    message = refused(model=path)
    assert "step 1 of 2 gave numbers that are not finite" in message
    assert "try another dtype" in message


@pytest.mark.parametrize("part", ["vae", "t5"])
def test_a_damaged_encoder_or_autoencoder_is_named(refused, tiny, tmp_path, part):
    from safetensors.torch import load_file, save_file

    source = {"vae": tiny.autoencoder, "t5": tiny.t5}[part]
    tensors = load_file(source)
    name = {"vae": "decoder.conv_out.bias", "t5": "encoder.final_layer_norm.weight"}[part]
    tensors[name][0] = float("nan")
    save_file(tensors, tmp_path / "damaged.safetensors")
    message = refused(**{part: tmp_path / "damaged.safetensors"})
    assert "not finite" in message
    assert "damaged.safetensors" in message


def test_what_nobody_foresaw_is_a_sentence_too_and_a_traceback_on_demand(refused, draw, monkeypatch, tmp_path):
    def burst(*_):
        raise RuntimeError("the sky\nfell")

    monkeypatch.setattr("flux.cli.engine.open_model", burst)
    assert "unexpected RuntimeError: the sky fell; set FLUXFOUNDRY_DEBUG=1" in refused(code=1)
    monkeypatch.setenv("FLUXFOUNDRY_DEBUG", "1")
    said = draw("--out", tmp_path / "out" / "a.png")
    assert said.code == 1
    assert "Traceback (most recent call last):" in said.err


def test_a_full_device_is_said_so(refused, monkeypatch):
    def burst(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("flux.cli.engine.open_model", burst)
    assert "ran out of memory; ask for a smaller picture" in refused(code=1)


def test_a_package_that_is_missing_is_named(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "flux.cli.engine", None)
    assert "the Python package flux.cli.engine is missing; run `pip install -r requirements.txt`" in refused(code=1)


def test_a_real_process_ends_with_2_and_one_line():
    for words in (("generate", "x", "--model", "nothing"), ("generate", "x", "--seed", "x"), ("inspect", "/nowhere")):
        done = subprocess.run(
            [sys.executable, "-m", "flux", *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_an_empty_prompt_is_no_mistake(draw, tmp_path):
    assert draw("--out", tmp_path / "a.png", prompt="").code == 0
