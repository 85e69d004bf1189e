"""Every tensor of a file is bound to its numbers by the header, in every format; bytes move when they are wanted."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from flux.errors import FileError
from flux.weights.formats.written import WRITTEN
from flux.weights.sources import open_checkpoint
from tests.stored import parts_as, suffix_of, write_stored

SHAPE = (32, 512)
NUMBERS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.1
BIAS = torch.arange(32.0)
LARGEST_ERROR = {"nvfp4": 0.13, "nf4": 0.11, "Q2_K": 0.34, "Q3_K": 0.18}  # of the norm; 0.1 for the others


def written(tmp_path, kind):
    path = tmp_path / f"layer{suffix_of(kind)}"
    return open_checkpoint(write_stored(path, {"layer.weight": NUMBERS, "layer.bias": BIAS}, kind))


def error(found):
    return ((found.float() - NUMBERS).norm() / NUMBERS.norm()).item()


@pytest.mark.parametrize("kind", WRITTEN)
def test_every_format_that_can_be_written_is_found_and_read(tmp_path, kind):
    opened = written(tmp_path, kind)
    assert sorted(opened) == ["layer.bias", "layer.weight"]
    source = opened["layer.weight"]
    assert source.shape == SHAPE
    assert source.format.name == WRITTEN[kind].row.name
    numbers = source.numbers(torch.float32)
    assert numbers.shape == SHAPE
    assert error(numbers) < LARGEST_ERROR.get(kind.removeprefix("gguf:"), 0.1)
    assert torch.equal(source.numbers(torch.bfloat16), numbers.bfloat16())
    assert torch.equal(opened["layer.bias"].numbers(torch.float32), BIAS)


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_sources_bytes_are_what_its_format_says(tmp_path, kind):
    source = written(tmp_path, kind)["layer.weight"]
    table = 16 * 4 if kind == "nf4" else 0  # bitsandbytes writes its table beside every weight
    scales = 32 * 4 if kind.endswith("-row") else 8
    padding = 128 * 4 * 8 if kind == "nvfp4" else 128 * 16 if kind == "mxfp8" else 0
    expected = NUMBERS.numel() * source.format.bits / 8
    assert expected <= source.nbytes <= expected + table + scales + padding


@pytest.mark.parametrize("kind", [kind for kind, row in WRITTEN.items() if row.row.rows is not None])
def test_some_rows_are_the_same_numbers_as_all_rows(tmp_path, kind):
    source = written(tmp_path, kind)["layer.weight"]
    places = torch.tensor([31, 0, 7, 7])
    picked = source.format.rows(source.stored(), source.shape, places)
    rows = source.format.decode(picked, (4, 512), torch.float32)
    assert torch.equal(rows, source.numbers(torch.float32)[places])


def test_numbers_that_are_stored_as_wanted_are_the_file_itself(tmp_path):
    source = written(tmp_path, "bf16")["layer.weight"]
    assert source.numbers(torch.bfloat16).data_ptr() == source.numbers(torch.bfloat16).data_ptr()
    assert source.numbers(torch.float32).data_ptr() != source.stored()["data"].data_ptr()


def test_padding_is_left_away(tmp_path):
    numbers = NUMBERS[:, :48][:20]
    source = open_checkpoint(write_stored(tmp_path / "x.safetensors", {"l.weight": numbers}, "nvfp4"))["l.weight"]
    assert source.shape == (32, 48)
    whole = source.numbers(torch.float32)
    assert not whole[20:].any()
    assert torch.equal(source.numbers(torch.float32, shape=(20, 48)), whole[:20])


def test_a_scale_that_is_no_number_is_refused_when_it_is_read(tmp_path):
    parts = parts_as("l.weight", NUMBERS, "fp8")
    parts["l.weight_scale"] = torch.tensor(float("nan"))
    save_file(parts, tmp_path / "x.safetensors")
    source = open_checkpoint(tmp_path / "x.safetensors")["l.weight"]
    for _ in range(2):
        with pytest.raises(FileError, match=r"x\.safetensors: the scale of tensor l\.weight has a value that is not"):
            source.numbers(torch.float32)


def test_a_gguf_block_scale_that_is_no_number_is_refused_when_it_is_read(tmp_path):
    path = write_stored(tmp_path / "x.gguf", {"l.weight": NUMBERS}, "gguf:Q8_0")
    data = bytearray(path.read_bytes())
    data[-34:-32] = b"\x00\x7c"  # fp16's infinity in place of the last block's scale
    path.write_bytes(data)
    source = open_checkpoint(path)["l.weight"]
    with pytest.raises(FileError, match=r"x\.gguf: .*l\.weight"):
        source.numbers(torch.float32)


def test_a_gguf_file_is_known_by_its_first_bytes_whatever_its_name(tmp_path):
    path = write_stored(tmp_path / "x.safetensors", {"l.weight": NUMBERS}, "gguf:Q4_K")
    opened = open_checkpoint(path)
    assert opened.is_gguf
    assert opened["l.weight"].format.name == "Q4_K"


def test_a_checkpoint_knows_its_bytes(tmp_path):
    opened = written(tmp_path, "bf16")
    assert opened.nbytes == NUMBERS.numel() * 2 + BIAS.numel() * 4
    assert [path.name for path in opened.files] == ["layer.safetensors"]


@pytest.mark.parametrize(("name", "metadata", "dialect"), [
    ("flux1-modelopt-nvfp4.safetensors", None, "nvfp4 linear"),
    ("flux1-nvfp4-comfyui.safetensors", None, "nvfp4"),
    ("comfy.safetensors", {"producer": "ModelOpt 0.33"}, "nvfp4 linear"),
])  # fmt: skip
def test_whose_nvfp4_it_is_is_told_by_metadata_then_by_the_name_where_shapes_do_not(tmp_path, name, metadata, dialect):
    parts = {
        "l.weight": torch.zeros(128, 32, dtype=torch.uint8),
        "l.weight_scale": torch.ones(128, 4).to(torch.float8_e4m3fn),
        "l.weight_scale_2": torch.tensor(1.0),
    }
    save_file(parts, tmp_path / name, metadata)
    assert open_checkpoint(tmp_path / name)["l.weight"].format.name == dialect
    save_file(parts, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match="put modelopt or comfyui into the file's name"):
        open_checkpoint(tmp_path / "x.safetensors")
