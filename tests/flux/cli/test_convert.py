"""A model file to another format from the command line, and a picture drawn with what came out."""

from __future__ import annotations

import json
import os

import pytest

from flux.cli.arguments import FORMATS, LAYOUTS, PARTS
from flux.mini.files import MINI
from flux.weights.convert import CONVERTIBLE, LAYOUT_NAMES
from flux.weights.formats.written import WRITTEN


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
