"""The matrix product with weights: torch's own, or oneDNN's where that is the faster of the two.

On x86 torch gives fp32 products to MKL, which does not choose its kernels by the instructions that a processor has;
oneDNN does. On an AMD EPYC with AVX-512 it took a middle-sized FLUX.1's step from about as long as diffusers' to nine
tenths of it (``python -m benchmarks.transformer``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Linear", "linear"]

SMALLEST = 256 * 256  # weights in a matrix from which on oneDNN's longer way to its kernel is paid back
_built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's stubs lack it
_one_dnn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _built_in else None


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
        out: Tensor = _one_dnn(x, weight, bias, "none", [], "")
        return out
    return F.linear(x, weight, bias)


def _suits_one_dnn(x: Tensor, weight: Tensor) -> bool:
    """Plain fp32 on a CPU, large enough, and nothing that wants to see torch's own function (which has a gradient)."""
    return (
        weight.dtype == x.dtype == torch.float32
        and weight.device.type == x.device.type == "cpu"
        and weight.numel() >= SMALLEST
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and type(weight) in (Tensor, nn.Parameter)
    )


class Linear(nn.Linear):
    """``torch.nn.Linear`` that computes by ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., N) of inputs (..., K)."""
        return linear(x, self.weight, self.bias)
