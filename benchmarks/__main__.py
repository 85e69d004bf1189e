"""Every table that the project publishes: ``python -m benchmarks`` (or ``make bench``).

``--quick`` leaves the slow ones out: fidelity, decoding, what the embedded models draw of prompts and under guidance,
the step beside other engines, for one picture and several, what streaming costs, how near plans come to what runs take,
what a step cache saves, what compiling brings.
``--fidelity`` prints what each storage format costs, and nothing else. What a GPU does has a command of its own:
``python -m benchmarks.gpu``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flux.mini.files import FOLDER, GUIDED_FILES, MINI
from flux.mini.train_autoencoder import psnr_on_fresh_scenes
from flux.models.autoencoder import Autoencoder
from flux.pipelines.parts import open_autoencoder
from flux.version import VERSION
from flux.weights.readers.gguf import GgufFile
from flux.weights.readers.safetensors import SafetensorsFile

from . import (
    batches,
    compiled,
    decoding,
    fidelity,
    guided,
    opening,
    planned,
    prompts,
    startup,
    step_cache,
    streaming,
    transformer,
)
from .machine import processor
from .report import Report

__all__ = ["main"]

TABLES = Path(__file__).resolve().parent / "tables"
PSNR_SCENES = 200
PSNR_BAR = 34.0
MOST_MB = 32  # of the models that draw from text, and again of those that pictures guide
MB = 1e6


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, and keep them in ``benchmarks/tables`` if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only what takes seconds")
    parser.add_argument("--fidelity", action="store_true", help="only what each storage format costs")
    parser.add_argument("--count", type=int, default=600, help="prompts for each embedded model (default: %(default)s)")
    parser.add_argument(
        "--cases", type=int, default=200, help="pictures for each embedded guided model (default: %(default)s)"
    )
    parser.add_argument("--write", action="store_true", help=f"keep the tables in {TABLES.parent.name}/{TABLES.name}")
    options = parser.parse_args(arguments)
    parts: dict[str, Callable[[], str | Report]] = {
        "environment": environment,
        "embedded": embedded,
        "startup": startup.table,
        "opening": opening.table,
    }
    if not options.quick:
        parts["fidelity"] = fidelity.table
        parts["decoding"] = decoding.table
        parts["prompts"] = lambda: prompts.table(options.count)
        parts["guided"] = lambda: guided.table(options.cases)
        parts["transformer"] = transformer.table
        parts["batches"] = batches.table
        parts["streaming"] = streaming.table
        parts["planned"] = planned.table
        parts["step_cache"] = step_cache.table
        parts["compiled"] = compiled.table
    if options.fidelity:
        parts = {"fidelity": fidelity.table}
    for name, make in parts.items():
        found = make()
        sys.stdout.write(f"## {name}\n\n{found}\n\n")
        sys.stdout.flush()
        if options.write:
            TABLES.mkdir(exist_ok=True)
            (TABLES / f"{name}.md").write_text(f"{found}\n", encoding="utf-8")
            if isinstance(found, Report):
                data = {"environment": environment(), **found.data}
                (TABLES / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


def environment() -> str:
    """Where and when the figures were taken."""
    return (
        f"FLUX Foundry {VERSION}, torch {torch.__version__}, Python {platform.python_version()}, {processor()}, "
        f"{torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}"
    )


def embedded() -> str:
    """Sizes of the embedded files, and the autoencoder's fidelity on fresh scenes."""
    rows = []
    readers = {".safetensors": SafetensorsFile, ".gguf": GgufFile}
    for path in sorted(path for path in FOLDER.iterdir() if path.suffix in readers):
        count = sum(math.prod(entry.shape) for entry in readers[path.suffix](path).values())
        rows.append(f"| {path.name} | {count / MB:.2f} M | {path.stat().st_size / MB:.2f} MB |")
    guided_bytes = sum(path.stat().st_size for path in GUIDED_FILES)
    text_bytes = sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) - guided_bytes
    part = open_autoencoder(MINI.autoencoder, torch.device("cpu"), torch.float32)
    with part.resident() as autoencoder:
        assert isinstance(autoencoder, Autoencoder)
        psnr = psnr_on_fresh_scenes(autoencoder, PSNR_SCENES)
    return "\n".join(
        (
            "| file | parameters | size |",
            "|---|---|---|",
            *rows,
            f"| all that draw from text | | **{text_bytes / MB:.2f} MB** (bar: {MOST_MB}) |",
            f"| all that pictures guide | | **{guided_bytes / MB:.2f} MB** (bar: {MOST_MB}) |",
            "",
            f"Autoencoder on {PSNR_SCENES} scenes that training never drew: **{psnr:.2f} dB** PSNR "
            f"(bar: {PSNR_BAR:.0f}).",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
