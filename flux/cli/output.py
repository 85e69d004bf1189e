"""Where the command line's pictures go, and under which names."""

from __future__ import annotations

import itertools
from pathlib import Path

from ..errors import UserError
from ..images import check_output

__all__ = ["Output"]

FOLDER_SUFFIX, RECORD_SUFFIX = ".png", ".json"


class Output:
    """Names for pictures.

    Args:
        out: A file's name, which is replaced if it is there; or a folder (one that exists, or any name that ends in a
            slash), where names are new ones.
        model: As the user named it; part of names in a folder.
        count: How many pictures there will be; more than one are numbered.
        with_record: Whether a record will be written beside them.
    """

    def __init__(self, out: str, model: str, count: int, *, with_record: bool = False) -> None:
        self.given, self.count, self.with_record = Path(out), count, with_record
        self.is_folder = out.endswith(("/", "\\")) or self.given.is_dir()
        self.stem = Path(model).name.removesuffix(".safetensors")

    def check(self) -> None:
        """Refuse what cannot be written to; creates nothing.

        Raises:
            UserError: A picture, or the record, cannot be written there.
        """
        picture = self.given / f"{self.stem}{FOLDER_SUFFIX}" if self.is_folder else self.path(0, 0)
        check_output(picture)
        if self.with_record and not self.is_folder and self.record_path(picture).is_dir():
            raise UserError(
                f"{self.record_path(picture)}, where the record would go, is a folder; choose another --out"
            )

    def path(self, index: int, seed: int) -> Path:
        """Of picture ``index``, counted from 0."""
        if self.is_folder:
            endings = (FOLDER_SUFFIX, RECORD_SUFFIX) if self.with_record else (FOLDER_SUFFIX,)
            return _unused(self.given, f"{self.stem}-{seed}", endings)
        return self.given if self.count == 1 else self.given.with_stem(f"{self.given.stem}-{index + 1}")

    def record_path(self, first_picture: Path) -> Path:
        """Of the record: the name given, or in a folder the first picture's, with .json."""
        return (first_picture if self.is_folder else self.given).with_suffix(RECORD_SUFFIX)


def _unused(folder: Path, stem: str, endings: tuple[str, ...]) -> Path:
    """A name with the first of ``endings``, under which nothing is there with any of them."""
    stems = (f"{stem}{mark}" for mark in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
    free = next(stem for stem in stems if not any((folder / f"{stem}{ending}").exists() for ending in endings))
    return folder / f"{free}{endings[0]}"
