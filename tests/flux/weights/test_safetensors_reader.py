"""Headers are checked before anything is read, and tensors come out as the safetensors library wrote them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from flux.errors import FileError, MissingFileError, UserError
from flux.weights.readers.safetensors import DTYPES, SafetensorsFile
from tests.conftest import ROOT


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_every_dtype_comes_back_as_the_library_wrote_it(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(3, 5, generator=generator) * 20).to(dtype) for name, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / "all.safetensors", metadata={"made": "here"})
    file = SafetensorsFile(tmp_path / "all.safetensors")
    assert set(file) == set(tensors)
    assert file.metadata == {"made": "here"}
    assert file.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert file[name].dtype == name
        read = file.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_scalars_and_empty_tensors_are_read(tmp_path):
    save_file({"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.read("scalar").item() == 3.0
    assert file.read("empty").shape == (0, 4)


def test_a_tensor_that_is_read_can_be_changed_without_touching_the_file(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    file.read("a").add_(1)
    assert not file.read("a").any()


def test_a_file_of_no_tensors_is_whole(tmp_path):
    assert len(SafetensorsFile(raw_file(tmp_path / "a.safetensors", {}))) == 0


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path):
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"cut\.safetensors"):
            SafetensorsFile(cut)


def test_a_file_with_any_damaged_byte_opens_or_is_refused_but_never_crashes(tmp_path):
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, tmp_path / "whole.safetensors", metadata={"k": "v"})
    whole = bytearray((tmp_path / "whole.safetensors").read_bytes())
    damaged, rng = tmp_path / "damaged.safetensors", random.Random(0)
    for position in range(len(whole) - 40):
        copy = bytearray(whole)
        copy[position] = rng.randrange(256)
        damaged.write_bytes(copy)
        try:
            file = SafetensorsFile(damaged)
            for name in file:
                file.read(name)
        except UserError:
            pass


@pytest.mark.parametrize(
    ("header", "words"),
    [
        pytest.param(b"not json", "not JSON", id="no JSON"),
        pytest.param(b"\xff\xfe\x00{}", "not JSON", id="no text"),
        pytest.param(b"[" * 100_000, "not JSON", id="nested too deep"),
        pytest.param(b"[1, 2]", "not a table of tensors", id="a list"),
        pytest.param(b'{"a": 1, "a": 2}', "a name stands twice", id="a name twice"),
        pytest.param({"__metadata__": [1]}, "metadata is not a table", id="metadata is a list"),
        pytest.param({"a": 7}, "'a' is damaged", id="an entry is a number"),
        pytest.param({"a": {"dtype": "F32"}}, "'a' is damaged", id="fields missing"),
        pytest.param({"a": entry(offsets=(0, 4, 8))}, "'a' is damaged", id="three offsets"),
        pytest.param({"a": entry(offsets=(-4, 0))}, "'a' is damaged", id="a negative offset"),
        pytest.param({"a": entry(shape=(True,))}, "'a' is damaged", id="a shape of booleans"),
        pytest.param({"a": entry(shape=(1.0,))}, "'a' is damaged", id="a shape of floats"),
        pytest.param({"a": entry(shape=(1,) * 9)}, "'a' is damaged", id="too many dimensions"),
        pytest.param({"a": entry(offsets=(4, 0))}, "cut off", id="offsets the wrong way round"),
        pytest.param({"a": entry(offsets=(0, 400), shape=(100,))}, "ends at byte 400 of 8", id="past the end"),
        pytest.param({"a": entry(shape=(2,))}, "4 bytes, which does not fit shape", id="bytes and shape differ"),
        pytest.param({"a": entry(shape=(2**40, 2**40))}, "does not fit shape", id="a huge shape"),
        pytest.param({"a": entry(), "b": entry(offsets=(2, 6))}, "'a' and 'b' overlap", id="overlap"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path, header, words):
    with pytest.raises(FileError, match=r"bad\.safetensors") as caught:
        SafetensorsFile(raw_file(tmp_path / "bad.safetensors", header, bytes(8)))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "is empty (0 bytes)", id="empty"),
        pytest.param(b"abc", "(3 bytes) is not a safetensors file", id="three bytes"),
        pytest.param(b"\xff" * 100, "is not a safetensors file", id="no header"),
        pytest.param((10**6).to_bytes(8, "little") + b"{}", "header claims 1000000 bytes", id="header cut off"),
        pytest.param(b"GGUF\x03\x00\x00\x00" + bytes(64), "is a GGUF file", id="gguf"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", id="lfs pointer"),
        pytest.param(b"<!DOCTYPE html><html></html>", "is a web page", id="web page"),
        pytest.param(b"\x80\x02}q\x00.", "is a pickle file", id="pickle"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"model\.safetensors") as caught:
        SafetensorsFile(path)
    assert words in str(caught.value)


def test_torch_saves_are_refused_under_any_name(tmp_path):
    for name in ("model.ckpt", "model.safetensors"):
        torch.save({"a": torch.zeros(1)}, tmp_path / name)
        with pytest.raises(FileError, match="is a pickle file, which can run code"):
            SafetensorsFile(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "zip.safetensors", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(FileError, match="pickle"):
        SafetensorsFile(tmp_path / "zip.safetensors")


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])  # bytes 80 02 to 80 05, with which pickles begin
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, length):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    header = path.read_bytes()[8:-8].rstrip()
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(8))
    assert list(SafetensorsFile(path)) == ["a"]


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(MissingFileError, match="was not found"):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(FileError, match="is a folder"):
        SafetensorsFile(tmp_path)


def test_a_format_that_is_not_read_is_named_only_when_its_tensor_is_wanted(tmp_path):
    file = SafetensorsFile(raw_file(tmp_path / "a.safetensors", {"a": entry("F4", (2, 4))}, bytes(4)))
    with pytest.raises(FileError, match="stored as F4"):
        file.read("a")


def test_a_file_that_changes_after_it_was_opened_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(FileError, match="ended while tensor a was read"):
        file.read("a")
    path.unlink()
    with pytest.raises(FileError, match="cannot be read any more"):
        file.read("a")


def test_headers_are_read_without_torch():
    code = "import flux.weights.readers.header, flux.specs.fit, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
