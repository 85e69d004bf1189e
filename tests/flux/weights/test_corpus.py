"""Evil files, one a row, all through ``open_checkpoint``: each is refused by name, and costs next to nothing.

What one reader alone refuses stands in its own tests too; here are the files that pass a first look, or that would take
memory or time.
"""

from __future__ import annotations

import random
import tracemalloc
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from flux.errors import FileError, FluxFoundryError
from flux.weights.readers.gguf import GgufFile, LongArray
from flux.weights.readers.header import MAX_TENSORS
from flux.weights.sources import open_checkpoint
from tests.fuzz.damage import damaged
from tests.fuzz.evil_gguf import GGUF, STRING, U8, array, field, gguf, string, tensor
from tests.fuzz.evil_safetensors import COMPANIONS, INDEXES, LAYER, SAFETENSORS, SHARD, WEIGHT, entry, header
from tests.fuzz.seeds import INDEX, READERS, seeds
from tests.fuzz.worker import OPENED, REFUSED, examine

MB = 1 << 20
ALLOWANCE = 64 * MB  # bytes beyond the file's size


def rows(cases):
    return [pytest.param(content, words, id=name) for name, content, words in cases]


def numbers_of_all(path):
    for source in open_checkpoint(path).values():
        source.numbers(torch.float32)


def refused(path):
    """The message with which a file or a tensor of it is refused, and the memory it took beyond the file's size."""
    tracemalloc.start()
    try:
        with pytest.raises(FluxFoundryError) as caught:
            numbers_of_all(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return str(caught.value), peak - path.stat().st_size


def check_refusal(path, words):
    message, memory = refused(path)
    assert words in message
    assert path.name in message
    assert message.isprintable()
    assert len(message) < 1500
    assert memory < ALLOWANCE


@pytest.mark.parametrize(("content", "words"), rows(SAFETENSORS + COMPANIONS))
def test_an_evil_safetensors_file_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "refused.safetensors"
    path.write_bytes(content)
    check_refusal(path, words)


@pytest.mark.parametrize(("content", "words"), rows(GGUF))
def test_an_evil_gguf_file_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "refused.gguf"
    path.write_bytes(content)
    check_refusal(path, words)


def test_names_of_every_row_differ():
    for cases in (SAFETENSORS + COMPANIONS, GGUF, INDEXES):
        names = [name for name, _, _ in cases]
        assert len(set(names)) == len(names)


def opened(path):
    """A checkpoint, and the memory that opening it took beyond the file's size."""
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return checkpoint, peak - path.stat().st_size


def test_as_many_tensors_as_are_read_fit_into_the_allowance(tmp_path):
    path = tmp_path / "many.gguf"
    path.write_bytes(gguf([], [tensor(f"{n:x}", (0,)) for n in range(MAX_TENSORS)]))
    checkpoint, memory = opened(path)
    assert len(checkpoint) == MAX_TENSORS
    assert memory < ALLOWANCE


def test_as_many_tensors_as_a_header_may_say_fit_into_the_allowance(tmp_path):
    path = tmp_path / "many.safetensors"
    count = 13_000  # where a file has no tensors' bytes, what its header may cost ends soon after
    path.write_bytes(header({f"{n:x}": entry(shape=(0,), offsets=(0, 0)) for n in range(count)}))
    checkpoint, memory = opened(path)
    assert len(checkpoint) == count
    assert memory < ALLOWANCE


def test_more_tensors_than_any_model_has_are_refused_even_in_a_large_file(tmp_path):
    path = tmp_path / "refused.safetensors"
    text = header({f"{n:x}": entry(shape=(0,), offsets=(0, 0)) for n in range(MAX_TENSORS + 1)})
    path.write_bytes(text)
    with path.open("r+b") as file:
        file.truncate(1 << 33)  # sparse: bytes enough to be granted the memory
    with pytest.raises(FileError, match=f"claims {MAX_TENSORS + 1} tensors"):
        open_checkpoint(path)


def test_a_long_text_stays_in_the_file(tmp_path):
    path = tmp_path / "long.gguf"
    words = "\U0001f600" + "x" * 20 * MB
    path.write_bytes(gguf([field("long", STRING, string(words)), field("short", STRING, string("y"))], [tensor()]))
    checkpoint, memory = opened(path)
    assert checkpoint.metadata == {"short": "y"}
    assert GgufFile(path).fields["long"] == LongArray(STRING, 1, 24 + 12 + 4)
    assert memory < MB


def test_texts_that_are_kept_are_bounded_together(tmp_path):
    path = tmp_path / "refused.gguf"
    words = string("\U0001f600" + "x" * 60_000)
    path.write_bytes(gguf([field(str(n), STRING, words) for n in range(200)]))
    message, memory = refused(path)
    assert "bytes long" in message
    assert memory < ALLOWANCE


def test_an_array_too_long_for_memory_is_refused_when_it_is_wanted(tmp_path):
    path = tmp_path / "refused.gguf"
    path.write_bytes(gguf([array(U8, 5 * MB, bytes(5 * MB))]))
    file = GgufFile(path)
    tracemalloc.start()
    with pytest.raises(FileError, match=r"refused\.gguf.* has 5242880 items"):
        file.array("k")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MB


def test_a_vocabulary_of_the_largest_models_can_be_read(tmp_path):
    path = tmp_path / "words.gguf"
    count = 262_144
    path.write_bytes(gguf([array(STRING, count, b"".join(string(f"word {n}") for n in range(count)))]))
    words = GgufFile(path).array("k")
    assert len(words) == count
    assert words[-1] == f"word {count - 1}"


def test_a_tensor_of_no_rows_is_read_in_every_scaled_format(tmp_path):
    for kind in (torch.float8_e4m3fn, torch.int8):
        path = tmp_path / "empty.safetensors"
        save_file({WEIGHT: torch.zeros(0, 4).to(kind), f"{LAYER}.weight_scale": torch.zeros(0)}, path)
        assert open_checkpoint(path)[WEIGHT].numbers(torch.float32).shape == (0, 4)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.gguf"])
def test_torchs_own_files_are_refused_under_any_name(tmp_path, name):
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(FileError, match="is a pickle file, which can run code"):
        open_checkpoint(tmp_path / name)
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("data.pkl", "b")
    with pytest.raises(FileError, match="pickle"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("index", "words"),
    rows(INDEXES),
)
def test_an_evil_index_is_refused_by_name(tmp_path, index, words):
    save_file({"a": torch.zeros(1)}, tmp_path / SHARD)
    (tmp_path / INDEX).write_bytes(index)
    check_refusal(tmp_path / INDEX, words)


@pytest.mark.parametrize("reader", READERS)
def test_every_seed_of_the_fuzzing_opens_whole(tmp_path, reader):
    for seed in seeds(reader):
        for name, data in seed.files.items():
            (tmp_path / name).write_bytes(data)
        result = examine(tmp_path / seed.opened)
        assert result.outcome == OPENED, (seed.name, result)
        for name in seed.files:
            (tmp_path / name).unlink()


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_open_or_are_refused_in_a_sentence(tmp_path, reader):
    outcomes, messages = [], set()
    folder = tmp_path / "damaged"
    folder.mkdir()
    tracemalloc.start()
    for number in range(400):
        rng = random.Random(f"{reader} {number}")
        seed = rng.choice(seeds(reader))
        files = damaged(seed, rng)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        result = examine(folder / seed.opened)
        assert result.outcome in (OPENED, REFUSED), (number, seed.name, result)
        assert result.seconds < 5
        outcomes.append(result.outcome)
        messages.add(result.text[:60])
        for name in files:
            (folder / name).unlink()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 20 < outcomes.count(OPENED) < 200  # damage that always or never matters finds nothing
    assert len(messages) > 30
    assert peak < ALLOWANCE
