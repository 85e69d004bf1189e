"""A folder's model files are what they are, each looked at once."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from flux.mini.files import MINI
from flux.pipelines import library
from flux.pipelines.library import given_files, model_files_in


@pytest.fixture
def folder(tmp_path):
    shutil.copy(MINI.transformer, tmp_path / "b.safetensors")
    shutil.copy(MINI.clip, tmp_path / "a.sft")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    (tmp_path / "deep").mkdir()
    shutil.copy(MINI.t5, tmp_path / "deep" / "c.safetensors")
    return tmp_path


def test_model_files_are_found_by_name_and_deep_only_if_asked(folder):
    assert [path.name for path in model_files_in(folder)] == ["a.sft", "b.safetensors", "broken.gguf"]
    assert "c.safetensors" in [path.name for path in model_files_in(folder, deep=True)]


def test_a_model_in_several_files_is_listed_once(tmp_path):
    shard = "m-00001-of-00002.safetensors"
    save_file({"a": torch.ones(1)}, tmp_path / shard)
    assert [path.name for path in model_files_in(tmp_path)] == [shard]
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert [path.name for path in model_files_in(tmp_path)] == ["m.safetensors.index.json"]


def test_what_cannot_be_read_is_left_out(folder):
    given = given_files([*model_files_in(folder), folder / "none.safetensors"])
    assert [str(own) for own in given] == [
        "a.sft is Foundry Mini's CLIP text encoder",
        "b.safetensors is the Foundry Mini diffusion model",
    ]


def test_a_file_is_opened_again_only_when_it_changed(folder, monkeypatch):
    opened = []
    real = library.open_checkpoint
    monkeypatch.setattr(library, "open_checkpoint", lambda path: (opened.append(path.name), real(path))[1])
    path = folder / "b.safetensors"
    for _ in range(3):
        given_files([path])
    assert opened == ["b.safetensors"]
    shutil.copy(MINI.t5, path)
    assert given_files([path])[0].found.kind == "t5"
    assert len(opened) == 2
