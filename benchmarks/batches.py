"""Several pictures at once on the CPU: a middle-sized FLUX.1's step for one, two and four, and the time for each.

``python -m benchmarks.batches``. All runs in one process, their steps taken in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from flux.models.flux1 import Flux1
from flux.pipelines.denoising import prepared
from flux.pipelines.parts import open_transformer
from flux.pipelines.prompts import EncodedPrompt
from flux.sampling.noise import draw_noise

from .engines import PATCH
from .machine import processor
from .random_files import write_random
from .report import Report, verdict
from .transformer import COLUMNS, GUIDANCE, MIDDLE, ROWS, TEXT_TOKENS, make_inputs

__all__ = ["BATCHES", "main", "table"]

BATCHES = (1, 2, 4)
BARS = {4: 1.0}  # of the time that a picture takes alone
REPEATS = 5
TIME = 0.5  # of the flow


@torch.inference_mode()
def measure(path: Path, batches: Sequence[int] = BATCHES, repeats: int = REPEATS) -> dict[int, list[float]]:
    """Seconds that a step takes in every turn by how many pictures it is for; a turn draws as many of each."""
    part = open_transformer(path, torch.device("cpu"), torch.float32)
    inputs, cells = make_inputs(MIDDLE), (PATCH * ROWS, PATCH * COLUMNS)
    prompt = EncodedPrompt(inputs["text"], inputs["pooled"])
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    with prepared(part, prompt, [TIME, 0.0], guidance=GUIDANCE) as velocity:
        steps = {
            batch: partial(velocity, draw_noise((MIDDLE.latent_channels, *cells), list(range(batch))))
            for batch in batches
        }
        for step in steps.values():
            step(TIME)
        for _ in range(repeats):
            for batch, step in steps.items():
                times = max(batches) // batch
                start = time.perf_counter()
                for _ in range(times):
                    step(TIME)
                seconds[batch].append((time.perf_counter() - start) / times)
    return seconds


def table(batches: Sequence[int] = BATCHES, repeats: int = REPEATS) -> Report:
    """Steps for more and more pictures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{MIDDLE.name}.safetensors"
        write_random(path, lambda: Flux1(MIDDLE), "flux1-bfl", "bf16", MIDDLE.title)
        found = measure(path, batches, repeats)
    rows, data = [], []
    for batch, turns in found.items():
        seconds, bar = statistics.median(turns), BARS.get(batch)
        # Of the same turn, for what else the machine does comes and goes.
        beside = zip(turns, found[batches[0]], strict=True)
        ratio = statistics.median(own / batch / first * batches[0] for own, first in beside)
        told = ("", "") if bar is None else (f"≤ {bar:.2f}", verdict(ratio <= bar))
        rows.append(
            f"| {batch} | {seconds:.2f} s | {seconds / batch:.2f} s | **{ratio:.3f}** | {told[0]} | {told[1]} |"
        )
        data.append({"batch": batch, "seconds": seconds, "ratio": ratio, "bar": bar})
    text = (
        f"Hidden {MIDDLE.hidden}, {MIDDLE.double_blocks} + {MIDDLE.single_blocks} blocks stored in bf16, "
        f"{ROWS * COLUMNS} + {TEXT_TOKENS} tokens a picture in fp32, {processor()}, {torch.get_num_threads()} threads; "
        f"medians of {repeats} turns, ratios within each turn."
    )
    head = ("| pictures | step | for each | of one alone | bar | |", "|---|---|---|---|---|---|")
    return Report("\n".join((text, "", *head, *rows)), {"rows": data})


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batches", description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    sys.stdout.write(f"{table(repeats=parser.parse_args(arguments).repeats)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
