"""GGUF headers are checked before anything is read, and tensors come out as the ``gguf`` package wrote them."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
import torch

from flux.errors import FileError, MissingFileError, UserError
from flux.weights.readers.gguf import GgufFile, LongArray
from tests.mutations import mutated

U32, F32_TYPE, STRING, ARRAY = 4, 0, 8, 9
PLAIN = {
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
}
BLOCK_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # that the package can write itself


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


SEVEN = struct.pack("<I", 7)


def field(key="k", kind=U32, value=SEVEN):
    return text(key) + struct.pack("<I", kind) + value


def array(kind, count, items=b"", key="k"):
    return field(key, ARRAY, struct.pack("<IQ", kind, count) + items)


def tensor(name="a", sides=(4,), kind=F32_TYPE, offset=0):
    return text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)


def raw_file(path, fields=(), tensors=(), room=64, counts=None, version=3, alignment=32):
    tensor_count, field_count = counts or (len(tensors), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, field_count) + b"".join((*fields, *tensors))
    path.write_bytes(head + bytes(-len(head) % alignment + room))
    return path


def written(path, **more):
    """A file of every kind of tensor and field that the package writes; with its tensors as the package has them."""
    writer = gguf.GGUFWriter(path, "flux")
    rng = np.random.default_rng(0)
    writer.add_string("a.text", "words")
    writer.add_uint32("a.count", 4_000_000_000)
    writer.add_int64("a.negative", -5)
    writer.add_float64("a.fraction", 0.25)
    writer.add_bool("a.truth", True)
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.words", ["one", "two"])
    for add, value in more.items():
        getattr(writer, add)(*value)
    tensors = {}
    for name, dtype in PLAIN.items():
        tensors[name] = (rng.standard_normal((3, 2, 5)) * 20).astype(dtype)
        writer.add_tensor(name, tensors[name])
    for name in BLOCK_TYPES:
        kind = gguf.GGMLQuantizationType[name]
        tensors[name] = gguf.quants.quantize(rng.standard_normal((4, 64)).astype(np.float32), kind)
        writer.add_tensor(name, tensors[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_every_type_comes_back_as_the_package_wrote_it(tmp_path):
    tensors = written(tmp_path / "all.gguf")
    file = GgufFile(tmp_path / "all.gguf")
    assert set(file) == set(tensors)
    assert file.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, stored in tensors.items():
        assert file[name].dtype == name
        assert file[name].shape == ((3, 2, 5) if name in PLAIN else (4, 64))
        read = file.read(name)
        assert read.dtype == torch.from_numpy(stored).dtype
        assert read.numpy().tobytes() == stored.tobytes()
        assert read.shape[0] == (3 if name in PLAIN else 8)


def test_the_package_reads_the_same_places_and_shapes(tmp_path):
    written(tmp_path / "all.gguf")
    file = GgufFile(tmp_path / "all.gguf")
    for theirs in gguf.GGUFReader(tmp_path / "all.gguf").tensors:
        ours = file[theirs.name]
        assert ours.dtype == theirs.tensor_type.name
        assert ours.shape == tuple(int(side) for side in reversed(theirs.shape))
        assert file.data_start + ours.start == theirs.data_offset


def test_bf16_is_read_as_bf16(tmp_path):
    numbers = torch.randn(4, 8).to(torch.bfloat16)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    writer.add_tensor("a", numbers.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert torch.equal(GgufFile(tmp_path / "a.gguf").read("a"), numbers)


def test_fields_keep_their_types_and_metadata_is_text(tmp_path):
    written(tmp_path / "a.gguf")
    file = GgufFile(tmp_path / "a.gguf")
    assert file.fields["a.count"] == 4_000_000_000
    assert file.fields["a.negative"] == -5
    assert file.fields["a.fraction"] == 0.25
    assert file.fields["a.truth"] is True
    assert file.fields["a.numbers"] == (1, 2, 3)
    assert file.array("a.words") == file.fields["a.words"] == ("one", "two")
    assert file.metadata["general.architecture"] == "flux"
    assert file.metadata["a.count"] == "4000000000"
    assert "a.numbers" not in file.metadata
    with pytest.raises(KeyError):
        file.array("a.count")


def test_a_vocabulary_stays_in_the_file_until_it_is_wanted(tmp_path):
    words, scores = [f"word {n}" for n in range(2000)], [n / 2 for n in range(2000)]
    written(tmp_path / "a.gguf", add_token_list=[words], add_token_scores=[scores])
    file = GgufFile(tmp_path / "a.gguf")
    assert isinstance(file.fields["tokenizer.ggml.tokens"], LongArray)
    assert file.fields["tokenizer.ggml.tokens"].count == 2000
    assert file.array("tokenizer.ggml.tokens") == tuple(words)
    assert file.array("tokenizer.ggml.scores") == tuple(scores)
    assert file.read("I8").shape == (3, 2, 5)


def test_another_alignment_moves_the_tensors(tmp_path):
    tensors = written(tmp_path / "a.gguf", add_custom_alignment=[1024])
    file = GgufFile(tmp_path / "a.gguf")
    assert file.data_start % 1024 == 0
    assert np.array_equal(file.read("F32").numpy(), tensors["F32"])


def test_a_rearranged_tensor_has_its_original_shape(tmp_path):
    shape = field("comfy.gguf.orig_shape.a", ARRAY, struct.pack("<IQ3i", 5, 3, 2, 1, 32))
    file = GgufFile(raw_file(tmp_path / "a.gguf", [shape], [tensor(sides=(64,), kind=8)], room=68))
    assert file["a"].shape == (2, 1, 32)
    assert file.read("a").shape == (2, 34)


def test_version_2_is_read_and_a_file_of_no_tensors_is_whole(tmp_path):
    assert len(GgufFile(raw_file(tmp_path / "a.gguf", [field()], version=2, room=0))) == 0


def test_scalars_and_empty_tensors_are_read(tmp_path):
    rows = [tensor("scalar", ()), tensor("empty", (0, 3), offset=32), tensor("blocks", (32, 0), kind=8, offset=32)]
    file = GgufFile(raw_file(tmp_path / "a.gguf", tensors=rows))
    assert file.read("scalar").item() == 0.0
    assert file.read("empty").shape == (3, 0)
    assert file.read("blocks").shape == (0, 34)


def test_a_tensor_that_is_read_can_be_changed_without_touching_the_file(tmp_path):
    file = GgufFile(raw_file(tmp_path / "a.gguf", tensors=[tensor()]))
    file.read("a").add_(1)
    assert not file.read("a").any()


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path):
    whole = raw_file(tmp_path / "w.gguf", [field(), array(STRING, 1, text("x"), "s")], [tensor()], room=16).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"cut\.gguf"):
            GgufFile(cut)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param({"counts": (2**40, 0)}, "claims 1099511627776 tensors", id="tensors"),
        pytest.param({"counts": (0, 2**63)}, "claims 9223372036854775808 fields", id="fields"),
        pytest.param({"counts": (0, 1), "room": 0}, "claims 1 fields", id="fields without room"),
        pytest.param({"fields": [field(), field()]}, "field 'k' stands twice", id="a key twice"),
        pytest.param({"tensors": [tensor(), tensor()]}, "tensor 'a' stands twice", id="a name twice"),
        pytest.param({"fields": [struct.pack("<Q", 2**62)]}, "is 4611686018427387904 bytes long", id="a long key"),
        pytest.param({"fields": [field(b"\xff\xfe")]}, "key of field 0 is not text", id="a key that is no text"),
        pytest.param({"fields": [field(kind=99)]}, "'k' is of type 99", id="a field's type"),
        pytest.param({"fields": [field(kind=STRING, value=struct.pack("<Q", 2**60))]}, "bytes long", id="a long text"),
        pytest.param({"fields": [field(kind=STRING, value=struct.pack("<Q", 5000))]}, "past the end", id="a text cut"),
        pytest.param({"fields": [array(U32, 2**61)]}, "claims 2305843009213693952 items", id="a long array"),
        pytest.param({"fields": [array(STRING, 10**6)]}, "claims 1000000 items", id="a long array of texts"),
        pytest.param({"fields": [array(77, 1)]}, "'k' is of type 77", id="an array's type"),
        pytest.param(
            {"fields": [array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 8)]}, "nested more than 2", id="nested too deep"
        ),
        pytest.param(
            {"fields": [field("general.alignment", value=struct.pack("<I", 0))]}, "alignment is 0", id="no alignment"
        ),
        pytest.param(
            {"fields": [field("general.alignment", value=struct.pack("<I", 24))]}, "alignment is 24", id="alignment 24"
        ),
        pytest.param(
            {"fields": [field("general.alignment", value=struct.pack("<I", 2**31))]}, "alignment is", id="huge"
        ),
        pytest.param({"fields": [field("general.alignment", STRING, text("x"))]}, "alignment is 'x'", id="a word"),
        pytest.param({"tensors": [tensor(sides=(1,) * 5)]}, "'a' claims 5 dimensions", id="rank"),
        pytest.param({"tensors": [tensor(sides=(2**60, 2))]}, "'a' claims shape", id="a side"),
        pytest.param({"tensors": [tensor(sides=(2**39, 2**39))]}, "'a' ends at byte", id="a huge shape"),
        pytest.param({"tensors": [tensor(sides=(17,))]}, "'a' ends at byte 68 of 64", id="past the end"),
        pytest.param({"tensors": [tensor(offset=64)]}, "'a' ends at byte 80 of 64", id="begins at the end"),
        pytest.param({"tensors": [tensor(offset=4)]}, "begins at byte 4, not at a multiple of 32", id="not aligned"),
        pytest.param({"tensors": [tensor(kind=99)]}, "'a' is of ggml type 99", id="an unknown type"),
        pytest.param({"tensors": [tensor(kind=31)]}, "'a' is of ggml type 31", id="a withdrawn type"),
        pytest.param({"tensors": [tensor(sides=(48,), kind=8)]}, "48 numbers, not a multiple of Q8_0's 32", id="rows"),
        pytest.param({"tensors": [tensor(sides=(16, 2), kind=8)]}, "not a multiple", id="rows shorter than a block"),
        pytest.param({"tensors": [tensor(), tensor("b")]}, "'a' and 'b' overlap", id="overlap"),
        pytest.param(
            {"fields": [array(U32, 1, struct.pack("<I", 5), "comfy.gguf.orig_shape.a")], "tensors": [tensor()]},
            r"original shape [5] of tensor 'a' does not fit [4]",
            id="another original shape",
        ),
        pytest.param(
            {"fields": [field("comfy.gguf.orig_shape.a")], "tensors": [tensor()]},
            "original shape of tensor 'a' is not a list",
            id="an original shape that is a number",
        ),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path, content, words):
    with pytest.raises(FileError, match=r"bad\.gguf") as caught:
        GgufFile(raw_file(tmp_path / "bad.gguf", **content))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "is empty (0 bytes)", id="empty"),
        pytest.param(b"GGUF", "is not a GGUF file", id="four bytes"),
        pytest.param(bytes(64), "is not a GGUF file", id="zeros"),
        pytest.param(b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is GGUF version 1", id="version 1"),
        pytest.param(b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "is GGUF version 9", id="version 9"),
        pytest.param(b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file", id="big endian"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", id="lfs pointer"),
        pytest.param(b"<!DOCTYPE html><html></html>", "is a web page", id="web page"),
        pytest.param(b"\x80\x02}q\x00.", "is a pickle file", id="pickle"),
    ],
)
def test_what_is_no_gguf_file_is_named(tmp_path, content, words):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(FileError, match=r"model\.gguf") as caught:
        GgufFile(tmp_path / "model.gguf")
    assert words in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(MissingFileError, match="was not found"):
        GgufFile(tmp_path / "none.gguf")
    with pytest.raises(FileError, match="is a folder"):
        GgufFile(tmp_path)


def test_a_file_that_changes_after_it_was_opened_is_named(tmp_path):
    words = array(STRING, 300, text("x") * 300, "s")
    path = raw_file(tmp_path / "a.gguf", [words], [tensor(sides=(100,))], room=400)
    file, whole = GgufFile(path), path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(FileError, match="ended while tensor a was read"):
        file.read("a")
    path.write_bytes(whole[:100])
    with pytest.raises(FileError, match="past the end"):
        file.array("s")
    path.unlink()
    with pytest.raises(FileError, match="cannot be read any more"):
        file.read("a")
    with pytest.raises(FileError, match="cannot be read any more"):
        file.array("s")


def test_damaged_files_are_read_or_refused_quickly_and_in_little_memory(tmp_path):
    written(tmp_path / "whole.gguf", add_token_list=[[f"t{n}" for n in range(300)]])
    whole, rng, damaged = (tmp_path / "whole.gguf").read_bytes(), random.Random(0), tmp_path / "damaged.gguf"
    messages = []
    tracemalloc.start()
    start = time.process_time()
    for _ in range(200):
        damaged.write_bytes(mutated(whole, rng))
        try:
            file = GgufFile(damaged)
            for name in file:
                file.read(name)
            for key, value in file.fields.items():
                if isinstance(value, LongArray):
                    file.array(key)
        except UserError as error:
            messages.append(str(error))
    elapsed, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 50 < len(messages) < 200
    assert all("damaged.gguf" in message for message in messages)
    assert peak < 8 << 20
    assert elapsed < 20


def test_more_texts_than_any_vocabulary_has_are_refused_before_they_are_walked_over(tmp_path):
    path = raw_file(tmp_path / "a.gguf", [array(STRING, 3_000_000)])
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(FileError, match="its arrays claim 3000000 texts"):
        GgufFile(path)


def test_a_sparse_file_of_huge_counts_costs_no_memory(tmp_path):
    path = raw_file(tmp_path / "a.gguf", [array(0, 90_000_000)])
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    file = GgufFile(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert file.fields["k"].count == 90_000_000
    assert peak < 1 << 20
