"""The table of the embedded files, on two scenes."""

from __future__ import annotations

from benchmarks import __main__ as benchmarks
from flux.mini.files import MINI
from tests.benchmarks.figures import rows_of


def test_every_file_is_counted_and_all_of_them_keep_their_bars(monkeypatch):
    monkeypatch.setattr(benchmarks, "PSNR_SCENES", 2)
    report = benchmarks.embedded()
    rows = {row["file"]: row for row in rows_of(report)}
    assert rows[MINI.transformer.name]["bytes"] == MINI.transformer.stat().st_size
    assert all(row["parameters"] > 0 for row in rows.values())
    sums = report.data["sums"]
    assert all(one["bytes"] <= one["bar"] == 32e6 for one in sums)
    assert sum(one["bytes"] for one in sums) >= sum(row["bytes"] for row in rows.values())
    assert report.data["psnr"] > 25
    assert str(report).count("(bar: 32) |") == len(sums)
