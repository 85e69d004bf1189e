"""What compiling brings, on a small transformer and with a compiler that leaves graphs as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import compiled
from flux.pipelines import compiled as engine
from tests.benchmarks.figures import rows_of
from tests.tiny import TINY

DEEP = replace(TINY, name="deep", title="a deep one", double_blocks=2, single_blocks=4)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(compiled, "MIDDLE", DEEP)
    monkeypatch.setattr("benchmarks.transformer.ROWS", 2)
    monkeypatch.setattr("benchmarks.transformer.COLUMNS", 2)
    monkeypatch.setattr(compiled, "ROWS", 2)
    monkeypatch.setattr(compiled, "COLUMNS", 2)
    monkeypatch.setattr(compiled, "LOOKS", 3)
    monkeypatch.setattr(engine, "_compilations", {})
    monkeypatch.setattr(engine, "_faults", {})


def test_every_case_is_timed_and_only_the_first_one_compiles(monkeypatch):
    monkeypatch.setattr(engine, "INDUCTOR", "eager")
    report = compiled.table(repeats=1)
    rows = rows_of(report)
    assert [row["name"] for row in rows] == [case.name for case in compiled.CASES]
    assert [row["compilations"] for row in rows] == [2, 0, 0]
    assert all(row["difference"] < 1e-5 for row in rows)
    assert all(row["ratio"] == row["compiled_seconds"] / row["seconds"] for row in rows)
    assert report.data["look_seconds"] > 0
    assert all(f"| {case.name} | " in report.text for case in compiled.CASES)
    assert "are finite takes" in report.text


def test_where_nothing_can_be_compiled_there_is_no_table(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(engine, "INDUCTOR", fail)
    with pytest.raises(RuntimeError, match=r"could not be compiled \(RuntimeError: no compiler\)"):
        compiled.table(repeats=1, cases=compiled.CASES[:1])
    assert not torch.is_inference_mode_enabled()
