"""FLUX.1 [dev] on a GPU: beside diffusers, in fp8, under budgets, in batches and sizes, against what the card can do.

``python -m benchmarks.gpu`` is the one command. It ends within ``--minutes``: a section for which too little time is
left is skipped, and says so; each writes its figures to ``--out`` as soon as it has them (``--write``: to the tables).
Weights are random, of real size and made on the device (``random_weights``); nothing is downloaded. The same way is
taken on a CPU with ``--device cpu --size tiny``, where figures mean nothing, and no bar is asked.

What a card can do at most is what the operations of a pass take at the rate of its matrix products in bf16, measured in
the same run; what it can bring, at the rate of copies from pinned memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux.memory.plan import StagePlan
from flux.memory.policy import KEEP, Policy, read_policy
from flux.memory.rates import measure_rates
from flux.models.flux1 import Flux1
from flux.pipelines.compiled import INDUCTOR, compiled_blocks
from flux.pipelines.denoising import Hooks, Velocity, prepared, walk
from flux.pipelines.parts import Part
from flux.pipelines.planning import Job, plan_run, planned_of_part
from flux.pipelines.prompts import EncodedPrompt
from flux.sampling.noise import draw_noise
from flux.specs.flux1 import FLUX1, Flux1Spec
from flux.version import VERSION
from flux.weights.diffusers_folder import config_of
from flux.weights.formats.base import DATA

from . import planned
from .engines import CELL, PATCH, from_tokens, to_tokens
from .random_weights import STORED, HostWeight, draw, open_random
from .report import verdict

__all__ = ["SECTIONS", "SIZES", "Bar", "Bench", "Section", "Size", "Watch", "limit_of", "main", "table"]

MINUTES = 8.0
REPEATS = 5
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the blocks' weights that are granted room
LEAST_BUDGET = "3"  # GiB, of the whole stage
PLANNED_BUDGET = "8"  # GiB, in the place of those that a small model's plans are tried with
STREAMED_BAR_DOWN_TO = 0.5  # of the blocks' weights
ROOM = 0.9  # of the card's memory that engines which run in turn may take together
MIB, GIB, GB, TERA = 1 << 20, 1 << 30, 1e9, 1e12
TABLES = Path(__file__).resolve().parent / "tables"
FOUNDRY, FOUNDRY_FP8 = "FLUX Foundry", "FLUX Foundry, fp8"
FOUNDRY_COMPILED, FOUNDRY_FP8_COMPILED = "FLUX Foundry, compiled", "FLUX Foundry, fp8, compiled"
DIFFUSERS, DIFFUSERS_COMPILED = "diffusers", "diffusers, compiled"


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


@dataclass(frozen=True)
class Bar:
    """What a figure may be at most, where it counts.

    Attributes:
        what: It is.
        value: That was measured; None where it could not be.
        most: That it may be.
    """

    what: str
    value: float | None
    most: float

    @property
    def holds(self) -> bool:
        return self.value is not None and self.value <= self.most

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"**{self.value:.3f}**"
        return f"{self.what}: {value} (≤ {self.most:g}: {verdict(self.holds)})"


@dataclass
class Found:
    """What a section found: rows of figures, all with the same keys; bars; and sentences on what went otherwise."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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


@dataclass(frozen=True)
class Denoises:
    """An engine that is ready to denoise.

    Attributes:
        run: From noise to latents (B, C, h, w), on the CPU.
        once: Seconds that it took besides, for each prompt and schedule.
    """

    run: Callable[[], Tensor]
    once: float = 0.0


@contextmanager
def our_denoising(bench: Bench, stored: str, *, compiled: bool = False) -> Iterator[Denoises]:
    """Ours, with weights stored so."""
    noise, part = bench.noise(bench.size.side), bench.part(stored)
    blocks = compiled_blocks(part.module, backend=bench.compiler, tell=_not_compiled) if compiled else nullcontext()
    with ready(bench, part) as run, blocks:
        yield Denoises(lambda: walk(run.velocity, noise, bench.sigmas(), device=bench.device), run.tables)


def _not_compiled(reason: str) -> None:
    """What did not compile is not to pass for it."""
    raise RuntimeError(reason)


@contextmanager
def their_denoising(bench: Bench, *, compiled: bool) -> Iterator[Denoises]:
    """The model of diffusers with our weights and steps; compiled by blocks, as its documentation advises."""
    model = diffusers_model(bench)
    if compiled:
        compile_blocks = getattr(model, "compile_repeated_blocks", model.compile)
        compile_blocks(fullgraph=True, backend=bench.compiler)
    noise, sigmas, given = bench.noise(bench.size.side), bench.sigmas(), partial(torch.full, (1,), device=bench.device)
    rows, columns = noise.shape[-2:]
    prompt, spec = bench.prompt(), bench.size.spec
    places = torch.cartesian_prod(torch.arange(rows // PATCH), torch.arange(columns // PATCH))
    arguments = {
        "encoder_hidden_states": prompt.tokens.to(bench.device, bench.dtype),
        "pooled_projections": prompt.pooled.to(bench.device, bench.dtype),
        "guidance": given(spec.guidance, dtype=torch.float32),
        "img_ids": torch.nn.functional.pad(places, (1, 0)).to(bench.device, bench.dtype),
        "txt_ids": torch.zeros(spec.t5_length, 3, device=bench.device, dtype=bench.dtype),
    }

    @torch.inference_mode()
    def run() -> Tensor:
        x = to_tokens(noise.to(bench.device))
        for sigma, following in pairwise(sigmas):
            velocity = model(
                hidden_states=x.to(bench.dtype),
                timestep=given(sigma, dtype=bench.dtype),
                return_dict=False,
                **arguments,
            )[0]
            x = x + (following - sigma) * velocity
        return from_tokens(x, rows, columns).cpu()

    yield Denoises(run)


def diffusers_model(bench: Bench) -> Any:
    """The model of diffusers with our weights, on the device."""
    from diffusers import FluxTransformer2DModel

    from tests.oracles import flux1_to_diffusers  # the conversion that the parity tests prove

    config = {name: value for name, value in (config_of(bench.size.spec) or {}).items() if not name.startswith("_")}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    ours = {name: next(iter(own.kept.parts.values())).stored[DATA] for name, own in bench.weights().items()}
    model.load_state_dict(flux1_to_diffusers(ours), assign=True)
    return model.to(bench.device, bench.dtype).eval().requires_grad_(False)


ENGINES: dict[str, Callable[[Bench], AbstractContextManager[Denoises]]] = {
    FOUNDRY: lambda bench: our_denoising(bench, "bf16"),
    FOUNDRY_FP8: lambda bench: our_denoising(bench, "fp8"),
    FOUNDRY_COMPILED: lambda bench: our_denoising(bench, "bf16", compiled=True),
    FOUNDRY_FP8_COMPILED: lambda bench: our_denoising(bench, "fp8", compiled=True),
    DIFFUSERS: lambda bench: their_denoising(bench, compiled=False),
    DIFFUSERS_COMPILED: lambda bench: their_denoising(bench, compiled=True),
}
"""What denoises, in the order of the table."""

OURS = {FOUNDRY: "bf16", FOUNDRY_FP8: "fp8", FOUNDRY_COMPILED: "bf16", FOUNDRY_FP8_COMPILED: "fp8"}  # as stored

DENOISE_BARS = (
    ("FLUX Foundry of diffusers, both compiled", FOUNDRY_COMPILED, DIFFUSERS_COMPILED, 0.90),
    ("fp8 of bf16, both compiled", FOUNDRY_FP8_COMPILED, FOUNDRY_COMPILED, 0.70),
)
RESIDENT_BAR = ("GB of weights and tables of FLUX.1 [dev] in bf16 that stay", FOUNDRY, 17.4)
SECONDS_BARS = {"H200": ("FLUX Foundry, compiled, in seconds on an H200", FOUNDRY_COMPILED, 3.4)}  # by a card's name


@dataclass
class Denoised:
    """What an engine took: seconds of whole runs, and bytes."""

    once: float
    resident: int
    peak: int
    output: Tensor
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) + self.once


def denoising(bench: Bench) -> Found:
    """Whole runs of every engine: in turn where they fit together, else one engine after the other."""
    found, notes = dict[str, Denoised](), list[str]()
    for group in _groups(bench):
        _in_turn(bench, group, found, notes)
    operations = bench.size.steps * bench.plan(bench.part(), bench.size.side).operations
    rows = [
        {
            "engine": name,
            "seconds": own.median,
            "of which once a prompt": own.once,
            "a step": statistics.median(own.seconds) / bench.size.steps,
            "of the bf16 roofline": operations / bench.rate / own.median,
            "resident": own.resident,
            "peak": own.peak,
            "difference": _difference(own.output, next(iter(found.values())).output),
        }
        for name, own in found.items()
    ]
    bars = [
        Bar(what, found[one].median / found[other].median if {one, other} <= set(found) else None, most)
        for what, one, other, most in DENOISE_BARS
    ]
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else ""
    bars += [
        Bar(what, found[one].median if one in found else None, most)
        for word, (what, one, most) in SECONDS_BARS.items()
        if word in name
    ]
    what, one, most = RESIDENT_BAR
    if bench.is_judged:
        bars.append(Bar(what, found[one].resident / GB if one in found else None, most))
    return Found(rows, bars, notes)


def _in_turn(bench: Bench, group: Sequence[str], found: dict[str, Denoised], notes: list[str]) -> None:
    """Have engines that are there at once denoise one after the other, again and again; all are gone at the end.

    One that fails is noted, and the others go on.
    """
    with ExitStack() as held:
        engines = {}
        for name in group:
            engine = _try(held, bench, name, found, notes)
            if engine is not None:
                engines[name] = engine
        for _ in range(bench.repeats):
            for name, engine in engines.items():
                found[name].seconds.append(bench.timed(engine.run))


def _try(held: ExitStack, bench: Bench, name: str, found: dict[str, Denoised], notes: list[str]) -> Denoises | None:
    try:
        return _enter(held, bench, name, found)
    except Exception as error:  # noqa: BLE001 - whatever a peer or a compiler raises
        notes.append(f"{name} failed: {type(error).__name__}: {error}")
        return None


def _enter(held: ExitStack, bench: Bench, name: str, found: dict[str, Denoised]) -> Denoises:
    """An engine, warm; what it takes is noted."""
    before = bench.begin_peak()
    engine = held.enter_context(ENGINES[name](bench))
    resident = bench.allocated() - before
    output = engine.run()
    found[name] = Denoised(engine.once, resident, bench.peak() - before, output)
    return engine


def _groups(bench: Bench) -> list[list[str]]:
    """Engines that are there at once."""
    if bench.device.type != "cuda":
        return [list(ENGINES)]
    needed = sum(_bytes_of(bench, name) for name in ENGINES)
    total = torch.cuda.get_device_properties(bench.device).total_memory
    return [list(ENGINES)] if needed <= ROOM * total else [[name] for name in ENGINES]


def _bytes_of(bench: Bench, name: str) -> int:
    """That an engine's weights take."""
    if name not in OURS:
        return sum(own.nbytes for own in bench.weights().values())
    part = bench.part(OURS[name])
    return part.residency.accounts.footprint(tuple(part.module.modulation_layers())).device_bytes


def _difference(one: Tensor, other: Tensor) -> float:
    """The norm of what differs, of the norm."""
    return float((one - other).norm() / other.norm())


def limit_of(whole: int, others: int, share: float) -> int:
    """Bytes that all weights may take, where the blocks among them are granted a share of what they would.

    Args:
        whole: Bytes of all, where all stay.
        others: Of these, what is in no block.
        share: Of the rest, 0 to 1.
    """
    return int(others + share * (whole - others))


def budgets(bench: Bench) -> Found:
    """Steps with less and less room for weights, against the longer of computing and bringing."""
    part, side = bench.part(), bench.size.side
    apart = tuple(part.module.modulation_layers())
    whole = part.residency.accounts.footprint(apart)
    limits: dict[str, int | None] = {
        f"{100 * share:.0f} %": None if share == 1 else limit_of(whole.device_bytes, whole.others, share)
        for share in SHARES
    }
    limits[f"{LEAST_BUDGET} GiB"] = bench.plan(part, side, policy=read_policy(LEAST_BUDGET)).limit
    noise, found, compute = bench.noise(side).to(bench.device), Found(), 0.0
    for name, limit in limits.items():
        before = bench.begin_peak()
        with ready(bench, part, limit) as run:
            seconds = bench.median(partial(run.velocity, noise, bench.sigmas()[0]))
            kept = part.residency.resident_bytes
        compute = compute or seconds
        streamed = part.residency.accounts.footprint(apart, limit).blocks.streamed_bytes
        expected = max(compute, streamed / bench.brings)
        found.rows.append({
            "budget": name, "a step": seconds, "streamed": streamed, "bringing alone": streamed / bench.brings,
            "of the longer": seconds / expected, "resident": kept, "peak": bench.peak() - before,
        })  # fmt: skip
    for share, row in zip(SHARES, found.rows, strict=False):
        if STREAMED_BAR_DOWN_TO <= share < 1:
            found.bars.append(
                Bar(f"{row['budget']}, of the longer of computing and bringing", row["of the longer"], 1.15)
            )
    return found


def _cases(bench: Bench, cases: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """A row for each (side, batch), all weights resident."""
    part, before = bench.part(), bench.begin_peak()
    with ready(bench, part) as run:
        weights = bench.allocated() - before  # and tables
        for side, batch in cases:
            noise = bench.noise(side, batch).to(bench.device)
            before = bench.begin_peak()
            seconds = bench.median(partial(run.velocity, noise, bench.sigmas()[0]))
            plan = bench.plan(part, side, batch)
            yield {
                "picture": f"{side}²", "batch": batch, "a step": seconds, "a picture": seconds / batch,
                "of the bf16 roofline": plan.operations / bench.rate / seconds,
                "peak": bench.peak() - before + weights, "planned": plan.peak_bytes,
            }  # fmt: skip


def batches(bench: Bench) -> Found:
    """Several pictures at once."""
    rows = list(_cases(bench, [(bench.size.side, batch) for batch in bench.size.batches]))
    return Found(rows, [Bar(f"a picture of {row['batch']}, of one alone", row["a picture"] / rows[0]["a picture"], 1.0)
                        for row in rows[1:] if row["batch"] == 4])  # fmt: skip


def sizes(bench: Bench) -> Found:
    """From small pictures to large ones."""
    return Found(list(_cases(bench, [(side, 1) for side in bench.size.sides])))


def graphs(bench: Bench) -> Found:
    """A pass as its kernels are launched one by one, and as a CUDA graph that was recorded: whether graphs would pay.

    Only the model's own pass: no look at what it gives, and nothing is streamed.
    """
    part, found = bench.part(), Found()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((given, named))

    with ready(bench, part) as run, torch.inference_mode():
        for side in (bench.size.graphed_side, bench.size.side):
            noted = part.module.register_forward_pre_hook(note, with_kwargs=True)
            run.velocity(bench.noise(side).to(bench.device), bench.sigmas()[0])
            noted.remove()
            given, named = calls[-1]
            one_pass = partial(part.module, *given, **named)
            launched = bench.median(one_pass)
            replayed = bench.median(_recorded(bench, one_pass))
            found.rows.append({
                "picture": f"{side}²", "a pass": launched, "as a graph": replayed, "of it": replayed / launched,
            })  # fmt: skip
    return found


def _recorded(bench: Bench, work: Callable[[], object]) -> Callable[[], object]:
    """Some work as a graph; itself off a card."""
    if bench.device.type != "cuda":
        return work
    aside = torch.cuda.Stream(bench.device)
    aside.wait_stream(torch.cuda.current_stream(bench.device))
    with torch.cuda.stream(aside):  # what libraries set up at first use cannot be recorded
        work()
    torch.cuda.current_stream(bench.device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def plans(bench: Bench) -> Found:
    """What was planned beside what was taken."""
    planned.warm_up(bench.device)
    found = Found()
    for case in bench.size.cases:
        _compare(found, bench.part(case.stored), case)
    with tempfile.TemporaryDirectory() as folder:
        for case in bench.size.pictures:
            _compare(found, planned.opened(Path(folder), case, bench.device), case)
    worst = max(abs(row["off"]) for row in found.rows)
    found.bars.append(Bar("the farthest, as a share", worst, planned.BARS[bench.device.type]))
    return found


def _compare(found: Found, part: Part[Any, Any], case: planned.Case) -> None:
    foreseen, taken = planned.compare(part, case)
    off = foreseen / max(taken, 1) - 1
    found.rows.append({"run": case.name, "planned": foreseen, "taken": taken, "off": off})


def rates(bench: Bench) -> Found:
    """What the card can do."""
    operations = bench.plan(bench.part(), bench.size.side).operations
    return Found([{
        "products": f"{bench.rate / TERA:.1f} TFLOP/s in {str(bench.dtype).removeprefix('torch.')}",
        "from pinned memory": f"{bench.brings / GIB:.1f} GiB/s",
        "a step's operations": f"{operations / TERA:.3f} TFLOP",
        "a step at that rate": operations / bench.rate,
    }])  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A part of the run.

    Attributes:
        name: Of its file.
        title: For people.
        needs: Seconds that it takes on an H200 at most; with less left it is skipped.
        run: Finds the figures.
    """

    name: str
    title: str
    needs: float
    run: Callable[[Bench], Found]


SECTIONS = (  # what bars are asked of comes first
    Section("rates", "What the card does at most", 30, rates),
    Section("denoising", "Denoising beside diffusers", 230, denoising),
    Section("plans", "Plans beside what runs take", 80, plans),
    Section("budgets", "Room for fewer and fewer weights", 60, budgets),
    Section("batches", "Several pictures at once", 25, batches),
    Section("graphs", "Whether CUDA graphs would pay", 20, graphs),
    Section("sizes", "From small to large", 20, sizes),
)
BYTES = {"resident", "peak", "planned", "taken", "streamed"}
SECONDS = {
    "seconds", "of which once a prompt", "a step", "a picture", "a pass",
    "as a graph", "bringing alone", "a step at that rate",
}  # fmt: skip
SHARES_OF = {"of the bf16 roofline", "off"}


def cell(name: str, value: Any) -> str:
    """A figure as people read it."""
    if name in BYTES:
        return f"{value / GIB:.2f} GiB"
    if name in SECONDS:
        return f"{value:.3f} s"
    if name in SHARES_OF:
        return f"{100 * value:.0f} %"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(found: Found, is_judged: bool) -> str:
    """Rows and bars as Markdown."""
    names = list(found.rows[0])
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(cell(name, row[name]) for name in names)} |" for row in found.rows]
    if is_judged and found.bars:
        lines += ["", *(f"- {bar}" for bar in found.bars)]
    if found.notes:
        lines += ["", *(f"- {note}" for note in found.notes)]
    return "\n".join(lines)


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
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
