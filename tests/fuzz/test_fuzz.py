"""The fuzzing finds what it looks for: targets that misbehave on purpose are told apart, and equal seeds repeat."""

from __future__ import annotations

import errno
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from flux.errors import FileError
from tests.fuzz.__main__ import Tally, cases, fuzz, table
from tests.fuzz.damage import damaged
from tests.fuzz.json_trees import mutated_json, parse
from tests.fuzz.seeds import READERS, seeds
from tests.fuzz.worker import CRASH, DIED, HUNG, MEMORY, MESSAGE, OPENED, REFUSED, STATUS, Result, Worker, examine

MB = 1 << 20
PATIENCE = 2.0  # seconds; the target that hangs costs a test this much


def fail(error: BaseException) -> None:
    raise error


def take_and_say_so(path: Path) -> None:
    try:
        bytearray(80 * MB)
    except MemoryError as error:
        raise FileError(f"{path.name} is too large") from error


WAYS = {
    "open": lambda path: None,
    "open again": lambda path: None,
    "crash": lambda path: fail(ZeroDivisionError("by nothing")),
    "exit": lambda path: fail(SystemExit(3)),
    "die": lambda path: os.abort(),
    "hang": lambda path: time.sleep(60),
    "refuse": lambda path: fail(FileError(f"{path.name} is damaged; download it again")),
    "refuse another": lambda path: fail(FileError("something is damaged; download it again")),
    "refuse in lines": lambda path: fail(FileError(f"{path.name} is damaged;\ndownload it again")),
    "take": lambda path: bytearray(80 * MB),
    "take untouched": lambda path: np.empty(80 * MB, np.uint8),
    "take by torch": lambda path: torch.zeros(20 * MB),
    "take and say so": take_and_say_so,
    "take a little": lambda path: torch.zeros(10 * MB),
    "take what its size allows": lambda path: bytearray(150 * MB),
}


def misbehave(path: Path) -> None:
    """Do what the file's name says."""
    if path.name.replace("-", " ") in WAYS:  # the process opens the seeds first, which are not
        WAYS[path.name.replace("-", " ")](path)


EXPECTED = {
    "open": OPENED,
    "crash": CRASH,
    "exit": CRASH,
    "die": DIED,
    "hang": HUNG,
    "refuse": REFUSED,
    "refuse another": MESSAGE,
    "refuse in lines": MESSAGE,
}
MEMORY_EXPECTED = {
    "take": MEMORY,
    "take untouched": MEMORY,
    "take by torch": MEMORY,
    "take and say so": MEMORY,
    "take a little": OPENED,
    "take what its size allows": OPENED,
}


def test_what_a_target_does_is_told_apart_and_the_next_file_is_opened_all_the_same(tmp_path):
    expected = {**EXPECTED, **(MEMORY_EXPECTED if STATUS.exists() else {}), "open again": OPENED}
    found = {}
    with Worker("tests.fuzz.test_fuzz:misbehave", PATIENCE) as worker:
        for word in expected:
            path = tmp_path / word.replace(" ", "-")
            path.touch()
            if "size" in word:
                os.truncate(path, 100 * MB)
            found[word] = worker.examine(path)
    assert {word: result.outcome for word, result in found.items()} == expected
    if STATUS.exists():
        assert found["take a little"].peak > 39 * MB


def test_want_of_memory_is_seen_through_other_errors(tmp_path):
    def target(path):
        try:
            raise OSError(errno.ENOMEM, "no memory")
        except OSError as error:
            raise FileError(f"{path.name} cannot be read") from error

    assert examine(tmp_path / "a", target).outcome == MEMORY


@pytest.mark.parametrize("reader", READERS)
def test_equal_seeds_give_equal_files_and_others_others(reader):
    one, same = [[files for _, _, files in cases(reader, 20, seed=3)] for _ in range(2)]
    other = [files for _, _, files in cases(reader, 20, seed=4)]
    assert one == same
    assert one != other


@pytest.mark.parametrize("reader", READERS)
def test_damage_changes_something_nearly_always_and_no_seed(reader):
    whole = [dict(seed.files) for seed in seeds(reader)]
    same = sum(files == origin.files for _, origin, files in cases(reader, 300, seed=0))
    assert same < 30
    assert whole == [seed.files for seed in seeds(reader)]


def test_changed_json_stays_json_mostly():
    text = '{"a":{"b":[1,2],"c":"d"},"e":{"f":null}}'
    changed = [mutated_json(text, random.Random(number)) for number in range(200)]
    readable = 0
    for candidate in changed:
        try:
            parse(candidate)
        except (ValueError, RecursionError):
            continue
        readable += 1
    assert 120 < readable < 200
    assert len(set(changed)) > 100


def test_a_failure_is_kept_and_counted(tmp_path):
    class Refuser:
        def examine(self, path):
            return Result(MESSAGE, "it names no file")

    tally = fuzz("gguf", 3, 0, tmp_path / "kept", Refuser())
    assert tally.outcomes[MESSAGE] == len(tally.failures) == 3
    kept = sorted((tmp_path / "kept").iterdir())
    assert [folder.name for folder in kept] == [f"gguf-0-{number}-message" for number in range(3)]
    number, origin, files = next(cases("gguf", 1, 0))
    assert damaged(origin, random.Random()) != {}
    assert (kept[number] / "m.gguf").read_bytes() == files["m.gguf"]


def test_the_table_has_a_row_for_each_reader():
    lines = table([Tally("safetensors"), Tally("gguf")]).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| reader", "| ---", "| safetensors", "| gguf"]
    assert len({line.count("|") for line in lines}) == 1
