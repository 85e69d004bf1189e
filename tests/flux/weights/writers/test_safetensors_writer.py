"""Files are read back by the safetensors library, which refuses holes, bit for bit."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flux.errors import MismatchError
from flux.weights.readers.header import ITEM_BITS, MAX_NUMBERS, METADATA
from flux.weights.readers.safetensors import SafetensorsFile
from flux.weights.writers import safetensors
from flux.weights.writers.safetensors import NAMES, SafetensorsWriter
from flux.weights.writers.whole import tensor_bytes


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random_bits(dtype, *shape):
    """Numbers of a type whose bits are all random: NaNs, infinities and denormals are among them."""
    generator = torch.Generator().manual_seed(ITEM_BITS[NAMES[dtype]])
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    return torch.randint(256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def write(path, tensors, metadata=None, **options):
    with SafetensorsWriter(path, tensors, metadata, **options) as writer:
        add_all(writer, tensors.items())
    return path


def add_all(writer, tensors):
    for name, tensor in tensors:
        writer.add(name, tensor)


def check(path, tensors):
    """The file holds just these, by the library and by our own reader."""
    loaded, ours = load_file(path), SafetensorsFile(path)
    assert set(loaded) == set(ours) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape == ours[name].shape
        assert torch.equal(raw(loaded[name]), raw(tensor))
    return ours


@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (2, 8, 4), (0, 4), (1, 2, 1, 2, 1, 2, 1, 2)])
def test_every_type_and_shape_comes_back_bit_for_bit_with_the_metadata(tmp_path, shape):
    tensors = {f"layer.{name}": random_bits(dtype, *shape) for dtype, name in NAMES.items()}
    metadata = {"format": "pt", "title": "größer → besser", "json": json.dumps({"a": ["\n", '"']})}
    path = write(tmp_path / "all.safetensors", tensors, metadata)
    ours = check(path, tensors)
    assert all(ours[name].dtype == name.removeprefix("layer.") for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata == ours.metadata


def test_exponents_of_mxfp8_are_read_as_they_were_written(tmp_path):
    exponents = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    file = SafetensorsFile(write(tmp_path / "a.safetensors", {"scale": exponents}))
    assert file["scale"].dtype == "F8_E8M0"
    assert file.read("scale").dtype == torch.float8_e8m0fnu
    assert torch.equal(raw(file.read("scale")), raw(exponents))


def test_views_and_parameters_are_written_as_the_numbers_that_they_show(tmp_path):
    base = torch.arange(240.0).view(4, 6, 10)
    tensors = {
        "transposed": base.transpose(0, 2),
        "every second": base[:, ::2, 1::3],
        "expanded": base[:1, :1].expand(5, 3, 10),
        "behind": base.view(-1)[3:8],
        "conjugate": torch.complex(base[0], base[1]).conj(),
        "negative": torch.complex(base[0], base[1]).conj().imag,
        "one of many": base.view(-1)[7::300],
        "a negative one": torch.complex(base[0, 0, :1], base[1, 1, :1]).conj().imag,
        "parameter": torch.nn.Parameter(base[2]),
    }
    tensors = {name: tensor.detach() if name != "parameter" else tensor for name, tensor in tensors.items()}
    path = write(tmp_path / "a.safetensors", tensors)
    loaded = load_file(path)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_a_contiguous_tensor_is_written_without_a_copy(tmp_path):
    big = torch.zeros(1 << 20)
    part = big[1 << 10 :]
    assert np.frombuffer(tensor_bytes(part), np.uint8).ctypes.data == part.data_ptr()
    tracemalloc.start()
    write(tmp_path / "a.safetensors", {"big": big, "part": part})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < big.nbytes // 16


def test_all_numbers_are_aligned_and_odd_ones_come_last(tmp_path):
    marker = torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    tensors = {
        "marker": marker,
        "a": torch.randn(6, 4).bfloat16(),
        "bias": torch.randn(3).bfloat16(),
        "scale": torch.tensor(2.0),
        "b": torch.randn(2, 4),
        "nothing": torch.zeros(0),
        "c": random_bits(torch.float8_e4m3fn, 16, 8),
    }
    file = check(write(tmp_path / "a.safetensors", tensors, {"a": "b"}), tensors)
    assert file.data_start % 8 == 0
    for name, tensor in tensors.items():
        start = file.data_start + file[name].start
        assert start % (8 if name in ("a", "b", "c") else tensor.element_size()) == 0
    assert sorted(file, key=lambda name: (file[name].start, file[name].end))[-3:] == ["scale", "bias", "marker"]


def test_odd_tensors_are_held_only_up_to_a_limit_and_nothing_is_lost_beyond_it(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "MOST_HELD", 100)
    tensors = {str(count): random_bits(torch.uint8, count) for count in (51, 33, 80, 17, 16, 15)}
    path = tmp_path / "a.safetensors"
    file = check(write(path, tensors), tensors)
    assert sorted(file, key=lambda name: file[name].start) == ["80", "17", "16", "51", "33", "15"]


def test_names_that_do_not_come_leave_the_file_whole(tmp_path):
    names = [f"double_blocks.{n}.img_attn.qkv.{word}" for n in range(100) for word in ("weight", "weight_scale")]
    with SafetensorsWriter(tmp_path / "a.safetensors", names) as writer:
        writer.add(names[7], torch.ones(3))
    assert list(load_file(tmp_path / "a.safetensors")) == [names[7]]
    with SafetensorsWriter(tmp_path / "none.safetensors", names):
        pass
    assert load_file(tmp_path / "none.safetensors") == {}


def test_the_room_in_the_header_holds_all_that_was_named_and_no_more(tmp_path):
    names = [f'layer "{n}" ß' for n in range(30)]
    tensors = {name: torch.zeros((1,) * 7 + (n + 1,), dtype=torch.float8_e4m3fnuz) for n, name in enumerate(names)}
    path = write(tmp_path / "a.safetensors", tensors)
    check(path, tensors)
    full = SafetensorsWriter(tmp_path / "b.safetensors", names)
    with pytest.raises(MismatchError, match=r"b\.safetensors: no room was kept in the header for tensor 'more, "), full:
        add_all(full, ((f"more, {n}", torch.zeros(8)) for n in range(1000)))
    assert not (tmp_path / "b.safetensors").exists()


def test_the_room_suffices_for_the_longest_entries_that_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "FARTHEST", 0)  # empty tensors, so that these are offsets to the digit
    longest = torch.empty((MAX_NUMBERS, 1, 1, 1, 1, 1, 1, 0), dtype=torch.float8_e4m3fnuz)
    tensors = {f"layer {n}": longest for n in range(30)}
    check(write(tmp_path / "a.safetensors", tensors, {"a": "b"}), tensors)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        pytest.param("a", torch.zeros(2), "there is a tensor 'a' already", id="a name twice"),
        pytest.param(METADATA, torch.zeros(2), "there is a tensor '__metadata__' already", id="the metadata's name"),
        pytest.param("b", torch.zeros(2, dtype=torch.complex128), "torch.complex128 with 1 dim", id="a foreign type"),
        pytest.param("b", torch.zeros((1,) * 9), "with 9 dimensions", id="too many dimensions"),
        pytest.param("b\ud800", torch.zeros(2), "cannot be printed", id="half a character"),
        pytest.param("b" * 257, torch.zeros(2), "is longer than 256 characters", id="a long name"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused_and_the_rest_can_still_be_written(tmp_path, name, tensor, words):
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, ["a", "b", "c"]) as writer:
        writer.add("a", torch.ones(2))
        with pytest.raises(MismatchError, match=r"a\.safetensors") as caught:
            writer.add(name, tensor)
        assert words in str(caught.value)
        writer.add("c", torch.ones(4))
    check(path, {"a": torch.ones(2), "c": torch.ones(4)})


def test_a_text_that_is_none_is_refused_ahead(tmp_path):
    with pytest.raises(MismatchError, match=r"a\.safetensors: the text .* has characters that UTF-8 does not know"):
        SafetensorsWriter(tmp_path / "a.safetensors", [], {"key": "half a character: \ud800"})


def test_a_header_beyond_the_formats_limit_is_refused_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(MismatchError, match="would need .* bytes for its header, 1000 are allowed"):
        SafetensorsWriter(tmp_path / "a.safetensors", map(str, range(20)))
