"""What a step cache saves and what it costs: the embedded model with higher and higher thresholds, and without a cache.

``python -m benchmarks.step_cache``. Pictures of prompts that training never drew, at equal seeds, each with a memory of
its own; the runs of a prompt are taken in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flux.mini.files import MINI, open_mini
from flux.pipelines.denoising import prepared, walk
from flux.pipelines.prompts import EncodedPrompt
from flux.pipelines.step_cache import CachedSteps, Skipped, StepCache
from flux.pipelines.text_to_image import FluxModel, Request, decode, plan_sigmas
from flux.sampling.noise import draw_noise

from .fidelity import psnr
from .machine import processor
from .prompts import CELL, NATIVE, SEED, TOKEN, requests_for_measuring
from .report import Report

__all__ = ["Run", "main", "measure", "table"]

STEPS = (16, 28)
THRESHOLDS = (0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3)
COUNT = 8
CPU = torch.device("cpu")


@dataclass
class Run:
    """What one number of steps and one threshold gave, picture by picture; a threshold of None is no cache.

    Attributes:
        steps: Of the schedule.
        threshold: Of the cache.
        seconds: Of sampling.
        skipped: By the cache.
        psnr: Beside the picture without a cache.
    """

    steps: int
    threshold: float | None
    seconds: list[float] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)


def measure(
    steps: int, thresholds: Sequence[float] = THRESHOLDS, count: int = COUNT, model: FluxModel | None = None
) -> list[Run]:
    """Every threshold against no cache, which comes first.

    Args:
        steps: Of the schedule.
        thresholds: Of the caches, whose other settings are the defaults.
        count: Pictures, each of a prompt of its own that training never drew.
        model: That draws; mini in fp32 when None.
    """
    model = model or open_mini(MINI, dtype=torch.float32)
    texts = [(text, None) for _, text in requests_for_measuring(count, SEED)]
    prompts = model.text.encode_all(texts, length=model.transformer.spec.t5_length)
    runs = [Run(steps, threshold) for threshold in (None, *thresholds)]
    _sampled(model, prompts[0], SEED, steps, None)  # warm-up
    for place, prompt in enumerate(prompts):
        exact = None
        for run in runs:
            settings = None if run.threshold is None else StepCache(threshold=run.threshold)
            latents, seconds, skipped = _sampled(model, prompt, SEED + place, steps, settings)
            picture = decode(model.autoencoder, latents)
            exact = picture if exact is None else exact
            run.seconds.append(seconds)
            run.psnr.append(psnr(picture, exact))
            run.skipped += [] if skipped is None else [skipped]
    return runs


def _sampled(
    model: FluxModel, prompt: EncodedPrompt, seed: int, steps: int, settings: StepCache | None
) -> tuple[Tensor, float, Skipped | None]:
    """Latents, the seconds that their steps took, and what was skipped."""
    part = model.transformer
    width, height = NATIVE
    sigmas = plan_sigmas(part.spec, Request(prompt="", steps=steps), (width // TOKEN) * (height // TOKEN))
    noise = draw_noise((part.spec.latent_channels, height // CELL, width // CELL), [seed])
    cached = None if settings is None else CachedSteps(settings, sigmas)
    with prepared(part, prompt, sigmas, guidance=part.spec.guidance, cached=cached) as velocity:
        began = time.perf_counter()
        latents = walk(velocity, noise, sigmas, device=CPU)
        seconds = time.perf_counter() - began
    return latents, seconds, None if cached is None else cached.skipped


def table(steps: Sequence[int] = STEPS, thresholds: Sequence[float] = THRESHOLDS, count: int = COUNT) -> Report:
    """Thresholds beside no cache."""
    model = open_mini(MINI, dtype=torch.float32)
    spec, usual = model.transformer.spec, StepCache()
    blocks = spec.double_blocks + spec.single_blocks
    rows = [
        _figures(run, runs[0]) for own in steps for runs in [measure(own, thresholds, count, model)] for run in runs
    ]
    text = "\n".join(
        (
            f"`flux1-mini` in fp32, {NATIVE[0]}x{NATIVE[1]}, {count} held-out prompts, against pictures without a "
            f"cache at equal seeds; at most {usual.max_skips} skips one after the other, the first {usual.warmup} "
            f"steps and the last never; {processor()}, {torch.get_num_threads()} threads. A skipped step runs 1 of its "
            f"{blocks} blocks (1 of 57 in FLUX.1), so that blocks tell more of a large model's time than seconds do.",
            "",
            "| steps | threshold | steps skipped | blocks skipped | time | PSNR, median | worst |",
            "|---|---|---|---|---|---|---|",
            *map(_row, rows),
        )
    )
    return Report(text, {"pictures": count, "blocks": blocks, "threads": torch.get_num_threads(), "rows": rows})


def _figures(run: Run, exact: Run) -> dict[str, Any]:
    return {
        "steps": run.steps,
        "threshold": run.threshold,
        "seconds": statistics.median(run.seconds),
        "ratio": statistics.median(own / whole for own, whole in zip(run.seconds, exact.seconds, strict=True)),
        "skipped_steps": statistics.mean([len(skipped.skipped) for skipped in run.skipped] or [0]),
        "skipped_share": statistics.mean([skipped.share for skipped in run.skipped] or [0.0]),
        "psnr": statistics.median(run.psnr),
        "worst_psnr": min(run.psnr),
    }


def _row(one: Mapping[str, Any]) -> str:
    if one["threshold"] is None:
        return f"| {one['steps']} | no cache | | | {1000 * one['seconds']:.0f} ms | | |"
    usual = "**" if one["threshold"] == StepCache().threshold else ""
    return (
        f"| {one['steps']} | {usual}{one['threshold']:g}{usual} | {one['skipped_steps']:.1f} "
        f"| {100 * one['skipped_share']:.0f} % | {one['ratio']:.2f} | {_decibel(one['psnr'])} "
        f"| {_decibel(one['worst_psnr'])} |"
    )


def _decibel(value: float) -> str:
    return "equal" if value == float("inf") else f"{value:.1f} dB"


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cache", description=__doc__)
    parser.add_argument("--count", type=int, default=COUNT, help="prompts (default: %(default)s)")
    sys.stdout.write(f"{table(count=parser.parse_args(arguments).count)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
