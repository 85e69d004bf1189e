"""Where the command line's pictures go, and under which names."""

from __future__ import annotations

import itertools
from pathlib import Path

from ..images import check_output

__all__ = ["Output"]

FOLDER_SUFFIX = ".png"


class Output:
    """Names for pictures.

    Args:
        out: A file's name, which is replaced if it is there; or a folder (one that exists, or any name that ends in a
            slash), where names are new ones.
        model: As the user named it; part of names in a folder.
        count: How many pictures there will be; more than one are numbered.
    """

    def __init__(self, out: str, model: str, count: int) -> None:
        self.given, self.count = Path(out), count
        self.is_folder = out.endswith(("/", "\\")) or self.given.is_dir()
        self.stem = Path(model).name.removesuffix(".safetensors")

    def check(self) -> None:
        """Refuse what cannot be written to; creates nothing.

        Raises:
            UserError: A picture cannot be written there.
        """
        check_output(self.given / f"{self.stem}{FOLDER_SUFFIX}" if self.is_folder else self.path(0, 0))

    def path(self, index: int, seed: int) -> Path:
        """Of picture ``index``, counted from 0."""
        if self.is_folder:
            return _unused(self.given, f"{self.stem}-{seed}", FOLDER_SUFFIX)
        return self.given if self.count == 1 else self.given.with_stem(f"{self.given.stem}-{index + 1}")

    def record_path(self, first_picture: Path) -> Path:
        """Of the record: the name given, or in a folder the first picture's, with .json."""
        return (first_picture if self.is_folder else self.given).with_suffix(".json")


def _unused(folder: Path, stem: str, suffix: str) -> Path:
    paths = (folder / f"{stem}{mark}{suffix}" for mark in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
    return next(path for path in paths if not path.exists())
