"""What streaming costs, on a small transformer: every limit is kept, and all outputs are equal."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import planned, streaming
from benchmarks.planned import Case
from benchmarks.random_files import FORMATS
from tests.tiny import TINY

DEEP = replace(TINY, name="deep", title="a deep one", double_blocks=2, single_blocks=4)


def test_fewer_weights_in_memory_give_the_same_output(monkeypatch):
    monkeypatch.setattr(streaming, "MIDDLE", DEEP)
    monkeypatch.setattr("benchmarks.transformer.ROWS", 2)
    monkeypatch.setattr("benchmarks.transformer.COLUMNS", 2)
    monkeypatch.setattr(streaming, "ROWS", 2)
    monkeypatch.setattr(streaming, "COLUMNS", 2)
    text = streaming.table(repeats=1)
    assert "equal to the bit" in text
    rows = [line.split(" | ") for line in text.splitlines() if " MiB" in line]
    assert [int(row[1]) for row in rows] == sorted(int(row[1]) for row in rows)
    assert (rows[0][1], rows[-1][1]) == ("0", "6")
    sizes = [int(row[2].removesuffix(" MiB")) for row in rows]
    assert sizes == sorted(sizes, reverse=True)


def test_a_case_is_planned_and_measured_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(planned, "SMALL", DEEP)
    text = planned.table(cases=planned.CASES[:1])
    [row] = [line for line in text.splitlines() if line.startswith("| 256")]
    foreseen, taken = (int(cell.removesuffix(" MiB")) for cell in row.split(" | ")[1:3])
    assert foreseen > 0
    assert taken > 0


def test_the_cases_are_a_dozen_and_of_every_kind():
    cases = planned.CASES
    assert len(cases) == len(set(cases)) >= 12
    for name in ("side", "batch", "stored", "policy", "references"):
        assert len({getattr(case, name) for case in cases}) > 1
    assert {case.stored for case in cases} <= {"bf16", *FORMATS}
    assert Case(512).name == "512², batch 1, bf16, keep"
