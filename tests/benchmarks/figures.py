"""The figures of a table, as a program reads them."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.report import Report


def rows_of(report: Report) -> list[dict[str, Any]]:
    """A table's rows, out of the JSON that is kept of it."""
    data = json.loads(json.dumps(report.data, allow_nan=False))
    assert data["rows"]
    return list(data["rows"])
