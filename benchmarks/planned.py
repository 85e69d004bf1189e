"""How near plans come to what runs take: peaks that were foreseen from headers beside peaks that were measured.

``python -m benchmarks.planned``. Every case runs in a process of its own, on random weights of a small FLUX.1 shape, or
on a GPU (``--device cuda``) of FLUX.1's own. On a CPU what counts is how far the process's peak resident set grows, on
CUDA the most that its allocator handed out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flux.adapters.guides import Reference
from flux.memory.policy import read_policy
from flux.mini.files import MINI
from flux.models.flux1 import Flux1
from flux.pipelines.denoising import Guidance, denoise
from flux.pipelines.parts import Part, open_transformer
from flux.pipelines.planning import Job, plan_run, planned_of_part
from flux.pipelines.prompts import EncodedPrompt
from flux.sampling.noise import draw_noise
from flux.specs.flux1 import FLUX1, Flux1Spec

from .machine import UNLIKE_USERS, peak_resident, processor
from .random_files import write_random

__all__ = ["BARS", "CASES", "Case", "compare", "main", "table", "warm_up"]

SMALL = replace(
    FLUX1["flux1-dev"], name="flux1-small", title="a small FLUX.1", hidden=1024, heads=8, double_blocks=4,
    single_blocks=8,
)  # fmt: skip
STEPS, GUIDANCE, CELL = 2, 3.5, 8
MIB = 1 << 20
BARS = {"cpu": 0.10, "cuda": 0.05}  # by which a peak may be off
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
KEEPS = {"bf16": "numbers"}  # others stay packed


@dataclass(frozen=True)
class Case:
    """One run."""

    side: int
    batch: int = 1
    stored: str = "bf16"
    policy: str = "keep"
    references: int = 0

    @property
    def name(self) -> str:
        more = f", {self.references} references" if self.references else ""
        return f"{self.side}², batch {self.batch}, {self.stored}, {self.policy}{more}"


WARM_UP = Case(512)  # on the embedded model
CASES = (
    Case(256), Case(512), Case(1024), Case(512, batch=4), Case(512, policy="balance"), Case(512, policy="save"),
    Case(1024, policy="save"), Case(512, policy="0.75"), Case(512, stored="fp8"),
    Case(512, stored="fp8", policy="save"),
    Case(512, stored="gguf:Q4_K"), Case(512, stored="gguf:Q4_K", policy="balance"), Case(512, references=1),
    Case(256, references=3, policy="save"), Case(256, batch=8, policy="balance"),
)  # fmt: skip


@torch.inference_mode()
def measure(path: Path, case: Case, device: torch.device) -> tuple[int, int]:
    """Bytes that were planned for a case, and bytes that it took."""
    warm_up(device)
    return compare(open_transformer(path, device, DTYPES[device.type], keep=KEEPS.get(case.stored, "packed")), case)


def warm_up(device: torch.device) -> None:
    """Have libraries and threads there before anything is measured."""
    _run(open_transformer(MINI.transformer, device, DTYPES[device.type]), WARM_UP, None)


@torch.inference_mode()
def compare(part: Part[Flux1Spec, Flux1], case: Case) -> tuple[int, int]:
    """Bytes that were planned for a case, and bytes that it took, in a process that is warm."""
    job = Job(
        width=case.side, height=case.side, batch=case.batch, steps=STEPS,
        references=((case.side, case.side),) * case.references,
    )  # fmt: skip
    device, policy = part.device, read_policy(case.policy)
    [stage] = plan_run([planned_of_part(part)], job, policy, device=str(device), available=0).stages
    before = _begin(device)
    _run(part, case, stage.limit)
    return stage.peak_bytes, _taken(device) - before


def _run(part: Part[Flux1Spec, Flux1], case: Case, limit: int | None) -> None:
    spec, cells, random = part.spec, case.side // CELL, torch.Generator().manual_seed(0)
    prompt = EncodedPrompt(
        torch.randn(1, spec.t5_length, spec.context_width, generator=random),
        torch.randn(1, spec.pooled_width, generator=random),
    )
    references = [torch.zeros(1, spec.latent_channels, cells, cells) for _ in range(case.references)]
    noise = draw_noise((spec.latent_channels, cells, cells), list(range(case.batch)))
    denoise(
        part, prompt, noise, [1 - index / STEPS for index in range(STEPS + 1)], guidance=GUIDANCE,
        guided=Guidance(guides=[Reference(latents=latents) for latents in references]), limit=limit,
    )  # fmt: skip


def _begin(device: torch.device) -> int:
    """Have the peak counted from here; what it is."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return _taken(device)


def _taken(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident()


def table(device: str = "cpu", cases: Sequence[Case] = CASES) -> str:
    """Every case as Markdown."""
    spec: Flux1Spec = SMALL if device == "cpu" else FLUX1["flux1-dev"]
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for stored in dict.fromkeys(case.stored for case in cases):
            path = Path(folder) / ("model" + (".gguf" if stored.startswith("gguf") else ".safetensors"))
            write_random(path, lambda: Flux1(spec), "flux1-bfl", stored, spec.title)
            for case in (case for case in cases if case.stored == stored):
                planned, taken = _in_process(path, case, device)
                off = planned / taken - 1
                worst = max(worst, abs(off))
                rows.append(f"| {case.name} | {planned / MIB:.0f} MiB | {taken / MIB:.0f} MiB | {100 * off:+.1f} % |")
            path.unlink()
    bar = BARS[torch.device(device).type]
    return "\n".join(
        (
            f"{spec.title}, hidden {spec.hidden}, {spec.double_blocks} + {spec.single_blocks} blocks, random weights, "
            f"on {processor() if device == 'cpu' else device}; the farthest is {100 * worst:.1f} % off "
            f"(bar {100 * bar:.0f} %).",
            "",
            "| run | planned | taken | |",
            "|---|---|---|---|",
            *rows,
        )
    )


def _in_process(path: Path, case: Case, device: str) -> tuple[int, int]:
    command = [sys.executable, "-m", "benchmarks.planned", "--file", str(path), "--device", device]
    command += ["--case", str(CASES.index(case))]
    environment = {name: value for name, value in os.environ.items() if name not in UNLIKE_USERS}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    planned, taken = done.stdout.split()[-2:]
    return int(planned), int(taken)


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or measure one case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planned", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.file is None:
        sys.stdout.write(f"{table(options.device)}\n")
    else:
        planned, taken = measure(options.file, CASES[options.case], torch.device(options.device))
        sys.stdout.write(f"{planned} {taken}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
