"""Which number format a device multiplies fast.

CPUs differ by two orders of magnitude here: with bf16 units bf16 is several times faster than fp32, without them some
hundred times slower. So it is measured, once for each device, on one matrix product that takes a few milliseconds; in
one thread, for where others hold a core the threads of a short product wait for one another longer than they compute.
"""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "ONE_BYTE_FLOATS", "SMALL_MODEL", "WITHOUT_FP8", "clamp_to_range", "compute_dtype", "fast_dtype", "held_as",
    "mixed_precision",
]  # fmt: skip

PROBE_ROWS, PROBE_WIDTH = 256, 512
PROBE_REPEATS = 5
SMALL_MODEL = 100_000_000  # parameters up to which fp32 costs nobody anything
FP16_LIMIT = torch.finfo(torch.float16).max  # 65504
ONE_BYTE_FLOATS = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu})
WITHOUT_FP8 = frozenset({"mps"})  # device types without fp8 and fp64


def held_as(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What stored bytes of a type are on a device: fp8 stays bytes where there is none, and decoders take it so."""
    return torch.uint8 if dtype in ONE_BYTE_FLOATS and device.type in WITHOUT_FP8 else dtype


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The faster of bf16 and fp32 for matrix products on ``device``."""
    return _fast_dtype(torch.device(device).type)


def mixed_precision(device: torch.device | str) -> torch.autocast:
    """Matrix products in ``fast_dtype`` inside the block, for training; as they are where that is fp32."""
    dtype = fast_dtype(device)
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


@functools.cache
def _fast_dtype(device_type: str) -> torch.dtype:
    if device_type == "cuda" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        return torch.float16  # cards before Ampere emulate bf16
    if device_type != "cpu":
        return torch.bfloat16
    full = _probe_seconds(torch.float32)
    # One small product first: where bf16 is emulated, the whole probe would take noticeable time.
    if _probe_seconds(torch.bfloat16, rows=16) > full:
        return torch.float32
    return torch.bfloat16 if _probe_seconds(torch.bfloat16) < full else torch.float32


def _probe_seconds(dtype: torch.dtype, rows: int = PROBE_ROWS, repeats: int = PROBE_REPEATS) -> float:
    x = torch.ones(rows, PROBE_WIDTH, dtype=dtype)
    weight = torch.ones(PROBE_WIDTH, PROBE_WIDTH, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        F.linear(x, weight)
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            F.linear(x, weight)
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best


def compute_dtype(device: torch.device | str, parameters: int) -> torch.dtype:
    """What weights become where they run: fp32 for small models on a CPU, else what the device multiplies fast.

    Args:
        device: Where the model runs.
        parameters: How many it has.
    """
    if torch.device(device).type == "cpu" and parameters <= SMALL_MODEL:
        return torch.float32
    return fast_dtype(device)


def clamp_to_range(x: Tensor) -> Tensor:
    """fp16 with what overflowed (infinities) put back to the largest number it holds; other formats as they are.

    The residual streams of FLUX.1's text side and of T5-XXL leave fp16's range in some blocks. An infinity would become
    NaN in the next norm and spread to every token; the largest number only bends one channel. NaN stays NaN.
    """
    return x.clamp(-FP16_LIMIT, FP16_LIMIT) if x.dtype == torch.float16 else x
