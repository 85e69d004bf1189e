"""How long the command line takes to start and to draw: whole processes, as a user runs them."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

__all__ = ["table"]

REPEATS = 5
PROMPT = "a red circle on the left and a blue square on the right"
START_BAR, DRAW_BAR = 4.0, 3.0
DRAWING = ("text", "sampling", "decoding")


def table() -> str:
    """Medians of start-up and drawing of ``flux1-mini`` (16 steps, 128x128) in seconds, as Markdown."""
    starts, draws = zip(*(_run() for _ in range(REPEATS)), strict=True)
    return "\n".join(
        (
            f"| `generate` with mini, 16 steps, 128x128, median of {REPEATS} | seconds | bar |",
            "|---|---|---|",
            f"| start-up: interpreter, imports, opening | **{statistics.median(starts):.2f}** | ≤ {START_BAR:.0f} |",
            f"| text, 16 steps, decoding | **{statistics.median(draws):.2f}** | ≤ {DRAW_BAR:.0f} |",
        )
    )


def _run() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "flux", "generate", PROMPT, "--seed", "7", "--out", f"{folder}/a.png"]
        start = time.perf_counter()
        subprocess.run([*command, "--record", "--quiet"], check=True, capture_output=True)
        whole = time.perf_counter() - start
        record = json.loads(next(Path(folder).glob("*.json")).read_text(encoding="utf-8"))
    drawing = sum(record["seconds"].get(stage, 0.0) for stage in DRAWING)
    return whole - drawing, drawing
