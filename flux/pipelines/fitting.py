"""What would have fitted, after memory ran out under the least that a run can do with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..adapters.channels import CELL
from ..memory.available import available_bytes
from ..memory.policy import SAVE, Policy
from ..sampling.packing import PATCH
from .plan_picture import spelled
from .planning import Planned, plan_run
from .stage_work import Job

__all__ = ["what_would_fit"]

SHARES = tuple(tenths / 10 for tenths in range(9, 1, -1))  # of a picture's sides
GRID = PATCH * CELL  # pixels of a token's side


def what_would_fit(planned: Sequence[Planned], job: Job, device: torch.device, free: int | None = None) -> str:
    """A sentence on the largest picture of a job's aspect that has room in what is free.

    Args:
        planned: The run's parts; see ``planning.plan_run``.
        job: What was to be drawn.
        device: Where.
        free: Bytes; those that are free now when None.
    """
    free = available_bytes(device) if free is None else free
    most = 0
    for share in SHARES:
        width, height = (max(GRID, int(share * side) // GRID * GRID) for side in (job.width, job.height))
        smaller = replace(job, width=width, height=height)
        most = plan_run(planned, smaller, Policy(SAVE), device=str(device), available=free).peak_bytes
        if most <= free:
            return f"{width}x{height} would have fitted, with {spelled(most)} of the {spelled(free)} that are free"
    return f"even {width}x{height} takes {spelled(most)}, and {spelled(free)} are free"
