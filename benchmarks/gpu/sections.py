"""What the runner measures, in the order in which it does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flux.memory.policy import read_policy
from flux.pipelines.parts import Part

from .. import planned
from .bench import Bench, ready
from .denoising import denoising
from .found import Bar, Found

__all__ = ["SECTIONS", "Section", "limit_of"]

SHARES = (1.0, 0.75, 0.5, 0.25)  # of the blocks' weights that are granted room
LEAST_BUDGET = "3"  # GiB, of the whole stage
STREAMED_BAR_DOWN_TO = 0.5  # of the blocks' weights
GIB, TERA = 1 << 30, 1e12


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
