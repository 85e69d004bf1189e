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
from ..memory.outlines import Outlines
from ..memory.plan import Rates, RunPlan, StagePlan
from ..memory.policy import AUTO, KEEP, Needs, Policy, allowed, needs_strips, weights_limit
from ..memory.spread import Footprint, shares
from ..memory.tracing import Traced
from ..specs.autoencoder import AutoencoderSpec
from ..specs.flux1 import Flux1Spec
from ..specs.text import ClipTextSpec, T5Spec
from ..specs.vision import SiglipSpec
from ..weights.formats.base import DATA
from ..weights.formats.floats import BF16
from ..weights.packed import Packed, PackedPart
from ..weights.renames import Piece, Recipe
from .modules import block_names, parameter_shapes
from .parts import BoundPart, Part, packs_on, title_of, widens_at_use
from .stage_work import Job, cache_bytes, comes_once, module_of, table_bytes, work

__all__ = [
    "Grant",
    "Job",
    "Planned",
    "grant",
    "grant_to",
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
DECODED_PER_THREAD = 28 << 20  # bytes, of threads and tables that turn codes into numbers; likewise
HEAP_MOST = 72 << 20  # bytes that a CPU's heap has free between activations, and no more than those; likewise
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
        further: Bytes that stay with its weights: of control LoRAs.
        predictions: How many a transformer makes in a step for each prompt, on the average of the schedule.
        flows: How many different ones there are.
        one_by_one: Whether its blocks run for one picture after the other; see ``one_by_one``.
        outlines: The weights of its linear layers as they are stored; None where only sizes are known.
    """

    spec: Any
    accounts: Accounts
    dtype: torch.dtype
    policy: Policy | None = None
    apart: tuple[str, ...] | None = None
    further: int = 0
    predictions: float = 1.0
    flows: int = 1
    one_by_one: bool = False
    outlines: Outlines | None = None

    def stays(self, job: Job) -> int:
        """Bytes that stay with its weights: tables of modulations, a step cache, and what is further."""
        tables = round(self.predictions * table_bytes(self.spec, self.dtype, job))
        return tables + self.flows * cache_bytes(self.spec, self.dtype, job) + self.further

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
    accounts = Accounts(module, sizes, item=dtype.itemsize, keeps_packed=packs, blocks=blocks)
    outlines = None
    if dtype != torch.bfloat16 and (device is None or device.type != "cpu"):
        found = {name: _outline_in_bf16(name, shapes[name]) for name in sorted(accounts.movable)}
        outlines = Outlines("cuda" if device is None else str(device), found)
    return Planned(spec, accounts, dtype, one_by_one=_one_by_one(spec, device), outlines=outlines)


def _outline_in_bf16(name: str, shape: tuple[int, ...]) -> Packed:
    data = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return Packed(shape, Recipe((Piece(name),)), {name: PackedPart(BF16, shape, {DATA: data})})


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
    spec, is_cpu = bound.recognised.spec, device.type == "cpu"
    outlines = None if is_cpu else Outlines.of_file(bound.bindings, accounts.movable, device, dtype)
    return Planned(spec, accounts, dtype, one_by_one=_one_by_one(spec, device), outlines=outlines)


def planned_of_part(part: Part[Any, Any]) -> Planned:
    """A part that is opened."""
    one_by_one, residency = _one_by_one(part.spec, part.device), part.residency
    outlines = None if part.device.type == "cpu" else residency.outlines
    return Planned(part.spec, residency.accounts, part.dtype, one_by_one=one_by_one, outlines=outlines)


def _one_by_one(spec: Any, device: torch.device | None) -> bool:
    """Whether pictures run one after the other in a part; see ``denoising.prepared``."""
    return isinstance(spec, Flux1Spec) and device is not None and device.type == "cpu"


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
    """What a policy grants the stages of a run with parts that are opened; see ``grant_to``."""
    return grant_to([planned_of_part(part) for part in parts], job, policy, parts[0].device)


def grant_to(planned: Sequence[Planned], job: Job, policy: Policy, device: torch.device) -> Grant:
    """What a policy grants the stages of a run.

    Args:
        planned: See ``plan_run``.
        job: What is to be drawn.
        policy: How much memory may be taken.
        device: Where.

    Raises:
        BudgetError: A budget is below what a stage can do with.
    """
    available = available_bytes(device)
    is_alone = policy.name == KEEP and job.pictures == 1
    if is_alone or (policy.name == AUTO and _is_plenty(planned, job, available)):
        return Grant()
    plan = plan_run(planned, job, policy, device=str(device), available=available)
    return Grant(
        {stage.name: stage.limit for stage in plan.stages},
        frozenset(stage.name for stage in plan.stages if stage.in_strips),
        decodes_alone=not any(stage.beside for stage in plan.stages if stage.name == "decode"),
    )


def _with_what_stays(parts: Sequence[Planned], plan: RunPlan, job: Job) -> RunPlan:
    """A plan in which the transformer's weights and tables stay beside decoding, where another picture follows.

    Where both are too much together, the transformer goes and comes again, and the plan is as it was.
    """
    stages = {stage.name: stage for stage in plan.stages}
    if job.pictures == 1 or not {"transformer", "decode"} <= set(stages):
        return plan
    own, transformer = stages["transformer"], next(part for part in parts if isinstance(part.spec, Flux1Spec))
    stays = own.footprint.device_bytes + own.beside + transformer.stays(job) - transformer.further
    decode = replace(stages["decode"], beside=stays)
    if decode.peak_bytes > allowed(plan.policy, plan.peak_bytes, plan.available):
        return plan
    return replace(plan, stages=tuple(decode if stage.name == "decode" else stage for stage in plan.stages))


def _is_plenty(parts: Sequence[Planned], job: Job, available: int) -> bool:
    """Whether there is no need to look closer: a run takes a small share of what is free."""
    pixels = job.batch * job.width * job.height + sum(width * height for width, height in job.references)
    weights = max(sum(part.accounts.footprint().device_bytes + part.further for part in own) for own in _groups(parts))
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
        parts: The model's, in any order. Where there are several transformers, the first one is the run's own; they are
            in memory together, and each further one has a stage beside it ("transformer 2").
        job: What is to be drawn.
        policy: How much memory may be taken by parts that have no policy of their own.
        device: Where.
        available: Bytes that are free there.
        rates: What the machine does in a second.

    Raises:
        BudgetError: A budget is below what a stage can do with.
    """
    on_cpu = torch.device(device).type == "cpu"
    plan = functools.partial(_planned_stages, job=job, policy=policy, available=available, on_cpu=on_cpu)
    found = [_or_too_little(plan, group, name) for group in _groups(parts) for name in _stages_of(group[0].spec, job)]
    short = [stage for stage in found if isinstance(stage, BudgetError)]
    if short:  # the stage that takes most says what would do for all
        raise max(short, key=lambda error: error.least)
    stages = [stage for own in found if not isinstance(own, BudgetError) for stage in own]
    order = {name: index for index, name in enumerate(STAGES)}
    stages.sort(key=lambda stage: order[stage.name.split()[0]])
    return _with_what_stays(parts, RunPlan(tuple(stages), policy, device, available, rates), job)


def working_bytes(
    spec: Any,
    dtype: torch.dtype,
    job: Job,
    stage: str | None = None,
    *,
    in_strips: bool = False,
    packed: Outlines | None = None,
) -> int:
    """Bytes that a part takes at once beside its weights: activations, and the table of a transformer's modulations.

    Args:
        spec: Of the part.
        dtype: That it computes with.
        job: What is drawn.
        stage: What it does: "encode" or "decode" of an autoencoder, the part's only one when None.
        in_strips: Whether an autoencoder runs in strips of rows.
        packed: Weights of linear layers that are unpacked at use.
    """
    only = "vision" if isinstance(spec, SiglipSpec) else ALONE.get(type(spec))
    wanted = stage or only
    assert wanted is not None
    return work(spec, wanted, dtype, job, in_strips=in_strips, packed=packed).peak + table_bytes(spec, dtype, job)


def _groups(parts: Sequence[Planned]) -> list[list[Planned]]:
    """What is in memory at once: all transformers of a run, and every other part by itself."""
    transformers = [part for part in parts if isinstance(part.spec, Flux1Spec)]
    return [*([transformers] if transformers else []), *([part] for part in parts if part not in transformers)]


def _or_too_little(
    plan: Callable[..., list[StagePlan]], group: Sequence[Planned], name: str
) -> list[StagePlan] | BudgetError:
    """The plans of a stage, or why it has none."""
    try:
        return plan(group, name)
    except BudgetError as error:
        return error


def _stages_of(spec: Any, job: Job) -> tuple[str, ...]:
    if isinstance(spec, AutoencoderSpec):
        return ("encode", "decode") if job.starts or job.references else ("decode",)
    if isinstance(spec, SiglipSpec):
        return ("vision",) if job.views else ()
    return (ALONE[type(spec)],) if type(spec) in ALONE else ()


@dataclass(frozen=True)
class _Use:
    """What a part takes in a stage, whatever it is granted.

    Attributes:
        part: The part.
        apart: The prefixes of what does not stay.
        made: By one pass.
        beside: Bytes that stay with its weights: tables of modulations, a step cache, control LoRAs.
        unpacked: Bytes that unpacking weights at use takes, or multiplying them as they are stored, where all stay.
        streamed: The same where some are streamed.
        packing: Bytes that libraries keep.
    """

    part: Planned
    apart: tuple[str, ...]
    made: Traced
    beside: int
    unpacked: int
    streamed: int
    packing: int

    def weights(self, limit: int | None = None) -> Footprint:
        """Where the weights are under a limit in bytes."""
        return self.part.accounts.footprint(self.apart, limit)

    @property
    def needs(self) -> Needs:
        """What it can do with alone."""
        working = self.made.peak + max(self.unpacked, self.streamed) + self.packing + self.beside
        return Needs(self.weights().device_bytes, self.weights(0).device_bytes, working)


def _use(part: Planned, name: str, job: Job, *, on_cpu: bool) -> _Use:
    apart = comes_once(part.spec) if part.apart is None else part.apart
    made = _made(part, name, job)
    traces = not on_cpu and part.outlines is not None
    unpacked, streamed = _by_trace(part, apart, name, job) if traces else _by_size(part, apart, job, on_cpu=on_cpu)
    packing = _library_bytes(part, made) if on_cpu else 0
    return _Use(part, apart, made, part.stays(job), unpacked, streamed, packing)


def _made(part: Planned, name: str, job: Job, packed: Outlines | None = None) -> Traced:
    """By one pass, with weights that stand as they are used, but for those that are given."""
    return work(part.spec, name, part.dtype, replace(job, pictures=1), one_by_one=part.one_by_one, packed=packed)


def _by_size(part: Planned, apart: tuple[str, ...], job: Job, *, on_cpu: bool) -> tuple[int, int]:
    """Bytes for what is unpacked at use, where all stays, and where some is streamed: of the largest weight."""
    accounts = part.accounts
    # What is unpacked once is kept, on a CPU, for the next taker (``ops.host_memory``): the largest modulation layer.
    once = accounts.unpacked_bytes(name for prefix in apart for name in accounts.names_in(prefix)) if on_cpu else 0
    blocks = [accounts.names_in(block, apart) for block in accounts.blocks]
    alone = max(once, accounts.unpacked_bytes(accounts.packable))
    # Of several pictures that run one after the other a block's weights are unpacked together, where nothing streams.
    held = blocks if part.one_by_one and job.batch > 1 else []
    together = [accounts.unpacked_together(name for name in names if name in accounts.packable) for names in held]
    return max([alone, *together]), max(alone, accounts.unpacked_bytes(name for names in blocks for name in names))


def _by_trace(part: Planned, apart: tuple[str, ...], name: str, job: Job) -> tuple[int, int]:
    """The same where memory comes back at once: what the pass takes more with such weights."""
    outlines, accounts = part.outlines, part.accounts
    assert outlines is not None
    in_blocks = {own for block in accounts.blocks for own in accounts.names_in(block, apart)}
    plain = _made(part, name, job).peak
    stays, streams = (
        max(0, _made(part, name, job, outlines.of(names)).peak - plain)
        for names in (accounts.packable, accounts.packable | in_blocks)
    )
    return stays, streams


def _together_needs(uses: Sequence[_Use]) -> Needs:
    """What parts can do with that are in memory at once, and run one after the other."""
    needs = [use.needs for use in uses]
    stays = sum(use.beside for use in uses)
    working = max(need.working - use.beside for need, use in zip(needs, uses, strict=True)) + stays
    return Needs(sum(need.whole for need in needs), sum(need.least for need in needs), working)


def _planned_stages(
    parts: Sequence[Planned], name: str, *, job: Job, policy: Policy, available: int, on_cpu: bool
) -> list[StagePlan]:
    """A stage of the first part; and of further ones that are in memory with it, one of each."""
    uses = [_use(part, name, job, on_cpu=on_cpu) for part in parts]
    if isinstance(parts[0].spec, AutoencoderSpec):
        return [_planned_autoencoder(uses[0], name, job=job, policy=policy, available=available)]
    needs = [use.needs for use in uses]
    if any(part.policy for part in parts):  # each for itself
        limits = [
            weights_limit(use.part.policy or policy, own, available) for use, own in zip(uses, needs, strict=True)
        ]
        dealt: Sequence[int | None] = limits
    else:
        limits = [weights_limit(policy, _together_needs(uses), available)] * len(uses)
        dealt = shares(limits[0], [(need.least, need.whole) for need in needs])
    found = [use.weights(limit) for use, limit in zip(uses, dealt, strict=True)]
    all_stays = sum(weights.device_bytes + use.beside for weights, use in zip(found, uses, strict=True))
    stages = [_stage(use, name, job, weights, limit) for use, weights, limit in zip(uses, found, limits, strict=True)]
    return [
        replace(
            stage,
            name=name if index == 0 else f"{name} {index + 1}",
            beside=stage.beside + all_stays - found[index].device_bytes - uses[index].beside,
        )
        for index, stage in enumerate(stages)
    ]


def _planned_autoencoder(use: _Use, name: str, *, job: Job, policy: Policy, available: int) -> StagePlan:
    policy, needs, part = use.part.policy or policy, use.needs, use.part
    if not needs_strips(policy, needs, available):
        return _stage(use, name, job, use.weights(limit := weights_limit(policy, needs, available)), limit)
    striped = work(part.spec, name, part.dtype, job, in_strips=True)
    # Of small pictures strips take more than one piece.
    in_strips = striped.peak < use.made.peak
    if in_strips:
        use = replace(use, made=Traced(striped.peak, IN_STRIPS[name] * use.made.operations))
    limit = weights_limit(policy, use.needs, available)
    return replace(_stage(use, name, job, use.weights(limit), limit), in_strips=in_strips)


def _stage(use: _Use, name: str, job: Job, weights: Footprint, limit: int | None) -> StagePlan:
    accounts = use.part.accounts
    return StagePlan(
        name=name,
        title=use.part.title,
        weights=accounts.stored_bytes(),
        footprint=weights,
        activations=use.made.peak + use.beside - use.part.further,
        workspace=(use.streamed if weights.blocks.streamed else use.unpacked) + use.packing,
        beside=use.part.further,
        once=accounts.stored_bytes() - accounts.stored_bytes(use.apart),
        passes=max(1, round(use.part.predictions * _passes(name, job))),
        operations=use.made.operations,
        limit=limit,
    )


def _library_bytes(part: Planned, made: Traced) -> int:
    """What libraries keep for themselves on a CPU: those for products pieces of matrices, the heap what is too small.

    The heap does so while a transformer's steps run; see ``ops.host_heap``.
    """
    packing = PACKED_PER_THREAD * torch.get_num_threads() if part.accounts.stored_bytes() > LARGE_STORED else 0
    packing += DECODED_PER_THREAD * torch.get_num_threads() if packing and part.accounts.decodes else 0
    return packing + min(made.peak, HEAP_MOST) if isinstance(part.spec, Flux1Spec) else packing


def _passes(name: str, job: Job) -> int:
    encoded = max(1, int(job.starts) + len(job.references))
    passes = {"transformer": job.evaluations or job.steps, "vision": job.views, "decode": job.batch, "encode": encoded}
    return passes.get(name, 1) * (job.prompts if name in PROMPTED else 1)
