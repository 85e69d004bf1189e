"""Opening the largest file that people have: FLUX.1 [dev] in 16 bits, 24 GB.

What is opened is a whole file by its header, with every tensor's real name and shape, and sparse, for opening reads
nothing else. The time is that of ``open_transformer``: the header, what the file is, the module on the meta device, and
a binding for each of its parameters; and that of what ``python -m flux inspect`` does besides starting Python. Each
file is opened in a process of its own: once cold, then several times of which the median counts. Memory is how far the
process's peak resident set grows meanwhile. ``python -m benchmarks.opening``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux.pipelines.describe import describe
from flux.pipelines.parts import open_transformer
from flux.weights.formats.gguf_blocks import BLOCKS

from .machine import peak_resident
from .report import Report

__all__ = ["Opened", "main", "measure", "table", "write_sparse"]

REPEATS = 15
MILLI = 1e-3
MB, GB = 1e6, 1e9
TIME_BAR, MEMORY_BAR = 50 * MILLI, 50 * MB

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Opened:
    """Seconds of the first opening and the median of the others, the same of inspecting, and bytes of memory."""

    first: float
    again: float
    inspect_first: float
    inspect_again: float
    memory: int


def write_sparse(path: Path, shapes: Shapes) -> Path:
    """A whole file of these tensors in BF16 (vectors of a GGUF file in F32), all zero, that takes no room on disk."""
    from tests.tiny import write_header_only

    if path.suffix != ".gguf":
        return write_header_only(path, shapes)
    import gguf

    writer = gguf.GGUFWriter(str(path), "flux")
    room = 0
    for name, shape in shapes.items():
        kind = "BF16" if len(shape) > 1 else "F32"
        nbytes = math.prod(shape) * BLOCKS[kind].bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, gguf.GGMLQuantizationType[kind])
        room += writer.ggml_pad(nbytes, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, writer.ggml_pad(path.stat().st_size, writer.data_alignment) + room)
    return path


def measure(path: Path, repeats: int = REPEATS) -> Opened:
    """Open a file in this process, which has not opened one before."""
    cpu = torch.device("cpu")
    before = peak_resident()
    first, again = _timed(lambda: open_transformer(path, cpu), repeats)
    memory = peak_resident() - before
    return Opened(first, again, *_timed(lambda: describe(path), repeats), memory)


def _timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Seconds of the first run, and the median of as many others."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:])


def measure_apart(path: Path, repeats: int = REPEATS) -> Opened:
    """``measure`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.opening", "--file", str(path), "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Opened(**json.loads(done.stdout))


def table(shapes: Shapes | None = None, repeats: int = REPEATS) -> Report:
    """Times and memory; of FLUX.1 [dev], or of a transformer with these tensors."""
    from tests.fixtures.listings import flux1_bfl

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".safetensors", ".gguf"):
            path = write_sparse(Path(folder) / f"flux1-dev{suffix}", shapes or flux1_bfl())
            rows.append(_figures(path, measure_apart(path, repeats)))
    text = "\n".join(
        (
            "| FLUX.1 [dev] in 16 bits, one file | open, cold | open | bar | memory | bar | inspect, cold | inspect |",
            "|---|---|---|---|---|---|---|---|",
            *map(_row, rows),
        )
    )
    return Report(text, {"repeats": repeats, "rows": rows})


def _figures(path: Path, one: Opened) -> dict[str, Any]:
    return {
        "container": path.suffix.lstrip("."),
        "file_bytes": path.stat().st_size,
        "open_cold_seconds": one.first,
        "open_seconds": one.again,
        "open_bar": TIME_BAR,
        "memory_bytes": one.memory,
        "memory_bar": MEMORY_BAR,
        "inspect_cold_seconds": one.inspect_first,
        "inspect_seconds": one.inspect_again,
    }


def _row(one: Mapping[str, Any]) -> str:
    cold, again, bar, inspect_cold, inspect = (
        f"{one[name] / MILLI:.0f} ms"
        for name in ("open_cold_seconds", "open_seconds", "open_bar", "inspect_cold_seconds", "inspect_seconds")
    )
    return (
        f"| {one['container']}, {one['file_bytes'] / GB:.1f} GB | {cold} | **{again}** | ≤ {bar} "
        f"| **{one['memory_bytes'] / MB:.1f} MB** | ≤ {one['memory_bar'] / MB:.0f} MB | {inspect_cold} | {inspect} |"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or with ``--file`` what this process measures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.opening", description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="default: %(default)s")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.file:
        sys.stdout.write(json.dumps(asdict(measure(options.file, options.repeats))))
    else:
        sys.stdout.write(f"{table(repeats=options.repeats)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
