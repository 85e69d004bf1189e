"""A model to a file of any format, tensor by tensor.

What is stored packed, by part: the large matrices, which are nearly all of a model. Embedders, norms, biases and the
last layer are a hundredth of it and cost quality first; they stay in 16 or 32 bits, as in the releases that people use.

Peak memory is a few times the largest tensor at hand: its numbers, what an encoder holds besides, and the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import FluxFoundryError, UserError
from .formats.base import DATA, Format
from .formats.bnb import QUANT_STATE
from .formats.floats import FLOATS
from .formats.gguf_blocks import GGUF_FORMATS
from .formats.naming import COMFY_NAMES, COMFY_QUANT, WEIGHT, comfy_quant, companion_names
from .formats.written import GGUF, WRITTEN, Written
from .packed import Packed
from .renames import Layout, Recipe, Reshape, assemble
from .writers.gguf import GgufWriter
from .writers.safetensors import SafetensorsWriter

__all__ = ["Item", "Outcome", "Stores", "packs", "store"]

Shape = tuple[int, ...]
Watch = Callable[[int, int, str], None]

PACKED_NAMES: dict[str, re.Pattern[str]] = {  # of a part's tensors in our names, those that are stored packed
    "transformer": re.compile(r"(double_blocks|single_blocks)\.\d+\..*\.weight|.*_modulation\w*\.lin\.weight"),
    "t5": re.compile(r"shared\.weight|encoder\.block\.\d+\.layer\.\d+\.(SelfAttention|DenseReluDense)\.\w+\.weight"),
    "clip": re.compile(r"text_model\.encoder\.layers\.\d+\..*(proj|fc1|fc2)\.weight"),
    "autoencoder": re.compile(r"(?!)"),  # convolutions: no format packs them
    "vision": re.compile(r"(?!)"),  # towers are small, and everybody stores them plain
}
ARCHITECTURES = {("transformer", "flux1"): "flux", ("transformer", "flux2"): "flux2", ("t5", ""): "t5encoder"}
FILE_TYPES = {  # llama.cpp's numbers of whole files
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 14,
    "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32,
}  # fmt: skip
GGUF_TEXTS = ("license", "author", "description")  # of a safetensors header's, those that GGUF has a key for
QUANTIZATION_VERSION = 2  # of ggml's block formats
PLAIN_NAMES = ("fp32", "bf16", "fp16")
DIFFUSERS, DIFFUSERS_FORMATS = "-diffusers", (*PLAIN_NAMES, "nf4")
SIXTEEN_BITS, SMALL_BLOCKS = "bf16", "gguf:Q8_0"
# Formats whose stored tensors serve in a new safetensors file as they are: its names tell all that a reader must know.
COPIED = frozenset({*FLOATS.values(), *(row.row for row in WRITTEN.values() if row.row.name in COMFY_NAMES)})


class Item(Protocol):
    """One of our tensors, wherever it comes from."""

    @property
    def shape(self) -> Shape: ...

    @property
    def stored_as(self) -> frozenset[str]:
        """Names of the formats that it is stored in; none where it was made for the occasion."""

    def numbers(self) -> Tensor:
        """In the type that they are stored in, where that is plain; else fp32. On the CPU."""

    def packed(self) -> Packed | None:
        """As it is stored, to be copied; None where only the numbers are known."""


@dataclass(frozen=True, kw_only=True)
class Stores:
    """What is to be written.

    Attributes:
        part: "transformer", "autoencoder", "clip" or "t5".
        layout: How the file names its tensors.
        written: The format; None keeps what a tensor is stored in.
        metadata: The header's own texts.
        title: Of the model.
        source: What it is taken from, for messages.
    """

    part: str
    layout: Layout
    written: Written | None
    metadata: Mapping[str, str]
    title: str
    source: str = "the model"

    @property
    def is_gguf(self) -> bool:
        return self.written is not None and self.written.name.startswith(GGUF)

    def reads(self, row: Written) -> bool:
        """Whether programs that read this layout know a format: diffusers knows plain floats and bitsandbytes' nf4."""
        return not self.layout.name.endswith(DIFFUSERS) or row.name in DIFFUSERS_FORMATS

    def keeps(self, row: Format) -> bool:
        """Whether stored tensors of a format may stay as they are in this layout."""
        return any(self.reads(written) for written in WRITTEN.values() if written.row is row) or row in FLOATS.values()


@dataclass(frozen=True)
class Outcome:
    """What was written: the file's bytes, and how many numbers there are in each format."""

    nbytes: int
    formats: dict[str, int]


def packs(part: str, name: str) -> bool:
    """Whether a tensor of ours is one of those that are stored packed."""
    return PACKED_NAMES[part].fullmatch(name) is not None


def store(
    path: Path, items: Mapping[str, Item], stores: Stores, *, replace: bool = False, watch: Watch | None = None
) -> Outcome:
    """Write a model.

    Args:
        path: The file; written under another name and renamed when it is whole.
        items: Our tensors by name.
        stores: What is to be written.
        replace: Whether an older file of that name may be replaced.
        watch: Called before each tensor with how many are written, how many there are, and its name; may raise to stop.

    Raises:
        UserError: The file is there already or cannot be written; a tensor cannot be stored so.
    """
    plan = stores.layout.table.to_foreign(items, path.name)
    outs = [_plan_one(name, recipe, items, stores) for name, recipe in plan.items()]
    write = _write_gguf if stores.is_gguf else _write_safetensors
    write(path, outs, stores, replace, watch or (lambda *_: None))
    formats: dict[str, int] = {}
    for out in outs:
        formats[out.row.name] = formats.get(out.row.name, 0) + math.prod(out.shape)
    return Outcome(path.stat().st_size, formats)


@dataclass(frozen=True)
class _Out:
    """One tensor of the new file: its shape, its format, and what makes the stored tensors by role."""

    name: str
    shape: Shape
    row: Format
    make: Callable[[], Mapping[str, Tensor]]


def _plan_one(name: str, recipe: Recipe, items: Mapping[str, Item], stores: Stores) -> _Out:
    shape = recipe.shape(lambda source: items[source].shape)
    if stores.written is None:
        kept = _copied(recipe, items, shape, stores)
        if kept is not None:
            return _Out(name, shape, kept[0], kept[1])
    is_packed = all(packs(stores.part, source) for source in recipe.sources)
    written = _written_for(stores, shape, is_packed, items[recipe.sources[0]])

    def make() -> Mapping[str, Tensor]:
        try:
            return written.encode(assemble(recipe, lambda source: items[source].numbers()))
        except FluxFoundryError as error:
            raise UserError(f"{stores.source}: tensor {name} cannot be stored as {written.name}: {error}") from error

    return _Out(name, shape, written.row, make)


def _copied(
    recipe: Recipe, items: Mapping[str, Item], shape: Shape, stores: Stores
) -> tuple[Format, Callable[[], Mapping[str, Tensor]]] | None:
    """A stored tensor, or rows of it, bit for bit; None where numbers have to be made."""
    piece = recipe.pieces[0]
    packed = items[piece.name].packed() if len(recipe.pieces) == 1 else None
    if packed is None or not packed.recipe.only_renames:
        return None
    (part,) = packed.parts.values()
    row, pick = part.format, part.format.rows
    if row not in COPIED or not stores.keeps(row):
        return None
    if recipe.only_renames:
        return row, lambda: part.stored
    if pick is None or recipe.reshape is not Reshape.KEEP:
        return None
    places = torch.arange(packed.shape[0])[piece.rows(packed.shape[0])]
    return row, lambda: pick(part.stored, part.shape, places)


def _written_for(stores: Stores, shape: Shape, is_packed: bool, item: Item) -> Written:
    """The format of one tensor."""
    wanted = stores.written or _same_format(item, stores)
    if not wanted.packs:
        if stores.is_gguf and len(shape) < 2:
            return WRITTEN[GGUF + "F32"]  # as llama.cpp wants norms and biases
        return wanted
    if is_packed and wanted.suits(shape):
        return wanted
    if not stores.is_gguf:
        return _plain_format(item)
    if is_packed and WRITTEN[SMALL_BLOCKS].suits(shape):
        return WRITTEN[SMALL_BLOCKS]
    return WRITTEN[GGUF + ("BF16" if len(shape) > 1 else "F32")]


def _same_format(item: Item, stores: Stores) -> Written:
    """The format that a tensor is stored in, where a safetensors file in this layout has it, else plain numbers."""
    names = item.stored_as
    kept = (row for row in WRITTEN.values() if row.row.name in names and not row.name.startswith(GGUF))
    return next((row for row in kept if stores.reads(row)), WRITTEN[SIXTEEN_BITS])


def _plain_format(item: Item) -> Written:
    """What a tensor that is not packed is stored as: its own plain type, else 16 bits."""
    names = item.stored_as
    return next((WRITTEN[name] for name in PLAIN_NAMES if WRITTEN[name].row.name in names), WRITTEN[SIXTEEN_BITS])


def _write_safetensors(path: Path, outs: Sequence[_Out], stores: Stores, replace: bool, watch: Watch) -> None:
    assert not any(out.row in GGUF_FORMATS.values() for out in outs), "safetensors files have no GGUF blocks"
    names = [name for out in outs for name in _names(out, (*out.row.companions, *out.row.optional, QUANT_STATE))]
    with SafetensorsWriter(path, names, {**stores.metadata, "format": "pt"}, replace=replace) as writer:
        for place, out in enumerate(outs):
            watch(place, len(outs), out.name)
            parts = out.make()
            own = companion_names(out.name, out.row, parts)
            for role, tensor in parts.items():
                writer.add(own[role], tensor)
            marker = comfy_quant(out.row)
            if marker is not None:
                writer.add(_marker(out.name), marker)
        watch(len(outs), len(outs), "")


def _names(out: _Out, roles: Sequence[str]) -> list[str]:
    """Every name that a tensor may need in a safetensors file."""
    return [*companion_names(out.name, out.row, (DATA, *roles)).values(), _marker(out.name)]


def _marker(name: str) -> str:
    return f"{name.removesuffix(WEIGHT)}.{COMFY_QUANT}"


def _write_gguf(path: Path, outs: Sequence[_Out], stores: Stores, replace: bool, watch: Watch) -> None:
    assert stores.written is not None
    kind = stores.written.row.name
    fields: dict[str, str | int | float | bool] = {
        "general.architecture": ARCHITECTURES[stores.part, stores.layout.family],
        "general.name": stores.title,
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": FILE_TYPES[kind],
        **{f"general.{key}": stores.metadata[key] for key in GGUF_TEXTS if key in stores.metadata},
    }
    planned = {out.name: (out.row.name, out.shape) for out in outs}
    with GgufWriter(path, fields, planned, replace=replace) as writer:
        for place, out in enumerate(outs):
            watch(place, len(outs), out.name)
            writer.add(out.name, out.make()[DATA])
        watch(len(outs), len(outs), "")
