"""A safetensors file by its header: what is in it, and any tensor's bytes when they are wanted."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...errors import FileError
from .file_bytes import FileBytes, MappedTensors
from .header import SafetensorsHeader, TensorEntry, fill

__all__ = ["DTYPES", "SafetensorsFile", "TensorEntry"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsFile(SafetensorsHeader, MappedTensors):
    """The entries of a file by name; ``stored`` and ``read`` bring one tensor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._bytes = FileBytes(path, stamp=self.stamp)

    def stored(self, name: str) -> Tensor:
        """One tensor on the CPU, in its stored format; mostly a view of the mapped file, never to be written to.

        Raises:
            FileError: The format is not read here, or the file changed since it was opened.
        """
        return self._flat(name, self._dtype(name)).view(self[name].shape)

    def outline(self, name: str) -> Tensor:
        """What ``stored`` gives, on the meta device: by the header alone."""
        return torch.empty(self[name].shape, dtype=self._dtype(name), device="meta")

    def read(self, name: str) -> Tensor:
        """A copy of one tensor on the CPU, in its stored format; see ``stored``."""
        entry, dtype = self[name], self._dtype(name)
        buffer = bytearray(entry.end - entry.start)
        fill(self.path, buffer, self.data_start + entry.start, f"tensor {name}")
        if not buffer:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).view(entry.shape)

    def _dtype(self, name: str) -> torch.dtype:
        stored = self[name].dtype
        if stored not in DTYPES:
            raise FileError(
                f"{self.path.name}: tensor {name} is stored as {stored}, which this version does not read; "
                "use the model's bf16 release"
            )
        return DTYPES[stored]
