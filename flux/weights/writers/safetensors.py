"""A safetensors file, tensor by tensor: no more of it is in memory than the tensor at hand.

The header stands in front of the tensors and tells their sizes, which are known only when all of them are encoded. So
room is kept for it, by the names that may come, and what is not needed is filled with spaces, as the format allows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import MismatchError
from ..readers.header import ITEM_BITS, LENGTH_BYTES, MAX_HEADER_BYTES, MAX_NUMBERS, MAX_RANK, METADATA
from ..readers.safetensors import DTYPES
from .whole import WholeFile, tensor_bytes

__all__ = ["SafetensorsWriter"]

NAMES: dict[torch.dtype, str] = {
    **{dtype: name for name, dtype in DTYPES.items()},
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.complex64: "C64",
}
ALIGNMENT = 8  # bytes, the widest item
MOST_HELD = 8 << 20  # bytes of tensors that wait for the end; of one model's markers and scalars there are some 100 KB

FARTHEST = MAX_NUMBERS  # an offset that no file reaches
WIDEST_DTYPE = max(ITEM_BITS, key=len)
WIDEST_SHAPE = (FARTHEST, *(1,) * (MAX_RANK - 1))  # no shape of as many numbers takes more digits
AROUND, BETWEEN = len("{}"), len(",")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Held:
    """A tensor that waits for the end."""

    item: int  # bytes of a number
    name: str
    dtype: str
    shape: Shape
    data: bytes


class SafetensorsWriter(WholeFile):
    """Writes a file in a ``with`` statement: a temporary one, which at the end gets the target's name.

    Tensors lie in the order in which they are added, but those that would leave the next one unaligned (an odd number
    of bytes: markers, scalars) come last, from the widest numbers to the narrowest, so that all are aligned.

    Args:
        path: The target.
        names: Of all tensors that may come, companions included; more than do come are no harm.
        metadata: The header's own texts.
        replace: Whether an older file of that name may be replaced.

    Raises:
        UserError: The target is a folder, in no folder or there already, or cannot be written.
        MismatchError: There are too many names for one file, or one that cannot stand in it.
    """

    def __init__(
        self, path: Path, names: Iterable[str], metadata: Mapping[str, str] | None = None, *, replace: bool = False
    ) -> None:
        super().__init__(path, replace=replace)
        self._entries = [self._utf8(f"{_text(METADATA)}:{_text(dict(metadata))}")] if metadata else []
        needed = sum(self._cost(name, WIDEST_DTYPE, WIDEST_SHAPE) for name in names)
        taken = AROUND + sum(len(entry) + BETWEEN for entry in self._entries)
        self._room = -(-(taken + needed) // ALIGNMENT) * ALIGNMENT
        if self._room > MAX_HEADER_BYTES:
            raise MismatchError(
                f"{path.name} would need {self._room} bytes for its header, {MAX_HEADER_BYTES} are allowed; "
                "store fewer tensors in one file"
            )
        self._left = self._room - taken
        self._names: set[str] = set()
        self._held: list[_Held] = []
        self._held_bytes = 0
        self._end = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, of any shape and any type that safetensors has, on any device.

        Raises:
            MismatchError: The name is there already or is beyond what room was kept for, or safetensors has no such
                type or so many dimensions.
            UserError: The disk takes no more.
        """
        self._open_file()
        dtype, shape = NAMES.get(tensor.dtype), tuple(tensor.shape)
        if dtype is None or len(shape) > MAX_RANK:
            raise MismatchError(
                f"{self.path.name}: tensor {name!r} is {tensor.dtype} with {len(shape)} dimensions, which safetensors "
                f"does not hold; make it one of {', '.join(NAMES.values())} with at most {MAX_RANK}"
            )
        self._claim(name, dtype, shape)
        data = tensor_bytes(tensor)
        if data.nbytes % ALIGNMENT and self._held_bytes + data.nbytes <= MOST_HELD:
            self._held.append(_Held(tensor.element_size(), name, dtype, shape, bytes(data)))
            self._held_bytes += data.nbytes
        else:
            self._put(name, dtype, shape, data)

    def _claim(self, name: str, dtype: str, shape: Shape) -> None:
        """Take a name, and what room it needs in the header."""
        self._check_name(name)
        if name in self._names or name == METADATA:
            raise MismatchError(f"{self.path.name}: there is a tensor {name!r} already; give this one another name")
        cost = self._cost(name, dtype, shape)
        if cost > self._left:
            raise MismatchError(
                f"{self.path.name}: no room was kept in the header for tensor {name!r}; name all tensors beforehand"
            )
        self._names.add(name)
        self._left -= cost

    def _cost(self, name: str, dtype: str, shape: Shape) -> int:
        """The most bytes that an entry takes."""
        return len(self._utf8(_entry(name, dtype, shape, FARTHEST, FARTHEST))) + BETWEEN

    def _put(self, name: str, dtype: str, shape: Shape, data: bytes | memoryview) -> None:
        start, self._end = self._end, self._end + len(data)
        self._write(data)
        self._entries.append(self._utf8(_entry(name, dtype, shape, start, self._end)))

    def _begin(self) -> None:
        self._write(self._room.to_bytes(LENGTH_BYTES, "little") + bytes(self._room))

    def _finish(self) -> None:
        for held in sorted(self._held, key=lambda held: -held.item):
            self._put(held.name, held.dtype, held.shape, held.data)
        header = b"{" + b",".join(self._entries) + b"}"
        assert len(header) <= self._room
        self._write_at(LENGTH_BYTES, header.ljust(self._room))


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _entry(name: str, dtype: str, shape: Shape, start: int, end: int) -> str:
    return f"{_text(name)}:{_text({'dtype': dtype, 'shape': shape, 'data_offsets': (start, end)})}"
