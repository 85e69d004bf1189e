"""What programs get of a table."""

from __future__ import annotations

import math

from benchmarks.report import Report
from tests.benchmarks.figures import rows_of


def test_numbers_that_are_not_finite_are_none_wherever_they_are():
    report = Report("text", {"rows": [{"psnr": math.inf, "ratio": 0.5}], "shape": (2, math.nan), "worst": -math.inf})
    assert report.data == {"rows": [{"psnr": None, "ratio": 0.5}], "shape": [2, None], "worst": None}
    assert rows_of(report) == report.data["rows"]


def test_what_is_no_number_stays():
    assert Report("text", {"rows": [{"name": "fp8", "bar": None, "equal": True}]}).data["rows"] == [
        {"name": "fp8", "bar": None, "equal": True}
    ]
