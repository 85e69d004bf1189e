"""A file's bytes are views of it where that is fast, and copies elsewhere; never of a file that was cut."""

from __future__ import annotations

import mmap
import os

import pytest
import torch

from flux.errors import FileError, UserError
from flux.ops.pieces import SMALLEST, by_several
from flux.weights.readers import file_bytes
from flux.weights.readers.file_bytes import ENVIRONMENT, FileBytes, faster_way
from flux.weights.readers.stamps import stamp_of

NUMBERS = torch.arange(64, dtype=torch.float32)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "numbers.bin"
    file.write_bytes(b"head" + NUMBERS.numpy().tobytes())
    return file


@pytest.mark.parametrize("way", ["auto", "map", "read"])
def test_every_way_gives_the_same_numbers(path, way):
    found = FileBytes(path, way).tensor(4, 256, torch.float32, "numbers")
    assert torch.equal(found, NUMBERS)


def test_mapped_numbers_are_the_file_itself(path):
    file = FileBytes(path, "map")
    found = [file.tensor(4, 256, torch.float32, "numbers") for _ in range(3)]
    assert len({numbers.data_ptr() for numbers in found}) == 1
    write_number(path, 9.0)
    assert found[0][0] == 9.0


@pytest.mark.parametrize("way", ["map", "read"])
def test_a_file_that_was_written_to_is_not_read_on(path, way):
    file = FileBytes(path, way)
    file.tensor(4, 256, torch.float32, "numbers")
    write_number(path, 9.0)
    with pytest.raises(FileError, match=r"numbers\.bin was changed after it was opened, before tensor a was read"):
        file.tensor(4, 64, torch.float32, "tensor a")
    with pytest.raises(FileError, match="was changed after it was opened"):
        file.read_into(torch.empty(4, dtype=torch.uint8), 4, "tensor a")
    assert FileBytes(path, way).tensor(4, 4, torch.float32, "numbers").item() == 9.0


def test_a_file_that_was_replaced_after_its_header_was_read_is_refused(path):
    with path.open("rb") as file:
        stamp = stamp_of(file.fileno())
    other = path.with_name("other.bin")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(stamp.written, stamp.written))
    os.replace(other, path)
    with pytest.raises(FileError, match=r"numbers\.bin was changed after it was opened"):
        FileBytes(path, stamp=stamp).tensor(4, 64, torch.float32, "tensor a")


def test_a_file_that_is_replaced_while_it_is_read_is_read_to_its_end(path):
    file = FileBytes(path)
    file.tensor(4, 64, torch.float32, "numbers")
    other = path.with_name("other.bin")
    other.write_bytes(b"another file")
    os.replace(other, path)
    assert torch.equal(file.tensor(4, 256, torch.float32, "numbers"), NUMBERS)


def write_number(path, number):
    """Write the first one, at another time than the file was made."""
    with path.open("r+b") as writer:
        writer.seek(4)
        writer.write(torch.tensor([number]).numpy().tobytes())
    written = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(written, written))


@pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="this system has no private maps")
def test_who_writes_to_mapped_numbers_changes_neither_the_file_nor_ends_the_process(path):
    before = path.read_bytes()
    FileBytes(path, "map").tensor(4, 256, torch.float32, "numbers").zero_()
    assert path.read_bytes() == before
    assert torch.equal(FileBytes(path, "map").tensor(4, 256, torch.float32, "numbers"), NUMBERS)


def test_read_numbers_are_ones_own(path):
    file = FileBytes(path, "read")
    one = file.tensor(4, 256, torch.float32, "numbers")
    one.zero_()
    assert torch.equal(file.tensor(4, 256, torch.float32, "numbers"), NUMBERS)


def test_numbers_between_words_are_copied(path):
    path.write_bytes(b"x" + NUMBERS.numpy().tobytes())
    found = FileBytes(path, "map").tensor(1, 256, torch.float32, "numbers")
    assert torch.equal(found, NUMBERS)
    assert found.data_ptr() % 4 == 0


@pytest.mark.parametrize("way", ["map", "read"])
def test_a_file_that_was_cut_is_refused_by_name(path, way):
    file = FileBytes(path, way)
    file.tensor(4, 256, torch.float32, "numbers")
    with path.open("r+b") as writer:
        writer.truncate(100)
    with pytest.raises(FileError, match=r"numbers\.bin ended while tensor a was read"):
        file.tensor(4, 64, torch.float32, "tensor a")


def test_a_file_that_is_gone_is_refused_by_name(path):
    file = FileBytes(path)
    path.unlink()
    with pytest.raises(FileError, match=r"numbers\.bin cannot be read any more"):
        file.tensor(4, 64, torch.float32, "tensor a")


def test_the_environment_is_the_switch(path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "read")
    assert FileBytes(path).way == "read"
    monkeypatch.setenv(ENVIRONMENT, "fast")
    with pytest.raises(UserError, match=r"auto, map, read, but FLUXFOUNDRY_FILES is 'fast'"):
        FileBytes(path)


def test_mapping_is_left_only_where_it_is_noticeably_slower():
    assert faster_way(mapping=0.5, reading=0.01) == "read"
    assert faster_way(mapping=0.02, reading=0.01) == "map"
    assert faster_way(mapping=0.004, reading=0.0001) == "map"


def test_the_first_large_tensor_is_timed_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(file_bytes, "PROBE_BYTES", 40)
    seen = []
    monkeypatch.setattr(file_bytes, "faster_way", lambda mapping, reading: seen.append((mapping, reading)) or "read")
    path = tmp_path / "large.bin"
    path.write_bytes(NUMBERS.numpy().tobytes())
    file = FileBytes(path, "auto")
    file.tensor(0, 64, torch.float32, "a small one")
    assert file.way == "auto"
    assert torch.equal(file.tensor(0, 256, torch.float32, "a large one"), NUMBERS)
    assert file.way == "read"
    assert len(seen) == file_bytes.PROBES
    assert all(seconds > 0 for pair in seen for seconds in pair)


def test_one_place_where_mapping_is_fast_is_enough_to_map(tmp_path, monkeypatch):
    monkeypatch.setattr(file_bytes, "PROBE_BYTES", 40)
    answers = iter(["read", "map"])
    monkeypatch.setattr(file_bytes, "faster_way", lambda mapping, reading: next(answers))
    path = tmp_path / "large.bin"
    path.write_bytes(NUMBERS.numpy().tobytes())
    file = FileBytes(path, "auto")
    file.tensor(0, 256, torch.float32, "a large one")
    assert file.way == "map"


@pytest.mark.parametrize("way", ["map", "auto"])
def test_a_file_system_without_mapping_is_read(path, way, monkeypatch):
    def fail(*_, **__):
        raise OSError("no such device")

    monkeypatch.setattr(file_bytes.mmap, "mmap", fail)
    monkeypatch.setattr(file_bytes, "PROBE_BYTES", 40)
    file = FileBytes(path, way)
    assert torch.equal(file.tensor(4, 256, torch.float32, "numbers"), NUMBERS)
    assert file.way == "read"


def test_forgotten_pages_come_in_again(path):
    file = FileBytes(path, "map")
    path_size = 3 * 4096
    path.write_bytes(bytes(path_size - 1) + b"z")
    held = file.tensor(0, path_size, torch.uint8, "numbers")
    file.forget(0, path_size)
    assert held[-1] == ord("z")


def test_bytes_are_read_into_memory_of_the_callers_and_nothing_is_mapped(path):
    file, memory = FileBytes(path), torch.zeros(300, dtype=torch.uint8)
    file.read_into(memory[8:264], 4, "numbers")
    assert torch.equal(memory[8:264].view(torch.float32), NUMBERS)
    assert not memory[:8].any()
    assert not memory[264:].any()
    assert file._map is None


def test_several_threads_read_the_same_bytes(tmp_path):
    wanted = torch.randint(0, 256, (3 * SMALLEST + 77,), dtype=torch.uint8)
    (tmp_path / "large").write_bytes(wanted.numpy().tobytes())
    memory = torch.zeros(len(wanted) - 5, dtype=torch.uint8)
    with by_several(3):
        FileBytes(tmp_path / "large").read_into(memory, 5, "numbers")
    assert torch.equal(memory, wanted[5:])


def test_where_no_place_can_be_read_at_bytes_are_the_same(path, monkeypatch):
    monkeypatch.delattr(file_bytes.os, "preadv", raising=False)
    memory = torch.zeros(64, dtype=torch.uint8)
    FileBytes(path).read_into(memory, 4 + 64, "numbers")
    assert torch.equal(memory.view(torch.float32), NUMBERS[16:32])


def test_a_file_that_is_cut_while_it_is_read_from_is_refused_by_name(path):
    file, memory = FileBytes(path), torch.zeros(256, dtype=torch.uint8)
    file.read_into(memory, 4, "tensor a")
    with path.open("r+b") as writer:
        writer.truncate(100)
    with pytest.raises(FileError, match=r"numbers\.bin ended while tensor a was read"):
        file.read_into(memory, 4, "tensor a")
    with pytest.raises(FileError, match=r"numbers\.bin ended while tensor a was read"):
        file._fill(memory, file._fd, 4, "tensor a")  # cut between the look at its size and the read
