"""The table of start-up and drawing, without the processes."""

from __future__ import annotations

from benchmarks import startup
from tests.benchmarks.figures import rows_of


def test_the_medians_stand_beside_their_bars(monkeypatch):
    runs = iter([(1.0, 0.25), (9.0, 0.5), (2.0, 9.0), (1.5, 0.125), (3.0, 0.75)])
    monkeypatch.setattr(startup, "_run", lambda: next(runs))
    report = startup.table()
    assert [(row["seconds"], row["bar"]) for row in rows_of(report)] == [(2.0, 4.0), (0.5, 3.0)]
    assert str(report).splitlines()[-2:] == [
        "| start-up: interpreter, imports, opening | **2.00** | ≤ 4 |",
        "| text, 16 steps, decoding | **0.50** | ≤ 3 |",
    ]
