"""Runs the sections, as long as there is time: ``python -m benchmarks.gpu``."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flux.version import VERSION

from . import __doc__ as ABOUT
from .bench import REPEATS, SIZES, Bench
from .found import table
from .sections import SECTIONS, Section

__all__ = ["Watch", "main", "run_sections"]

MINUTES = 8.0
GIB = 1 << 30
TABLES = Path(__file__).resolve().parents[1] / "tables"


class Watch:
    """The time that a run has.

    Args:
        seconds: In all.
        clock: Seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()


def environment(bench: Bench, name: str) -> dict[str, str]:
    """Where and when the figures were taken."""
    on_gpu = bench.device.type == "cuda"
    return {
        "foundry": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(bench.device) if on_gpu else str(bench.device),
        "memory": f"{torch.cuda.get_device_properties(bench.device).total_memory / GIB:.0f} GiB" if on_gpu else "",
        "size": name,
        "date": time.strftime("%Y-%m-%d"),
    }


def run_sections(
    bench: Bench, told: Mapping[str, str], watch: Watch, out: Path, sections: Sequence[Section] = SECTIONS
) -> list[str]:
    """Every section for which there is time; its figures are written as soon as they are there.

    Args:
        bench: What they run with.
        told: The environment.
        watch: The time that is left.
        out: The folder of the files.
        sections: In the order in which they run.

    Returns:
        What is not as it should be: the names of those that failed and, where bars are asked, of those that were
        skipped, and the bars that are missed.
    """
    out.mkdir(parents=True, exist_ok=True)
    texts, wrong = [", ".join(value for value in told.values() if value)], []
    for section in sections:
        record: dict[str, Any] = {"environment": dict(told)}
        start = time.monotonic()
        if watch.left < section.needs:
            text = f"Skipped: {watch.left:.0f} s were left, and it may take {section.needs:.0f}."
            record["skipped"] = text
            wrong += [section.name] if bench.is_judged else []
        else:
            try:
                found = section.run(bench)
            except Exception as error:  # noqa: BLE001 - the other sections are to be run all the same
                wrong.append(section.name)
                text, record["failed"] = f"Failed: {error}", traceback.format_exc()
            else:
                text = table(found, bench.is_judged)
                bars = found.bars if bench.is_judged else []
                record |= {"rows": found.rows, "bars": [asdict(bar) for bar in bars], "notes": found.notes}
                wrong += [bar.what for bar in bars if not bar.holds]
        gc.collect()
        record["seconds"] = time.monotonic() - start
        texts.append(f"**{section.title}**\n\n{text}")
        (out / f"gpu-{section.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (out / "gpu.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        sys.stdout.write(f"## {section.title} ({record['seconds']:.0f} s)\n\n{text}\n\n")
        sys.stdout.flush()
    return wrong


def end_in_time(seconds: float) -> threading.Timer:
    """End the process when its time is over, whatever it waits for; what was found by then is written."""

    def end() -> None:
        sys.stdout.write("The time is over; what was found is in the files.\n")
        sys.stdout.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def main(arguments: list[str] | None = None) -> int:
    """Run all sections, and print and keep what they find."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=ABOUT)
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--size", choices=SIZES, default="real", help="default: %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="after which it has ended (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help="of which medians are taken (default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="*", choices=[section.name for section in SECTIONS], help="these sections alone"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out") / "gpu", help="folder of the files (default: %(default)s)"
    )
    parser.add_argument("--write", action="store_true", help=f"have them in {TABLES.parent.name}/{TABLES.name} instead")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stdout.write("There is no GPU at hand: nothing was measured. (--device cpu --size tiny tries the way.)\n")
        return 0
    watch, timer = Watch(60 * options.minutes), end_in_time(60 * options.minutes)
    bench = Bench(device, SIZES[options.size], options.repeats)
    chosen = [section for section in SECTIONS if options.only is None or section.name in options.only]
    out = TABLES if options.write else options.out
    wrong = run_sections(bench, environment(bench, options.size), watch, out, chosen)
    timer.cancel()
    if wrong:
        sys.stdout.write(f"Not as it should be: {', '.join(wrong)}.\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
