"""The matrix product with weights: torch's own, or oneDNN's where that is the faster of the two.

On x86 torch gives fp32 products to MKL, which chooses its kernels by who made the processor; oneDNN chooses them by the
instructions that it has. On an AMD EPYC with AVX-512 oneDNN took a middle-sized FLUX.1's step from about as long as
diffusers' to nine tenths of it; on an Intel Xeon with the same instructions MKL is the faster one, by a twentieth
(``python -m benchmarks.transformer``). So MKL's own makers' processors are left to it. The choice is the same in every
run on a machine, since both round differently.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["linear"]

PLAIN: tuple[str, list[float], str] = ("none", [], "")  # no activation behind the product
CPU_INFO = Path("/proc/cpuinfo")
INTEL = "GenuineIntel"
SMALLEST = 256 * 256  # weights in a matrix from which on oneDNN's longer way to its kernel is paid back


def _maker() -> str:
    """Who made the processor, in its own words; empty where that is not told."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _find_one_dnn(maker: str) -> Callable[..., Tensor] | None:
    """Torch's way to oneDNN's product where it is the faster one, tried once: the function may change or go."""
    if INTEL in maker and torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return None
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


_one_dnn = _find_one_dnn(_maker())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: Inputs (..., K).
        weight: Weights (N, K).
        bias: Added to each output (N,), or None.

    Returns:
        Outputs (..., N).
    """
    if _one_dnn is not None and _suits_one_dnn(x, weight):
        return _one_dnn(x, weight, bias, *PLAIN)
    return F.linear(x, weight, bias)


def _suits_one_dnn(x: Tensor, weight: Tensor) -> bool:
    """Plain fp32 on a CPU, large enough, and nothing that wants to see torch's own function (which has a gradient)."""
    return (
        weight.dtype == x.dtype == torch.float32
        and weight.device.type == x.device.type == "cpu"
        and weight.numel() >= SMALLEST
        and x.shape[-1:] == weight.shape[1:]
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and type(weight) in (Tensor, nn.Parameter)
    )
