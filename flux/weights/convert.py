"""A model file to another format or layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MismatchError, UserError
from ..specs.flux1 import Flux1Spec
from ..specs.flux2 import Flux2Spec
from ..specs.recognition import titles_of
from .binding import Binding, bind
from .checkpoints import Expected, FilePart, read_parts
from .diffusers_folder import WEIGHTS, config_of, write_config
from .formats.companions import METADATA as QUANT_METADATA
from .formats.written import GGUF, WRITTEN, Written
from .packed import Packed
from .renames import LAYOUTS, Layout
from .sources import Checkpoint, open_checkpoint
from .storing import DIFFUSERS_FORMATS, Outcome, Stores, Watch, store

__all__ = [
    "CONVERTIBLE",
    "Converted",
    "StoredItem",
    "convert",
    "describe_formats",
    "items_of",
    "layout_for",
    "parse_target",
    "suffix_for",
]

LAYOUT_NAMES = {"bfl": "Black Forest Labs' names", "diffusers": "diffusers' names"}
CONVERTIBLE = ("transformer", "autoencoder", "clip", "t5")
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TITLE = "modelspec.title"
MILLION = 10**6
MAX_TEXT = 1 << 16  # characters of one that is carried over


@dataclass(frozen=True)
class StoredItem:
    """One of our tensors, in a file."""

    binding: Binding

    @property
    def shape(self) -> tuple[int, ...]:
        return self.binding.shape

    @property
    def stored_as(self) -> frozenset[str]:
        return frozenset(source.format.name for source in self.binding.sources.values())

    def numbers(self) -> Tensor:
        """In their own type where that is plain, so that the file itself serves; fp32 where they are packed."""
        names = self.stored_as
        dtype = PLAIN_DTYPES.get(next(iter(names)), torch.float32) if len(names) == 1 else torch.float32
        return self.binding.numbers(dtype)

    def packed(self) -> Packed | None:
        return self.binding.packed()


@dataclass(frozen=True)
class Converted:
    """What was made of what, and where the weights are."""

    path: Path
    title: str
    layout: str
    outcome: Outcome


def parse_target(to: str) -> tuple[Written | None, str | None]:
    """A format and a layout by the word of a user: "fp8", "gguf:Q4_K", "diffusers", "fp8,diffusers".

    Raises:
        UserError: There is no such format or layout.
    """
    written, layout = None, None
    for word in to.split(","):
        if word in LAYOUT_NAMES:
            layout = word
        elif (name := written_name(word)) is not None:
            written = WRITTEN[name]
        else:
            known = ", ".join((*WRITTEN, *LAYOUT_NAMES))
            raise UserError(f"there is no format {word!r}; choose one of: {known}")
    if written is not None and layout == "diffusers":
        if written.name.startswith(GGUF):
            raise UserError("GGUF files have Black Forest Labs' names; leave diffusers away, or choose another format")
        if written.name not in DIFFUSERS_FORMATS:
            raise UserError(
                f"diffusers does not read {written.name} files; with its layout choose one of "
                f"{', '.join(DIFFUSERS_FORMATS)}"
            )
    return written, layout


def written_name(word: str) -> str | None:
    """A key of ``WRITTEN`` for what people write: any case, and llama.cpp's mixtures (Q4_K_M) for their blocks."""
    plain = re.sub(r"_K_[SML]$", "_K", word.upper())
    return next((name for name in WRITTEN if name.upper() == plain), None)


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    part: str | None = None,
    variant: str | None = None,
    replace: bool = False,
    watch: Watch | None = None,
    expected: Expected | None = None,
) -> Converted:
    """Write one part of a model file in another format or layout, tensor by tensor.

    Args:
        source: A file, an index of several, or their folder.
        target: The new file: .gguf for GGUF formats, .safetensors for all others. In diffusers' layout a folder too,
            which gets the config that diffusers builds the model from besides.
        to: See ``parse_target``. A layout alone keeps what tensors are stored in, where it can.
        part: Which part of an all-in-one file; the first of ``CONVERTIBLE`` that it has when None.
        variant: What a transformer is, where its tensors cannot tell; written into the new file.
        replace: Whether an older file of that name may be replaced.
        watch: See ``storing.store``.
        expected: See ``checkpoints.read_parts``.

    Raises:
        UserError: A file cannot be read or written, is of no kind that is known here, or does not have that part.
    """
    written, layout = parse_target(to)
    is_folder = layout == "diffusers" and (target.is_dir() or not target.suffix)
    if not is_folder:
        check_suffix(target, written)
    checkpoint = open_checkpoint(source)
    found = _part(checkpoint, part, variant, expected)
    config = config_of(found.recognised.spec) if is_folder else None
    stores = Stores(
        part=found.kind,
        layout=layout_for(found, written, layout),
        written=written,
        metadata=_metadata(checkpoint.metadata, found, variant),
        title=title_of(found),
        source=checkpoint.path.name,
    )
    if written is not None and written.packs and found.kind == "autoencoder":
        raise MismatchError(
            f"{checkpoint.path.name} is {found.recognised.title}, whose convolutions no format packs; choose bf16, "
            "fp16 or fp32"
        )
    if is_folder:
        target = _diffusers_target(target, config, found)
    outcome = store(target, items_of(checkpoint, found), stores, replace=replace, watch=watch)
    if config is not None:
        write_config(target.parent, config)
    return Converted(target, found.recognised.title, stores.layout.title, outcome)


def _diffusers_target(folder: Path, config: dict[str, Any] | None, found: FilePart) -> Path:
    """The file of weights in a folder for diffusers, which is made if it is not there.

    Raises:
        MismatchError: Such a part is not written as a folder.
        UserError: The folder cannot be made.
    """
    if config is None:
        raise MismatchError(f"{found.recognised.title} is not written as a folder here; name a .safetensors file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made: {error.strerror}; choose another") from error
    return folder / WEIGHTS


def describe_formats(formats: Mapping[str, int]) -> str:
    """How many numbers are stored in each format, most first."""
    ordered = sorted(formats.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{count / MILLION:,.2f} M as {name}" for name, count in ordered)


def title_of(found: FilePart) -> str:
    """What a part is called, without an article where it is a release's."""
    spec = found.recognised.spec
    return spec.title if isinstance(spec, (Flux1Spec, Flux2Spec)) else found.recognised.title


def suffix_for(written: Written | None) -> str:
    """The ending of a file in this format."""
    return ".gguf" if written is not None and written.name.startswith(GGUF) else ".safetensors"


def check_suffix(target: Path, written: Written | None) -> None:
    """Refuse a name that says another container than the format's.

    Raises:
        UserError: It does.
    """
    suffix = suffix_for(written)
    if target.suffix.lower() not in (suffix, ".sft" if suffix != ".gguf" else suffix):
        raise UserError(f"{target.name} will be a {suffix} file; give it a name that ends so")


def layout_for(found: FilePart, written: Written | None, layout: str | None) -> Layout:
    """How the new file names its tensors.

    Raises:
        MismatchError: The part has no such layout.
    """
    assert found.layout is not None
    own = found.layout.layout
    if written is not None and written.name.startswith(GGUF):
        if found.kind not in ("transformer", "t5"):
            raise MismatchError(
                f"GGUF is for transformers and T5, not for {found.recognised.title}; choose another format"
            )
        return LAYOUTS["t5-gguf"] if found.kind == "t5" else LAYOUTS[f"{own.family}-bfl"]
    if own.part in ("clip", "t5"):
        return LAYOUTS["clip-hf" if own.part == "clip" else "t5-hf"]
    return LAYOUTS[f"{own.name.rpartition('-')[0]}-{layout}"] if layout is not None else own


def items_of(checkpoint: Checkpoint, found: FilePart) -> dict[str, StoredItem]:
    """Our tensors of a part by name."""
    plan = found.whole_plan()
    shapes = plan.shapes(lambda source: checkpoint[source].shape)
    return {name: StoredItem(own) for name, own in bind(plan, checkpoint, shapes, checkpoint.path.name).items()}


def _part(checkpoint: Checkpoint, part: str | None, variant: str | None, expected: Expected | None) -> FilePart:
    parts = read_parts(checkpoint, variant, expected)
    for kind in CONVERTIBLE if part is None else (part,):
        found = next((own for own in parts if own.kind == kind), None)
        if found is not None:
            found.whole_plan()
            return found
    what = titles_of([own.recognised for own in parts])
    wanted = "a FLUX transformer, autoencoder or text encoder" if part is None else f"a FLUX {part}"
    raise MismatchError(f"{checkpoint.path.name} is {what}, but {wanted} is needed to convert; choose another file")


def _metadata(metadata: Mapping[str, str], found: FilePart, variant: str | None) -> dict[str, str]:
    """The new file's texts: the old one's, without what tells of its storage, and the variant that the user named."""
    kept = {
        key: text
        for key, text in metadata.items()
        if key != QUANT_METADATA and not key.startswith("general.") and len(text) < MAX_TEXT
    }
    name = metadata.get("general.name")
    if name is not None and TITLE not in kept:
        kept[TITLE] = name
    if found.kind == "transformer" and (variant is not None or found.recognised.notes):
        kept[TITLE] = title_of(found)  # tensors do not tell it, and the new file may have another name
    return kept
