"""The comparison of decoders, on matrices of a few blocks."""

from __future__ import annotations

import pytest
import torch

from benchmarks import decoding
from benchmarks.decoding import (
    BARRED,
    MALLOC,
    measure,
    measure_apart,
    random_blocks,
    sides_of_gguf,
    sides_of_nf4,
    table,
)
from flux.weights.formats.gguf_blocks import BLOCKS, GGUF_FORMATS
from tests.benchmarks.figures import rows_of

SHAPE = (4, 512)


@pytest.mark.parametrize("name", [*GGUF_FORMATS, "nf4"])
def test_both_sides_of_a_type_decode_the_same_ordinary_numbers(name):
    ours, theirs = sides_of_nf4(SHAPE) if name == "nf4" else sides_of_gguf(name, SHAPE)
    numbers = ours()
    assert numbers.shape == SHAPE
    assert numbers.isfinite().all()
    assert numbers.std() > 0.3
    assert torch.equal(numbers, theirs())


def test_blocks_are_as_many_as_the_matrix_has_and_the_same_for_a_seed():
    blocks = random_blocks("Q4_K", SHAPE)
    assert blocks.shape == (SHAPE[0] * SHAPE[1] // BLOCKS["Q4_K"].values, BLOCKS["Q4_K"].bytes)
    assert torch.equal(blocks, random_blocks("Q4_K", SHAPE))
    assert not torch.equal(blocks, random_blocks("Q4_K", SHAPE, seed=1))


def test_numbers_that_differ_stop_the_measuring(monkeypatch):
    monkeypatch.setattr(decoding, "sides_of_nf4", lambda shape: (lambda: torch.zeros(shape), lambda: torch.ones(shape)))
    with pytest.raises(AssertionError, match="nf4 decodes to other numbers"):
        measure("nf4", SHAPE, 1)


def test_what_other_processes_had_of_the_cores_is_told(monkeypatch):
    times = iter([(10.0, 4.0, 2.0), (30.0, 16.0, 9.0)])
    monkeypatch.setattr(decoding, "_processor_times", lambda: next(times))
    assert measure("nf4", SHAPE, 1).foreign == pytest.approx(5 / 20)


def test_the_table_has_a_row_for_each_type_with_its_bar(monkeypatch):
    asked = []

    def fake(names, shape, repeats, malloc=None):
        asked.append((tuple(names), malloc))
        return [decoding.Measured(name, 1000, 1e-6, 7e-6 if malloc is None else 4e-6, 0.12) for name in names]

    monkeypatch.setattr(decoding, "measure_apart", fake)
    report = table()
    rows = {row.split("|")[1].strip(): row for row in str(report).splitlines() if row.startswith("| ")}
    assert set(GGUF_FORMATS) | {"nf4"} <= set(rows)
    assert "Other processes had up to 12 %" in str(report)
    for name in BARRED:
        assert rows[name] == f"| {name} | 1.00 | 4.0 | 0.143 | **7.0** | ≥ 5 | 4.0 |"
    assert rows["Q2_K"] == "| Q2_K | 1.00 | 4.0 | 0.143 | **7.0** |  |  |"
    figures = {row["name"]: row for row in rows_of(report)}
    assert list(figures) == [*GGUF_FORMATS, "nf4"]
    assert (figures["nf4"]["bar"], figures["Q2_K"]["bar"]) == (5.0, None)
    assert figures["nf4"]["ratio"] == pytest.approx(7)
    assert figures["nf4"]["ratio_with_malloc_settings"] == pytest.approx(4)
    assert figures["Q2_K"]["ratio_with_malloc_settings"] is None
    assert asked[0][1] is None
    assert set(asked[1][0]) == set(BARRED)
    assert asked[1][1] == MALLOC


def test_a_process_of_its_own_has_no_malloc_settings_but_those_it_is_given(monkeypatch):
    seen = {}

    def run(command, env, **_):
        seen.update(env)
        return type("Done", (), {"stdout": '[{"name": "nf4", "count": 1, "ours": 1, "theirs": 2}]'})()

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    monkeypatch.setattr(decoding.subprocess, "run", run)
    (one,) = measure_apart(["nf4"], SHAPE, 1)
    assert one.ratio == 2
    assert not any(key.startswith("MALLOC_") for key in seen)
    assert "PATH" in seen
    measure_apart(["nf4"], SHAPE, 1, MALLOC)
    assert MALLOC.items() <= seen.items()
