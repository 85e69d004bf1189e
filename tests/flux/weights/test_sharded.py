"""A model in several files is one model; files that do not belong together are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from flux.errors import FileError, MissingFileError
from flux.weights.readers.sharded import ShardedFile, index_in
from flux.weights.sources import open_checkpoint

A, B = torch.arange(6.0).view(2, 3), torch.ones(4)
ONE, TWO = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"
INDEX = "m.safetensors.index.json"


def write(folder, weight_map=None, shards=None):
    shards = shards or {ONE: {"a": A}, TWO: {"b": B}}
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"from": name})
    weight_map = weight_map or {"a": ONE, "b": TWO}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}))
    return folder / INDEX


@pytest.mark.parametrize("name", [INDEX, ONE, TWO, "."])
def test_index_folder_and_any_of_the_files_open_the_whole_model(tmp_path, name):
    write(tmp_path)
    opened = open_checkpoint(tmp_path / name)
    assert sorted(opened) == ["a", "b"]
    assert torch.equal(opened["a"].numbers(torch.float32), A)
    assert torch.equal(opened["b"].numbers(torch.float32), B)
    assert [path.name for path in opened.files] == [ONE, TWO]
    assert opened.metadata["total_size"] == "40"


def test_scales_may_be_in_another_file_than_their_numbers(tmp_path):
    shards = {
        ONE: {"l.weight": torch.ones(2, 16).to(torch.float8_e4m3fn)},
        TWO: {"l.weight_scale": torch.tensor(3.0)},
    }
    write(tmp_path, {"l.weight": ONE, "l.weight_scale": TWO}, shards)
    opened = open_checkpoint(tmp_path / INDEX)
    assert torch.equal(opened["l.weight"].numbers(torch.float32), torch.full((2, 16), 3.0))


@pytest.mark.parametrize(
    "name", ["../m.safetensors", "/etc/m.safetensors", "sub/m.safetensors", "..\\m.safetensors", "m.ckpt", ""]
)
def test_an_index_names_files_beside_it_and_no_others(tmp_path, name):
    write(tmp_path, {"a": name, "b": TWO})
    with pytest.raises(FileError, match="which is no .safetensors file beside it"):
        ShardedFile(tmp_path / INDEX)


def test_what_the_index_says_must_be_so(tmp_path):
    write(tmp_path, {"a": ONE, "b": ONE})
    with pytest.raises(FileError, match=f"says that tensor b is in {ONE}, which does not have it"):
        ShardedFile(tmp_path / INDEX)
    write(tmp_path, {"a": ONE, "b": TWO}, {ONE: {"a": A, "c": B}, TWO: {"b": B}})
    with pytest.raises(FileError, match=f"{ONE} has tensor c, which {INDEX} does not place there"):
        ShardedFile(tmp_path / INDEX)


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / TWO).unlink()
    with pytest.raises(MissingFileError, match=f"{INDEX} needs {TWO}"):
        open_checkpoint(tmp_path / INDEX)


def test_one_of_several_files_without_their_index_says_what_is_missing(tmp_path):
    write(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(MissingFileError, match=f"{TWO} is part 2 of 2 of a model, and {INDEX}"):
        open_checkpoint(tmp_path / TWO)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{", "[" * 100_000])
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FileError, match=INDEX):
        ShardedFile(tmp_path / INDEX)


def test_a_folder_of_several_models_asks_for_one(tmp_path):
    save_file({"a": A}, tmp_path / "x.safetensors")
    assert index_in(tmp_path) == tmp_path / "x.safetensors"
    save_file({"a": A}, tmp_path / "y.safetensors")
    with pytest.raises(FileError, match=r"holds several models \(x\.safetensors, y\.safetensors"):
        index_in(tmp_path)


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(FileError, match=r"is a folder without a \.safetensors file"):
        open_checkpoint(tmp_path)
