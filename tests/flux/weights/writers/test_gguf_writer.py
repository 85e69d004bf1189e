"""Files are read back by the ``gguf`` package, and by our own reader: places, shapes, types, bytes and fields."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from flux.errors import MismatchError
from flux.weights.formats.gguf_blocks import BLOCKS
from flux.weights.readers.gguf import PLAIN_DTYPES, GgufFile
from flux.weights.writers.gguf import GgufWriter

PACKED = [name for name in BLOCKS if name not in PLAIN_DTYPES and name in gguf.GGMLQuantizationType.__members__]
FIELDS = {
    "general.architecture": "flux",
    "general.file_type": 15,
    "general.quantization_version": 2,
    "a.title": "größer → besser",
    "a.empty": "",
    "a.zero": 0,
    "a.count": 2**32 - 1,
    "a.negative": -5,
    "a.long": 2**63,
    "a.long negative": -(2**40),
    "a.epsilon": 1e-6,
    "a.true": True,
    "a.false": False,
}
TYPES = {
    "general.file_type": "UINT32",
    "general.quantization_version": "UINT32",
    "a.title": "STRING",
    "a.zero": "UINT32",
    "a.count": "UINT32",
    "a.negative": "INT32",
    "a.long": "UINT64",
    "a.long negative": "INT64",
    "a.epsilon": "FLOAT32",
    "a.true": "BOOL",
}


def random_bytes(count, seed=0):
    return torch.randint(256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def every_type():
    """Of every type a matrix of three rows, an odd number of them so that padding is needed; by name: what it is."""
    planned, tensors = {}, {}
    for name, dtype in PLAIN_DTYPES.items():
        for shape in ((3, 5), (2, 1, 3, 5), (0, 3), *([] if name == "BF16" else [()])):
            key = f"{name}.{len(shape)}.{shape[0] if shape else ''}"
            size = torch.empty(0, dtype=dtype).element_size()
            planned[key] = (name, shape)
            tensors[key] = random_bytes(torch.Size(shape).numel() * size).view(dtype).view(shape)
    for name in PACKED:
        block = BLOCKS[name]
        planned[name] = (name, (3, 2 * block.values))
        tensors[name] = random_bytes(6 * block.bytes, block.code).view(6, block.bytes)
    return planned, tensors


def write(path, fields, planned, tensors, **options):
    with GgufWriter(path, fields, planned, **options) as writer:
        add_all(writer, tensors.items())
    return path


def add_all(writer, tensors):
    for name, tensor in tensors:
        writer.add(name, tensor)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("alignment", [None, 8, 512])
def test_the_package_and_our_reader_find_every_type_bit_for_bit(tmp_path, alignment):
    planned, tensors = every_type()
    fields = FIELDS if alignment is None else {**FIELDS, "general.alignment": alignment}
    path = write(tmp_path / "a.gguf", fields, planned, tensors)
    theirs, ours = gguf.GGUFReader(path), GgufFile(path)
    assert [tensor.name for tensor in theirs.tensors] == list(ours) == list(planned)
    for found in theirs.tensors:
        kind, shape = planned[found.name]
        assert found.tensor_type.name == ours[found.name].dtype == kind
        assert tuple(reversed(found.shape.tolist())) == ours[found.name].shape == shape
        assert found.data.tobytes() == raw(tensors[found.name]) == raw(ours.read(found.name))
        assert found.data_offset % (alignment or 32) == 0
    assert path.stat().st_size % (alignment or 32) == 0  # llama.cpp reads the last tensor's padding too


def test_the_package_and_our_reader_find_every_field_in_its_type(tmp_path):
    path = write(tmp_path / "a.gguf", FIELDS, {}, {})
    theirs, ours = gguf.GGUFReader(path), GgufFile(path).fields
    for key, value in FIELDS.items():
        expected = float(np.float32(value)) if isinstance(value, float) else value
        field = theirs.fields[key]
        assert field.contents() == ours[key] == expected
        assert type(ours[key]) is type(value)
        assert key not in TYPES or [kind.name for kind in field.types] == [TYPES[key]]
    assert {key for key in theirs.fields if not key.startswith("GGUF.")} == set(ours) == set(FIELDS)


def test_blocks_that_the_package_packed_are_unpacked_by_it_again(tmp_path):
    numbers = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    blocks = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
    path = write(tmp_path / "a.gguf", {}, {"a": ("Q8_0", (4, 64))}, {"a": torch.from_numpy(blocks)})
    found = gguf.GGUFReader(path).tensors[0]
    unpacked = gguf.quants.dequantize(found.data, found.tensor_type)
    assert np.array_equal(unpacked, gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))


def test_views_are_written_as_the_numbers_that_they_show(tmp_path):
    numbers = torch.arange(24.0).view(4, 6)
    planned = {"t": ("F32", (6, 4)), "s": ("F32", (4, 2)), "o": ("F32", (1,)), "p": ("F32", (4, 6))}
    tensors = {
        "t": numbers.T,
        "s": numbers[:, 1::3],
        "o": numbers.view(-1)[7::20],
        "p": torch.nn.Parameter(numbers),
    }
    file = GgufFile(write(tmp_path / "a.gguf", {}, planned, tensors))
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        pytest.param(torch.zeros(67, dtype=torch.uint8), "Q8_0 [2, 32] was said", id="a byte too few"),
        pytest.param(torch.zeros(69, dtype=torch.uint8), "takes 68 bytes (uint8)", id="a byte too many"),
        pytest.param(torch.zeros(2, 32), "is torch.float32 [2, 32]", id="numbers"),
        pytest.param(torch.zeros(68, dtype=torch.int8), "is torch.int8 [68]", id="signed bytes"),
    ],
)
def test_blocks_that_are_not_what_was_said_are_refused_and_the_right_ones_still_taken(tmp_path, tensor, words):
    right = random_bytes(68)
    with GgufWriter(tmp_path / "a.gguf", {}, {"a": ("Q8_0", (2, 32))}) as writer:
        with pytest.raises(MismatchError, match=r"a\.gguf: tensor 'a'") as caught:
            writer.add("a", tensor)
        writer.add("a", right)
    assert words in str(caught.value)
    assert raw(GgufFile(tmp_path / "a.gguf").read("a")) == raw(right)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, 3).half(), torch.zeros(3, 2).bfloat16(), torch.zeros(12, dtype=torch.uint8)]
)
def test_plain_numbers_of_another_type_or_shape_are_refused(tmp_path, tensor):
    with pytest.raises(MismatchError, match=r"BF16 \[2, 3\] was said of it .* takes torch.bfloat16 \[2, 3\]"):
        write(tmp_path / "a.gguf", {}, {"a": ("BF16", (2, 3))}, {"a": tensor})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("ba", "tensor 'b' came, but 'a' is the next one"),
        ("aa", "tensor 'a' came, but 'b' is the next one"),
        ("abc", "tensor 'c' came, but all have come"),
        ("a", "1 tensors did not come, the first is 'b'"),
        ("", "2 tensors did not come, the first is 'a'"),
    ],
)
def test_another_order_and_tensors_that_do_not_come_are_refused(tmp_path, order, words):
    planned = {"a": ("F32", (2,)), "b": ("F32", (2,))}
    with pytest.raises(MismatchError, match=words), GgufWriter(tmp_path / "a.gguf", {}, planned) as writer:
        add_all(writer, ((name, torch.zeros(2)) for name in order))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "planned", "words"),
    [
        pytest.param({}, {"a": ("Q9_9", (32,))}, "'Q9_9' is no ggml type", id="a type"),
        pytest.param({}, {"a": ("F32", (1,) * 5)}, "has 5 dimensions", id="a rank"),
        pytest.param({}, {"a": ("Q4_K", (2, 64))}, "do not divide into Q4_K's blocks of 256", id="rows"),
        pytest.param({}, {"a": ("Q8_0", ())}, "is a single number, not of Q8_0", id="a scalar in blocks"),
        pytest.param({}, {"a": ("BF16", ())}, "is a single number, not of BF16", id="a scalar that others cannot read"),
        pytest.param({}, {"a" * 257: ("F32", ())}, "is longer than 256 characters", id="a long name"),
        pytest.param({}, {"a\n": ("F32", ())}, "cannot be printed", id="a name of two lines"),
        pytest.param({"k": "\ud800"}, {}, "characters that UTF-8 does not know", id="half a character"),
        pytest.param({"k": 2**64}, {}, "cannot hold 18446744073709551616 for the field 'k'", id="a huge number"),
        pytest.param({"k": -(2**63) - 1}, {}, "cannot hold -9223372036854775809", id="far below zero"),
        pytest.param({"k": 1e39}, {}, "cannot hold 1e+39", id="a huge fraction"),
        pytest.param({"general.file_type": -1}, {}, "cannot hold -1", id="a file type below zero"),
        pytest.param({"general.file_type": "Q8_0"}, {}, "cannot hold 'Q8_0'", id="a file type in words"),
        pytest.param({"general.quantization_version": 2.0}, {}, "cannot hold 2.0", id="a version with a fraction"),
        pytest.param({"general.alignment": 24}, {}, "is 24; choose a power of two", id="an odd alignment"),
        pytest.param({"general.alignment": 0}, {}, "is 0; choose a power of two", id="no alignment"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_before_anything_is_written(tmp_path, fields, planned, words):
    with pytest.raises(MismatchError, match=r"a\.gguf") as caught:
        GgufWriter(tmp_path / "a.gguf", fields, planned)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []
