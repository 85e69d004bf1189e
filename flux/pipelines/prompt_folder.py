"""Prompts' embeddings on disk: a folder with a safetensors file for each, written whole and checked when it is read.

Several processes may use one folder at once: a file appears under its name when it is complete, and two that write the
same entry write the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import FileError, MissingFileError, UserError
from ..memory.policy import GIB
from ..weights.readers.safetensors import SafetensorsFile
from ..weights.writers.safetensors import SafetensorsWriter
from ..weights.writers.whole import tensor_bytes

__all__ = ["Cleared", "FolderStore", "KeptFile", "clear_folder", "kept_files"]

NAME = re.compile(r"prompt-[0-9a-f]{64}\.safetensors")
UNFINISHED = re.compile(r"\.prompt-[0-9a-f]{64}\.safetensors\.[0-9a-f]+\.part")  # of a process that was ended
KEY, DIGEST, ABOUT = "prompt_key", "prompt_digest", "prompt_encoder"  # in a file's metadata
FOLDER_BYTES = 4 * GIB  # 500 prompts of T5-XXL

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Cleared:
    """What was let go."""

    entries: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class KeptFile:
    """One entry of a folder.

    Attributes:
        path: Its file.
        nbytes: Of it.
        used: When it was last read or written, in nanoseconds.
    """

    path: Path
    nbytes: int
    used: int

    @property
    def about(self) -> str:
        """What made it, by its header."""
        try:
            return SafetensorsFile(self.path).metadata.get(ABOUT) or "unknown"
        except UserError:
            return "damaged"


class FolderStore:
    """Entries in a folder, which is made when the first one is put there.

    Args:
        folder: Where.
        most_bytes: Of all entries; those that were not used for longest make room.
        tell: Told in a sentence of files that could not be used, and of what could not be written.

    Raises:
        UserError: There is a file of that name.
    """

    def __init__(self, folder: Path, most_bytes: int = FOLDER_BYTES, tell: Tell | None = None) -> None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; name a folder for the embeddings of prompts")
        self.folder, self.most_bytes = folder, most_bytes
        self._tell = tell or (lambda _: None)

    def get(self, key: str) -> dict[str, Tensor] | None:
        """An entry's tensors; None where there is none that is whole."""
        path = self._path(key)
        try:
            found = _read(path, key)
            os.utime(path)
        except MissingFileError:
            return None
        except (UserError, OSError) as error:
            self._tell(f"a prompt is encoded again, for its kept embedding cannot be used: {error}")
            return None
        return found

    def put(self, key: str, tensors: Mapping[str, Tensor], about: str = "") -> None:
        """Keep an entry; where that fails it is told, and the run goes on.

        Args:
            key: Lowercase hexadecimal, 64 digits.
            tensors: By name.
            about: What made them.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            metadata = {KEY: key, DIGEST: _digest(tensors), ABOUT: about}
            with SafetensorsWriter(self._path(key), tensors, metadata, replace=True) as file:
                for name, tensor in tensors.items():
                    file.add(name, tensor)
            self._make_room(self._path(key))
        except (UserError, OSError) as error:
            self._tell(f"the embedding of a prompt could not be kept: {error}")

    def _path(self, key: str) -> Path:
        path = self.folder / f"prompt-{key}.safetensors"
        assert NAME.fullmatch(path.name)
        return path

    def _make_room(self, newest: Path) -> None:
        entries = sorted(kept_files(self.folder), key=lambda entry: entry.used)
        total = sum(entry.nbytes for entry in entries)
        for entry in entries:
            if total <= self.most_bytes:
                return
            if entry.path != newest:
                entry.path.unlink(missing_ok=True)
                total -= entry.nbytes


def kept_files(folder: Path) -> Iterator[KeptFile]:
    """The entries of a folder; none where there is no such folder."""
    for path, found in _files(folder, NAME):
        yield KeptFile(path, found.st_size, found.st_mtime_ns)


def clear_folder(folder: Path) -> Cleared:
    """Remove every entry of a folder, and nothing else that is in it.

    Raises:
        UserError: One cannot be removed.
    """
    gone = Cleared()
    for path, found in list(_files(folder, NAME)):
        _remove(path)
        gone = Cleared(gone.entries + 1, gone.nbytes + found.st_size)
    for path, _ in list(_files(folder, UNFINISHED)):
        _remove(path)
    return gone


def _files(folder: Path, name: re.Pattern[str]) -> Iterator[tuple[Path, os.stat_result]]:
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if name.fullmatch(entry.name) is None:
            continue
        try:
            if entry.is_file(follow_symlinks=False):
                yield Path(entry.path), entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # another process was faster
            continue


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be removed: {error.strerror}; remove it by hand") from error


def _read(path: Path, key: str) -> dict[str, Tensor]:
    file = SafetensorsFile(path)
    if file.metadata.get(KEY) != key:
        raise FileError(f"{path.name} is not the embedding that its name says")
    tensors = {name: file.read(name) for name in file}
    if file.metadata.get(DIGEST) != _digest(tensors):
        raise FileError(f"{path.name} is damaged")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
