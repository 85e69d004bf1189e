"""What the files in a user's folders are, each looked at once as long as it does not change."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from ..specs.fit import Given
from ..weights.checkpoints import FilePart, read_parts
from ..weights.readers.sharded import INDEX_SUFFIX, SHARD
from ..weights.sources import open_checkpoint
from .modules import parameter_shapes

__all__ = ["MODEL_SUFFIXES", "given_files", "model_files_in"]

MODEL_SUFFIXES = (".safetensors", ".sft", ".gguf", INDEX_SUFFIX)
MOST_FILES = 500  # that are looked at for one message
REMEMBERED = 4096


def model_files_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """The model files of a folder by name, one for each model: of those in several parts, the index.

    Args:
        folder: Where to look.
        deep: Whether to look in its folders too.
    """
    found = (path for path in (folder.rglob("*") if deep else folder.glob("*")) if is_model_file(path))
    return sorted(found)


def is_model_file(path: Path) -> bool:
    """Whether a file is a model by its name: an index, or a file that no index beside it names."""
    name = path.name.lower()
    if not name.endswith(MODEL_SUFFIXES):
        return False
    shard = SHARD.fullmatch(path.name)
    return (shard is None or not path.with_name(shard["stem"] + INDEX_SUFFIX).is_file()) and path.is_file()


def given_files(paths: Iterable[Path]) -> list[Given]:
    """Every whole part of every file; what cannot be read, or has something amiss, is left out."""
    given = []
    for path in list(paths)[:MOST_FILES]:
        try:
            stat = path.stat()
            parts = _parts(path, stat.st_size, stat.st_mtime_ns)
        except (UserError, OSError):
            continue
        given += [Given(path, part.recognised) for part in parts if part.fault is None]
    return given


@functools.lru_cache(REMEMBERED)
def _parts(path: Path, size: int, changed: int) -> tuple[FilePart, ...]:
    """The parts of a file as it is now."""
    del size, changed  # only keys
    return tuple(read_parts(open_checkpoint(path), expected=parameter_shapes))
