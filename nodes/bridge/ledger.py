"""What stages of the host's prompts took: noted as they run, for FLUX Memory Report.

On CUDA a stage's memory is what torch's allocator handed out beyond what was there when it began, and the weights that
it found loaded; on a CPU likewise of the process's resident set.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_execution.utils import get_executing_context

from ...flux.errors import BudgetError
from ...flux.memory.loss import is_lost, lost
from ...flux.memory.metering import Meter, Metered, Several, StageActual
from ...flux.memory.plan import RunPlan
from ...flux.memory.policy import Policy
from ...flux.memory.report import RunReport
from ...flux.memory.streamed import Passed
from ...flux.pipelines.planning import Job, Planned, plan_run
from .residents import residents_of

__all__ = ["AS_LOADED", "Loaded", "Whole", "noted", "report_of"]

Later = Callable[[None], Planned]

AS_LOADED = Policy("as loaded")
REMEMBERED = 64  # stages


class Loaded:
    """A patcher's weights, to a meter."""

    def __init__(self, patcher: Any) -> None:
        self._patcher = patcher

    @property
    def resident_bytes(self) -> int:
        """As the host counts them."""
        return int(self._patcher.loaded_size())

    @property
    def passed(self) -> Passed:
        """Of all modules of the model."""
        return Several(residents_of(self._patcher.model)).passed


@dataclass(frozen=True)
class Whole:
    """Weights that are there as a whole, to a meter."""

    resident_bytes: int
    passed: Passed = Passed()


@dataclass(frozen=True)
class Entry:
    """A stage that ran.

    Attributes:
        taken: What it took.
        parts: What ran, as far as planning goes, and what was in memory with it; asked when a report is made.
        job: What it did.
        device: Where.
        prompt: The host's id of the run.
        node: The host's id of the node that ran it.
    """

    taken: StageActual
    parts: Sequence[Later]
    job: Job
    device: torch.device
    prompt: str | None
    node: str | None


_entries: list[Entry] = []


@contextmanager
def noted(
    stage: str, title: str, device: torch.device, weights: Metered, parts: Sequence[Later], job: Job
) -> Iterator[Meter]:
    """Note what a stage takes inside the block, which may tell of passes.

    Args:
        stage: Its key, as in a plan.
        title: What runs in it.
        device: Where.
        weights: What it runs with.
        parts: What runs, as far as planning goes, and what is in memory with it; asked when a report is made, so they
            should hold no model.
        job: What it does.

    Raises:
        DeviceLostError: The device failed inside the block.
    """
    meter = Meter(device)
    found = weights.resident_bytes
    with meter.stage(stage, title, weights), _told_if_lost(device):
        yield meter
    taken = meter.stages[stage]
    taken.peak_bytes += found
    _entries.append(Entry(taken, parts, job, device, *_running()))
    del _entries[:-REMEMBERED]


@contextmanager
def _told_if_lost(device: torch.device) -> Iterator[None]:
    """Say in a sentence that a device failed."""
    try:
        yield
    except Exception as error:
        if is_lost(error):
            raise lost(device, error) from error
        raise


def report_of(available: Callable[[torch.device], int], nodes: Collection[str]) -> tuple[RunReport, list[str]]:
    """What the stages of the prompt that runs took, beside their plans; of those that it found cached, the last time.

    Args:
        available: Bytes that models may take of a device.
        nodes: Ids of the prompt's nodes; what others ran before is not told of.

    Returns:
        The report, and the keys of stages that did not run in this prompt.
    """
    prompt, _ = _running()
    own = [entry for entry in _entries if entry.prompt == prompt]
    ran = {entry.taken.name for entry in own}
    earlier = {e.taken.name: e for e in _entries if e.taken.name not in ran and e.node in nodes}
    taken: dict[str, StageActual] = {}
    plans: list[RunPlan] = []
    for entry, together in _joined([*earlier.values(), *own]):
        key = _free_key(together.name, taken)
        taken[key] = replace(together, name=key)
        plans += _planned(entry, key, available(entry.device))
    if not plans:
        return RunReport(None, taken), sorted(earlier)
    stages = tuple(stage for plan in plans for stage in plan.stages)
    plan = replace(plans[0], stages=stages, available=max(plan.available for plan in plans))
    return RunReport(plan, taken), sorted(earlier)


def _joined(entries: Sequence[Entry]) -> Iterator[tuple[Entry, StageActual]]:
    """Stages that ran several times alike, as two prompts through one encoder, each as one."""
    alike: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        loaded = tuple((id(part.accounts), part.policy) for part in (own(None) for own in entry.parts))
        alike.setdefault((entry.taken.name, entry.taken.title, entry.job, loaded), []).append(entry)
    for group in alike.values():
        together = group[0].taken
        for other in group[1:]:
            together = together.joined(other.taken)
        yield group[0], together


def _planned(entry: Entry, key: str, available: int) -> list[RunPlan]:
    """The stage's plan; none where it would have been refused, as a batch that is larger than what was planned for."""
    parts = [part(None) for part in entry.parts]
    try:
        plan = plan_run(parts, entry.job, AS_LOADED, device=str(entry.device), available=available)
    except BudgetError:
        return []
    return [replace(plan, stages=(replace(plan.stage(entry.taken.name), name=key),))]


def _free_key(name: str, taken: dict[str, StageActual]) -> str:
    """A stage's key, with a number where several of its kind ran."""
    if name not in taken:
        return name
    number = 2
    while f"{name} {number}" in taken:
        number += 1
    return f"{name} {number}"


def _running() -> tuple[str | None, str | None]:
    """The prompt and the node that run."""
    context = get_executing_context()
    return (None, None) if context is None else (str(context.prompt_id), str(context.node_id))
