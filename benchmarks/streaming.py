"""What streaming costs: a middle-sized FLUX.1's step with all weights resident, and with fewer and fewer of them.

``python -m benchmarks.streaming``. All runs in one process, their steps taken in turn; every one gives the same bits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux.models.flux1 import Flux1
from flux.pipelines.denoising import Denoiser, Engine, Hooks
from flux.pipelines.parts import Part, open_transformer
from flux.pipelines.prompts import EncodedPrompt
from flux.sampling.noise import draw_noise

from .engines import PATCH
from .machine import processor
from .random_files import write_random
from .report import Report, verdict
from .transformer import COLUMNS, GUIDANCE, MIDDLE, ROWS, TEXT_TOKENS, make_inputs

__all__ = ["main", "table"]

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the blocks' weights that are granted room
BAR = {0.5: 1.25}  # times of the resident step
REPEATS = 5
TIME = 0.5  # of the flow
MIB = 1 << 20


@dataclass(frozen=True)
class Run:
    """A transformer under a limit, and its step."""

    part: Part[Any, Any]
    bytes: int
    streamed: int
    step: Callable[[], Tensor]


def _run(path: Path, share: float) -> Run:
    part = open_transformer(path, torch.device("cpu"), torch.float32, keep="numbers")
    apart = tuple(part.module.modulation_layers())
    whole = part.residency.accounts.footprint(apart)
    limit = None if share == 1 else int(whole.others + share * (whole.device_bytes - whole.others))
    footprint = part.residency.accounts.footprint(apart, limit)
    part.residency.load(without=apart, limit=limit)
    inputs = make_inputs(MIDDLE)
    flow = Denoiser(Engine(part), EncodedPrompt(inputs["text"], inputs["pooled"]), GUIDANCE, Hooks())
    flow.prepare([TIME])
    noise = draw_noise((MIDDLE.latent_channels, PATCH * ROWS, PATCH * COLUMNS), [0])
    return Run(part, footprint.device_bytes, len(footprint.blocks.streamed), lambda: flow(noise, TIME))


@torch.inference_mode()
def table(repeats: int = REPEATS) -> Report:
    """Steps under falling limits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux1-middle.safetensors"
        write_random(path, lambda: Flux1(MIDDLE), "flux1-bfl", "bf16", MIDDLE.title)
        runs = {share: _run(path, share) for share in SHARES}
        outputs = [run.step() for run in runs.values()]  # warm-up
        medians = _timed(runs, repeats)
        for run in runs.values():
            run.part.residency.release()
    same = all(torch.equal(output, outputs[0]) for output in outputs)
    rows = [
        {
            "share": share,
            "blocks_streamed": run.streamed,
            "bytes": run.bytes,
            "seconds": medians[share],
            "ratio": medians[share] / medians[1.0],
            "bar": BAR.get(share),
        }
        for share, run in runs.items()
    ]
    text = "\n".join(
        (
            f"Hidden {MIDDLE.hidden}, {MIDDLE.double_blocks} + {MIDDLE.single_blocks} blocks stored in bf16, "
            f"{ROWS * COLUMNS} + {TEXT_TOKENS} tokens in fp32, {processor()}, {torch.get_num_threads()} threads; "
            f"median of {repeats}; that the outputs are equal to the bit: {verdict(same)}.",
            "",
            "| room for | blocks streamed | weights in memory | step | ratio | bar | |",
            "|---|---|---|---|---|---|---|",
            *map(_row, rows),
        )
    )
    return Report(text, {"repeats": repeats, "equal": same, "rows": rows})


def _timed(runs: Mapping[float, Run], repeats: int) -> dict[float, float]:
    """Median seconds of a step of each, taken in turn."""
    seconds: dict[float, list[float]] = {share: [] for share in runs}
    for _ in range(repeats):
        for share, run in runs.items():
            start = time.perf_counter()
            run.step()
            seconds[share].append(time.perf_counter() - start)
    return {share: statistics.median(own) for share, own in seconds.items()}


def _row(one: Mapping[str, Any]) -> str:
    bar = " | " if one["bar"] is None else f"≤ {one['bar']:.2f} | {verdict(one['ratio'] <= one['bar'])}"
    return (
        f"| {100 * one['share']:.0f} % | {one['blocks_streamed']} | {one['bytes'] / MIB:.0f} MiB "
        f"| {one['seconds']:.2f} s | {one['ratio']:.3f} | {bar} |"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    sys.stdout.write(f"{table(parser.parse_args(arguments).repeats)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
