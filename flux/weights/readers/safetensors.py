"""A safetensors file by its header: what is in it, and any tensor's bytes when they are wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import FileError
from .header import SafetensorsHeader, TensorEntry, fill

__all__ = ["DTYPES", "SafetensorsFile", "TensorEntry"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsFile(SafetensorsHeader):
    """The entries of a file by name; ``read`` brings one tensor's numbers."""

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in its stored format.

        Raises:
            FileError: The format is not read here, or the file changed since it was opened.
        """
        entry = self[name]
        if entry.dtype not in DTYPES:
            raise FileError(
                f"{self.path.name}: tensor {name} is stored as {entry.dtype}, which this version does not read; "
                "use the model's bf16 release"
            )
        buffer = bytearray(entry.end - entry.start)
        fill(self.path, buffer, self.data_start + entry.start, f"tensor {name}")
        dtype = DTYPES[entry.dtype]
        if not buffer:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).view(entry.shape)
