"""Files of any storage format, written by the formats' own libraries (safetensors, gguf)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux.weights.formats.base import DATA
from flux.weights.formats.naming import comfy_quant, companion_names
from flux.weights.formats.written import GGUF, WRITTEN

__all__ = ["parts_as", "suffix_of", "write_stored"]


def suffix_of(kind: str) -> str:
    """The file suffix that a written format goes with."""
    return ".gguf" if kind.startswith(GGUF) else ".safetensors"


def write_stored(path: Path, tensors: Mapping[str, Tensor], kind: str) -> Path:
    """Write matrices as ``kind`` (a key of ``WRITTEN``) where it suits them, and the rest in fp32."""
    return _write_gguf(path, tensors, kind) if kind.startswith(GGUF) else _write_safetensors(path, tensors, kind)


def parts_as(name: str, numbers: Tensor, kind: str) -> dict[str, Tensor]:
    """The stored tensors of one tensor of numbers, by their names in a safetensors file."""
    row = WRITTEN[kind]
    if not row.suits(tuple(numbers.shape)) or not name.endswith(".weight"):
        return {name: numbers}
    parts = row.encode(numbers)
    stored = {companion_names(name, row.row, parts)[role]: part for role, part in parts.items()}
    marker = comfy_quant(row.row)
    return stored if marker is None else {**stored, f"{name.removesuffix('.weight')}.comfy_quant": marker}


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], kind: str) -> Path:
    stored: dict[str, Tensor] = {}
    for name, numbers in tensors.items():
        stored |= parts_as(name, numbers, kind)
    save_file({name: part.contiguous() for name, part in stored.items()}, path)
    return path


def _write_gguf(path: Path, tensors: Mapping[str, Tensor], kind: str) -> Path:
    writer = gguf.GGUFWriter(str(path), "flux")
    for name, numbers in tensors.items():
        row = WRITTEN[kind] if WRITTEN[kind].suits(tuple(numbers.shape)) else WRITTEN["gguf:F32"]
        data = row.encode(numbers)[DATA]
        kept = gguf.GGMLQuantizationType[row.row.name]
        if data.dtype == torch.uint8:
            data = data.view(*numbers.shape[:-1], -1)
            writer.add_tensor(name, data.numpy(), raw_dtype=kept)
        elif data.dtype == torch.bfloat16:
            writer.add_tensor(name, data.view(torch.uint8).view(*numbers.shape[:-1], -1).numpy(), raw_dtype=kept)
        else:
            writer.add_tensor(name, data.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
