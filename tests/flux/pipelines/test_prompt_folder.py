"""Entries on disk: whole or not there, checked when they are read, and gone when they are cleared."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux.errors import UserError
from flux.pipelines.prompt_folder import Cleared, FolderStore, clear_folder, kept_files

KEY, OTHER = "a" * 64, "b" * 64
TENSORS = {
    "tokens": torch.linspace(-1, 1, 24).view(1, 4, 6),
    "pooled": torch.linspace(0, 1, 5, dtype=torch.bfloat16)[None],
}


@pytest.fixture
def told():
    return []


@pytest.fixture
def store(tmp_path, told):
    return FolderStore(tmp_path / "prompts", tell=told.append)


def file_of(store, key=KEY):
    return store.folder / f"prompt-{key}.safetensors"


def same(found, tensors=TENSORS):
    return found.keys() == tensors.keys() and all(
        torch.equal(found[name], own) and found[name].dtype == own.dtype for name, own in tensors.items()
    )


def test_an_entry_comes_back_to_the_bit_also_to_another_process(store, told):
    assert store.get(KEY) is None
    store.put(KEY, TENSORS, "t5xxl")
    assert same(store.get(KEY))
    assert same(FolderStore(store.folder).get(KEY))
    assert store.get(OTHER) is None
    assert told == []


def test_its_file_is_one_that_others_read_and_says_what_made_it(store):
    store.put(KEY, TENSORS, "t5xxl")
    assert same(load_file(file_of(store)))
    [entry] = kept_files(store.folder)
    assert (entry.path, entry.about, entry.nbytes) == (file_of(store), "t5xxl", file_of(store).stat().st_size)


def cut(path):
    os.truncate(path, path.stat().st_size - 7)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def swap(path):
    save_file(TENSORS, path)


def rename(path):
    store = FolderStore(path.parent)
    store.put(OTHER, {"tokens": torch.zeros(1)})
    os.replace(file_of(store, OTHER), path)


@pytest.mark.parametrize("harm", [cut, flip, empty, swap, rename])
def test_what_is_damaged_or_foreign_is_told_of_and_written_again(store, told, harm):
    store.put(KEY, TENSORS)
    harm(file_of(store))
    assert store.get(KEY) is None
    [sentence] = told
    assert sentence.startswith(f"a prompt is encoded again, for its kept embedding cannot be used: prompt-{KEY}")
    store.put(KEY, TENSORS)
    assert same(store.get(KEY))
    assert len(told) == 1


def test_what_cannot_be_written_is_told_of_and_harms_nothing(store, told):
    file_of(store).mkdir(parents=True)
    store.put(KEY, TENSORS)
    [sentence] = told
    assert sentence.startswith("the embedding of a prompt could not be kept: ")
    assert store.get(KEY) is None
    assert [path.name for path in store.folder.iterdir()] == [file_of(store).name]


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        FolderStore(tmp_path / "file")


def test_what_was_not_used_for_longest_makes_room(store):
    for number, key in enumerate("cde"):
        store.put(key * 64, TENSORS)
        os.utime(file_of(store, key * 64), ns=(number, number))
    store.get("c" * 64)
    store.most_bytes = 3 * file_of(store, "c" * 64).stat().st_size
    store.put(KEY, TENSORS)
    assert {entry.path.name[7] for entry in kept_files(store.folder)} == {"a", "c", "e"}


def test_the_newest_stays_though_it_is_too_large(store):
    store.most_bytes = 1
    store.put(OTHER, TENSORS)
    store.put(KEY, TENSORS)
    assert [entry.path for entry in kept_files(store.folder)] == [file_of(store)]


def test_clearing_removes_entries_and_what_was_left_half_written_and_nothing_else(store):
    store.put(KEY, TENSORS)
    store.put(OTHER, TENSORS)
    size = sum(entry.nbytes for entry in kept_files(store.folder))
    (store.folder / f".{file_of(store).name}.0123456789abcdef.part").write_text("half")
    others = ["flux1-dev.safetensors", f"prompt-{'g' * 64}.safetensors", "notes.txt"]
    for name in others:
        (store.folder / name).write_text("mine")
    assert clear_folder(store.folder) == Cleared(2, size)
    assert sorted(path.name for path in store.folder.iterdir()) == sorted(others)
    assert clear_folder(store.folder) == clear_folder(store.folder / "absent") == Cleared()


def test_two_that_write_and_read_at_once_do_not_disturb_each_other(store, told):
    def use(number):
        own = FolderStore(store.folder, tell=told.append)
        own.put(KEY, TENSORS)
        return own.get(KEY)

    with ThreadPoolExecutor(4) as pool:
        assert all(same(found) for found in pool.map(use, range(40)))
    assert told == []
    assert [path.name for path in store.folder.iterdir()] == [file_of(store).name]
