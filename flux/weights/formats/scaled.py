"""fp8 and int8 with one scale for a tensor or one for each row: W = q · scale.

Companions come in two key styles, see ``companions``. ComfyUI's int8 may be rotated besides ("ConvRot"): W · H is
stored in place of W, where H turns every group of 4^m columns by a normalised Hadamard matrix: the m-fold Kronecker
product of the regular one of order 4, whose row i is 1 but for -1 at 3 - i. H is symmetric and its own inverse. The
source is comfy-kitchen 0.2.40, Apache 2.0 (``tensor/int8_utils.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .base import DATA, Decode, Format, Parts, Product
from .chunks import cast, in_chunks, scale_runs
from .floats import E4M3, E4M3_MAX, E5M2, magnitude, pick_rows, require_finite, take_rows, widen_fp8
from .products import fp8_product
from .roles import SCALE

__all__ = [
    "FP8_E4M3FN_SCALED",
    "FP8_E5M2_PER_ROW",
    "FP8_E5M2_SCALED",
    "FP8_PER_ROW",
    "INT8",
    "INT8_PER_ROW",
    "SCALE",
    "encode_fp8",
    "encode_int8",
    "in_slabs",
    "int8_rotated",
    "is_rotation_group",
]

INT8_MAX = 127.0
ROTATION_BASE = 4
LARGEST_ROTATION = 4096  # columns in a group
SLAB = 1 << 20  # numbers that an encoder holds in fp32 at a time


def _scales(parts: Parts) -> Tensor:
    return parts[SCALE].reshape(-1).float()


def _row_length(shape: tuple[int, ...], data: Tensor) -> int:
    return max(1, data.numel() // max(1, shape[0])) if shape else 1


def _decode_fp8(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, *, kind: torch.dtype) -> Tensor:
    data = parts[DATA]
    return widen_fp8(data, kind, dtype, _scales(parts), _row_length(shape, data)).view(shape)


def _decode_int8(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    data = parts[DATA]
    if data.device.type != "cpu":
        return _on_device(parts, shape, dtype)
    numbers = scale_runs(cast(data, torch.float32).view(-1), _scales(parts), _row_length(shape, data))
    return cast(numbers, dtype).view(shape)


def _on_device(
    parts: Parts,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    then: Callable[[Tensor], Tensor] = lambda numbers: numbers,
) -> Tensor:
    """Whole numbers times their scales, chunk by chunk; see ``in_chunks``."""
    codes = parts[DATA].reshape(-1)
    out = torch.empty(codes.numel(), dtype=dtype, device=codes.device)

    def numbers(start: int, stop: int) -> Tensor:
        return codes[start:stop].float()

    return in_chunks(numbers, out, _scales(parts), _row_length(shape, codes), then).view(shape)


def _decode_rotated(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, *, group: int) -> Tensor:
    if parts[DATA].device.type != "cpu":
        return _on_device(parts, shape, dtype, partial(_rotate, group=group))
    return _rotate(_decode_int8(parts, shape, torch.float32), group).to(dtype)


def _rotate(numbers: Tensor, group: int) -> Tensor:
    """Every ``group`` columns of fp32 ``numbers`` (N, K) times H."""
    # H acts on the base-4 digits of a column's number one by one: half of (the sum, less twice the mirrored one).
    # A matrix product would do too, but a GPU may round its factors to TF32.
    shape, inner = numbers.shape, 1
    while inner < group:
        digits = numbers.view(-1, ROTATION_BASE, inner)
        numbers = digits.flip(1).mul_(-2).add_(digits.sum(1, keepdim=True)).mul_(0.5)
        inner *= ROTATION_BASE
    return numbers.view(shape)


def is_rotation_group(group: int, columns: int) -> bool:
    """Whether ``columns`` can have been rotated in groups of this many: a power of 4 that divides them."""
    powers = {ROTATION_BASE**m for m in range(1, LARGEST_ROTATION.bit_length() // 2 + 1)}
    return group in powers and columns % group == 0


def _pick_rows_and_scales(parts: Parts, shape: tuple[int, ...], places: Tensor) -> dict[str, Tensor]:
    return {**pick_rows(parts, shape, places), SCALE: take_rows(parts[SCALE], places)}


def _scaled(name: str, decode: Decode, *, per_row: bool = False, product: Product | None = None) -> Format:
    rows = _pick_rows_and_scales if per_row else pick_rows
    return Format(name=name, bits=8, decode=decode, companions=(SCALE,), rows=rows, product=product)


FP8_E4M3FN_SCALED = _scaled("fp8_e4m3fn scaled", partial(_decode_fp8, kind=E4M3), product=fp8_product)
FP8_E5M2_SCALED = _scaled("fp8_e5m2 scaled", partial(_decode_fp8, kind=E5M2), product=fp8_product)
FP8_PER_ROW = _scaled("fp8 per row", partial(_decode_fp8, kind=E4M3), per_row=True, product=fp8_product)
FP8_E5M2_PER_ROW = _scaled("fp8_e5m2 per row", partial(_decode_fp8, kind=E5M2), per_row=True, product=fp8_product)
INT8 = _scaled("int8", _decode_int8)
INT8_PER_ROW = _scaled("int8 per row", _decode_int8, per_row=True)


@functools.cache
def int8_rotated(group: int) -> Format:
    """int8 whose columns were rotated in groups of ``group`` (see ``is_rotation_group``)."""
    decode = partial(_decode_rotated, group=group)
    return Format(name=f"int8 rotated by {group}", bits=8, decode=decode, companions=(SCALE,))


def encode_fp8(numbers: Tensor, per_row: bool) -> dict[str, Tensor]:
    """Numbers (N, ...) as e4m3fn, scaled so that the largest becomes 448.

    Args:
        numbers: Any floating-point type.
        per_row: A scale for each row instead of one for the tensor.

    Returns:
        The fp8 numbers, and ``SCALE`` fp32: () or (N,).

    Raises:
        UserError: A number is not finite.
    """
    rows, scale = _rows_and_scale(numbers, E4M3_MAX, per_row)

    def encode(slab: Tensor, scales: Tensor) -> Tensor:
        return (slab / scales).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)

    codes = in_slabs(rows, scale.expand(len(rows), 1), encode)
    return {DATA: codes.view(numbers.shape), SCALE: scale.reshape(-1) if per_row else scale.reshape(())}


def encode_int8(numbers: Tensor, per_row: bool) -> dict[str, Tensor]:
    """Numbers (N, ...) as int8, scaled so that the largest becomes 127.

    Args:
        numbers: Any floating-point type.
        per_row: A scale for each row instead of one for the tensor.

    Returns:
        The int8 numbers, and ``SCALE`` fp32: () or (N, 1), as ComfyUI has them.

    Raises:
        UserError: A number is not finite.
    """
    rows, scale = _rows_and_scale(numbers, INT8_MAX, per_row)

    def encode(slab: Tensor, scales: Tensor) -> Tensor:
        return (slab / scales).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)

    codes = in_slabs(rows, scale.expand(len(rows), 1), encode)
    return {DATA: codes.view(numbers.shape), SCALE: scale if per_row else scale.reshape(())}


def _rows_and_scale(numbers: Tensor, largest: float, per_row: bool) -> tuple[Tensor, Tensor]:
    """The numbers as rows (N, K), and scales (N, 1) or (1, 1) that take the largest to ``largest``; 1 for zeros."""
    rows = numbers.reshape(len(numbers), -1) if numbers.dim() > 1 else numbers.reshape(1, -1)
    if per_row and numbers.dim() < 2:
        rows = numbers.reshape(-1, 1)
    if not rows.numel():
        return rows, torch.ones(len(rows) if per_row else 1, 1)
    amax = require_finite(magnitude(rows, 1)).float().view(-1, 1)
    if not per_row:
        amax = amax.amax(0, keepdim=True)
    scale = amax / largest
    return rows, torch.where(scale > 0, scale, torch.ones_like(scale))


def in_slabs(rows: Tensor, scales: Tensor, encode: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``encode(rows in fp32, their scales)`` some rows at a time, so that fp32 is never held for a whole tensor."""
    step = max(1, SLAB // max(1, rows.shape[1]))
    first = encode(rows[:step].float(), scales[:step])
    coded = first.new_empty((len(rows), *first.shape[1:]))
    coded[:step] = first
    for at in range(step, len(rows), step):
        coded[at : at + step] = encode(rows[at : at + step].float(), scales[at : at + step])
    return coded
