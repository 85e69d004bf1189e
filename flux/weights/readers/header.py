"""A safetensors file's header: what is in the file, known without torch and without reading a tensor.

The header is checked against the file's size before anything is read, so that a damaged file is refused by name and
never costs memory. Layout: 8 bytes of header length (little endian), the header as JSON, the tensors' bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import FileError, MissingFileError
from ..json_text import load_json
from .stamps import FileStamp, stamp_of

__all__ = [
    "ITEM_BITS",
    "MAX_NAME",
    "MAX_TENSORS",
    "SafetensorsHeader",
    "TensorEntry",
    "can_be_a_shape",
    "check_overlap",
    "fill",
    "is_name",
    "whole_text",
]

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_RANK = 8
MAX_NUMBERS = 1 << 48  # of a tensor; what torch multiplies sides with stays within 64 bits
MAX_NAME = 256  # characters; the longest of a FLUX model have half as many
MAX_TENSORS = 1 << 15  # several times as many as the largest of these models, in the smallest pieces
METADATA = "__metadata__"
PICKLE_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pt2"})
ZIP_START = b"PK\x03\x04"  # torch's way to keep pickles
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # bare ones
OTHER_STARTS = (  # what people have in place of a model, by a file's first bytes
    (b"GGUF", "is a GGUF file, not a safetensors file; give it a name that ends in .gguf"),
    (b"version ", "is a Git LFS pointer, not the model itself; fetch it with `git lfs pull`, or download it again"),
    (b"<!DOCTYP", "is a web page, not a model; the download needed a login or a licence to be accepted first"),
    (b"<!doctyp", "is a web page, not a model; the download needed a login or a licence to be accepted first"),
    (b"<html", "is a web page, not a model; the download needed a login or a licence to be accepted first"),
)

BYTE = 8
ITEM_BITS: dict[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its format's name, shape, and bytes from ``start`` to ``end`` after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsHeader(Mapping[str, TensorEntry]):
    """The entries of a file by name.

    Args:
        path: The file.

    Attributes:
        metadata: The header's own texts.
        data_start: Where in the file the tensors begin, in bytes.
        stamp: Of the file that the header was read from.

    Raises:
        MissingFileError: There is no such file.
        FileError: It is not a whole safetensors file, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries, self.metadata, self.data_start, self.stamp = _read(path)

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.end - entry.start for entry in self._entries.values())


def _read(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str], int, FileStamp]:
    if path.is_dir():
        raise FileError(f"{path} is a folder; name a .safetensors file in it")
    if not path.is_file():
        raise MissingFileError(f"{path} was not found; check the name and the folder")
    try:
        raw, stamp = _read_raw(path)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from error
    start = LENGTH_BYTES + len(raw)
    room = stamp.size - start
    header, metadata = _parse(path, raw, room)
    entries = {name: _entry(path, name, value, room) for name, value in header.items()}
    check_overlap(path.name, entries)
    return entries, metadata, start, stamp


def _read_raw(path: Path) -> tuple[bytes, FileStamp]:
    """The header's bytes, and the file's stamp."""
    with path.open("rb") as file:
        stamp = stamp_of(file.fileno())
        size = stamp.size
        head = file.read(LENGTH_BYTES)
        _check_start(path, head + file.read(1), size)
        file.seek(LENGTH_BYTES)
        length = int.from_bytes(head, "little")
        if len(head) < LENGTH_BYTES or not 2 <= length <= MAX_HEADER_BYTES:
            raise FileError(f"{path.name} ({size} bytes) is not a safetensors file; choose a .safetensors model file")
        if LENGTH_BYTES + length > size:
            raise FileError(
                f"{path.name} is cut off or not a safetensors file: its header claims {length} bytes, the file has "
                f"{size}; download it again"
            )
        return file.read(length), stamp


def _check_start(path: Path, head: bytes, size: int) -> None:
    """Name what is not a safetensors file by its suffix or first bytes."""
    if size == 0:
        raise FileError(f"{path.name} is empty (0 bytes); download it again")
    if path.suffix.lower() in PICKLE_SUFFIXES or _is_pickle(head):
        raise FileError(
            f"{path.name} is a pickle file, which can run code when it is opened, so it is refused; "
            "use the model's .safetensors release"
        )
    for start, what in OTHER_STARTS:
        if head.startswith(start):
            raise FileError(f"{path.name} {what}")


def _is_pickle(head: bytes) -> bool:
    """Whether a file's first bytes are a pickle's; a header's length may look like one, but JSON stands behind it."""
    return head.startswith(ZIP_START) or (head.startswith(PICKLE_STARTS) and head[LENGTH_BYTES:] != b"{")


def _parse(path: Path, raw: bytes, room: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The header's tensors and its metadata, as JSON has them; ``room`` bytes of the file are not the header's."""
    try:
        header = load_json(raw, room)
    except ValueError as error:
        raise FileError(
            f"{path.name} is damaged or not a safetensors file: its header is not JSON that can be read ({error}); "
            "download it again"
        ) from error
    if not isinstance(header, dict):
        raise FileError(
            f"{path.name} is damaged or not a safetensors file: its header is not a table of tensors; download it again"
        )
    metadata = header.pop(METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileError(f"{path.name} is damaged: the header's metadata is not a table of texts; download it again")
    if len(header) > MAX_TENSORS:
        raise FileError(f"{path.name} claims {len(header)} tensors, more than any model has; download it again")
    return header, {whole_text(key): whole_text(value) for key, value in metadata.items()}


def whole_text(text: str) -> str:
    """The text without halves of characters, which JSON can write and nothing can print."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _entry(path: Path, name: str, value: object, room: int) -> TensorEntry:
    """Check one header entry against the room that the file has for tensors."""
    if not is_name(name):
        raise FileError(
            f"{path.name}: a tensor's name ({name[:40]!r}) is longer than {MAX_NAME} characters or cannot be printed; "
            "download the file again"
        )
    entry = _parsed_entry(value)
    if entry is None:
        raise FileError(f"{path.name}: the entry of tensor {name!r} is damaged; download the file again")
    if not entry.start <= entry.end <= room:
        raise FileError(
            f"{path.name} is cut off: tensor {name!r} ends at byte {entry.end} of {room}; download the file again"
        )
    bits = ITEM_BITS.get(entry.dtype)
    length = entry.end - entry.start
    if bits is not None and math.prod(entry.shape) * bits != length * BYTE:
        raise FileError(
            f"{path.name}: tensor {name!r} has {length} bytes, which does not fit shape {list(entry.shape)} of "
            f"{entry.dtype}; download the file again"
        )
    if not can_be_a_shape(entry.shape):
        raise FileError(f"{path.name}: tensor {name!r} claims shape {list(entry.shape)}; download the file again")
    return entry


def _parsed_entry(value: object) -> TensorEntry | None:
    """The entry, or None where it is not one."""
    if not isinstance(value, dict):
        return None
    dtype, shape, span = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(span, list)):
        return None
    if len(span) != 2 or not all(type(n) is int and 0 <= n <= MAX_NUMBERS for n in (*shape, *span)):
        return None
    if not is_name(dtype) or len(shape) > MAX_RANK:
        return None
    return TensorEntry(dtype, tuple(shape), span[0], span[1])


def is_name(text: str) -> bool:
    """Whether a text can be the name of a tensor or a type: not absurdly long, and safe to print."""
    return len(text) <= MAX_NAME and text.isprintable()


def can_be_a_shape(sides: Iterable[int]) -> bool:
    """Whether torch can have such a tensor: a side of 0 does not make up for absurd others."""
    return math.prod(side or 1 for side in sides) <= MAX_NUMBERS


def fill(path: Path, buffer: bytearray, offset: int, what: str) -> None:
    """Read a file's bytes from ``offset`` on until ``buffer`` is full; ``what`` they are, messages say.

    Raises:
        FileError: The file ends before, or cannot be read any more.
    """
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            view, done = memoryview(buffer), 0
            while done < len(buffer):
                count = file.readinto(view[done:])
                if not count:
                    raise FileError(f"{path.name} ended while {what} was read; was it replaced meanwhile?")
                done += count
    except OSError as error:
        raise FileError(f"{path} cannot be read any more: {error.strerror}; is it still there?") from error


def check_overlap(file_name: str, entries: Mapping[str, TensorEntry]) -> None:
    """Refuse tensors that share bytes.

    Raises:
        FileError: Two do; the message names them.
    """
    last_end, last_name = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < last_end:
            raise FileError(f"{file_name}: tensors {last_name!r} and {name!r} overlap; download the file again")
        last_end, last_name = entry.end, name
