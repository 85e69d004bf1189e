"""What a step cache saves and costs, on few pictures of few steps: more is skipped, and less is like it was."""

from __future__ import annotations

from benchmarks import step_cache
from tests.benchmarks.figures import rows_of


def test_higher_thresholds_skip_more_and_cost_more():
    exact, *cached = step_cache.measure(12, (0.0, 0.12, 0.5), count=2)
    assert (exact.threshold, exact.skipped, exact.psnr) == (None, [], [float("inf")] * 2)
    assert all(len(run.seconds) == len(run.psnr) == 2 for run in (exact, *cached))
    shares = [sum(skipped.share for skipped in run.skipped) for run in cached]
    assert shares == sorted(set(shares))
    worst = [min(run.psnr) for run in cached]
    assert worst == sorted(set(worst), reverse=True)
    assert worst[0] == float("inf")


def test_the_table_has_a_row_for_each_and_marks_the_default():
    report = step_cache.table((9,), (0.1, 0.5), count=1)
    rows = [line for line in str(report).splitlines() if line.startswith("| 9 ")]
    assert [row.split(" | ")[1] for row in rows] == ["no cache", "**0.1**", "0.5"]
    assert all(row.count("|") == 8 for row in rows)
    exact, *cached = rows_of(report)
    assert (exact["threshold"], exact["ratio"], exact["skipped_steps"], exact["psnr"]) == (None, 1, 0, None)
    assert [row["threshold"] for row in cached] == [0.1, 0.5]
    assert 0 < cached[1]["skipped_share"] < 1
