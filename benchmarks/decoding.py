"""How fast packed weights become fp32 on the CPU, beside what people would use otherwise.

GGUF types beside the ``gguf`` package's NumPy code; nf4 beside the plain look-up in torch. Both sides decode the same
random matrix of a real size in one process, in turn, and must give the same numbers to the bit; times are medians.
The process is a fresh one without glibc's malloc settings, as users have it; the types with a bar are measured once
more with those of the Makefile, which help convolutions. ``python -m benchmarks.decoding``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from flux.weights.formats.base import DATA
from flux.weights.formats.bnb import ABSMAX, BLOCK, NF4, NF4_VALUES, QUANT_MAP
from flux.weights.formats.gguf_blocks import BLOCKS, GGUF_FORMATS
from flux.weights.formats.gguf_checks import SCALE_PLACES

from .report import Report

__all__ = ["BARRED", "Measured", "main", "measure", "random_blocks", "table"]

SHAPE = (3072, 12288)  # of the second feed-forward layer of FLUX.1's double blocks
REPEATS = 7
THREADS = 2
BAR = 5.0
BARRED = ("Q8_0", "Q6_K", "Q4_K", NF4.name)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}  # as in the Makefile
NANO = 1e9
GIGA = 1e9
FP32_BYTES = 4

Decoder = Callable[[], Tensor]


@dataclass(frozen=True)
class Measured:
    """Medians of both sides' seconds for one matrix of ``count`` numbers.

    Attributes:
        foreign: Share of all cores' time that other processes had meanwhile.
    """

    name: str
    count: int
    ours: float
    theirs: float
    foreign: float = 0.0

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.theirs / self.ours


def random_blocks(name: str, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A matrix as a GGUF type stores it, uint8 (blocks, bytes of a block): random codes, ordinary numbers as scales."""
    rng = np.random.default_rng(seed)
    block = BLOCKS[name]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // block.values, block.bytes), dtype=np.uint8)
    for place in SCALE_PLACES[name]:
        scales = rng.standard_normal((len(blocks), 1), dtype=np.float32).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8)
    return torch.from_numpy(blocks)


def sides_of_gguf(name: str, shape: tuple[int, int]) -> tuple[Decoder, Decoder]:
    """Our decoder and the package's, on the same blocks."""
    import gguf

    blocks = random_blocks(name, shape)
    rows, kind = blocks.numpy().reshape(shape[0], -1), gguf.GGMLQuantizationType[name]
    return (
        lambda: GGUF_FORMATS[name].decode({DATA: blocks}, shape, torch.float32),
        lambda: torch.from_numpy(gguf.quants.dequantize(rows, kind)),
    )


def sides_of_nf4(shape: tuple[int, int]) -> tuple[Decoder, Decoder]:
    """Our decoder of nf4, and the look-up as anybody would write it, on the same codes."""
    generator = torch.Generator().manual_seed(0)
    count = shape[0] * shape[1]
    data = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(count // BLOCK, generator=generator) + 0.5
    values = torch.tensor(NF4_VALUES)
    parts = {DATA: data, ABSMAX: absmax, QUANT_MAP: values}

    def plain() -> Tensor:
        codes = torch.stack((data >> 4, data & 0x0F), dim=-1).view(-1, BLOCK).long()
        return (values[codes] * absmax[:, None]).view(shape)

    return lambda: NF4.decode(parts, shape, torch.float32), plain


def measure(name: str, shape: tuple[int, int] = SHAPE, repeats: int = REPEATS) -> Measured:
    """Time both sides of a type in turn, warm, and hold their numbers against each other.

    Raises:
        AssertionError: They differ in a bit.
    """
    ours, theirs = sides_of_nf4(shape) if name == NF4.name else sides_of_gguf(name, shape)
    assert torch.equal(ours().view(torch.int32), theirs().view(torch.int32)), f"{name} decodes to other numbers"
    seconds: tuple[list[float], list[float]] = ([], [])
    before = _processor_times()
    for _ in range(repeats):
        for side, decode in zip(seconds, (ours, theirs), strict=True):
            start = time.perf_counter()
            decode()
            side.append(time.perf_counter() - start)
    whole, busy, own = (after - earlier for after, earlier in zip(_processor_times(), before, strict=True))
    foreign = min(1.0, max(0.0, busy - own) / whole) if whole else 0.0
    return Measured(name, shape[0] * shape[1], *map(statistics.median, seconds), foreign)


def _processor_times() -> tuple[float, float, float]:
    """Seconds so far of all cores together: in all, busy, and busy for this process."""
    cores, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = cores.idle + getattr(cores, "iowait", 0.0)
    return sum(cores[:8]), sum(cores[:8]) - idle, own.user + own.system  # guest times are within the first two


def measure_apart(
    names: Sequence[str], shape: tuple[int, int], repeats: int, malloc: dict[str, str] | None = None
) -> list[Measured]:
    """``measure`` of each in a process of its own, with these malloc settings and no others."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | (malloc or {})
    sides = [str(side) for side in shape]
    command = [sys.executable, "-m", "benchmarks.decoding", "--json", "--shape", *sides, "--repeats", str(repeats)]
    done = subprocess.run([*command, *names], env=environment, capture_output=True, text=True, check=True)
    return [Measured(**row) for row in json.loads(done.stdout)]


def table(
    names: Sequence[str] = (*GGUF_FORMATS, NF4.name), shape: tuple[int, int] = SHAPE, repeats: int = REPEATS
) -> Report:
    """The comparison."""
    found = measure_apart(names, shape, repeats)
    kept = measure_apart([name for name in names if name in BARRED], shape, repeats, MALLOC)
    kept_ratios = {one.name: one.ratio for one in kept}
    text = "\n".join(
        (
            f"A matrix of {shape[0]} x {shape[1]} to fp32 on the CPU, {THREADS} threads, medians of {repeats} taken in "
            "turn, equal to the bit. Beside: the `gguf` package's NumPy code; for nf4 the plain look-up in torch. "
            f"Other processes had up to {100 * max(one.foreign for one in found):.0f} % of the cores' time meanwhile: "
            "torch's threads wait for each other, and where a core is busy otherwise, threads of our own take over.",
            "",
            "| | numbers a ns | GB/s written | beside | times as fast | bar | with `make`'s malloc settings |",
            "|---|---|---|---|---|---|---|",
            *(_row(one, kept_ratios.get(one.name)) for one in found),
        )
    )
    rows = [_figures(one, kept_ratios.get(one.name)) for one in found]
    return Report(text, {"shape": shape, "threads": THREADS, "repeats": repeats, "rows": rows})


def _figures(one: Measured, kept: float | None) -> dict[str, Any]:
    """Those of a row; ``kept`` is the ratio with the Makefile's malloc settings."""
    bar = BAR if one.name in BARRED else None
    return {**asdict(one), "ratio": one.ratio, "bar": bar, "ratio_with_malloc_settings": kept}


def _row(one: Measured, kept: float | None) -> str:
    ours, theirs = (one.count / seconds / NANO for seconds in (one.ours, one.theirs))
    bar = f"≥ {BAR:.0f}" if one.name in BARRED else ""
    written = one.count * FP32_BYTES / one.ours / GIGA
    beside = "" if kept is None else f"{kept:.1f}"
    return f"| {one.name} | {ours:.2f} | {written:.1f} | {theirs:.3f} | **{one.ratio:.1f}** | {bar} | {beside} |"


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or with ``--json`` what this process measures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__)
    parser.add_argument("names", nargs="*", help="types (default: all)")
    parser.add_argument("--shape", type=int, nargs=2, default=SHAPE, help="of the matrix (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names, shape = options.names or [*GGUF_FORMATS, NF4.name], (options.shape[0], options.shape[1])
    if options.json:
        torch.set_num_threads(THREADS)
        sys.stdout.write(json.dumps([asdict(measure(name, shape, options.repeats)) for name in names]))
    else:
        sys.stdout.write(f"{table(names, shape, options.repeats)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
