"""A plan, and what a run took beside it, as text."""

from __future__ import annotations

from collections.abc import Iterator

from ..memory.metering import StageActual
from ..memory.plan import RunPlan, StagePlan
from ..memory.policy import AUTO, SAVE
from ..memory.report import RunReport, usual_pass
from .describe import human_bytes
from .layout import table
from .plan_picture import spelled

__all__ = ["plan_lines", "report_lines"]

HEAD = ("STAGE", "MODEL", "WEIGHTS", "STAY", "STREAMED", "BESIDES", "PEAK", "TIME")
TAKEN = ("STAGE", "MODEL", "PLANNED", "TAKEN", "STAYED", "STREAMED", "TIME", "A PASS", "WAITED")
NONE = "-"
ON_A_CPU = (
    "TAKEN is what the process has grown by since the run began: libraries that are loaded on first use and what "
    "earlier stages left behind are in it."
)


def plan_lines(plan: RunPlan) -> list[str]:
    """A plan as a table, and sentences on what is streamed."""
    rows = [_row(stage, plan) for stage in plan.stages]
    largest = max(plan.stages, key=lambda stage: stage.peak_bytes)
    return [
        *table(HEAD, rows),
        "",
        f"The peak is {spelled(plan.peak_bytes)}, {largest.name} ({largest.title}), of {spelled(plan.available)} "
        f"free on {plan.device}; policy {plan.policy}.",
        *_streaming(plan),
        *_too_much(plan),
    ]


def _row(stage: StagePlan, plan: RunPlan) -> tuple[str, ...]:
    return (
        stage.name,
        stage.title,
        human_bytes(stage.weights),
        spelled(stage.resident_bytes + stage.ring_bytes),
        spelled(stage.streamed_bytes) if stage.streamed_bytes else "-",
        spelled(stage.activations + stage.workspace + stage.beside),
        spelled(stage.peak_bytes),
        "-" if plan.rates is None else f"{stage.seconds(plan.rates):.1f} s",
    )


def _streaming(plan: RunPlan) -> Iterator[str]:
    for stage in plan.stages:
        blocks = stage.footprint.blocks
        if blocks.streamed:
            yield (
                f"{stage.title}: {len(blocks.streamed)} of {len(blocks.kept)} blocks are streamed, "
                f"{spelled(stage.streamed_bytes)} each pass, through {spelled(stage.ring_bytes)}."
            )
        if stage.in_strips:
            yield f"{stage.title}: {'encodes' if stage.name == 'encode' else 'decodes'} in strips of rows."
        if stage.beside:
            yield f"{stage.title}: {spelled(stage.beside)} of control LoRAs and other models stay beside it."
        if stage.once:
            yield f"{stage.title}: {spelled(stage.once)} of modulation weights come once and do not stay."


def _too_much(plan: RunPlan) -> Iterator[str]:
    if plan.peak_bytes > plan.available:
        others = {AUTO: "policy save, ", SAVE: ""}.get(plan.policy.name, "policy auto or save, ")
        yield f"That is more than is free: choose {others}a smaller picture, or a smaller format."


def report_lines(report: RunReport) -> list[str]:
    """A run's plan beside what it took, as a table and sentences."""
    rows = [_taken(planned, taken) for planned, taken in report.rows()]
    share = report.waited / report.seconds if report.seconds else 0.0
    return [
        *table(TAKEN, rows),
        "",
        f"All stages together took {report.seconds:.1f} s, of which {report.waited:.1f} s ({100 * share:.0f} %) were "
        "waiting for weights.",
        *([ON_A_CPU] if report.plan is not None and report.plan.device == "cpu" else []),
    ]


def _taken(planned: StagePlan | None, taken: StageActual) -> tuple[str, ...]:
    times = len(taken.passes)
    return (
        taken.name,
        taken.title,
        NONE if planned is None else spelled(planned.peak_bytes),
        spelled(taken.peak_bytes),
        spelled(taken.resident_bytes),
        spelled(taken.streamed_bytes) if taken.streamed_bytes else NONE,
        f"{taken.seconds:.1f} s",
        f"{times} x {usual_pass(taken):.2f} s" if times else NONE,
        f"{taken.waited:.1f} s" if taken.streamed_bytes else NONE,
    )
