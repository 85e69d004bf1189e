"""The layouts of FLUX files, and which of them a file has.

A file may hold several parts, each below a prefix of its own; ``find_layouts`` gives them all. It takes names alone, so
it cannot tell apart what shapes tell: ``flux.specs.recognise`` does that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from . import autoencoder, flux1, flux2, text, vision
from .plans import Packing, Piece, Plan, Recipe, Reshape, assemble
from .tables import Layout

__all__ = [
    "LAYOUTS", "FoundLayout", "Layout", "Packing", "Piece", "Plan", "Recipe", "Reshape", "assemble", "find_layout",
    "find_layouts",
]  # fmt: skip

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        flux1.BFL, flux1.DIFFUSERS,
        flux2.BFL, flux2.DIFFUSERS,
        autoencoder.BFL, autoencoder.DIFFUSERS, autoencoder.FLUX2_BFL, autoencoder.FLUX2_DIFFUSERS,
        text.CLIP, text.CLIP_BARE,
        text.T5, text.T5_GGUF,
        vision.SIGLIP, vision.SIGLIP_BARE, vision.REDUX,
    )
}  # fmt: skip
# Where all-in-one files keep their parts. A part without a prefix has none of these names.
PART_ROOTS = ("model.diffusion_model.", "first_stage_model.", "vae.", "text_encoders.")


@dataclass(frozen=True)
class FoundLayout:
    """A layout, and the prefix before its names in a file."""

    layout: Layout
    prefix: str = ""

    def own_names(self, names: Iterable[str]) -> list[str]:
        """Of a file's names those of this part, without the prefix."""
        others = () if self.prefix else PART_ROOTS
        return [
            name.removeprefix(self.prefix)
            for name in names
            if name.startswith(self.prefix) and not name.startswith(others)
        ]

    def to_ours(self, names: Iterable[str], where: str = "the file") -> Plan:
        """A plan for our tensors, of the file's.

        Args:
            names: All of the file's tensors, without what a storage format keeps beside them (scales, markers).
            where: The file's name, for messages.

        Raises:
            FileError: A name below the prefix is not known, one of several that belong together is missing, or two
                stand for the same tensor.
        """
        return self.layout.table.to_ours(self.own_names(names), where).under(sources=self.prefix)

    def to_foreign(self, names: Iterable[str], where: str = "the model") -> Plan:
        """A plan for the file's tensors, of ours; see ``to_ours``.

        Raises:
            FileError: A name is not known.
        """
        return self.layout.table.to_foreign(names, where).under(targets=self.prefix)


def find_layouts(names: Iterable[str]) -> list[FoundLayout]:
    """Every part that names tell of, one of a kind, transformer first."""
    every = frozenset(names)
    found: dict[str, FoundLayout] = {}
    for layout in LAYOUTS.values():
        prefix = layout.find_prefix(every)
        if prefix is not None and layout.part not in found:
            found[layout.part] = FoundLayout(layout, prefix)
    return list(found.values())


def find_layout(names: Iterable[str], part: str | None = None) -> FoundLayout | None:
    """The layout of a file's first part, or of one kind of part; None where there is none.

    Args:
        names: All of the file's tensors.
        part: See ``Layout``; the first that is found when None.
    """
    return next((found for found in find_layouts(names) if part in (None, found.layout.part)), None)
