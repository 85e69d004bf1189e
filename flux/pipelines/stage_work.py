"""What one pass of each of a run's stages makes: its tensors and operations, found on the meta device without a weight.

Each module runs there as it does in a run (``memory.tracing``).
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.channels import CELL
from ..memory.outlines import Outlines
from ..memory.tracing import Traced, trace
from ..models.flux1 import Conditions, Flux1
from ..models.positions import image_ids, reference_ids, text_ids
from ..ops.layers import on_meta
from ..sampling.packing import PATCH, pack, unpack
from ..specs.autoencoder import AutoencoderSpec
from ..specs.flux1 import Flux1Spec
from ..specs.text import ClipTextSpec, T5Spec
from ..specs.vision import SiglipSpec
from .modules import build_of
from .one_by_one import pictures_one_by_one
from .step_cache import CachedSteps, StepCache
from .strips import Striped

__all__ = ["Job", "cache_bytes", "comes_once", "module_of", "table_bytes", "work"]

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
        starts: Whether a picture of this size is encoded: to start from, to fill, to follow.
        views: Views that a vision tower sees.
        styles: Further text tokens, of Redux.
        cached: Whether the transformer runs with a step cache.
        evaluations: Of the model in a schedule, where a solver makes more than one a step; 0 for as many as steps.
        pictures: Such batches, one after the other.
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
    evaluations: int = 0
    pictures: int = 1

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of latent cells."""
        return self.height // CELL, self.width // CELL


def comes_once(spec: Any) -> tuple[str, ...]:
    """What is made into a table before the first pass, and then let go."""
    return tuple(module_of(spec, torch.float32).modulation_layers()) if isinstance(spec, Flux1Spec) else ()


def table_bytes(spec: Any, dtype: torch.dtype, job: Job) -> int:
    """Of the modulations of every step."""
    if not isinstance(spec, Flux1Spec):
        return 0
    layers = module_of(spec, torch.float32).modulation_layers().values()
    rows = (job.evaluations or job.steps) * job.prompts
    return rows * dtype.itemsize * sum(int(layer.out_features) for layer in layers)


def cache_bytes(spec: Any, dtype: torch.dtype, job: Job) -> int:
    """What a step cache keeps of the last step: what the first block did to the picture, the others to all tokens."""
    if not isinstance(spec, Flux1Spec) or not job.cached:
        return 0
    own, beside = _tokens([job.cells]), _tokens(_reference_cells(job))
    found = 2 * job.prompts - 1  # of each prompt the last step's and, but for the one that runs, this one's
    return found * job.batch * (2 * own + beside) * spec.hidden * dtype.itemsize


@functools.lru_cache(32)
def module_of(spec: Any, dtype: torch.dtype) -> Any:
    """A part's module on the meta device."""
    build = build_of(spec)
    assert build is not None, "a part that is planned can run"
    with on_meta():
        return build(spec).to(dtype).eval()


_one_at_a_time = threading.Lock()  # runs change the module, which all have in common


def work(
    spec: Any,
    stage: str,
    dtype: torch.dtype,
    job: Job,
    *,
    in_strips: bool = False,
    one_by_one: bool = False,
    packed: Outlines | None = None,
) -> Traced:
    """What one pass of a stage makes.

    Args:
        spec: Of the part.
        stage: What it does.
        dtype: That it computes with.
        job: What is drawn.
        in_strips: Whether an autoencoder runs in strips of rows.
        one_by_one: Whether a transformer's blocks run for one picture after the other.
        packed: Weights that are unpacked at use, or multiplied as they are stored.
    """
    return _work(spec, stage, dtype, job, in_strips, one_by_one, packed or None)


@functools.lru_cache(256)
def _work(
    spec: Any, stage: str, dtype: torch.dtype, job: Job, in_strips: bool, one_by_one: bool, packed: Outlines | None
) -> Traced:
    module = module_of(spec, dtype)
    runs = Striped(module) if in_strips else module
    with ExitStack() as held:
        held.enter_context(_one_at_a_time)
        if one_by_one:
            held.enter_context(pictures_one_by_one(module))
        if packed is not None:
            held.enter_context(packed.fitted(module))
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
        sizes = [*job.references, *([(job.width, job.height)] if job.starts or not job.references else [])]
        width, height = max(sizes, key=math.prod)
        pixels = torch.empty(1, 3, height, width)
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
