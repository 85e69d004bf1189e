"""A GGUF file by its header: what is in it, and any tensor's bytes when they are wanted.

Layout (version 2 and 3, little endian): "GGUF", the version, how many tensors and fields there are; the fields (a key,
a type, a value); the tensors (a name, sides from the innermost out, a type, an offset); and from the next multiple of
the alignment on the tensors' bytes. Each count and length is checked against the file's size before anything of it is
read.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ...errors import FileError, MissingFileError
from ..formats.gguf_blocks import BLOCKS
from .file_bytes import FileBytes, MappedTensors
from .header import (
    MAX_NAME,
    MAX_TENSORS,
    OTHER_STARTS,
    PICKLE_STARTS,
    PICKLE_SUFFIXES,
    ZIP_START,
    TensorEntry,
    can_be_a_shape,
    check_overlap,
    fill,
)
from .stamps import stamp_of

__all__ = ["PLAIN_DTYPES", "GgufFile", "LongArray"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
SHAPE_KEY = "comfy.gguf.orig_shape."  # before a tensor's name: its shape, where what is stored was rearranged

MAX_HEADER_BYTES = 100_000_000  # as in safetensors; the longest vocabularies take a tenth of it
MAX_KEY = 2 * MAX_NAME  # characters; a key may hold a tensor's name
MAX_FIELDS = 1 << 14
MAX_RANK = 4
MAX_SIDE = 1 << 40  # numbers along one dimension
MAX_DEPTH = 2  # of arrays in arrays
MAX_TEXT = 4096  # characters of a value that is repeated in ``metadata``
MAX_KEPT_BYTES = 8 << 20  # of all texts that ``fields`` keeps, and of those that ``array`` gives
MAX_ARRAY = 1 << 20  # items that ``array`` gives: an object each, of which a byte of the file can make 8 bytes or more
MAX_ITEMS = 1 << 21  # texts and arrays in arrays, of which each must be walked over; the longest vocabularies have half
KEPT_ITEMS = 256  # of an array; of longer ones only the place is kept
KEPT_BYTES = 1 << 16  # of a text; likewise
FIELD_BYTES = 13  # the least that a field takes: an empty key, a type, a byte
LONGEST_CHARACTER = 4  # bytes, in UTF-8
TENSOR_BYTES = 24  # the least that a tensor's entry takes: an empty name, no sides, a type, an offset

SCALARS: dict[int, str] = {  # value types by number, as struct writes them
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
ITEMS = {kind: struct.Struct("<" + code) for kind, code in SCALARS.items()}

PLAIN_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}
TYPES = {block.code: name for name, block in BLOCKS.items()}


@dataclass(frozen=True)
class LongArray:
    """An array, or a long text as an array of one, that stays in the file; ``GgufFile.array`` reads it.

    Attributes:
        kind: The type of its items, by GGUF's number.
        count: How many there are.
        start: Where in the file the first begins, in bytes.
    """

    kind: int
    count: int
    start: int


class GgufFile(Mapping[str, TensorEntry], MappedTensors):
    """The entries of a file by name; ``stored`` and ``read`` bring one tensor.

    Args:
        path: The file.

    Attributes:
        metadata: The header's fields as text, without arrays and long texts.
        fields: The header's fields as they are: int, float, bool, str, a tuple of these, or a ``LongArray``.
        data_start: Where in the file the tensors begin, in bytes.

    Raises:
        MissingFileError: There is no such file.
        FileError: It is not a whole GGUF file, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            raise FileError(f"{path} is a folder; name a .gguf file in it")
        if not path.is_file():
            raise MissingFileError(f"{path} was not found; check the name and the folder")
        self.path = path
        try:
            with path.open("rb") as file:
                cursor = _Cursor(path, file)
                self.stamp = cursor.stamp
                self.fields, self._entries, self.data_start = _read_header(cursor)
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from error
        self.metadata = {key: str(value) for key, value in self.fields.items() if _is_short(value)}
        self._bytes = FileBytes(path, stamp=self.stamp)

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

    def stored(self, name: str) -> Tensor:
        """One tensor on the CPU as it is stored; mostly a view of the mapped file, never to be written to.

        Returns:
            Plain numbers in their type and shape; of a block format its bytes, uint8 (blocks, bytes of a block).

        Raises:
            FileError: The file changed since it was opened.
        """
        entry = self[name]
        dtype = PLAIN_DTYPES.get(entry.dtype)
        flat = self._flat(name, dtype or torch.uint8)
        return flat.view(entry.shape) if dtype else flat.view(-1, BLOCKS[entry.dtype].bytes)

    def outline(self, name: str) -> Tensor:
        """What ``stored`` gives, on the meta device: by the header alone."""
        entry = self[name]
        dtype = PLAIN_DTYPES.get(entry.dtype)
        size = entry.end - entry.start
        shape = entry.shape if dtype else (size // BLOCKS[entry.dtype].bytes, BLOCKS[entry.dtype].bytes)
        return torch.empty(shape, dtype=dtype or torch.uint8, device="meta")

    def read(self, name: str) -> Tensor:
        """A copy of one tensor on the CPU as it is stored; see ``stored``."""
        entry = self[name]
        dtype = PLAIN_DTYPES.get(entry.dtype)
        shape = entry.shape if dtype else (-1, BLOCKS[entry.dtype].bytes)
        buffer = bytearray(entry.end - entry.start)
        if not buffer:
            return torch.empty(entry.shape if dtype else (0, shape[1]), dtype=dtype or torch.uint8)
        fill(self.path, buffer, self.data_start + entry.start, f"tensor {name}")
        return torch.frombuffer(buffer, dtype=dtype or torch.uint8).view(shape)

    def array(self, key: str) -> tuple[object, ...]:
        """A field's items, read from the file where the field is a ``LongArray``.

        Raises:
            KeyError: There is no such field, or it is no array.
            FileError: The file changed since it was opened, or the array is absurdly long.
        """
        value = self.fields[key]
        if isinstance(value, tuple):
            return value
        if not isinstance(value, LongArray):
            raise KeyError(key)
        try:
            with self.path.open("rb") as file:
                cursor = _Cursor(self.path, file)
                cursor.skip(value.start, "the header")
                return _read_items(cursor, value.kind, value.count, f"field {key!r}")
        except OSError as error:
            raise FileError(f"{self.path} cannot be read any more: {error.strerror}; is it still there?") from error


class _Cursor:
    """A place in a file's header that moves forward only, and only within the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.name = path.name
        self.suffix = path.suffix.lower()
        self.stamp = stamp_of(file.fileno())
        self.size = self.stamp.size
        self.position = 0
        self.items = 0  # texts and arrays in arrays so far
        self.text_bytes = 0  # of all texts that were read
        self._file = file

    @property
    def room(self) -> int:
        """Bytes that may still belong to the header."""
        return min(self.size, MAX_HEADER_BYTES) - self.position

    def refuse(self, what: str) -> FileError:
        return FileError(f"{self.name} is damaged or not a GGUF file: {what}; download it again")

    def take(self, count: int, what: str) -> bytes:
        """The next bytes.

        Raises:
            FileError: The file, or what a header may take, ends before.
        """
        self._move(count, what)
        data = self._file.read(count)
        if len(data) < count:
            raise FileError(f"{self.name} ended while {what} was read; was it replaced meanwhile?")
        return data

    def skip(self, count: int, what: str) -> None:
        """Move on without reading."""
        self._move(count, what)
        self._file.seek(count, os.SEEK_CUR)

    def _move(self, count: int, what: str) -> None:
        if count > self.room:
            limit = "the file" if self.size <= MAX_HEADER_BYTES else f"a header of {MAX_HEADER_BYTES} bytes"
            raise self.refuse(f"{what} takes {count} bytes from byte {self.position} on, past the end of {limit}")
        self.position += count

    def number(self, layout: struct.Struct, what: str) -> int:
        value: int = layout.unpack(self.take(layout.size, what))[0]
        return value

    def text(self, what: str, length: int | None = None) -> str:
        """A string: its length in bytes, where that was not read before, and UTF-8. What is not UTF-8 is replaced."""
        return self._text_bytes(what, MAX_KEPT_BYTES - self.text_bytes, length).decode("utf-8", "replace")

    def label(self, what: str, longest: int) -> str:
        """A string that is to be printed, of at most so many characters."""
        data = self._text_bytes(what, longest * LONGEST_CHARACTER)
        try:
            name = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse(f"{what} is not text") from error
        if len(name) > longest or not name.isprintable():
            raise self.refuse(f"{what} ({name[:40]!r}) is longer than {longest} characters or cannot be printed")
        return name

    def _text_bytes(self, what: str, longest: int, length: int | None = None) -> bytes:
        length = self.number(U64, what) if length is None else length
        if length > longest:
            raise self.refuse(f"{what} is {length} bytes long, of which {longest} are read at most")
        self.text_bytes += length
        return self.take(length, what)


def _read_header(cursor: _Cursor) -> tuple[dict[str, object], dict[str, TensorEntry], int]:
    """Fields, tensors, and where their bytes begin."""
    _check_start(cursor)
    tensors = _count(cursor, "tensors", TENSOR_BYTES, MAX_TENSORS)
    fields = _read_fields(cursor, _count(cursor, "fields", FIELD_BYTES, MAX_FIELDS))
    alignment = _alignment(cursor, fields)
    raw = _read_tensors(cursor, tensors)
    data_start = -(-cursor.position // alignment) * alignment
    room = max(0, cursor.size - data_start)
    entries = {
        name: _entry(cursor, name, row, _shape(cursor, name, row, fields), room, alignment) for name, row in raw.items()
    }
    check_overlap(cursor.name, entries)
    return fields, entries, data_start


def _check_start(cursor: _Cursor) -> None:
    """Name what is not a GGUF file of a version that is read, and leave the cursor behind magic and version."""
    if cursor.size == 0:
        raise FileError(f"{cursor.name} is empty (0 bytes); download it again")
    head = cursor.take(min(cursor.size, len(MAGIC) + U32.size), "the start")
    if cursor.suffix in PICKLE_SUFFIXES or head.startswith((ZIP_START, *PICKLE_STARTS)):
        raise FileError(
            f"{cursor.name} is a pickle file, which can run code when it is opened, so it is refused; "
            "use the model's .safetensors or .gguf release"
        )
    if not head.startswith(MAGIC) or len(head) < len(MAGIC) + U32.size:
        what = next((what for start, what in OTHER_STARTS if start != MAGIC and head.startswith(start)), None)
        raise FileError(f"{cursor.name} {what or 'is not a GGUF file; choose a .gguf model file'}")
    version = int.from_bytes(head[len(MAGIC) :], "little")
    if int.from_bytes(head[len(MAGIC) :], "big") in VERSIONS:
        raise FileError(f"{cursor.name} is a big-endian GGUF file; choose the little-endian release")
    if version not in VERSIONS:
        raise FileError(
            f"{cursor.name} is GGUF version {version}, and only 2 and 3 are read; choose a release of these versions"
        )


def _count(cursor: _Cursor, what: str, least: int, most: int) -> int:
    """How many of something there are, against what would fit into the file."""
    count = cursor.number(U64, f"the number of {what}")
    if count > min(most, cursor.room // least):
        raise cursor.refuse(f"it claims {count} {what} in {cursor.size} bytes")
    return count


def _read_fields(cursor: _Cursor, count: int) -> dict[str, object]:
    fields: dict[str, object] = {}
    for index in range(count):
        key = cursor.label(f"the key of field {index}", MAX_KEY)
        what = f"field {key!r}"
        if key in fields:
            raise cursor.refuse(f"{what} stands twice in it")
        fields[key] = _read_value(cursor, cursor.number(U32, what), what)
    return fields


def _read_value(cursor: _Cursor, kind: int, what: str) -> object:
    if kind == ARRAY:
        return _read_array(cursor, what)
    if kind == STRING:
        return _read_text(cursor, what)
    return _read_items(cursor, kind, 1, what)[0]


def _read_text(cursor: _Cursor, what: str) -> object:
    """A text where it is short, else its place."""
    start, length = cursor.position, cursor.number(U64, what)
    if KEPT_BYTES < length <= cursor.room:
        cursor.skip(length, what)
        return LongArray(STRING, 1, start)
    return cursor.text(what, length)


def _read_array(cursor: _Cursor, what: str) -> object:
    """An array's items where they are few, else their place."""
    kind, count, start = _array_start(cursor, what)
    if count <= KEPT_ITEMS and kind != ARRAY:
        return _read_items(cursor, kind, count, what)
    _skip_items(cursor, kind, count, what, MAX_DEPTH)
    return LongArray(kind, count, start)


def _array_start(cursor: _Cursor, what: str) -> tuple[int, int, int]:
    """The items' type, their number, and where the first begins."""
    kind, count = cursor.number(U32, what), cursor.number(U64, what)
    if count * _least_bytes(cursor, kind, what) > cursor.room:
        raise cursor.refuse(f"{what} claims {count} items, more than the file has room for")
    cursor.items += 0 if kind in ITEMS else count
    if cursor.items > MAX_ITEMS:
        raise cursor.refuse(f"with {what} its arrays claim {cursor.items} texts, of which {MAX_ITEMS} are read at most")
    return kind, count, cursor.position


def _least_bytes(cursor: _Cursor, kind: int, what: str) -> int:
    """Bytes that a value takes, or takes at least."""
    if kind in ITEMS:
        return ITEMS[kind].size
    if kind == STRING:
        return U64.size
    if kind == ARRAY:
        return U32.size + U64.size
    raise cursor.refuse(f"{what} is of type {kind}, which GGUF does not have")


def _read_items(cursor: _Cursor, kind: int, count: int, what: str) -> tuple[object, ...]:
    """Values of one type, not arrays."""
    least = _least_bytes(cursor, kind, what)
    if count > MAX_ARRAY:
        raise cursor.refuse(f"{what} has {count} items, of which {MAX_ARRAY} are read at most")
    if kind == STRING:
        return tuple(cursor.text(what) for _ in range(count))
    if kind == ARRAY:
        raise cursor.refuse(f"{what} is an array of arrays")
    return struct.unpack(f"<{count}{SCALARS[kind]}", cursor.take(count * least, what))


def _skip_items(cursor: _Cursor, kind: int, count: int, what: str, depth: int) -> None:
    """Move behind values of one type; only lengths are read."""
    if kind in ITEMS:
        cursor.skip(count * ITEMS[kind].size, what)
        return
    if depth == 0:
        raise cursor.refuse(f"{what} holds arrays nested more than {MAX_DEPTH} deep")
    for _ in range(count):
        if kind == STRING:
            cursor.skip(cursor.number(U64, what), what)
        else:
            inner, length, _ = _array_start(cursor, what)
            _skip_items(cursor, inner, length, what, depth - 1)


def _is_short(value: object) -> bool:
    return not isinstance(value, (tuple, LongArray)) and not (isinstance(value, str) and len(value) > MAX_TEXT)


def _alignment(cursor: _Cursor, fields: Mapping[str, object]) -> int:
    value = fields.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise cursor.refuse(f"its alignment is {value!r}, not a power of two")
    return value


Row = tuple[tuple[int, ...], int, int]  # shape in torch's order, type, offset


def _read_tensors(cursor: _Cursor, count: int) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for index in range(count):
        name = cursor.label(f"the name of tensor {index}", MAX_NAME)
        what = f"the entry of tensor {name!r}"
        if name in rows:
            raise cursor.refuse(f"tensor {name!r} stands twice in it")
        rank = cursor.number(U32, what)
        if rank > MAX_RANK:
            raise cursor.refuse(f"tensor {name!r} claims {rank} dimensions")
        layout = struct.Struct(f"<{rank}QIQ")
        *sides, kind, offset = layout.unpack(cursor.take(layout.size, what))
        if any(side > MAX_SIDE for side in sides):
            raise cursor.refuse(f"tensor {name!r} claims shape {sides[::-1]}")
        rows[name] = (tuple(reversed(sides)), kind, offset)
    return rows


def _shape(cursor: _Cursor, name: str, row: Row, fields: Mapping[str, object]) -> tuple[int, ...]:
    """The shape that the numbers have: as stored, or what a field says it was before."""
    stored, original = row[0], fields.get(SHAPE_KEY + name)
    if original is None:
        return stored
    if not isinstance(original, tuple) or len(original) > MAX_RANK:
        raise cursor.refuse(f"the original shape of tensor {name!r} is not a list of up to {MAX_RANK} sides")
    sides = [side for side in original if type(side) is int and 0 <= side <= MAX_SIDE]
    if len(sides) < len(original) or math.prod(sides) != math.prod(stored):
        raise cursor.refuse(f"the original shape {list(original)} of tensor {name!r} does not fit {list(stored)}")
    return tuple(sides)


def _entry(cursor: _Cursor, name: str, row: Row, shape: tuple[int, ...], room: int, alignment: int) -> TensorEntry:
    """Check one tensor against its type and against the room that the file has for tensors."""
    stored, kind, start = row
    if kind not in TYPES:
        raise FileError(
            f"{cursor.name}: tensor {name!r} is of ggml type {kind}, which this version does not know; "
            "choose a release in another type, as Q8_0 or Q4_K"
        )
    block = BLOCKS[TYPES[kind]]
    width = stored[-1] if stored else 1
    if width % block.values:
        raise cursor.refuse(
            f"tensor {name!r} has rows of {width} numbers, not a multiple of {TYPES[kind]}'s {block.values}"
        )
    end = start + math.prod(stored) // block.values * block.bytes
    if end > room:
        raise FileError(f"{cursor.name} is cut off: tensor {name!r} ends at byte {end} of {room}; download it again")
    if start % alignment:
        raise cursor.refuse(f"tensor {name!r} begins at byte {start}, not at a multiple of {alignment}")
    if not (can_be_a_shape(shape) and can_be_a_shape(stored)):
        raise cursor.refuse(f"tensor {name!r} claims shape {list(shape)}")
    return TensorEntry(TYPES[kind], shape, start, end)
