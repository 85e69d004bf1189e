"""A GGUF file, tensor by tensor: no more of it is in memory than the tensor at hand.

Names, types and shapes are known ahead, so the header is written first and whole; its layout is told in the reader.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import MismatchError
from ..formats.gguf_blocks import BLOCKS
from ..readers.gguf import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    ITEMS,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_RANK,
    PLAIN_DTYPES,
    STRING,
    U32,
    U64,
    VERSIONS,
)
from ..readers.header import TensorEntry
from .whole import WholeFile, tensor_bytes

__all__ = ["GgufWriter"]

U32_KIND, I32_KIND, F32_KIND, BOOL_KIND, U64_KIND, I64_KIND = 4, 5, 6, 7, 10, 11  # value types by GGUF's number
WHOLE_KINDS = (U32_KIND, I32_KIND, U64_KIND, I64_KIND)  # the first that holds a number is taken
U32_KEYS = frozenset({"general.file_type", "general.quantization_version", ALIGNMENT_KEY})  # read as u32 by llama.cpp
SCALAR_TYPES = frozenset(PLAIN_DTYPES) - {"BF16"}  # which the gguf package reads as blocks, and wants rows of

Field = str | int | float | bool
Shape = tuple[int, ...]
Planned = tuple[str, Shape]  # a type and a shape


class GgufWriter(WholeFile):
    """Writes a file in a ``with`` statement: a temporary one, which at the end gets the target's name.

    Args:
        path: The target.
        fields: The header's fields. Numbers with a fraction become f32, whole ones u32 where they fit, as llama.cpp
            reads them, else i32, u64 or i64. ``general.alignment`` is heeded, 32 without it.
        tensors: The type (a key of ``BLOCKS``) and the shape, in torch's order, of every tensor by name, in the order
            in which they will come.
        replace: Whether an older file of that name may be replaced.

    Raises:
        UserError: The target is a folder, in no folder or there already, or cannot be written.
        MismatchError: A field, name, type or shape that GGUF cannot hold; at the end, a tensor that did not come.
    """

    def __init__(
        self, path: Path, fields: Mapping[str, Field], tensors: Mapping[str, Planned], *, replace: bool = False
    ) -> None:
        super().__init__(path, replace=replace)
        self._alignment = self._checked_alignment(fields.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT))
        self._entries: dict[str, TensorEntry] = {}
        end = 0
        for name, (kind, shape) in tensors.items():
            start = self._aligned(end)
            end = start + self._nbytes(name, kind, shape)
            self._entries[name] = TensorEntry(kind, tuple(shape), start, end)
        self._header = self._joined([self._field(key, value) for key, value in fields.items()])
        self._coming = list(reversed(self._entries))  # the next one last

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Args:
            name: The next one of ``tensors``.
            tensor: Plain numbers in their type and shape; of a block format its bytes, uint8 of any shape. On any
                device.

        Raises:
            MismatchError: It is not the next one, or not what was said of it beforehand.
            UserError: The disk takes no more.
        """
        self._open_file()
        if not self._coming or name != self._coming[-1]:
            due = f"{self._coming[-1]!r} is the next one" if self._coming else "all have come"
            raise MismatchError(f"{self.path.name}: tensor {name!r} came, but {due}; keep to the order given before")
        self._check(name, tensor)
        self._coming.pop()
        data = tensor_bytes(tensor)
        self._write(data)
        self._write(bytes(-len(data) % self._alignment))

    def _check(self, name: str, tensor: Tensor) -> None:
        """Refuse a tensor that is not what its entry says."""
        entry = self._entries[name]
        plain, length = PLAIN_DTYPES.get(entry.dtype), entry.end - entry.start
        if plain is None:
            fits, needed = tensor.dtype == torch.uint8 and tensor.numel() == length, f"{length} bytes (uint8)"
        else:
            fits, needed = tensor.dtype == plain and tuple(tensor.shape) == entry.shape, f"{plain} {list(entry.shape)}"
        if not fits:
            raise MismatchError(
                f"{self.path.name}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, but {entry.dtype} "
                f"{list(entry.shape)} was said of it beforehand, which takes {needed}; encode it as that"
            )

    def _begin(self) -> None:
        self._write(self._header)

    def _finish(self) -> None:
        if self._coming:
            count, first = len(self._coming), self._coming[-1]
            raise MismatchError(f"{self.path.name}: {count} tensors did not come, the first is {first!r}; add them")

    def _aligned(self, position: int) -> int:
        return -(-position // self._alignment) * self._alignment

    def _checked_alignment(self, value: Field) -> int:
        if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            raise MismatchError(f"{self.path.name}: {ALIGNMENT_KEY} is {value!r}; choose a power of two, as 32")
        return value

    def _nbytes(self, name: str, kind: str, shape: Shape) -> int:
        """Bytes that a tensor takes, checked to be one that GGUF can hold."""
        if kind not in BLOCKS:
            raise MismatchError(f"{self.path.name}: {kind!r} is no ggml type; choose one of {', '.join(BLOCKS)}")
        if len(shape) > MAX_RANK:
            raise MismatchError(
                f"{self.path.name}: tensor {name!r} has {len(shape)} dimensions, and GGUF holds {MAX_RANK} at most; "
                "store this model as safetensors"
            )
        block = BLOCKS[kind]
        if not shape and kind not in SCALAR_TYPES:
            raise MismatchError(f"{self.path.name}: tensor {name!r} is a single number, not of {kind}; store it as F32")
        if shape and shape[-1] % block.values:
            raise MismatchError(
                f"{self.path.name}: rows of tensor {name!r}, {list(shape)}, do not divide into {kind}'s blocks of "
                f"{block.values} numbers; store it in another type"
            )
        return math.prod(shape) // block.values * block.bytes

    def _joined(self, fields: list[bytes]) -> bytes:
        """The header, up to where the tensors' bytes begin."""
        start = MAGIC + U32.pack(max(VERSIONS)) + U64.pack(len(self._entries)) + U64.pack(len(fields))
        rows = [self._row(name, entry) for name, entry in self._entries.items()]
        header = b"".join((start, *fields, *rows))
        return header.ljust(self._aligned(len(header)), b"\0")

    def _row(self, name: str, entry: TensorEntry) -> bytes:
        """A tensor's entry: its name, sides from the innermost out, type and offset."""
        sides = entry.shape[::-1]
        layout = struct.Struct(f"<I{len(sides)}QIQ")
        return self._name(name) + layout.pack(len(sides), *sides, BLOCKS[entry.dtype].code, entry.start)

    def _field(self, key: str, value: Field) -> bytes:
        kind, data = self._value(key, value)
        return self._name(key) + U32.pack(kind) + data

    def _value(self, key: str, value: Field) -> tuple[int, bytes]:
        """A field's type by GGUF's number, and its bytes."""
        if key in U32_KEYS:
            kinds: tuple[int, ...] = (U32_KIND,)
        elif isinstance(value, str):
            return STRING, self._string(value)
        elif isinstance(value, bool):
            kinds = (BOOL_KIND,)
        else:
            kinds = WHOLE_KINDS if isinstance(value, int) else (F32_KIND,)
        for kind in kinds:
            with contextlib.suppress(struct.error, OverflowError):
                return kind, ITEMS[kind].pack(value)
        raise MismatchError(f"{self.path.name}: GGUF cannot hold {value!r} for the field {key!r}; choose another value")

    def _name(self, name: str) -> bytes:
        self._check_name(name)
        return self._string(name)

    def _string(self, text: str) -> bytes:
        data = self._utf8(text)
        return U64.pack(len(data)) + data
