"""Matrix products in the stored format, where the device has units for it; elsewhere weights are widened first.

fp8 (from Ada Lovelace and Hopper on) by torch's scaled product, nvfp4 and mxfp8 (from Blackwell on) by comfy-kitchen's
kernels where that package is installed, as ComfyUI brings it. Inputs are narrowed with a scale of their own at each
call, from their largest number, so that nothing has to be calibrated ahead.

Shapes: M tokens, N rows of the weight, K columns.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from ...ops.devices import capability
from .base import DATA, Parts
from .floats import E4M3, E4M3_MAX, magnitude
from .roles import BLOCK_EXPONENT, BLOCK_SCALE, PRE_QUANT_SCALE, SCALE, TENSOR_SCALE

__all__ = ["fp8_product", "fp8_units", "has_units", "kitchen", "mxfp8_product", "nvfp4_product"]

FP8_CAPABILITY, ROW_CAPABILITY, FP4_CAPABILITY = (8, 9), (9, 0), (10, 0)
MULTIPLE = 16  # that K and N must be of
SMALLEST_SCALE = 1e-12
AT_A_TIME = 1 << 23  # numbers, 16 MiB of 16 bits
NVFP4_RANGE = 448.0 * 6.0
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def fp8_units(device: torch.device, *, per_row: bool = False) -> bool:
    """Whether a device multiplies fp8, with a scale for each row if that is asked."""
    return capability(str(device)) >= (ROW_CAPABILITY if per_row else FP8_CAPABILITY)


def fp4_units(device: torch.device) -> bool:
    """Whether a device multiplies nvfp4 and mxfp8. Of the package's kernels the meta device knows nothing."""
    return device.type != "meta" and capability(str(device)) >= FP4_CAPABILITY


@functools.cache
def kitchen() -> ModuleType | None:
    """comfy-kitchen, if it is installed and can be imported."""
    try:
        return importlib.import_module("comfy_kitchen")
    except (ImportError, OSError, RuntimeError):
        return None


def has_units(product: object, device: torch.device) -> bool:
    """Whether a device can run one of the products below."""
    if product in (nvfp4_product, mxfp8_product):
        return fp4_units(device) and kitchen() is not None
    return product is fp8_product and fp8_units(device)


def fp8_product(parts: Parts, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """``x @ (data * scale).T + bias`` in fp8, accumulated as the card does it fastest.

    Args:
        parts: ``DATA`` fp8 (N, K); ``SCALE`` fp32, one number or N, or absent for 1.
        x: (M, K), bf16 or fp16.
        bias: (N,) or None.

    Returns:
        (M, N) in the dtype of ``x``; None where the device, the type or the shape does not allow it.
    """
    data, scale = parts[DATA], parts.get(SCALE)
    per_row = scale is not None and scale.numel() > 1
    if x.dtype not in SIXTEEN_BITS or data.dim() != 2 or any(side % MULTIPLE for side in data.shape):
        return None
    if not fp8_units(x.device, per_row=per_row):
        return None
    low, high = x.aminmax(dim=1, keepdim=True) if per_row else x.aminmax()
    largest = torch.maximum(high, -low)
    own = (largest.float() / E4M3_MAX).clamp_min(max(SMALLEST_SCALE, torch.finfo(x.dtype).tiny)).to(x.dtype)
    theirs = torch.ones((), device=x.device) if scale is None else scale.float()
    theirs = theirs.reshape(1, -1) if per_row else theirs.reshape(())
    # The result of a row-wise product is bf16 in cuBLAS; fp16 takes the way over it.
    kind = torch.bfloat16 if per_row else x.dtype
    out: Tensor = torch._scaled_mm(
        _narrowed(x, own), data.t(), scale_a=own.float(), scale_b=theirs, bias=None if bias is None else bias.to(kind),
        out_dtype=kind, use_fast_accum=True,
    )  # fmt: skip
    return out.to(x.dtype)


def _narrowed(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` in fp8, some rows at a time: what stands between is small, and finds itself in the card's cache.

    Args:
        x: (M, K), whose largest number is at most 2^-7 above fp8's by the scale, and so is rounded down to it.
        scale: One number, or (M, 1).
    """
    narrow = torch.empty(x.shape, dtype=E4M3, device=x.device)
    step = max(1, AT_A_TIME // x.shape[1])
    for first in range(0, len(x), step):
        rows = slice(first, first + step)
        narrow[rows] = x[rows] / (scale[rows] if scale.dim() else scale)
    return narrow


def nvfp4_product(parts: Parts, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """The same for nvfp4 in ComfyUI's dialect; see ``fp8_product``."""
    kernels = kitchen()
    data = parts[DATA]
    if kernels is None or not fp4_units(x.device) or x.dtype not in SIXTEEN_BITS or PRE_QUANT_SCALE in parts:
        return None
    if x.shape[1] != 2 * data.shape[1] or x.shape[1] % MULTIPLE:
        return None
    own = (magnitude(x).float() / NVFP4_RANGE).clamp_min(SMALLEST_SCALE)
    tokens = len(x)
    narrow, blocks = kernels.quantize_nvfp4(x, own, pad_16x=tokens % MULTIPLE != 0)
    out: Tensor = kernels.scaled_mm_nvfp4(
        narrow, data, own, parts[TENSOR_SCALE].float(), blocks, parts[BLOCK_SCALE].view(E4M3), None, x.dtype
    )
    out = out[:tokens]
    return out if bias is None else out[:, : len(bias)] + bias


def mxfp8_product(parts: Parts, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """The same for mxfp8; see ``fp8_product``."""
    kernels = kitchen()
    data = parts[DATA]
    if kernels is None or not fp4_units(x.device) or x.dtype not in SIXTEEN_BITS or x.shape[1] != data.shape[1]:
        return None
    tokens = len(x)
    narrow, blocks = kernels.quantize_mxfp8(x, pad_32x=True)
    out: Tensor = kernels.scaled_mm_mxfp8(
        narrow, data.view(E4M3), blocks, parts[BLOCK_EXPONENT].view(torch.float8_e8m0fnu), None, x.dtype
    )
    out = out[:tokens]
    return out if bias is None else out[:, : len(bias)] + bias
