"""Scaled dot-product attention behind one signature.

Shapes: B batch, H heads, L query length, S key length, D head dimension.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["attention"]


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
