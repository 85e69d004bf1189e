"""A run's plan beside what it took."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .metering import StageActual
from .plan import RunPlan, StagePlan

__all__ = ["RunReport", "usual_pass"]


@dataclass(frozen=True)
class RunReport:
    """What was foreseen and what was, stage by stage.

    Attributes:
        plan: Made before the run; None where none could be made.
        taken: By the stages' keys.
    """

    plan: RunPlan | None
    taken: Mapping[str, StageActual]

    def planned(self, name: str) -> StagePlan | None:
        """A stage's plan; None where it was not planned."""
        stages = () if self.plan is None else self.plan.stages
        return next((stage for stage in stages if stage.name == name), None)

    def rows(self) -> Iterator[tuple[StagePlan | None, StageActual]]:
        """Plan and fact of every stage that ran, in the plan's order, others last."""
        order = {} if self.plan is None else {stage.name: index for index, stage in enumerate(self.plan.stages)}
        for name in sorted(self.taken, key=lambda name: order.get(name, len(order))):
            yield self.planned(name), self.taken[name]

    @property
    def waited(self) -> float:
        """Seconds that blocks waited for their weights."""
        return sum(stage.waited for stage in self.taken.values())

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.taken.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        stages = {}
        for planned, taken in self.rows():
            foreseen = None if planned is None else planned.as_json(self.plan.rates if self.plan else None)
            stages[taken.name] = {"planned": foreseen, "taken": taken.as_json()}
        return {
            "policy": None if self.plan is None else str(self.plan.policy),
            "device": None if self.plan is None else self.plan.device,
            "seconds": self.seconds,
            "waited_seconds": self.waited,
            "stages": stages,
        }


def usual_pass(stage: StageActual) -> float:
    """Seconds of a pass, the median."""
    return statistics.median(stage.passes) if stage.passes else 0.0
