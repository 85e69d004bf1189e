"""``python -m flux plan``: what a run will take, before it begins."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..images import write_whole
from ..memory.available import available_bytes
from ..memory.policy import GIB, read_policy
from ..memory.rates import measure_rates
from ..ops.dtypes import compute_dtype
from ..pipelines.modules import build_of, parameter_shapes
from ..pipelines.parts import bind_part
from ..pipelines.plan_picture import draw_plan
from ..pipelines.plan_text import plan_lines
from ..pipelines.planning import Job, Planned, plan_run, planned_of_file, planned_of_spec
from ..pipelines.step_cache import check_few, check_steps
from ..pipelines.text_to_image import check_side, round_size
from ..specs.autoencoder import AUTOENCODERS
from ..specs.flux1 import FLUX1, Flux1Spec
from ..specs.text import CLIP_TEXT, T5_ENCODERS
from ..specs.vision import REDUXES, VISION_TOWERS, SiglipSpec
from ..weights.checkpoints import read_parts
from ..weights.sources import open_checkpoint
from .console import note, say
from .engine import DTYPES, resolve_device
from .purposes import SHORT_NAMES

__all__ = ["run"]

SIZE = re.compile(r"(\d+)x(\d+)", re.IGNORECASE)
ELSEWHERE = re.compile(r"cuda(:\d+)?|mps")  # devices that need not be here
UNKNOWN_DEVICE = 24 * GIB  # free memory of a device that is not here


def run(arguments: argparse.Namespace) -> int:
    """Print the plan as a table or JSON; returns the exit code."""
    policy = read_policy(arguments.policy)
    if arguments.picture is not None and arguments.picture.suffix.lower() != ".png":
        raise UserError(f"the plan is drawn as a PNG; give --picture a name that ends in .png, not {arguments.picture}")
    device, is_here = _device(arguments.device)
    available = _free(arguments.memory, device, is_here)
    dtype = DTYPES[arguments.dtype]
    parts = list(_parts(arguments.models, device, dtype, available, with_redux=arguments.redux > 0))
    place, transformer = next((i, part) for i, part in enumerate(parts) if isinstance(part.spec, Flux1Spec))
    further, lora_numbers = _beside(arguments.beside, device, dtype, available)
    parts[place] = replace(transformer, further=lora_numbers * transformer.dtype.itemsize)
    parts += further
    rates = measure_rates(device, transformer.dtype) if is_here else None
    plan = plan_run(parts, _job(arguments, parts), policy, device=str(device), available=available, rates=rates)
    say(json.dumps(plan.as_json(), indent=2) if arguments.json else "\n".join(plan_lines(plan)))
    if arguments.picture is not None:
        picture = draw_plan(plan)
        write_whole(arguments.picture, lambda file: picture.save(file, "PNG"))
    return 0


def _device(name: str) -> tuple[torch.device, bool]:
    """The device, and whether it is on this machine."""
    try:
        return resolve_device(name), True
    except UserError:
        if ELSEWHERE.fullmatch(name) is None:
            raise
        return torch.device(name.split(":")[0]), False


def _free(gib: float | None, device: torch.device, is_here: bool) -> int:
    if gib is not None:
        if not 0 < gib < math.inf:
            raise UserError(f"memory is {gib:g}; give the free memory in GiB, such as 12")
        return int(gib * GIB)
    if is_here:
        return available_bytes(device)
    note(
        f"{device} is not on this machine: {UNKNOWN_DEVICE // GIB} GiB of free memory are assumed; --memory says others"
    )
    return UNKNOWN_DEVICE


def _parts(
    models: Sequence[str], device: torch.device, dtype: torch.dtype | None, available: int, *, with_redux: bool
) -> Iterator[Planned]:
    """Every part of the model: of the files that are given, and else of its specs."""
    names, files = _names_and_files(models)
    given = [part for path in files for part in _of_file(path, device, dtype, available)]
    transformers = [*(part.spec for part in given if isinstance(part.spec, Flux1Spec)), *names]
    if len(transformers) != 1:
        raise UserError(
            f"{len(transformers)} transformers were given; give one: the name of a known model, or its file (`models` "
            "lists the names); a further one of the same run goes to --beside"
        )
    spec = transformers[0]
    clip, t5 = spec.text_encoders
    wanted: list[Any] = [*names, CLIP_TEXT[clip], T5_ENCODERS[t5], AUTOENCODERS[spec.autoencoder]]
    wanted += [_tower_of(spec)] if with_redux else []
    yield from given
    kinds = {type(part.spec) for part in given}
    for own in wanted:
        if type(own) not in kinds:
            yield _of_spec(own, device, dtype)


def _names_and_files(models: Sequence[str]) -> tuple[list[Flux1Spec], list[Path]]:
    """Known models, and files."""
    names = [FLUX1[SHORT_NAMES.get(name, name)] for name in models if SHORT_NAMES.get(name, name) in FLUX1]
    files = [Path(name) for name in models if SHORT_NAMES.get(name, name) not in FLUX1]
    for path in files:
        if not path.exists() and not path.suffix and path.name == str(path):
            raise UserError(f"{path} is neither a known model, which `models` lists, nor a file")
    return names, files


def _of_spec(spec: Any, device: torch.device, dtype: torch.dtype | None) -> Planned:
    shapes = parameter_shapes(spec)
    assert shapes is not None
    return planned_of_spec(spec, dtype or compute_dtype(device, _count(shapes)), device)


def _tower_of(spec: Flux1Spec) -> SiglipSpec:
    """The vision tower of the Redux that goes with a transformer."""
    redux = next(redux for redux in REDUXES.values() if redux.text_width == spec.context_width)
    return VISION_TOWERS[redux.tower]


def _beside(
    models: Sequence[str], device: torch.device, dtype: torch.dtype | None, available: int
) -> tuple[list[Planned], int]:
    """Further transformers, and how many numbers control LoRAs have."""
    names, files = _names_and_files(models)
    found, numbers = [_of_spec(spec, device, dtype) for spec in names], 0
    for path in files:
        checkpoint = open_checkpoint(path)
        if any(part.recognised.role == "lora" for part in read_parts(checkpoint, expected=parameter_shapes)):
            numbers += sum(math.prod(source.shape) for source in checkpoint.values())
            continue
        own = [part for part in _of_file(path, device, dtype, available) if isinstance(part.spec, Flux1Spec)]
        if not own:
            raise UserError(f"{path.name} is neither a transformer nor a control LoRA; `inspect` says what it is")
        found += own
    return found, numbers


def _count(shapes: Any) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _of_file(path: Path, device: torch.device, dtype: torch.dtype | None, available: int) -> Iterator[Planned]:
    """The parts of a file that can run."""
    found = [part.recognised for part in read_parts(open_checkpoint(path), expected=parameter_shapes)]
    kinds = [one.kind for one in found if one.runs and build_of(one.spec) is not None]
    if not kinds:
        raise UserError(f"{path.name} holds nothing that can be planned; `inspect` says what it is")
    for kind in kinds:
        bound = bind_part(path, kind)
        yield planned_of_file(bound, device, dtype or compute_dtype(device, bound.parameters), available)


def _job(arguments: argparse.Namespace, parts: Sequence[Planned]) -> Job:
    spec = next(part.spec for part in parts if isinstance(part.spec, Flux1Spec))
    sides = {}
    for name in ("width", "height"):
        value = getattr(arguments, name)
        if value is not None:
            check_side(name, value)
        sides[name] = round_size(value or spec.native_side)
    for name in ("batch", "count", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; give 1 or more")
    if arguments.step_cache:
        check_few(spec)
        check_steps(arguments.steps or spec.steps)
    if arguments.redux < 0:
        raise UserError(f"redux is {arguments.redux}; give how many pictures it takes over, 0 for none")
    tokens = sum(part.spec.grid**2 for part in parts if isinstance(part.spec, SiglipSpec))
    return Job(
        **sides,
        batch=arguments.batch,
        steps=arguments.steps or spec.steps,
        prompts=2 if arguments.negative else 1,
        references=tuple(_reference(text) for text in arguments.reference),
        starts=arguments.from_picture or bool(arguments.beside) or spec.task not in ("draw", "edit"),
        views=arguments.redux,
        styles=arguments.redux * tokens,
        cached=arguments.step_cache,
        pictures=arguments.count,
    )


def _reference(text: str) -> tuple[int, int]:
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise UserError(f"a reference's size is {text!r}; give width and height, such as 1024x768")
    width, height = (int(side) for side in found.groups())
    check_side("a reference's width", width)
    check_side("a reference's height", height)
    return round_size(width), round_size(height)
