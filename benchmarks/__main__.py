"""Every table that the project publishes, or those named: ``python -m benchmarks [NAME ...]`` (``make bench``).

Each says under itself what it was taken with. ``--quick`` is for what takes seconds. What a GPU does has a command of
its own: ``python -m benchmarks.gpu``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
from .report import Report, verdict

__all__ = ["main"]

TABLES = Path(__file__).resolve().parent / "tables"
PSNR_SCENES = 200
PSNR_BAR = 34.0
MB = 1e6
MOST_BYTES = 32 * MB  # of the models that draw from text, and again of those that pictures guide

Make = Callable[[argparse.Namespace], Report]

QUICK: dict[str, Make] = {
    "embedded": lambda _: embedded(),
    "startup": lambda _: startup.table(),
    "opening": lambda _: opening.table(),
}
SLOW: dict[str, Make] = {
    "fidelity": lambda _: fidelity.table(),
    "decoding": lambda _: decoding.table(),
    "prompts": lambda options: prompts.table(options.count),
    "guided": lambda options: guided.table(options.cases),
    "transformer": lambda _: transformer.table(),
    "batches": lambda _: batches.table(),
    "streaming": lambda _: streaming.table(),
    "planned": lambda _: planned.table(),
    "step_cache": lambda _: step_cache.table(),
    "compiled": lambda _: compiled.table(),
}


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, and keep them in ``benchmarks/tables`` if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(QUICK | SLOW)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="only what takes seconds")
    parser.add_argument("--count", type=int, default=600, help="prompts for each embedded model (default: %(default)s)")
    parser.add_argument(
        "--cases", type=int, default=200, help="pictures for each embedded guided model (default: %(default)s)"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"keep the tables in {TABLES.parent.name}/{TABLES.name}, as Markdown and JSON",
    )
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(QUICK | SLOW)
    if unknown:
        parser.error(f"there is no table {', '.join(sorted(unknown))}; there are {', '.join(QUICK | SLOW)}")
    missed = []
    for name in options.names or (QUICK if options.quick else QUICK | SLOW):
        report, taken = (QUICK | SLOW)[name](options), environment()
        text = f"{report}\n\n<sub>{taken}</sub>"
        sys.stdout.write(f"## {name}\n\n{text}\n\n")
        sys.stdout.flush()
        if options.write:
            _keep(name, text, {"environment": taken, **report.data})
        if verdict(holds=False) in report.text:
            missed.append(name)
    if missed:
        sys.stderr.write(f"a bar is missed in: {', '.join(missed)}\n")
    return int(bool(missed))


def _keep(name: str, text: str, data: Mapping[str, Any]) -> None:
    TABLES.mkdir(exist_ok=True)
    (TABLES / f"{name}.md").write_text(f"{text}\n", encoding="utf-8")
    (TABLES / f"{name}.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def environment() -> str:
    """Where and when the figures were taken."""
    return (
        f"FLUX Foundry {VERSION}, torch {torch.__version__}, Python {platform.python_version()}, {processor()}, "
        f"{torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}"
    )


def embedded() -> Report:
    """Sizes of the embedded files, and the autoencoder's fidelity on fresh scenes."""
    rows, sums, psnr = _embedded_files(), _embedded_sums(), _embedded_psnr()
    text = "\n".join(
        (
            "| file | parameters | size |",
            "|---|---|---|",
            *(f"| {row['file']} | {row['parameters'] / MB:.2f} M | {row['bytes'] / MB:.2f} MB |" for row in rows),
            *(f"| {one['what']} | | **{one['bytes'] / MB:.2f} MB** (bar: {one['bar'] / MB:.0f}) |" for one in sums),
            "",
            f"Autoencoder on {PSNR_SCENES} scenes that training never drew: **{psnr:.2f} dB** PSNR "
            f"(bar: {PSNR_BAR:.0f}).",
        )
    )
    return Report(text, {"rows": rows, "sums": sums, "psnr": psnr, "psnr_bar": PSNR_BAR, "psnr_scenes": PSNR_SCENES})


def _embedded_files() -> list[dict[str, Any]]:
    """Numbers and bytes of each file of weights."""
    rows = []
    readers = {".safetensors": SafetensorsFile, ".gguf": GgufFile}
    for path in sorted(path for path in FOLDER.iterdir() if path.suffix in readers):
        count = sum(math.prod(entry.shape) for entry in readers[path.suffix](path).values())
        rows.append({"file": path.name, "parameters": count, "bytes": path.stat().st_size})
    return rows


def _embedded_sums() -> list[dict[str, Any]]:
    """Bytes of all files, in two groups, and the most that each may take."""
    guided_bytes = sum(path.stat().st_size for path in GUIDED_FILES)
    text_bytes = sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) - guided_bytes
    return [
        {"what": "all that draw from text", "bytes": text_bytes, "bar": MOST_BYTES},
        {"what": "all that pictures guide", "bytes": guided_bytes, "bar": MOST_BYTES},
    ]


def _embedded_psnr() -> float:
    part = open_autoencoder(MINI.autoencoder, torch.device("cpu"), torch.float32)
    with part.resident() as autoencoder:
        assert isinstance(autoencoder, Autoencoder)
        return psnr_on_fresh_scenes(autoencoder, PSNR_SCENES)


if __name__ == "__main__":
    sys.exit(main())
