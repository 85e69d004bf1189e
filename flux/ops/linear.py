"""The matrix product with weights: torch's own, or oneDNN's where that is the faster of the two.

On x86 torch gives fp32 products to MKL, which does not choose its kernels by the instructions that a processor has;
oneDNN does. On an AMD EPYC with AVX-512 it took a middle-sized FLUX.1's step from about as long as diffusers' to nine
tenths of it (``python -m benchmarks.transformer``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["linear"]

PLAIN: tuple[str, list[float], str] = ("none", [], "")  # no activation behind the product
SMALLEST = 256 * 256  # weights in a matrix from which on oneDNN's longer way to its kernel is paid back


def _find_one_dnn() -> Callable[..., Tensor] | None:
    """Torch's way to oneDNN's product, tried once: the function is torch's own and may change or go."""
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
