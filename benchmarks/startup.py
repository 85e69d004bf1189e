"""How long the command line takes to start and to draw: whole processes, as a user runs them."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .report import Report

__all__ = ["table"]

REPEATS = 5
PROMPT = "a red circle on the left and a blue square on the right"
START_BAR, DRAW_BAR = 4.0, 3.0
DRAWING = ("text", "sampling", "decoding")


def table() -> Report:
    """Medians of start-up and drawing of ``flux1-mini`` (16 steps, 128x128)."""
    starts, draws = zip(*(_run() for _ in range(REPEATS)), strict=True)
    rows = [
        {"what": "start-up: interpreter, imports, opening", "seconds": statistics.median(starts), "bar": START_BAR},
        {"what": "text, 16 steps, decoding", "seconds": statistics.median(draws), "bar": DRAW_BAR},
    ]
    text = "\n".join(
        (
            f"| `generate` with mini, 16 steps, 128x128, median of {REPEATS} | seconds | bar |",
            "|---|---|---|",
            *(f"| {row['what']} | **{row['seconds']:.2f}** | ≤ {row['bar']:.0f} |" for row in rows),
        )
    )
    return Report(text, {"repeats": REPEATS, "rows": rows})


def _run() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "flux", "generate", PROMPT, "--seed", "7", "--out", f"{folder}/a.png"]
        start = time.perf_counter()
        subprocess.run([*command, "--record", "--quiet"], check=True, capture_output=True)
        whole = time.perf_counter() - start
        record = json.loads(next(Path(folder).glob("*.json")).read_text(encoding="utf-8"))
    drawing = sum(record["seconds"].get(stage, 0.0) for stage in DRAWING)
    return whole - drawing, drawing
