"""A model file to another format from the command line, and a picture drawn with what came out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux.cli.arguments import FORMATS, LAYOUTS, PARTS
from flux.mini.files import MINI
from flux.weights.convert import CONVERTIBLE, LAYOUT_NAMES
from flux.weights.formats.written import WRITTEN
from tests.conftest import ROOT


def test_the_help_names_what_there_is(flux):
    """Names stand twice, so that help needs no torch."""
    assert tuple(WRITTEN) == FORMATS
    assert tuple(LAYOUT_NAMES) == LAYOUTS
    assert PARTS == CONVERTIBLE
    said = flux("convert", "--help")
    assert said.code == 0
    assert "gguf:Q4_K" in "\n".join(said.out)


def test_the_new_files_path_is_the_result_and_the_rest_is_a_note(flux, tmp_path):
    target = tmp_path / "mini-fp8.safetensors"
    said = flux("convert", MINI.transformer, target, "--to", "fp8")
    assert (said.code, said.out) == (0, [str(target)])
    assert said.err[0].startswith(
        "note: the Foundry Mini diffusion model in FLUX.1 in Black Forest Labs' names: 6.29 M as"
    )
    assert flux("convert", MINI.transformer, target, "--to", "bf16", "--replace", "--quiet").err == []


def test_what_was_written_is_told_by_inspect_and_drawn_by_generate(flux, tmp_path):
    for target, to in (("mini.gguf", "gguf:Q8_0"), ("mini-d.safetensors", "nf4,diffusers")):
        assert flux("convert", MINI.transformer, tmp_path / target, "--to", to, "--quiet").code == 0
    said = flux("inspect", "--json", tmp_path / "mini.gguf", tmp_path / "mini-d.safetensors")
    one, other = json.loads("\n".join(said.out))
    assert (one["container"], one["parts"][0]["layout"]) == ("GGUF", "flux1-bfl")
    assert next(iter(one["formats"])) == "Q8_0"
    assert (other["container"], other["parts"][0]["layout"]) == ("safetensors", "flux1-diffusers")
    assert next(iter(other["formats"])) == "nf4"
    drawn = flux(
        "generate", "a red circle", "--model", tmp_path / "mini.gguf", "--steps", "1", "--out", tmp_path / "a.png"
    )
    assert drawn.code == 0
    assert (tmp_path / "a.png").is_file()


def test_a_folder_is_told_as_a_table(flux, tmp_path):
    for name in ("one", "two"):
        flux("convert", MINI.t5, tmp_path / f"{name}.safetensors", "--to", "fp16", "--quiet")
    (tmp_path / "notes.txt").write_text("mine")
    said = flux("inspect", tmp_path)
    assert said.code == 0
    assert said.out[0].split() == ["FILE", "WHAT", "STORED", "AS", "NAMES", "SIZE"]
    assert [line.split()[0] for line in said.out[1:]] == ["one.safetensors", "two.safetensors"]
    assert all("Foundry Mini's T5 text encoder" in line and " F16 " in line for line in said.out[1:])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("x.safetensors", "y.safetensors", "--to", "fp8"), "x.safetensors was not found"),
        ((MINI.transformer, "y.safetensors", "--to", "q4"), "there is no format 'q4'; choose one of: fp32"),
        ((MINI.transformer, "y.safetensors"), "--to; `python -m flux convert --help` shows what there is"),
        ((MINI.transformer, "y.gguf", "--to", "fp8"), "y.gguf will be a .safetensors file"),
        ((MINI.transformer, "there.safetensors", "--to", "fp8"), "there.safetensors is there already"),
        ((MINI.clip, "y.safetensors", "--to", "fp8", "--part", "transformer"), "but a FLUX transformer is needed"),
        ((MINI.transformer, "y.safetensors", "--to", "fp8", "--variant", "flux9"), "there is no model named flux9"),
        ((MINI.transformer, "y.safetensors", "--to", "fp8", "--variant", "flux1-dev"), "is not FLUX.1 [dev]"),
    ],
)
def test_the_wrong_thing_ends_with_2_and_a_sentence(flux, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").write_text("mine")
    said = flux("convert", *words)
    assert said.code == 2
    assert sentence in said.err[0]
    assert os.listdir(tmp_path) == ["there.safetensors"]


def test_a_file_that_is_not_whole_is_neither_converted_nor_told_without_its_fault(flux, tmp_path):
    tensors = load_file(MINI.transformer)
    del tensors["double_blocks.0.img_attn.qkv.weight"]
    tensors["double_blocks.0.txt_attn.proj.weight"] = torch.zeros(255, 256)
    save_file(tensors, tmp_path / "holes.safetensors")
    said = flux("inspect", tmp_path / "holes.safetensors")
    assert any(line.split()[0] == "fault" and "lacks tensors: double_blocks.0.img_attn.qkv.weight" in line
               for line in said.out[1:])  # fmt: skip
    refused = flux("convert", tmp_path / "holes.safetensors", tmp_path / "x.safetensors", "--to", "fp8")
    assert refused.code == 2
    assert "holes.safetensors lacks tensors" in refused.err[0]
    shutil.copy(MINI.transformer, tmp_path / "good.safetensors")
    shutil.copy(MINI.t5, tmp_path / "t5.safetensors")
    wrong = flux("generate", "x", "--model", tmp_path / "t5.safetensors", "--out", tmp_path / "x.png").err[0]
    assert wrong.endswith("of your files these fit: good.safetensors")


def test_whole_numbers_are_no_weights(flux, tmp_path):
    tensors = load_file(MINI.transformer)
    tensors["double_blocks.0.img_attn.proj.weight"] = torch.ones(256, 256, dtype=torch.int64)
    save_file(tensors, tmp_path / "whole.safetensors")
    path = tmp_path / "whole.safetensors"
    convert = ("convert", path, tmp_path / "x.safetensors", "--to", "fp8")
    generate = ("generate", "x", "--model", path, "--out", tmp_path / "x.png")
    for words in (convert, generate):
        said = flux(*words)
        assert said.code == 2
        assert "stores whole numbers without scales in place of weights: double_blocks.0.img_attn.proj" in said.err[0]


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="this system has no signals")
def test_a_conversion_that_is_ended_leaves_nothing_behind(tmp_path):
    """Ended while the first tensors are encoded, at the latest; what is there by then is a temporary file."""
    code = (
        "import os, signal, sys; from flux.weights import storing; real = storing._names\n"
        "def late(*args):\n    os.kill(os.getpid(), signal.SIGTERM); return real(*args)\n"
        "storing.companion_names = late\n"
        "from flux.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["convert", str(MINI.transformer), str(tmp_path / "x.safetensors"), "--to", "fp8"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "error: interrupted; no file was left half written\n"
    assert os.listdir(tmp_path) == []


def test_a_repository_of_diffusers_is_drawn_with_by_its_folder(flux, tmp_path):
    for folder, path in (("transformer", MINI.transformer), ("vae", MINI.autoencoder)):
        (tmp_path / folder).mkdir()
        target = tmp_path / folder / "diffusion_pytorch_model.safetensors"
        assert flux("convert", path, target, "--to", "diffusers", "--quiet").code == 0
    drawn = flux("generate", "a red circle", "--model", tmp_path, "--steps", "1", "--out", tmp_path / "a.png")
    assert drawn.code == 0, drawn.err


def test_an_all_in_one_file_is_drawn_with_by_its_own_parts(flux, tmp_path):
    parts = {"model.diffusion_model.": MINI.transformer, "vae.": MINI.autoencoder,
             "text_encoders.clip_l.transformer.": MINI.clip, "text_encoders.t5xxl.transformer.": MINI.t5}  # fmt: skip
    whole = {prefix + name: t for prefix, path in parts.items() for name, t in load_file(path).items()}
    for name in ("vae.decoder.conv_out.weight", "vae.decoder.conv_out.bias"):
        whole[name] = torch.zeros_like(whole[name])
    save_file(whole, tmp_path / "all.safetensors")
    drawn = flux("generate", "x", "--model", tmp_path / "all.safetensors", "--steps", "1", "--out", tmp_path / "a.png")
    assert drawn.code == 0, drawn.err
    assert set(Image.open(tmp_path / "a.png").getdata()) == {(128, 128, 128)}  # what an autoencoder of zeros gives
