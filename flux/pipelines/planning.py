"""What a run would take, planned from headers or from specs alone, before a weight is read.

Activations are those of ``stage_work``; weights are counted (``memory.accounts``); policies say what stays
(``memory.policy``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import BudgetError
from ..memory.accounts import Accounts, Size
from ..memory.available import available_bytes
from ..memory.plan import Rates, RunPlan, StagePlan
from ..memory.policy import AUTO, KEEP, Needs, Policy, allowed, needs_strips, weights_limit
from ..specs.autoencoder import AutoencoderSpec
from ..specs.flux1 import Flux1Spec
from ..specs.text import ClipTextSpec, T5Spec
from ..specs.vision import SiglipSpec
from ..weights.formats.floats import BF16
from .modules import block_names, parameter_shapes
from .parts import BoundPart, Part, packs_on, title_of, widens_at_use
from .stage_work import Job, cache_bytes, comes_once, module_of, table_bytes, work

__all__ = [
    "Grant",
    "Job",
    "Planned",
    "grant",
    "plan_run",
    "planned_of_file",
    "planned_of_part",
    "planned_of_spec",
    "working_bytes",
]

STAGES = ("clip", "t5", "vision", "encode", "transformer", "decode")
ALONE = {ClipTextSpec: "clip", T5Spec: "t5", Flux1Spec: "transformer"}  # stages of parts that run in one
PROMPTED = frozenset(ALONE.values())  # stages that run for each prompt
PACKED_PER_THREAD = 17 << 20  # bytes; ``benchmarks.planned`` found 33 to 39 MiB with two threads, in every case alike
LARGE_STORED = 50 << 20  # bytes of weights, from which on matrices are large enough for that
IN_STRIPS = {"decode": 2.0, "encode": 1.5}  # times the operations: what stands before norms is computed again
PER_PIXEL = 4096  # bytes, more than an autoencoder or a step of a transformer takes: FLUX.1's takes 3072 in fp32
PLENTY = 0.25  # of free memory: the rest is far more than a run's activations


@dataclass(frozen=True)
class Planned:
    """One part of a model, as far as planning goes.

    Attributes:
        spec: What it is.
        accounts: Of its weights.
        dtype: Of its numbers where they are unpacked.
        policy: Its own; the run's when None.
        apart: The prefixes of what does not stay; by its kind when None.
    """

    spec: Any
    accounts: Accounts
    dtype: torch.dtype
    policy: Policy | None = None
    apart: tuple[str, ...] | None = None

    @property
    def title(self) -> str:
        return title_of(self.spec)


def planned_of_spec(spec: Any, dtype: torch.dtype, device: torch.device | None = None) -> Planned:
    """A part of which no file is at hand, stored in bf16.

    Args:
        spec: What it is.
        dtype: Of its numbers where it runs.
        device: Where that is; a GPU when None.
    """
    module, shapes = module_of(spec, dtype), parameter_shapes(spec)
    assert shapes is not None
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: Size(count, (count * torch.bfloat16.itemsize,)) for name, count in counts.items()}
    packs = device is not None and widens_at_use(sum(counts.values()), {BF16.name}, device, dtype)
    blocks = block_names(module)
    return Planned(spec, Accounts(module, sizes, item=dtype.itemsize, keeps_packed=packs, blocks=blocks), dtype)


def planned_of_file(bound: BoundPart, device: torch.device, dtype: torch.dtype, available: int) -> Planned:
    """A part of a file, by its header.

    Args:
        bound: The part.
        device: Where it will run.
        dtype: Of its numbers there.
        available: Bytes free there, by which weights stay packed or not.
    """
    packs = packs_on(bound, device, dtype, available)
    blocks = block_names(bound.module)
    accounts = Accounts(bound.module, bound.bindings, item=dtype.itemsize, keeps_packed=packs, blocks=blocks)
    return Planned(bound.recognised.spec, accounts, dtype)


def planned_of_part(part: Part[Any, Any]) -> Planned:
    """A part that is opened."""
    return Planned(part.spec, part.residency.accounts, part.dtype)


@dataclass(frozen=True)
class Grant:
    """What the stages of a run may take.

    Attributes:
        limits: Bytes of weights by stage; None for as many as there are, as for stages that are not named.
        in_strips: The stages in which the autoencoder runs in strips.
        decodes_alone: Whether the transformer has to make room where a picture is decoded and another one follows.
    """

    limits: Mapping[str, int | None] = field(default_factory=dict)
    in_strips: frozenset[str] = frozenset()
    decodes_alone: bool = False


def grant(parts: Sequence[Part[Any, Any]], job: Job, policy: Policy) -> Grant:
    """What a policy grants the stages of a run.

    Args:
        parts: On one device.
        job: What is to be drawn.
        policy: How much memory may be taken.

    Raises:
        BudgetError: A budget is below what a stage can do with.
    """
    device = parts[0].device
    available = available_bytes(device)
    if policy.name == KEEP or (policy.name == AUTO and _is_plenty(parts, job, available)):
        return Grant()
    planned = [planned_of_part(part) for part in parts]
    plan = plan_run(planned, job, policy, device=str(device), available=available)
    return Grant(
        {stage.name: stage.limit for stage in plan.stages},
        frozenset(stage.name for stage in plan.stages if stage.in_strips),
        _together(planned, plan, job) > allowed(policy, plan.peak_bytes, available),
    )


def _together(parts: Sequence[Planned], plan: RunPlan, job: Job) -> int:
    """Bytes that decoding takes with the transformer's weights and tables beside it."""
    stages = {stage.name: stage for stage in plan.stages}
    if not {"transformer", "decode"} <= set(stages):
        return 0
    beside = sum(table_bytes(part.spec, part.dtype, job) + cache_bytes(part.spec, part.dtype, job) for part in parts)
    return stages["transformer"].footprint.device_bytes + beside + stages["decode"].peak_bytes


def _is_plenty(parts: Sequence[Part[Any, Any]], job: Job, available: int) -> bool:
    """Whether there is no need to look closer: a run takes a small share of what is free."""
    pixels = job.batch * job.width * job.height + sum(width * height for width, height in job.references)
    weights = max(part.residency.accounts.footprint().device_bytes for part in parts)
    return weights + PER_PIXEL * pixels <= PLENTY * available


def plan_run(
    parts: Sequence[Planned],
    job: Job,
    policy: Policy,
    *,
    device: str,
    available: int,
    rates: Rates | None = None,
) -> RunPlan:
    """Plan every stage of a run.

    Args:
        parts: The model's, in any order.
        job: What is to be drawn.
        policy: How much memory may be taken by parts that have no policy of their own.
        device: Where.
        available: Bytes that are free there.
        rates: What the machine does in a second.

    Raises:
        BudgetError: A budget is below what a stage can do with.
    """
    on_cpu = torch.device(device).type == "cpu"
    plan = functools.partial(_planned_stage, job=job, policy=policy, available=available, on_cpu=on_cpu)
    found = [_or_too_little(plan, part, name) for part in parts for name in _stages_of(part.spec, job)]
    short = [stage for stage in found if isinstance(stage, BudgetError)]
    if short:  # the stage that takes most says what would do for all
        raise max(short, key=lambda error: error.least)
    stages = [stage for stage in found if isinstance(stage, StagePlan)]
    order = {name: index for index, name in enumerate(STAGES)}
    stages.sort(key=lambda stage: order[stage.name])
    return RunPlan(tuple(stages), policy, device, available, rates)


def working_bytes(spec: Any, dtype: torch.dtype, job: Job, stage: str | None = None, *, in_strips: bool = False) -> int:
    """Bytes that a part takes at once beside its weights: activations, and the table of a transformer's modulations.

    Args:
        spec: Of the part.
        dtype: That it computes with.
        job: What is drawn.
        stage: What it does: "encode" or "decode" of an autoencoder, the part's only one when None.
        in_strips: Whether an autoencoder runs in strips of rows.
    """
    only = "vision" if isinstance(spec, SiglipSpec) else ALONE.get(type(spec))
    wanted = stage or only
    assert wanted is not None
    return work(spec, wanted, dtype, job, in_strips=in_strips).peak + table_bytes(spec, dtype, job)


def _or_too_little(plan: Callable[..., StagePlan], part: Planned, name: str) -> StagePlan | BudgetError:
    """A stage's plan, or why it has none."""
    try:
        return plan(part, name)
    except BudgetError as error:
        return error


def _stages_of(spec: Any, job: Job) -> tuple[str, ...]:
    if isinstance(spec, AutoencoderSpec):
        return ("encode", "decode") if job.starts or job.references else ("decode",)
    if isinstance(spec, SiglipSpec):
        return ("vision",) if job.views else ()
    return (ALONE[type(spec)],) if type(spec) in ALONE else ()


def _planned_stage(part: Planned, name: str, *, job: Job, policy: Policy, available: int, on_cpu: bool) -> StagePlan:
    found = work(part.spec, name, part.dtype, job)
    policy = part.policy or policy
    apart = comes_once(part.spec) if part.apart is None else part.apart
    accounts = part.accounts
    whole, least = accounts.footprint(apart), accounts.footprint(apart, 0)
    table = table_bytes(part.spec, part.dtype, job) + cache_bytes(part.spec, part.dtype, job)
    # What is unpacked once is kept, on a CPU, for the next taker (``ops.host_memory``): the largest modulation layer.
    once = accounts.unpacked_bytes(name for prefix in apart for name in accounts.names_in(prefix)) if on_cpu else 0
    packed = max(once, accounts.unpacked_bytes(accounts.packable))
    streamed = accounts.unpacked_bytes(name for block in accounts.blocks for name in accounts.names_in(block, apart))
    packing = _packing_bytes() if on_cpu and accounts.stored_bytes() > LARGE_STORED else 0
    needs = Needs(whole.device_bytes, least.device_bytes, found.peak + table + max(packed, streamed) + packing)
    in_strips = isinstance(part.spec, AutoencoderSpec) and needs_strips(policy, needs, available)
    operations = found.operations
    if in_strips:
        striped = work(part.spec, name, part.dtype, job, in_strips=True)
        # Of small pictures strips take more than one piece, which is the least then that a budget has to have room for.
        in_strips = policy.budget is None or striped.peak < found.peak
    if in_strips:
        found = striped
        needs = replace(needs, working=found.peak + packing)
        operations *= IN_STRIPS[name]
    limit = weights_limit(policy, needs, available)
    footprint = accounts.footprint(apart, limit)
    return StagePlan(
        name=name,
        title=part.title,
        weights=accounts.stored_bytes(),
        footprint=footprint,
        activations=found.peak + table,
        workspace=max(packed, streamed if footprint.blocks.streamed else 0) + packing,
        once=accounts.stored_bytes() - accounts.stored_bytes(apart),
        passes=_passes(name, job),
        operations=operations,
        limit=limit,
        in_strips=in_strips,
    )


def _packing_bytes() -> int:
    """What the libraries for matrix products keep for themselves on a CPU, for pieces of matrices."""
    return PACKED_PER_THREAD * torch.get_num_threads()


def _passes(name: str, job: Job) -> int:
    passes = {"transformer": job.steps, "vision": job.views, "decode": job.batch}
    return passes.get(name, 1) * (job.prompts if name in PROMPTED else 1)
