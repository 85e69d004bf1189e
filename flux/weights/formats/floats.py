"""Plain numbers: what safetensors calls F32, F16, BF16, F64, the two fp8 types, and whole numbers.

fp8 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"): e4m3fn has no infinities, ±448 at most, NaN is 0x7F and
0xFF; e5m2 is the upper half of an fp16. Apple's GPUs have neither fp8 nor fp64: ``for_device`` says what tensors travel
as there, and every decoder here takes fp8 as bytes too.
"""

from __future__ import annotations

import functools
import math
from functools import partial

import torch
from torch import Tensor

from ...errors import UserError
from ...ops.devices import type_of
from ...ops.dtypes import ONE_BYTE_FLOATS, WITHOUT_FP8, held_as
from .base import DATA, Format, Parts
from .chunks import BYTE_VALUES, as_bytes, cast, in_chunks, look_up

__all__ = [
    "BF16",
    "F16",
    "F32",
    "F64",
    "FLOATS",
    "FP8_E4M3FN",
    "FP8_E5M2",
    "PLAIN",
    "encode_bf16",
    "encode_fp16",
    "for_device",
    "fp8_table",
    "magnitude",
    "pick_rows",
    "require_finite",
    "take_rows",
    "widen_fp8",
]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E4M3_MAX = 448.0
EXACT = frozenset({torch.float32, torch.bfloat16, torch.float16})  # have every number of either fp8 type
BY_TABLE = WITHOUT_FP8 | {"cpu"}  # where a look-up beats torch's own cast, or is the only way


def for_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A stored tensor as ``device`` can hold it, not moved yet: on Apple's GPUs fp8 as bytes, and fp64 as fp32."""
    if device.type not in WITHOUT_FP8:
        return tensor
    if held_as(tensor.dtype, device) != tensor.dtype:
        return as_bytes(tensor)
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def fp8_table(kind: torch.dtype, device: torch.device) -> Tensor:
    """The numbers that the 256 bytes of an fp8 type stand for, fp32 (256, 1)."""
    return _fp8_table(kind, str(device))


@functools.cache
def _fp8_table(kind: torch.dtype, device: str) -> Tensor:
    with torch.inference_mode(False):  # a cached tensor outlives the mode in which it was asked for
        return torch.arange(BYTE_VALUES, dtype=torch.uint8).view(kind).float().view(-1, 1).to(device)


def widen_fp8(
    data: Tensor, kind: torch.dtype, dtype: torch.dtype, scales: Tensor | None = None, run: int | None = None
) -> Tensor:
    """fp8 numbers times the scales of their runs.

    Args:
        data: fp8, or its bytes (n in all).
        kind: Which fp8 type it is.
        dtype: Type of the result; products are made in fp32 and rounded once.
        scales: fp32, one for each run or a single one for all; None for 1.
        run: Consecutive numbers that share a scale.

    Returns:
        Numbers (n,) of ``dtype``.
    """
    codes = as_bytes(data)
    if type_of(data.device) in BY_TABLE:
        return look_up(codes, fp8_table(kind, data.device), dtype, scales, run)
    numbers = codes.view(kind).reshape(-1)
    if scales is None and dtype in EXACT:
        return numbers.to(dtype)
    out = torch.empty(numbers.shape, dtype=dtype, device=numbers.device)
    return in_chunks(lambda start, stop: numbers[start:stop].float(), out, scales, run)


def _decode_plain(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return cast(parts[DATA], dtype).view(shape)


def _decode_fp8(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, *, kind: torch.dtype) -> Tensor:
    return widen_fp8(parts[DATA], kind, dtype).view(shape)


def pick_rows(parts: Parts, shape: tuple[int, ...], places: Tensor) -> dict[str, Tensor]:
    """Rows whose numbers stand by themselves; companions are for the whole tensor."""
    del shape
    return {**parts, DATA: take_rows(parts[DATA], places)}


def take_rows(data: Tensor, places: Tensor) -> Tensor:
    """Some rows of a stored tensor; torch does not gather fp8, so that it is gathered as bytes."""
    if data.dtype in ONE_BYTE_FLOATS:
        return as_bytes(data)[places].view(data.dtype)
    return data[places]


F32 = Format(name="F32", bits=32, decode=_decode_plain, rows=pick_rows)
F16 = Format(name="F16", bits=16, decode=_decode_plain, rows=pick_rows)
BF16 = Format(name="BF16", bits=16, decode=_decode_plain, rows=pick_rows)
F64 = Format(name="F64", bits=64, decode=_decode_plain, rows=pick_rows)
FP8_E4M3FN = Format(name="fp8_e4m3fn", bits=8, decode=partial(_decode_fp8, kind=E4M3), rows=pick_rows)
FP8_E5M2 = Format(name="fp8_e5m2", bits=8, decode=partial(_decode_fp8, kind=E5M2), rows=pick_rows)

WHOLE_BITS = {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}  # position ids, tokenizers, switches

FLOATS: dict[str, Format] = {
    "F32": F32,
    "F16": F16,
    "BF16": BF16,
    "F64": F64,
    "F8_E4M3": FP8_E4M3FN,
    "F8_E5M2": FP8_E5M2,
}
"""The format of floating-point numbers without companions, by their dtype in the header."""

PLAIN: dict[str, Format] = {
    **FLOATS,
    **{name: Format(name=name, bits=bits, decode=_decode_plain) for name, bits in WHOLE_BITS.items()},
}
"""The same for all numbers without companions."""


def magnitude(numbers: Tensor, dim: int | None = None) -> Tensor:
    """The largest magnitude, of all or along a dimension; NaN where there is one. Nothing of the tensor is copied."""
    low, high = numbers.aminmax() if dim is None else numbers.aminmax(dim=dim)
    return torch.maximum(high, -low)


def require_finite(numbers: Tensor) -> Tensor:
    """The numbers themselves.

    Raises:
        UserError: There are NaNs or infinities among them, which no format is to carry on.
    """
    if numbers.numel() and not math.isfinite(magnitude(numbers).item()):
        raise UserError("the tensor has numbers that are not finite, so the file is damaged; use another copy of it")
    return numbers


def encode_bf16(numbers: Tensor) -> dict[str, Tensor]:
    """Numbers of any shape as bf16.

    Raises:
        UserError: A number is not finite, or too large for bf16.
    """
    return {DATA: _narrow(numbers, torch.bfloat16)}


def encode_fp16(numbers: Tensor) -> dict[str, Tensor]:
    """Numbers of any shape as fp16.

    Raises:
        UserError: A number is not finite, or beyond fp16's 65504.
    """
    return {DATA: _narrow(numbers, torch.float16)}


def _narrow(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    narrowed = require_finite(numbers).to(dtype)
    if narrowed.numel() and not math.isfinite(magnitude(narrowed).item()):
        found, name = magnitude(numbers).item(), str(dtype).removeprefix("torch.")
        raise UserError(f"{name} ends at {torch.finfo(dtype).max:g}, but the tensor has {found:g}; choose another type")
    return narrowed
