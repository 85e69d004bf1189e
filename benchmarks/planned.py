"""How near plans come to what runs take: peaks that were foreseen from headers beside peaks that were measured.

``python -m benchmarks.planned``. Every case runs in a process of its own, on random weights: transformers of a small
FLUX.1 shape, or on a GPU (``--device cuda``) of FLUX.1's own; text encoders, vision towers and autoencoders of real
size. On a CPU what counts is how far the process's peak resident set grows, on CUDA the most that its allocator handed
out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from flux.adapters.guides import Reference
from flux.memory.plan import StagePlan
from flux.memory.policy import read_policy
from flux.mini.files import MINI
from flux.models.autoencoder import Autoencoder
from flux.models.flux1 import Flux1
from flux.models.text.t5 import T5Encoder
from flux.models.vision.siglip import SiglipVision
from flux.pipelines.denoising import Guidance, denoise
from flux.pipelines.guided import encode_picture
from flux.pipelines.parts import Part, open_autoencoder, open_t5, open_transformer, open_vision
from flux.pipelines.planning import Job, plan_run, planned_of_part
from flux.pipelines.prompts import EncodedPrompt
from flux.pipelines.strips import StripedPart
from flux.pipelines.text_to_image import decode
from flux.sampling.noise import draw_noise
from flux.specs.autoencoder import AUTOENCODERS
from flux.specs.flux1 import FLUX1, Flux1Spec
from flux.specs.text import T5_XXL
from flux.specs.vision import SIGLIP_SO400M

from .machine import UNLIKE_USERS, peak_resident, processor
from .random_files import write_random
from .report import Report, verdict

__all__ = ["BARS", "CASES", "OTHERS", "Case", "compare", "main", "opened", "table", "warm_up"]

SMALL = replace(
    FLUX1["flux1-dev"], name="flux1-small", title="a small FLUX.1", hidden=1024, heads=8, double_blocks=4,
    single_blocks=8,
)  # fmt: skip
STEPS, GUIDANCE, CELL = 2, 3.5, 8
PROCESSES = 3  # of each case of the transformer
MIB = 1 << 20
BARS = {"cpu": 0.10, "cuda": 0.05}  # by which a peak may be off
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
KEEPS = {"bf16": "numbers"}  # others stay packed


@dataclass(frozen=True)
class Case:
    """One run of one stage; of others than the transformer sides and batches are those of the picture."""

    side: int
    batch: int = 1
    stored: str = "bf16"
    policy: str = "keep"
    references: int = 0
    stage: str = "transformer"

    @property
    def name(self) -> str:
        """In the table."""
        more = f", {self.references} references" if self.references else ""
        drawn = f"{self.side}², batch {self.batch}, " if self.stage == "transformer" else ""
        drawn = f"{self.side}², " if self.stage in ("encode", "decode") else drawn
        return f"{self.stage}: {drawn}{self.stored}, {self.policy}{more}"


WARM_UP = Case(512)  # on the embedded model
CASES = (
    Case(256), Case(512), Case(1024), Case(512, batch=4), Case(512, policy="balance"), Case(512, policy="save"),
    Case(1024, policy="save"), Case(512, policy="0.75"), Case(512, stored="fp8"),
    Case(512, stored="fp8", policy="save"),
    Case(512, stored="gguf:Q4_K"), Case(512, stored="gguf:Q4_K", policy="balance"), Case(512, references=1),
    Case(256, references=3, policy="save"), Case(256, batch=8, policy="balance"),
)  # fmt: skip
OTHERS = (
    Case(512, stage="decode"), Case(768, stage="decode"), Case(1024, stage="decode", policy="save"),
    Case(2048, stage="decode", policy="save"),
    Case(512, stage="encode"), Case(768, stage="encode", policy="save"), Case(512, stage="vision"),
    Case(512, stage="vision", policy="save"), Case(512, stage="t5", stored="fp8"),
    Case(512, stage="t5", stored="fp8", policy="save"), Case(512, stage="t5", policy="save"),
)  # fmt: skip


class Kind(NamedTuple):
    """What a stage runs with: how its module is built, how its file names it, and how it is opened."""

    build: Callable[[], nn.Module]
    layout: str
    title: str
    open: Callable[..., Part[Any, Any]]


AE = Kind(lambda: Autoencoder(AUTOENCODERS["flux1-ae"]), "flux1-ae-bfl", "flux1-ae", open_autoencoder)
KINDS: Mapping[str, Kind] = {
    "decode": AE,
    "encode": AE,
    "t5": Kind(lambda: T5Encoder(T5_XXL), "t5-hf", "t5", open_t5),
    "vision": Kind(lambda: SiglipVision(SIGLIP_SO400M), "siglip-hf", "a vision tower", open_vision),
}


@torch.inference_mode()
def measure(path: Path, case: Case, device: torch.device) -> tuple[int, int]:
    """Bytes that were planned for a case, and bytes that it took."""
    warm_up(device)
    if case.stage in KINDS:
        return compare(KINDS[case.stage].open(path, device, DTYPES[device.type]), case)
    return compare(open_transformer(path, device, DTYPES[device.type], keep=KEEPS.get(case.stored, "packed")), case)


def opened(folder: Path, case: Case, device: torch.device) -> Part[Any, Any]:
    """What a case of another stage than the transformer's runs with, of a file with random weights in a folder."""
    kind = KINDS[case.stage]
    path = folder / f"{kind.layout}-{case.stored}.safetensors"
    if not path.exists():
        write_random(path, kind.build, kind.layout, case.stored, kind.title)
    return kind.open(path, device, DTYPES[device.type])


def warm_up(device: torch.device) -> None:
    """Have libraries and threads there before anything is measured."""
    _run_transformer(open_transformer(MINI.transformer, device, DTYPES[device.type]), WARM_UP, None)


@torch.inference_mode()
def compare(part: Part[Any, Any], case: Case) -> tuple[int, int]:
    """Bytes that were planned for a case, and bytes that it took, in a process that is warm."""
    job = Job(
        width=case.side, height=case.side, batch=case.batch, steps=STEPS,
        references=((case.side, case.side),) * case.references, views=1, starts=True,
    )  # fmt: skip
    device, policy = part.device, read_policy(case.policy)
    plan = plan_run([planned_of_part(part)], job, policy, device=str(device), available=0)
    stage = plan.stage(case.stage)
    before = _begin(device)
    RUNS[case.stage](part, case, stage)
    return stage.peak_bytes, _taken(device) - before


def _run_transformer(part: Part[Flux1Spec, Flux1], case: Case, stage: StagePlan | None) -> None:
    spec, cells, random = part.spec, case.side // CELL, torch.Generator().manual_seed(0)
    prompt = EncodedPrompt(
        torch.randn(1, spec.t5_length, spec.context_width, generator=random),
        torch.randn(1, spec.pooled_width, generator=random),
    )
    references = [torch.zeros(1, spec.latent_channels, cells, cells) for _ in range(case.references)]
    noise = draw_noise((spec.latent_channels, cells, cells), list(range(case.batch)))
    denoise(
        part, prompt, noise, [1 - index / STEPS for index in range(STEPS + 1)], guidance=GUIDANCE,
        guided=Guidance(guides=[Reference(latents=latents) for latents in references]),
        limit=None if stage is None else stage.limit,
    )  # fmt: skip


def _run_decode(part: Part[Any, Any], case: Case, stage: StagePlan) -> None:
    latents = torch.zeros(1, part.spec.latent_channels, case.side // CELL, case.side // CELL)
    decode(StripedPart(part) if stage.in_strips else part, latents)


def _run_encode(part: Part[Any, Any], case: Case, stage: StagePlan) -> None:
    encode_picture(StripedPart(part) if stage.in_strips else part, torch.zeros(1, 3, case.side, case.side))


def _run_t5(part: Part[Any, Any], case: Case, stage: StagePlan) -> None:
    with part.resident(limit=stage.limit) as encoder:
        encoder(torch.ones(1, part.spec.length, dtype=torch.long))


def _run_vision(part: Part[Any, Any], case: Case, stage: StagePlan) -> None:
    with part.resident(limit=stage.limit) as tower:
        tower(torch.zeros(1, 3, part.spec.side, part.spec.side, dtype=part.dtype, device=part.device))


RUNS: Mapping[str, Callable[[Part[Any, Any], Case, StagePlan], None]] = {
    "transformer": _run_transformer, "decode": _run_decode, "encode": _run_encode, "t5": _run_t5,
    "vision": _run_vision,
}  # fmt: skip


def _begin(device: torch.device) -> int:
    """Have the peak counted from here; what it is."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return _taken(device)


def _taken(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident()


@dataclass(frozen=True)
class Compared:
    """A case's peak in bytes, planned and taken."""

    case: Case
    planned: int
    taken: int

    @property
    def off(self) -> float:
        """By which share the plan is above what was taken."""
        return self.planned / self.taken - 1

    def row(self, bar: float) -> str:
        """Of the table."""
        return (
            f"| {self.case.name} | {self.planned / MIB:.0f} MiB | {self.taken / MIB:.0f} MiB | {100 * self.off:+.1f} % "
            f"| {verdict(abs(self.off) <= bar)} |"
        )


def table(device: str = "cpu", cases: Sequence[Case] = CASES + OTHERS) -> Report:
    """Every case."""
    spec: Flux1Spec = SMALL if device == "cpu" else FLUX1["flux1-dev"]
    transformer = Kind(lambda: Flux1(spec), "flux1-bfl", spec.title, open_transformer)
    found: dict[Case, Compared] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, stored in dict.fromkeys((KINDS.get(case.stage, transformer), case.stored) for case in cases):
            path = Path(folder) / ("model" + (".gguf" if stored.startswith("gguf") else ".safetensors"))
            write_random(path, kind.build, kind.layout, stored, kind.title)
            for case in (c for c in cases if (KINDS.get(c.stage, transformer), c.stored) == (kind, stored)):
                found[case] = _measured(path, case, device)
            path.unlink()
    bar, worst = BARS[torch.device(device).type], max(abs(one.off) for one in found.values())
    text = "\n".join(
        (
            f"Transformer: {spec.title}, hidden {spec.hidden}, {spec.double_blocks} + {spec.single_blocks} blocks; the "
            f"others of real size; random weights, each case in a process of its own, the "
            f"transformer's in {PROCESSES}, of which the median is told, on "
            f"{processor() if device == 'cpu' else device}. Of {len(found)} the farthest is {100 * worst:.1f} % off "
            f"(bar {100 * bar:.0f} %).",
            "",
            "| run | planned | taken | | |",
            "|---|---|---|---|---|",
            *(found[case].row(bar) for case in cases),
        )
    )
    rows = [
        {"run": one.case.name, **vars(one.case), "planned_bytes": one.planned, "taken_bytes": one.taken, "off": one.off}
        for one in found.values()
    ]
    return Report(text, {"device": device, "bar": bar, "worst": worst, "rows": rows})


def _measured(path: Path, case: Case, device: str) -> Compared:
    """The median of several processes: how full the heap's pages are at the peak differs from one to the next."""
    times = 1 if case.stage in KINDS else PROCESSES
    runs = [_in_process(path, case, device) for _ in range(times)]
    return Compared(case, runs[0][0], int(statistics.median(taken for _, taken in runs)))


def _in_process(path: Path, case: Case, device: str) -> tuple[int, int]:
    command = [sys.executable, "-m", "benchmarks.planned", "--file", str(path), "--device", device]
    command += ["--case", str((CASES + OTHERS).index(case))]
    environment = {name: value for name, value in os.environ.items() if name not in UNLIKE_USERS}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    planned, taken = done.stdout.split()[-2:]
    return int(planned), int(taken)


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or measure one case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planned", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", metavar="WORDS", help="runs whose name has these words, as in the table")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.file is None:
        cases = [case for case in CASES + OTHERS if options.only in case.name]
        sys.stdout.write(f"{table(options.device, cases)}\n")
    else:
        planned, taken = measure(options.file, (CASES + OTHERS)[options.case], torch.device(options.device))
        sys.stdout.write(f"{planned} {taken}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
