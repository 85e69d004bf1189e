"""Several pictures at once, on a small transformer."""

from __future__ import annotations

import pytest

from benchmarks import batches
from tests.benchmarks.figures import rows_of
from tests.tiny import TINY


def test_every_batch_is_timed_and_compared_with_one_alone(monkeypatch):
    monkeypatch.setattr(batches, "MIDDLE", TINY)
    for name in ("benchmarks.transformer", "benchmarks.batches"):
        monkeypatch.setattr(f"{name}.ROWS", 2)
        monkeypatch.setattr(f"{name}.COLUMNS", 2)
    rows = rows_of(batches.table(repeats=1))
    assert [row["batch"] for row in rows] == [1, 2, 4]
    assert rows[0]["ratio"] == 1
    assert rows[2]["ratio"] == pytest.approx(rows[2]["seconds"] / 4 / rows[0]["seconds"])
    assert [row["bar"] for row in rows] == [None, None, 1.0]


def test_a_bar_is_judged(monkeypatch):
    monkeypatch.setattr(batches, "MIDDLE", TINY)
    monkeypatch.setattr(batches, "measure", lambda path, count, repeats: {1: [1.0, 2.0, 1.0], 4: [4.4, 8.0, 4.8]})
    text = batches.table().text
    assert "| 4 | 4.80 s | 1.20 s | **1.100** | ≤ 1.00 | MISSED |" in text
