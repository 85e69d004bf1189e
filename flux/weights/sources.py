"""Tensor sources: where each tensor's numbers are in a file, and how they are packed there.

Opening a file binds every tensor to a source by the header alone; bytes move when numbers are wanted. A source knows
its format and its companions (scales and the like); nothing else in the engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import FileError
from .formats.base import DATA, Format
from .formats.companions import Stored, check_scales, storage_of
from .formats.floats import PLAIN, for_device
from .formats.fp4 import NVFP4, NVFP4_LINEAR
from .formats.gguf_blocks import GGUF_FORMATS
from .formats.gguf_checks import check_block_scales
from .formats.products import has_units
from .readers.gguf import MAGIC, GgufFile
from .readers.header import TensorEntry
from .readers.safetensors import SafetensorsFile
from .readers.sharded import INDEX_SUFFIX, ShardedFile, index_in, index_of_shard
from .readers.stamps import FileStamp

__all__ = ["Checkpoint", "ModelFile", "Source", "open_checkpoint"]


NVFP4_WORDS = {"modelopt": NVFP4_LINEAR.name, "comfy": NVFP4.name}  # in metadata or a file's name, and the dialect


class ModelFile(Protocol):
    """A file, or several that belong together, opened by header."""

    path: Path
    metadata: dict[str, str]

    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def stamps(self) -> Mapping[Path, FileStamp]: ...
    def __getitem__(self, name: str, /) -> TensorEntry: ...
    def held(self) -> AbstractContextManager[Callable[[], None]]:
        """Have others leave the files as they are; yields what checks that they did."""

    def stored(self, name: str, /) -> Tensor:
        """A tensor as it stands in the file; not to be written to."""

    def outline(self, name: str, /) -> Tensor:
        """What ``stored`` gives, on the meta device: by the header alone."""

    def read_into(self, name: str, target: Tensor, /) -> None:
        """Read a tensor's bytes into memory (n,) of the caller's."""

    def want(self, name: str, /) -> None:
        """Have a mapped tensor's pages brought in together, ahead of their use."""

    def forget(self, name: str, /) -> None:
        """Let go of a mapped tensor's pages."""


class Source:
    """One tensor's numbers in a file.

    Attributes:
        name: The tensor's name there.
        shape: Of the numbers, unpacked. Formats that pad say the padded shape; ``numbers`` takes a smaller one.
        format: How they are packed.
        parts: The stored tensors' names by role.
        multiplies: Whether the file leaves it to us to multiply in the stored format.
    """

    def __init__(
        self,
        file: ModelFile,
        name: str,
        shape: tuple[int, ...],
        row: Format,
        parts: Mapping[str, str] | None = None,
        multiplies: bool = True,
    ) -> None:
        self.file, self.name, self.shape, self.format, self.multiplies = file, name, shape, row, multiplies
        self.parts = {DATA: name} if parts is None else dict(parts)
        self._is_checked = False

    @property
    def nbytes(self) -> int:
        """Bytes on disk, companions included."""
        return sum(self.piece_bytes)

    @property
    def piece_bytes(self) -> tuple[int, ...]:
        """Bytes on disk of every stored tensor, in the order of the roles."""
        return tuple(self.file[name].end - self.file[name].start for name in self.parts.values())

    def multiplies_on(self, device: torch.device) -> bool:
        """Whether it is multiplied as it is stored there, rather than unpacked."""
        return self.multiplies and has_units(self.format.product, device)

    def stored(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """The stored tensors by role; on the CPU they may be views of the file, not to be written to.

        Raises:
            FileError: The file changed since it was opened, or a scale is not a usable number.
        """
        parts = {role: self.file.stored(name) for role, name in self.parts.items()}
        if not self._is_checked:
            self._check(parts)
            self._is_checked = True
        if device is None or device.type == "cpu":
            return parts
        moved = {role: for_device(part, device).to(device) for role, part in parts.items()}
        self.forget()
        return moved

    def outline(self, device: torch.device) -> dict[str, Tensor]:
        """What ``stored`` would give on a device, on the meta device in its place; no byte is read."""
        return {role: for_device(self.file.outline(name), device) for role, name in self.parts.items()}

    def numbers(
        self, dtype: torch.dtype, device: torch.device | None = None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """The numbers: packed they move to the device, and are unpacked there.

        Args:
            dtype: That they become. Where they are stored so, on the CPU the result may be a view of the file.
            device: Where to; the CPU when None.
            shape: Without padding; ``self.shape`` when None.

        Raises:
            FileError: See ``stored``.
        """
        for name in self.parts.values():
            self.file.want(name)
        stored = self.stored(device)
        out = self.format.decode(stored, self.shape if shape is None else shape, dtype)
        if out.data_ptr() != stored[DATA].data_ptr():
            self.forget()
        return out

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Read the stored tensors' bytes, by role, into memory of the caller's.

        Args:
            targets: For each role bytes (n,) on the CPU.

        Raises:
            FileError: The file changed since it was opened.
        """
        for role, name in self.parts.items():
            self.file.read_into(name, targets[role])

    def forget(self) -> None:
        """Let go of the file's pages that were mapped for it."""
        for name in self.parts.values():
            self.file.forget(name)

    def _check(self, parts: Mapping[str, Tensor]) -> None:
        file = self.file.path.name
        if len(parts) > 1:
            check_scales(parts, self.name, file)
        elif self.format.name in GGUF_FORMATS:
            check_block_scales(self.format.name, parts[DATA], self.name, file)


class Checkpoint(Mapping[str, Source]):
    """Every tensor that holds numbers, by its name in the file.

    Attributes:
        path: The file, or the index of several.
        files: The files themselves.
        stamps: That they had when their headers were read.
        metadata: The header's own texts.
        is_gguf: Whether it is a GGUF file.
    """

    def __init__(self, file: ModelFile, sources: Mapping[str, Source]) -> None:
        self.path, self.metadata, self.files = file.path, dict(file.metadata), file.files
        self.stamps = dict(file.stamps)
        self.is_gguf = isinstance(file, GgufFile)
        self._sources = dict(sources)
        self._file = file

    def held(self) -> AbstractContextManager[Callable[[], None]]:
        """Have others leave the files as they are inside the block; see ``readers.file_bytes.FileBytes.held``."""
        return self._file.held()

    def __getitem__(self, name: str) -> Source:
        return self._sources[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(source.nbytes for source in self.values())


def open_checkpoint(path: Path, *, nvfp4_dialect: str | None = None) -> Checkpoint:
    """Open a model file by its header.

    Args:
        path: A safetensors or GGUF file; or the index of a model in several files, one of these files, or their folder.
        nvfp4_dialect: "nvfp4" or "nvfp4 linear" for files that do not tell; None to go by the words "modelopt" and
            "comfy" in their metadata and name.

    Raises:
        MissingFileError: There is no such file.
        FileError: It is damaged, of another kind, or packed in a way that is not read here.
    """
    file = _open_file(path)
    if isinstance(file, GgufFile):
        return Checkpoint(file, {name: _gguf_source(file, name, entry) for name, entry in file.items()})
    dialect = nvfp4_dialect or _nvfp4_hint(file)
    storage = storage_of(file, file.metadata, file.read, file=file.path.name, nvfp4_dialect=dialect)
    return Checkpoint(file, {name: _source(file, name, own) for name, own in storage.items()})


def _open_file(path: Path) -> SafetensorsFile | ShardedFile | GgufFile:
    if path.is_dir():
        found = index_in(path)
        if found is None:
            raise FileError(f"{path} is a folder without a .safetensors file; name a model file, or a folder with one")
        path = found
    if path.name.endswith(INDEX_SUFFIX):
        return ShardedFile(path)
    index = index_of_shard(path) if path.is_file() else None
    if index is not None:
        return ShardedFile(index)
    return GgufFile(path) if _is_gguf(path) else SafetensorsFile(path)


def _is_gguf(path: Path) -> bool:
    """By its name, or by its first bytes whatever its name."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _source(file: ModelFile, name: str, own: Stored) -> Source:
    return Source(file, name, own.shape, own.format, own.names, not own.full_precision_product)


def _nvfp4_hint(file: ModelFile) -> str | None:
    """Whose nvfp4 a file says that it is, in its metadata or else its name; None where it does not."""
    texts = (" ".join(text for pair in file.metadata.items() for text in pair), file.path.name)
    for text in map(str.lower, texts):
        dialect = next((dialect for word, dialect in NVFP4_WORDS.items() if word in text), None)
        if dialect is not None:
            return dialect
    return None


def _gguf_source(file: GgufFile, name: str, entry: TensorEntry) -> Source:
    row = GGUF_FORMATS.get(entry.dtype) or PLAIN.get(entry.dtype)
    if row is None:
        raise FileError(
            f"{file.path.name}: tensor {name} is stored as {entry.dtype}, which this version does not unpack; choose a "
            "release in Q8_0, Q6_K, Q5_K, Q4_K or another common type"
        )
    return Source(file, name, tuple(entry.shape), row)
