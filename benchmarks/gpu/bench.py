"""What sections share: how large everything is, the device, weights once drawn, our engine ready for a schedule."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flux.memory.plan import StagePlan
from flux.memory.policy import KEEP, Policy
from flux.memory.rates import measure_rates
from flux.models.flux1 import Flux1
from flux.pipelines.compiled import INDUCTOR
from flux.pipelines.denoising import Hooks, Velocity, prepared
from flux.pipelines.parts import Part
from flux.pipelines.planning import Job, plan_run, planned_of_part
from flux.pipelines.prompts import EncodedPrompt
from flux.sampling.noise import draw_noise
from flux.specs.flux1 import FLUX1, Flux1Spec

from .. import planned
from ..engines import CELL
from ..random_weights import STORED, HostWeight, draw, open_random

__all__ = ["REPEATS", "SIZES", "Bench", "Run", "Size", "ready"]

REPEATS = 5
PLANNED_BUDGET = "8"  # GiB, in the place of those that a small model's plans are tried with


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large everything is.

    Attributes:
        spec: Of the transformer.
        side: Of pictures, pixels.
        sides: Of those in the table of sizes.
        graphed_side: Of a small picture, for which launching kernels counts most.
        batches: Pictures at once.
        steps: Of a run.
        cases: Of which plans are compared with what is taken.
        pictures: Likewise, of the autoencoder.
    """

    spec: Flux1Spec
    side: int
    sides: tuple[int, ...]
    graphed_side: int
    batches: tuple[int, ...]
    steps: int
    cases: tuple[planned.Case, ...]
    pictures: tuple[planned.Case, ...]


SIZES = {
    "real": Size(
        spec=FLUX1["flux1-dev"], side=1024, sides=(512, 768, 1024, 1536, 2048), graphed_side=256,
        batches=(1, 2, 4, 8), steps=28,
        cases=tuple(
            replace(case, policy=PLANNED_BUDGET) if case.policy[0].isdigit() else case
            for case in planned.CASES
            if case.stored in STORED
        ),
        pictures=(
            planned.Case(1024, stage="decode"), planned.Case(1024, stage="encode"),
            planned.Case(2048, stage="decode", policy="save"),
        ),
    ),
    "tiny": Size(
        spec=replace(FLUX1["flux1-mini"], name="tiny", title="a tiny FLUX.1", double_blocks=2, single_blocks=4),
        side=64, sides=(32, 64), graphed_side=32, batches=(1, 2), steps=2,
        cases=(planned.Case(64), planned.Case(64, stored="fp8", policy="save")),
        pictures=(planned.Case(64, stage="decode"),),
    ),
}  # fmt: skip


class Bench:
    """What sections share: the device, weights once drawn, and the rates that were measured.

    Args:
        device: Where everything runs.
        size: Of everything.
        repeats: Of which medians are taken.
    """

    def __init__(self, device: torch.device, size: Size, repeats: int = REPEATS) -> None:
        self.device, self.size, self.repeats = device, size, repeats
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._weights: dict[str, dict[str, HostWeight]] = {}

    @property
    def is_judged(self) -> bool:
        """Whether bars are asked: they are a card's, and of the real size."""
        return self.device.type == "cuda" and self.size is SIZES["real"]

    @property
    def compiler(self) -> str:
        """That is asked for; off a card, where times mean nothing, one that leaves everything as it is."""
        return INDUCTOR if self.device.type == "cuda" else "eager"

    @property
    def rate(self) -> float:
        """Operations a second of matrix products."""
        return measure_rates(self.device, self.dtype).operations

    @property
    def brings(self) -> float:
        """Bytes a second from a cached file."""
        return measure_rates(self.device, self.dtype).bytes

    def weights(self, stored: str = "bf16") -> dict[str, HostWeight]:
        """All weights, drawn once."""
        if stored not in self._weights:
            self._weights[stored] = draw(self.size.spec, self.device, stored)
        return self._weights[stored]

    def part(self, stored: str = "bf16") -> Part[Flux1Spec, Flux1]:
        """A transformer of them, none on the device yet."""
        return open_random(self.size.spec, self.weights(stored), self.device, self.dtype)

    def prompt(self) -> EncodedPrompt:
        """A random one of the model's length."""
        spec, random = self.size.spec, torch.Generator().manual_seed(0)
        return EncodedPrompt(
            torch.randn(1, spec.t5_length, spec.context_width, generator=random),
            torch.randn(1, spec.pooled_width, generator=random),
        )

    def noise(self, side: int, batch: int = 1) -> Tensor:
        """Latents (batch, C, h, w)."""
        return draw_noise((self.size.spec.latent_channels, side // CELL, side // CELL), list(range(batch)))

    def sigmas(self) -> list[float]:
        """Evenly falling; how long a step takes does not depend on its time."""
        return [1 - index / self.size.steps for index in range(self.size.steps + 1)]

    def plan(self, part: Part[Flux1Spec, Flux1], side: int, batch: int = 1, policy: Policy | None = None) -> StagePlan:
        """The transformer's stage of a run."""
        job = Job(width=side, height=side, batch=batch, steps=self.size.steps)
        plan = plan_run(
            [planned_of_part(part)], job, policy or Policy(KEEP), device=str(self.device), available=1 << 60
        )  # fmt: skip
        return plan.stages[0]

    def settle(self) -> float:
        """Wait for the device; the time then."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds of some work."""
        start = self.settle()
        work()
        return self.settle() - start

    def median(self, work: Callable[[], object]) -> float:
        """The median of ``repeats`` times, after one that does not count."""
        work()
        return statistics.median(self.timed(work) for _ in range(self.repeats))

    def allocated(self) -> int:
        """Bytes of tensors on a GPU now."""
        return int(torch.cuda.memory_allocated(self.device)) if self.device.type == "cuda" else 0

    def begin_peak(self) -> int:
        """Have the peak counted from here; the bytes that are there."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self.allocated()

    def peak(self) -> int:
        """The most bytes of tensors on a GPU since then."""
        return int(torch.cuda.max_memory_allocated(self.device)) if self.device.type == "cuda" else 0


@dataclass(frozen=True)
class Run:
    """Our engine, ready for a schedule.

    Attributes:
        velocity: See ``prepared``.
        tables: Seconds that its modulations took, weights brought for them included.
    """

    velocity: Velocity
    tables: float


@contextmanager
def ready(bench: Bench, part: Part[Flux1Spec, Flux1], limit: int | None = None) -> Iterator[Run]:
    """Our engine with its weights where they are to be."""
    loaded = [bench.settle()]
    hooks = Hooks(progress=lambda *_: loaded.append(bench.settle()))
    given = prepared(
        part, bench.prompt(), bench.sigmas(), guidance=bench.size.spec.guidance, limit=limit, hooks=hooks
    )  # fmt: skip
    with ExitStack() as held:
        with torch.inference_mode():  # not as long as the engine is there: others are made meanwhile
            velocity = held.enter_context(given)
            tables = bench.settle() - loaded[-1]
        yield Run(torch.inference_mode()(velocity), tables)
