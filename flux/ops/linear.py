"""The matrix product with weights: torch's own, or oneDNN's where that is the faster of the two.

On x86 torch gives fp32 products to MKL, which chooses its kernels by who made the processor; oneDNN chooses them by the
instructions that it has. On an AMD EPYC with AVX-512 oneDNN took a middle-sized FLUX.1's step from about as long as
diffusers' to nine tenths of it; on an Intel Xeon with the same instructions MKL is the faster one, by a twentieth
(``python -m benchmarks.transformer``), but for few rows, as those of a text, where oneDNN is, by a tenth. The choice is
the same in every run on a machine, since both round differently.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .host_memory import in_large_pages

__all__ = ["linear"]

PLAIN: tuple[str, list[float], str] = ("none", [], "")  # no activation behind the product
CPU_INFO = Path("/proc/cpuinfo")
INTEL = "GenuineIntel"
ANY_ROWS = range(1, sys.maxsize)
FEW_ROWS = range(4, 257)  # of inputs, for which oneDNN is the faster one on Intel's processors too
SMALLEST = 256 * 256  # weights in a matrix from which on oneDNN's longer way to its kernel is paid back
LARGE_RESULT = 32 << 20  # bytes; up to there glibc keeps what it has, if it is not told otherwise


def _maker() -> str:
    """Who made the processor, in its own words; empty where that is not told."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _rows_for_one_dnn(maker: str) -> range:
    """Of how many rows of inputs oneDNN takes the product."""
    mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return FEW_ROWS if mkl and INTEL in maker else ANY_ROWS


def _find_one_dnn() -> Callable[..., Tensor] | None:
    """Torch's way to oneDNN's product, tried once: the function may change or go."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch's stubs lack it
        return None
    product: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if product is None:
        return None
    try:
        with torch.no_grad():
            out = product(torch.ones(1, 2), torch.ones(3, 2), None, *PLAIN)
    except (RuntimeError, TypeError):
        return None
    return product if out.tolist() == [[2.0, 2.0, 2.0]] else None


_one_dnn = _find_one_dnn()
_one_dnn_rows = _rows_for_one_dnn(_maker())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: Inputs (..., K).
        weight: Weights (N, K).
        bias: Added to each output (N,), or None.

    Returns:
        Outputs (..., N).
    """
    if weight.device.type == "cpu" and weight.numel() >= SMALLEST and _is_plain(x, weight):
        rows = x.numel() // x.shape[-1]
        if _one_dnn is not None and rows in _one_dnn_rows:
            return _one_dnn(x, weight, bias, *PLAIN)
        if rows * len(weight) * x.element_size() > LARGE_RESULT:
            return _into_large_pages(x, weight, bias)
    return F.linear(x, weight, bias)


def _into_large_pages(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = in_large_pages((len(rows), len(weight)), x.dtype)
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)
    return out.view(*x.shape[:-1], len(weight))


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """fp32 on a CPU, and nothing that wants to see torch's own function (which has a gradient)."""
    return (
        weight.dtype == x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[-1:] == weight.shape[1:]
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and type(weight) in (Tensor, nn.Parameter)
    )
