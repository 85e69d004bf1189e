"""What a run would take, planned from headers or from specs alone, before a weight is read.

Activations are found by running each module on the meta device (``memory.tracing``); weights are counted
(``memory.accounts``); policies say what stays (``memory.policy``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.channels import CELL
from ..errors import BudgetError
from ..memory.accounts import Accounts, Size
from ..memory.available import available_bytes
from ..memory.plan import Rates, RunPlan, StagePlan
from ..memory.policy import AUTO, KEEP, Needs, Policy, allowed, needs_strips, weights_limit
from ..memory.tracing import Traced, trace
from ..models.flux1 import Conditions, Flux1
from ..models.positions import image_ids, reference_ids, text_ids
from ..ops.layers import on_meta
from ..sampling.packing import PATCH, pack, unpack
from ..specs.autoencoder import AutoencoderSpec
from ..specs.flux1 import Flux1Spec
from ..specs.text import ClipTextSpec, T5Spec
from ..specs.vision import SiglipSpec
from ..weights.formats.floats import BF16
from .modules import block_names, build_of, parameter_shapes
from .parts import BoundPart, Part, packs_on, title_of, widens_at_use
from .step_cache import CachedSteps, StepCache
from .strips import Striped

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
LONG = torch.int64


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be drawn, as far as memory goes.

    Attributes:
        width: Pixels.
        height: Pixels.
        batch: Pictures at once.
        steps: Of the schedule.
        prompts: That are encoded and run: two with true guidance.
        references: Width and height in pixels of pictures that the model may look at.
        starts: Whether a picture is encoded: to start from, to fill, to follow.
        views: Views that a vision tower sees.
        styles: Further text tokens, of Redux.
        cached: Whether the transformer runs with a step cache.
    """

    width: int
    height: int
    batch: int = 1
    steps: int = 28
    prompts: int = 1
    references: tuple[tuple[int, int], ...] = ()
    starts: bool = False
    views: int = 0
    styles: int = 0
    cached: bool = False

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of latent cells."""
        return self.height // CELL, self.width // CELL


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
    module, shapes = _module(spec, dtype), parameter_shapes(spec)
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
    beside = sum(_table_bytes(part.spec, part.dtype, job) + _cache_bytes(part, job) for part in parts)
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
    return _work(spec, wanted, dtype, job, in_strips=in_strips).peak + _table_bytes(spec, dtype, job)


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
    found = _work(part.spec, name, part.dtype, job)
    policy = part.policy or policy
    apart = _comes_once(part.spec) if part.apart is None else part.apart
    accounts = part.accounts
    whole, least = accounts.footprint(apart), accounts.footprint(apart, 0)
    table = _table_bytes(part.spec, part.dtype, job) + _cache_bytes(part, job)
    # What is unpacked once is kept, on a CPU, for the next taker (``ops.host_memory``): the largest modulation layer.
    once = accounts.unpacked_bytes(name for prefix in apart for name in accounts.names_in(prefix)) if on_cpu else 0
    packed = max(once, accounts.unpacked_bytes(accounts.packable))
    streamed = accounts.unpacked_bytes(name for block in accounts.blocks for name in accounts.names_in(block, apart))
    packing = _packing_bytes() if on_cpu and accounts.stored_bytes() > LARGE_STORED else 0
    needs = Needs(whole.device_bytes, least.device_bytes, found.peak + table + max(packed, streamed) + packing)
    in_strips = isinstance(part.spec, AutoencoderSpec) and needs_strips(policy, needs, available)
    operations = found.operations
    if in_strips:
        striped = _work(part.spec, name, part.dtype, job, in_strips=True)
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


def _comes_once(spec: Any) -> tuple[str, ...]:
    """What is made into a table before the first pass, and then let go."""
    return tuple(_module(spec, torch.float32).modulation_layers()) if isinstance(spec, Flux1Spec) else ()


def _table_bytes(spec: Any, dtype: torch.dtype, job: Job) -> int:
    """Of the modulations of every step."""
    if not isinstance(spec, Flux1Spec):
        return 0
    layers = _module(spec, torch.float32).modulation_layers().values()
    return job.steps * job.prompts * dtype.itemsize * sum(int(layer.out_features) for layer in layers)


def _cache_bytes(part: Planned, job: Job) -> int:
    """What a step cache keeps of the last step: what the first block did to the picture, the others to all tokens."""
    if not isinstance(part.spec, Flux1Spec) or not job.cached:
        return 0
    own, beside = _tokens([job.cells]), _tokens(_reference_cells(job))
    found = 2 * job.prompts - 1  # of each prompt the last step's and, but for the one that runs, this one's
    return found * job.batch * (2 * own + beside) * part.spec.hidden * part.dtype.itemsize


@functools.lru_cache(32)
def _module(spec: Any, dtype: torch.dtype) -> Any:
    """A part's module on the meta device."""
    build = build_of(spec)
    assert build is not None, "a part that is planned can run"
    with on_meta():
        return build(spec).to(dtype).eval()


@functools.lru_cache(256)
def _work(spec: Any, stage: str, dtype: torch.dtype, job: Job, *, in_strips: bool = False) -> Traced:
    """What one pass of a stage makes."""
    module = _module(spec, dtype)
    runs = Striped(module) if in_strips else module
    return trace(module, functools.partial(WORK[type(spec)], runs, spec, stage, dtype, job))


def _run_transformer(module: Flux1, spec: Flux1Spec, stage: str, dtype: torch.dtype, job: Job) -> Callable[[], Tensor]:
    rows, columns = job.cells
    latents = torch.empty(job.batch, spec.in_channels // PATCH**2, rows, columns)
    sizes = _reference_cells(job)
    beside = torch.empty(1, _tokens(sizes), spec.in_channels, dtype=dtype)
    length = spec.t5_length + job.styles
    text = torch.empty(1, length, spec.context_width, dtype=dtype).expand(job.batch, -1, -1)
    ids = image_ids(rows // PATCH, columns // PATCH)
    if sizes:
        ids = torch.cat((ids, reference_ids(sizes, (rows, columns))))
    modulations = module.modulate(torch.empty(1, spec.hidden, dtype=dtype))
    cached = CachedSteps(StepCache(), (1.0, 0.0)) if job.cached else None

    def step() -> Tensor:
        image = torch.cat((pack(latents.to(dtype)), beside.expand(job.batch, -1, -1)), dim=1)
        own = rows * columns // PATCH**2
        evaluation = None if cached is None else cached.evaluation((stage,), 1.0, own=own, blocks=0)
        out = module(image, Conditions(text, text_ids(length), ids), modulations, shortcut=evaluation)
        return unpack(out[:, :own].float(), rows, columns)

    return step


def _reference_cells(job: Job) -> list[tuple[int, int]]:
    """Rows and columns of latent cells of each reference."""
    return [(height // CELL, width // CELL) for width, height in job.references]


def _tokens(sizes: Sequence[tuple[int, int]]) -> int:
    """Of pictures of these rows and columns of latent cells."""
    return sum(-(-height // PATCH) * -(-width // PATCH) for height, width in sizes)


def _run_autoencoder(module: Any, spec: AutoencoderSpec, stage: str, dtype: torch.dtype, job: Job) -> Callable[[], Any]:
    rows, columns = job.cells
    if stage == "encode":
        pixels = torch.empty(1, 3, job.height, job.width)
        return lambda: module.encode(pixels.to(dtype)).float()
    latents = torch.empty(1, spec.latent_channels, rows, columns)
    return lambda: module.decode(latents.to(dtype)).float()


def _run_t5(module: nn.Module, spec: T5Spec, stage: str, dtype: torch.dtype, job: Job) -> Callable[[], Any]:
    ids = torch.empty(1, spec.length, dtype=LONG)
    return lambda: module(ids).float()


def _run_clip(module: nn.Module, spec: ClipTextSpec, stage: str, dtype: torch.dtype, job: Job) -> Callable[[], Any]:
    ids = torch.empty(1, spec.positions, dtype=LONG)
    return lambda: module(ids)[1].float()


def _run_vision(module: nn.Module, spec: SiglipSpec, stage: str, dtype: torch.dtype, job: Job) -> Callable[[], Any]:
    pixels = torch.empty(1, 3, spec.side, spec.side)
    return lambda: module(pixels.to(dtype)).float()


WORK: Mapping[type, Callable[..., Callable[[], Any]]] = {  # what makes, on the meta device, one pass of a stage
    Flux1Spec: _run_transformer, AutoencoderSpec: _run_autoencoder, T5Spec: _run_t5, ClipTextSpec: _run_clip,
    SiglipSpec: _run_vision,
}  # fmt: skip
