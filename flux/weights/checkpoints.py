"""What a model file holds: its parts, each with what it is and how its tensors become ours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import FileError
from ..specs.recognition import Recognised, recognise_foreign, recognise_part
from .binding import Shapes, bind, listed
from .formats.floats import WHOLE_BITS
from .renames import FoundLayout, Plan, Recipe, find_layouts
from .sources import Checkpoint, Source

__all__ = ["Expected", "FilePart", "formats_of", "read_parts"]

Expected = Callable[[Any], Shapes | None]

LANGUAGE_MODEL = "text-encoder"  # its role
ENCODERS = ("clip", "t5", "vision")


@dataclass(frozen=True)
class FilePart:
    """One part of a file.

    Attributes:
        recognised: What it is.
        layout: How its tensors are named; None for what the engine does not know.
        plan: From the file's names to ours; None where something is amiss.
        fault: What is amiss, in a sentence; None for nothing.
    """

    recognised: Recognised
    layout: FoundLayout | None = None
    plan: Plan | None = None
    fault: str | None = None

    @property
    def kind(self) -> str:
        return self.recognised.kind

    def whole_plan(self) -> Plan:
        """The plan.

        Raises:
            FileError: Something is amiss.
        """
        if self.plan is None or self.fault is not None:
            raise FileError(self.fault or f"{self.recognised.title} cannot be loaded")
        return self.plan


def read_parts(checkpoint: Checkpoint, variant: str | None = None, expected: Expected | None = None) -> list[FilePart]:
    """Everything that a file holds; empty when nothing in it is known.

    Args:
        checkpoint: The file, opened.
        variant: What its transformer is by the user's word; decides where tensors cannot.
        expected: Gives the shapes of all parameters of a spec, so that a tensor that is missing or misshapen is a fault
            already; None where binding will tell.

    Raises:
        MismatchError: The tensors contradict ``variant``.
    """
    parts = [_read_part(checkpoint, found, variant, expected) for found in find_layouts(checkpoint)]
    if any(part.layout is not None and part.layout.layout.part == "transformer" for part in parts):
        return parts  # a model of another size or one that is not whole says itself what it is
    foreign = recognise_foreign(checkpoint)
    if foreign is None:
        return parts
    if foreign.role == LANGUAGE_MODEL:  # which may have a vision tower
        return [FilePart(foreign), *parts]
    if not foreign.is_model:
        return parts or [FilePart(foreign)]
    # Another family's own autoencoder may have FLUX.1's shapes (Stable Diffusion 3's), but not its meaning.
    return [FilePart(foreign), *(part for part in parts if part.kind in ENCODERS)]


def _read_part(checkpoint: Checkpoint, found: FoundLayout, variant: str | None, expected: Expected | None) -> FilePart:
    fault, plan = None, None
    try:
        plan = found.to_ours(checkpoint, checkpoint.path.name)
    except FileError as error:
        fault = str(error)
    shapes = _shapes(checkpoint, found, plan)
    layout = found.layout
    recognised = recognise_part(
        layout.part, layout.family, shapes,
        file_name=checkpoint.path.name, metadata=checkpoint.metadata,
        variant=variant if layout.part == "transformer" else None,
    )  # fmt: skip
    if plan is not None:
        fault = _fault(checkpoint, plan, None if expected is None else expected(recognised.spec))
    return FilePart(recognised, found, plan, fault)


def _fault(checkpoint: Checkpoint, plan: Plan, wanted: Shapes | None) -> str | None:
    """Why a part with known names cannot be loaded; None for nothing that is known."""
    label = checkpoint.path.name
    whole = [n for recipe in plan.values() for n in recipe.sources if checkpoint[n].format.name in WHOLE_BITS]
    if whole:
        return (
            f"{label} stores whole numbers without scales in place of weights: {listed(whole)}; use the model's own "
            "release"
        )
    if wanted is None:
        return None
    try:
        bind(plan, checkpoint, wanted, label)
    except FileError as error:
        return str(error)
    return None


def _shapes(checkpoint: Checkpoint, found: FoundLayout, plan: Plan | None) -> dict[str, tuple[int, ...]]:
    """Shapes under our names, as far as the file's tensors fit together."""
    if plan is None:
        known = [found.prefix + name for name in found.own_names(checkpoint) if found.layout.table.knows(name)]
        try:
            plan = found.to_ours(known)
        except FileError:
            return {}
    shapes = ((name, _shape(checkpoint, recipe)) for name, recipe in plan.items())
    return {name: shape for name, shape in shapes if shape is not None}


def _shape(checkpoint: Checkpoint, recipe: Recipe) -> tuple[int, ...] | None:
    """The shape of one of our tensors; None where what it is made of does not fit together."""
    try:
        return recipe.shape(lambda source: checkpoint[source].shape)
    except FileError:
        return None


def formats_of(checkpoint: Checkpoint, part: FilePart | None = None) -> dict[str, int]:
    """How many numbers are stored in each format, most first; of one part where it is given."""
    counts: Counter[str] = Counter()
    for source in _own(checkpoint, part).values():
        counts[source.format.name] += math.prod(source.shape)
    return dict(counts.most_common())


def _own(checkpoint: Checkpoint, part: FilePart | None) -> Mapping[str, Source]:
    if part is None or part.plan is None:
        return checkpoint
    return {name: checkpoint[name] for recipe in part.plan.values() for name in recipe.sources}
