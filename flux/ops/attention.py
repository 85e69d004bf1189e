"""Scaled dot-product attention behind one signature.

``attention`` is torch's own, by whichever of its kernels torch chooses. What else there is for a transformer's is in
``attention_backends``.

Shapes: B batch, H heads, L query length, S key length, D head dimension.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

__all__ = ["Kernel", "attention"]


class Kernel(Protocol):
    """What has the signature of ``attention``, and gives the same but for rounding."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, /, *, scale: float | None = None
    ) -> Tensor: ...


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    """Softmax attention.

    Args:
        q: Queries (B, H, L, D).
        k: Keys (B, H, S, D).
        v: Values (B, H, S, D).
        bias: Added to the logits, broadcastable to (B, H, L, S), or a boolean mask where True takes part.
        scale: Factor on the logits; 1/sqrt(D) when None.

    Returns:
        Attended values (B, H, L, D).
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
