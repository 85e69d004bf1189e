"""Blocks along a row that share a small scale: nvfp4 in both dialects, and mxfp8.

nvfp4 holds E2M1 numbers (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) two to a byte, an e4m3 scale for 16 of them,
and an fp32 scale for the tensor: W = E2M1 · block scale · tensor scale. ComfyUI (and BFL's FLUX.2 files) put the even
element in the high half of a byte and the block scales in cuBLAS's blocked layout; ModelOpt (and BFL's FLUX.3 files)
put it in the low half and the scales in rows. mxfp8 holds e4m3 numbers and a power of two for 32 of them, blocked.

Blocked layout (cuBLAS, "1D block scaling factors layout"): the scales [rows, columns] are cut in tiles of 128 × 4,
tiles row by row; in a tile's 512 bytes, (r, c) stands at (r mod 32) · 16 + ⌊r / 32⌋ · 4 + c. Padding is 0.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import DATA, Format, Parts
from .chunks import BYTE_VALUES, as_bytes, look_up
from .floats import E4M3, E4M3_MAX, magnitude, require_finite, widen_fp8
from .products import kitchen, mxfp8_product, nvfp4_product
from .roles import BLOCK_EXPONENT, BLOCK_SCALE, PRE_QUANT_SCALE, TENSOR_SCALE
from .scaled import in_slabs

__all__ = [
    "BLOCK_EXPONENT",
    "BLOCK_SCALE",
    "MXFP8",
    "MXFP8_BLOCK",
    "NVFP4",
    "NVFP4_BLOCK",
    "NVFP4_LINEAR",
    "PRE_QUANT_SCALE",
    "TENSOR_SCALE",
    "blocked_shape",
    "encode_mxfp8",
    "encode_nvfp4",
    "from_blocked",
    "to_blocked",
]

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
SIGN = 8  # the sign's bit in a four-bit code
# A number midway between two magnitudes goes to the one with the even code: at codes 1, 3, 5 that is upwards.
UPWARD_TIES = (1, 3, 5)

NVFP4_BLOCK, NVFP4_PAD = 16, 16  # ComfyUI pads rows and columns to multiples
MXFP8_BLOCK, MXFP8_PAD = 32, 32
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE_ROWS, TILE_COLUMNS, TILE_GROUP = 128, 4, 32
E8M0_BIAS, E8M0_NAN = 127, 255


def blocked_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of a blocked matrix of scales."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def to_blocked(scales: Tensor) -> Tensor:
    """Scales (rows, columns) of one byte each in the blocked layout, padded with zeros to ``blocked_shape``."""
    rows, columns = scales.shape
    full_rows, full_columns = blocked_shape(rows, columns)
    padded = F.pad(scales.view(torch.uint8), (0, full_columns - columns, 0, full_rows - rows))
    tiles = padded.view(-1, TILE_ROWS // TILE_GROUP, TILE_GROUP, full_columns // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(full_rows, full_columns).view(scales.dtype)


def from_blocked(blocked: Tensor, rows: int, columns: int) -> Tensor:
    """Scales (rows, columns) out of the blocked layout: ``to_blocked`` undone, on bytes."""
    full_rows, full_columns = blocked_shape(rows, columns)
    tiles = as_bytes(blocked).view(-1, full_columns // TILE_COLUMNS, TILE_GROUP, TILE_ROWS // TILE_GROUP, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(full_rows, full_columns)[:rows, :columns]


@functools.cache
def _pairs(high_first: bool, device: str) -> Tensor:
    """What a byte of two E2M1 codes stands for, fp32 (256, 2)."""
    with torch.inference_mode(False):
        values = torch.tensor((*MAGNITUDES, *(-value for value in MAGNITUDES)))
        codes = torch.arange(BYTE_VALUES)
        halves = (codes >> 4, codes & 15) if high_first else (codes & 15, codes >> 4)
        return torch.stack([values[half] for half in halves], dim=1).to(device)


@functools.cache
def _powers(device: str) -> Tensor:
    """What an e8m0 byte stands for, fp32 (256, 1)."""
    with torch.inference_mode(False):
        powers = [2.0 ** (byte - E8M0_BIAS) for byte in range(E8M0_NAN)]
        return torch.tensor([*powers, math.nan]).view(-1, 1).to(device)


def _by_kernel(parts: Parts, wanted: torch.dtype) -> ModuleType | None:
    """comfy-kitchen, where it is installed and the numbers are on a CUDA device in a type that it writes."""
    return kitchen() if parts[DATA].is_cuda and wanted in KERNEL_DTYPES else None


def _kernel_nvfp4(kernels: ModuleType, parts: Parts, dtype: torch.dtype) -> Tensor:
    """nvfp4 in ComfyUI's dialect, padding included, by comfy-kitchen."""
    scales = parts[BLOCK_SCALE].view(E4M3)
    out: Tensor = kernels.dequantize_nvfp4(
        as_bytes(parts[DATA]), parts[TENSOR_SCALE].float().reshape(()), scales, dtype
    )
    return out


def _kernel_mxfp8(kernels: ModuleType, parts: Parts, dtype: torch.dtype) -> Tensor:
    """mxfp8, padding included, by comfy-kitchen."""
    exponents = parts[BLOCK_EXPONENT].view(torch.float8_e8m0fnu)
    out: Tensor = kernels.dequantize_mxfp8(parts[DATA].view(E4M3), exponents, dtype)
    return out


def _decode_nvfp4(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, *, comfyui: bool) -> Tensor:
    """``shape`` may be smaller than what is stored, which may be padded."""
    rows, columns = shape
    kernels = _by_kernel(parts, dtype) if comfyui and PRE_QUANT_SCALE not in parts else None
    if kernels is not None:
        return _kernel_nvfp4(kernels, parts, dtype)[:rows, :columns].contiguous()
    data = as_bytes(parts[DATA])
    stored_columns = 2 * data.shape[1]
    blocks = stored_columns // NVFP4_BLOCK
    stored = parts[BLOCK_SCALE]
    scales = from_blocked(stored, rows, blocks) if comfyui else as_bytes(stored)[:rows]
    scales = widen_fp8(scales, E4M3, torch.float32) * parts[TENSOR_SCALE].float().reshape(())
    smoothing = parts.get(PRE_QUANT_SCALE)
    wide = dtype if smoothing is None else torch.float32
    numbers = look_up(data[:rows], _pairs(comfyui, str(data.device)), wide, scales, NVFP4_BLOCK)
    numbers = numbers.view(rows, stored_columns)[:, :columns].contiguous()
    return numbers if smoothing is None else numbers.mul_(smoothing.float().reshape(1, -1)[:, :columns]).to(dtype)


def _decode_mxfp8(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``shape`` may be smaller than what is stored, which may be padded."""
    rows, columns = shape
    kernels = _by_kernel(parts, dtype)
    if kernels is not None:
        return _kernel_mxfp8(kernels, parts, dtype)[:rows, :columns].contiguous()
    data = parts[DATA]
    exponents = from_blocked(parts[BLOCK_EXPONENT], rows, data.shape[1] // MXFP8_BLOCK)
    scales = look_up(exponents, _powers(str(data.device)), torch.float32)
    numbers = widen_fp8(data[:rows], E4M3, dtype, scales, MXFP8_BLOCK)
    return numbers.view(rows, data.shape[1])[:, :columns].contiguous()


NVFP4 = Format(
    name="nvfp4",
    bits=4 + 8 / NVFP4_BLOCK,
    decode=partial(_decode_nvfp4, comfyui=True),
    companions=(BLOCK_SCALE, TENSOR_SCALE),
    optional=(PRE_QUANT_SCALE,),
    pads=True,
    product=nvfp4_product,
)
NVFP4_LINEAR = Format(
    name="nvfp4 linear",
    bits=4 + 8 / NVFP4_BLOCK,
    decode=partial(_decode_nvfp4, comfyui=False),
    companions=(BLOCK_SCALE, TENSOR_SCALE),
    optional=(PRE_QUANT_SCALE,),
    pads=True,
)
MXFP8 = Format(
    name="mxfp8",
    bits=8 + 8 / MXFP8_BLOCK,
    decode=_decode_mxfp8,
    companions=(BLOCK_EXPONENT,),
    pads=True,
    product=mxfp8_product,
)


def encode_nvfp4(numbers: Tensor) -> dict[str, Tensor]:
    """Numbers (N, K) as nvfp4 in ComfyUI's dialect, N and K padded with zeros to multiples of 16.

    Args:
        numbers: Any floating-point type.

    Returns:
        Bytes (N, K / 2), ``BLOCK_SCALE`` e4m3 in the blocked layout, ``TENSOR_SCALE`` fp32 ().

    Raises:
        UserError: A number is not finite.
    """
    blocks = _blocks(_padded(numbers, NVFP4_PAD), NVFP4_BLOCK)
    amax = require_finite(magnitude(blocks, -1)).float()
    tensor_scale = amax.max() / (E4M3_MAX * E2M1_MAX) if amax.any() else torch.ones(())
    block_scales = (amax / E2M1_MAX / tensor_scale).clamp_(max=E4M3_MAX).to(E4M3)
    scales = block_scales.float() * tensor_scale
    data = in_slabs(blocks.flatten(1), scales, _e2m1_bytes)
    return {DATA: data, BLOCK_SCALE: to_blocked(block_scales), TENSOR_SCALE: tensor_scale}


def encode_mxfp8(numbers: Tensor) -> dict[str, Tensor]:
    """Numbers (N, K) as mxfp8, N and K padded with zeros to multiples of 32.

    A block's power of two is the smallest with which its largest number stays within e4m3's 448.

    Args:
        numbers: Any floating-point type.

    Returns:
        fp8 (N, K), and ``BLOCK_EXPONENT``, bytes in the blocked layout.

    Raises:
        UserError: A number is not finite.
    """
    blocks = _blocks(_padded(numbers, MXFP8_PAD), MXFP8_BLOCK)
    amax = require_finite(magnitude(blocks, -1)).float()
    mantissa, exponent = torch.frexp(amax / E4M3_MAX)  # mantissa in [0.5, 1): 0.5 is a power of two already
    exponent = (exponent - (mantissa == 0.5).int()).clamp_(-E8M0_BIAS, E8M0_BIAS)
    exponent = torch.where(amax > 0, exponent, torch.full_like(exponent, -E8M0_BIAS))
    codes = (exponent + E8M0_BIAS).to(torch.uint8)
    scales = look_up(codes, _powers(str(codes.device)), torch.float32).view(codes.shape)
    return {DATA: in_slabs(blocks.flatten(1), scales, _e4m3_blocks), BLOCK_EXPONENT: to_blocked(codes)}


def _padded(numbers: Tensor, multiple: int) -> Tensor:
    rows, columns = numbers.shape
    if rows % multiple == columns % multiple == 0:
        return numbers.contiguous()
    return F.pad(numbers, (0, -columns % multiple, 0, -rows % multiple))


def _blocks(rows: Tensor, block: int) -> Tensor:
    """Rows (n, K) as (n, K / block, block)."""
    return rows.view(len(rows), rows.shape[1] // block, block)


def _e2m1_bytes(rows: Tensor, scales: Tensor) -> Tensor:
    """fp32 rows (n, K) over their blocks' scales (n, K / 16) as bytes (n, K / 2), the even element in the high half."""
    scales = scales.unsqueeze(-1)  # 0 where even a block's largest number is below the smallest e4m3 scale
    blocks = _blocks(rows, NVFP4_BLOCK)
    numbers = torch.where(scales > 0, blocks / scales, torch.zeros_like(blocks)).flatten(1)
    codes = torch.bucketize(numbers.abs(), _midpoints(), out_int32=True) + SIGN * torch.signbit(numbers).int()
    return (codes[:, 0::2] * 16 + codes[:, 1::2]).to(torch.uint8)


def _midpoints() -> Tensor:
    """Up to which number each magnitude reaches, that number included."""
    middle = torch.tensor([(low + high) / 2 for low, high in zip(MAGNITUDES, MAGNITUDES[1:], strict=False)])
    below = torch.nextafter(middle, torch.zeros(()))
    upwards = torch.tensor([code in UPWARD_TIES for code in range(len(middle))])
    return torch.where(upwards, below, middle)


def _e4m3_blocks(rows: Tensor, scales: Tensor) -> Tensor:
    """fp32 rows (n, K) over their blocks' scales (n, K / 32), as e4m3."""
    numbers = _blocks(rows, MXFP8_BLOCK) / scales.unsqueeze(-1)
    return numbers.clamp_(-E4M3_MAX, E4M3_MAX).flatten(1).to(E4M3)
