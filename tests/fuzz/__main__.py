"""Thousands of damaged files: ``python -m tests.fuzz [safetensors|gguf|all] --files 20000 --seed 0 [--keep FOLDER]``.

Valid files of every kind (``seeds``) are damaged (``damage``) and opened by the engine, every tensor decoded. They may
open or be refused in one sentence that names the file. Any other exception, the end of the process, more than 5 s, and
memory beyond the file's size and 64 MB (how that is measured: ``worker``) are failures; with any the exit code is 1.
Equal seeds give equal files. ``--keep`` keeps the files that failed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from .damage import damaged
from .seeds import READERS, Seed, seeds
from .worker import FAILURES, Result, Worker

__all__ = ["Tally", "cases", "fuzz", "main", "write"]

HEADINGS = ("reader", "files", "opened", "refused", "slowest file", "largest memory", *FAILURES)
SHOWN, WIDTH = 20, 400  # failures that are printed, and characters of each
MB = 1e6


@dataclass
class Tally:
    """What became of a reader's files."""

    reader: str
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    peak: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, number: int, seed: Seed, result: Result) -> None:
        self.outcomes[result.outcome] += 1
        self.slowest, self.peak = max(self.slowest, result.seconds), max(self.peak, result.peak)
        if result.outcome in FAILURES:
            self.failures.append(f"{self.reader} {number} ({seed.name}): {result.outcome}: {result.text}")

    def row(self) -> tuple[str, ...]:
        counts = [str(self.outcomes[word]) for word in ("opened", "refused", *FAILURES)]
        measures = f"{self.slowest * 1e3:.0f} ms", f"{self.peak / MB:.1f} MB"
        return self.reader, str(self.outcomes.total()), *counts[:2], *measures, *counts[2:]


def cases(reader: str, count: int, seed: int) -> Iterator[tuple[int, Seed, dict[str, bytes]]]:
    """Damaged files by number, each drawn by itself: any one can be made again without the others."""
    for number in range(count):
        rng = random.Random(f"{reader} {seed} {number}")
        origin = rng.choice(seeds(reader))
        yield number, origin, damaged(origin, rng)


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Make ``folder`` hold these files alone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def fuzz(reader: str, count: int, seed: int, keep: Path | None, worker: Worker) -> Tally:
    """Have ``count`` damaged files opened."""
    tally = Tally(reader)
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base, "damaged")
        for number, origin, files in tqdm(cases(reader, count, seed), reader, count, unit=" files", mininterval=1):
            write(folder, files)
            result = worker.examine(folder / origin.opened)
            tally.add(number, origin, result)
            if keep is not None and result.outcome in FAILURES:
                write(keep / f"{reader}-{seed}-{number}-{result.outcome}", files)
    return tally


def table(tallies: list[Tally]) -> str:
    rows = [HEADINGS, tuple("---" for _ in HEADINGS), *(tally.row() for tally in tallies)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("reader", nargs="?", choices=(*READERS, "all"), default="all")
    parser.add_argument("--files", type=int, default=20_000, help="for each reader (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other files (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the files that failed are kept")
    options = parser.parse_args(arguments)
    readers = READERS if options.reader == "all" else (options.reader,)
    with Worker() as worker:
        tallies = [fuzz(reader, options.files, options.seed, options.keep, worker) for reader in readers]
    failures = [failure for tally in tallies for failure in tally.failures]
    print(table(tallies), *(failure[:WIDTH] for failure in failures[:SHOWN]), sep="\n")
    if len(failures) > SHOWN:
        print(f"and {len(failures) - SHOWN} more")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
