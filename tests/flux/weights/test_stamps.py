"""A file is known again by its stamp and samples, and another one is told from it, without being read whole."""

from __future__ import annotations

import os

import pytest

from flux.weights.readers import stamps
from flux.weights.readers.stamps import HEAD_BYTES, SAMPLES, fingerprint, stamp_of

WRITTEN = 1_000_000_000_000_000_000
SIZE = HEAD_BYTES + (1 << 20)


@pytest.fixture(autouse=True)
def nothing_remembered():
    fingerprint.cache_clear()


@pytest.fixture
def path(tmp_path):
    return make(tmp_path / "a.bin")


def make(path, change=None, written=WRITTEN):
    content = bytearray(os.urandom(1) * SIZE if change is None else b"x" * SIZE)
    for place, value in (change or {}).items():
        content[place] = value
    path.write_bytes(content)
    os.utime(path, ns=(written, written))
    return path


def stamp(path):
    with path.open("rb") as file:
        return stamp_of(file.fileno())


def known_as(path):
    return fingerprint(path, stamp(path))


def test_a_file_is_known_again_and_a_moved_one_too(path, tmp_path):
    before = known_as(path)
    fingerprint.cache_clear()
    assert known_as(path) == before
    assert known_as(path.rename(tmp_path / "b.bin")) == before


def test_a_file_written_at_another_time_is_another(path):
    before = known_as(path)
    os.utime(path, ns=(WRITTEN, WRITTEN + 1))
    assert known_as(path) != before


@pytest.mark.parametrize("place", [0, HEAD_BYTES - 1, SIZE // SAMPLES * 200, SIZE // SAMPLES * 255 + 9])
def test_files_of_one_size_and_time_are_told_apart_by_head_and_samples(tmp_path, place):
    one, other = make(tmp_path / "1", {}), make(tmp_path / "2", {place: 0})
    assert known_as(one) != known_as(other)


def test_little_of_a_large_file_is_read(tmp_path, monkeypatch):
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(10 << 30)  # sparse
    counted = []
    monkeypatch.setattr(stamps.hashlib, "sha256", lambda _: Counting(counted))
    assert known_as(path) == "hash"
    assert sum(counted) <= HEAD_BYTES + SAMPLES * stamps.SAMPLE_BYTES


class Counting:
    def __init__(self, counted):
        self.counted = counted

    def update(self, data):
        self.counted.append(len(data))

    def hexdigest(self):
        return "hash"


def test_a_path_that_leads_elsewhere_by_now_has_none(path, tmp_path):
    opened = stamp(path)
    os.replace(make(tmp_path / "other"), path)
    assert fingerprint(path, opened) is None


def test_a_file_that_is_gone_has_none(path):
    opened = stamp(path)
    path.unlink()
    assert fingerprint(path, opened) is None
