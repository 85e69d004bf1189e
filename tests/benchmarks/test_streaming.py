"""What streaming costs, on a small transformer: every limit is kept, and all outputs are equal."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import planned, streaming
from benchmarks.planned import Case
from benchmarks.random_files import FORMATS
from tests.benchmarks.figures import rows_of
from tests.tiny import TINY

DEEP = replace(TINY, name="deep", title="a deep one", double_blocks=2, single_blocks=4)


def test_fewer_weights_in_memory_give_the_same_output(monkeypatch):
    monkeypatch.setattr(streaming, "MIDDLE", DEEP)
    monkeypatch.setattr("benchmarks.transformer.ROWS", 2)
    monkeypatch.setattr("benchmarks.transformer.COLUMNS", 2)
    monkeypatch.setattr(streaming, "ROWS", 2)
    monkeypatch.setattr(streaming, "COLUMNS", 2)
    report = streaming.table(repeats=1)
    assert "equal to the bit" in report.text
    assert report.data["equal"]
    rows = rows_of(report)
    streamed, sizes = ([row[name] for row in rows] for name in ("blocks_streamed", "bytes"))
    assert streamed == sorted(streamed)
    assert (streamed[0], streamed[-1]) == (0, 6)
    assert sizes == sorted(sizes, reverse=True)
    assert [row["bar"] for row in rows] == [None, None, 1.25, None, None]
    assert rows[0]["ratio"] == 1
    assert [line.split(" | ")[1] for line in report.text.splitlines() if " MiB" in line] == list(map(str, streamed))


def test_a_case_is_planned_and_measured_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(planned, "SMALL", DEEP)
    report = planned.table(cases=planned.CASES[:1])
    [row] = rows_of(report)
    assert row["planned_bytes"] > 0
    assert row["taken_bytes"] > 0
    assert row["off"] == row["planned_bytes"] / row["taken_bytes"] - 1
    assert f"| {planned.CASES[0].name} | " in report.text


def test_the_cases_are_a_dozen_and_of_every_kind():
    cases = planned.CASES
    assert len(cases) == len(set(cases)) >= 12
    for name in ("side", "batch", "stored", "policy", "references"):
        assert len({getattr(case, name) for case in cases}) > 1
    assert {case.stored for case in cases} <= {"bf16", *FORMATS}
    assert Case(512).name == "transformer: 512², batch 1, bf16, keep"


def test_of_a_transformers_processes_the_median_is_told(monkeypatch):
    taken = iter([300, 100, 110, 500])
    monkeypatch.setattr(planned, "_in_process", lambda path, case, device: (120, next(taken)))
    monkeypatch.setattr(planned, "write_random", lambda path, *_: path.touch())
    rows = rows_of(planned.table(cases=(planned.CASES[0], planned.OTHERS[0])))
    assert [row["taken_bytes"] for row in rows] == [110, 500]
