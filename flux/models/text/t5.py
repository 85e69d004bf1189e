"""The encoder of T5 v1.1 (Raffel et al. 2020; gated GELU as in Shazeer 2020).

Parameter names are those of Hugging Face's encoder files. Shapes: B batch, L tokens, D width, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.attention import attention
from ...ops.layers import TORCH_LAYERS, Layers
from ...specs.text import T5Spec

__all__ = ["T5Encoder", "relative_buckets"]

NORM_EPS = 1e-6
FP16_LIMIT = 65504.0


class T5Encoder(nn.Module):
    """Token ids (B, L) to hidden states (B, L, D) after the final norm."""

    def __init__(self, spec: T5Spec, layers: Layers = TORCH_LAYERS) -> None:
        super().__init__()
        self.spec = spec
        self.shared = layers.Embedding(spec.vocabulary, spec.width)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(Block(spec, layers, first=i == 0) for i in range(spec.layers))
        self.encoder.final_layer_norm = RmsNorm(spec.width)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode.

        Args:
            ids: Token ids (B, L).
            mask: (B, L), True where a token may be attended. None attends to padding too, as FLUX.1 does.
        """
        x: Tensor = self.shared(ids)
        bias = self.encoder.block[0].position_bias(ids.shape[1], x)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)
        for block in self.encoder.block:
            x = block(x, bias)
        out: Tensor = self.encoder.final_layer_norm(x)
        return out


class Block(nn.Module):
    """Attention, then the gated feed-forward; the first block holds the position table of all."""

    def __init__(self, spec: T5Spec, layers: Layers, *, first: bool) -> None:
        super().__init__()
        self.spec = spec
        inner = spec.heads * spec.head_width
        attend, feed = nn.Module(), nn.Module()
        attend.SelfAttention = nn.Module()
        for name in ("q", "k", "v"):
            setattr(attend.SelfAttention, name, layers.Linear(spec.width, inner, bias=False))
        attend.SelfAttention.o = layers.Linear(inner, spec.width, bias=False)
        if first:
            attend.SelfAttention.relative_attention_bias = layers.Embedding(spec.buckets, spec.heads)
        attend.layer_norm = RmsNorm(spec.width)
        feed.DenseReluDense = nn.Module()
        feed.DenseReluDense.wi_0 = layers.Linear(spec.width, spec.mlp_width, bias=False)
        feed.DenseReluDense.wi_1 = layers.Linear(spec.width, spec.mlp_width, bias=False)
        feed.DenseReluDense.wo = layers.Linear(spec.mlp_width, spec.width, bias=False)
        feed.layer_norm = RmsNorm(spec.width)
        self.layer = nn.ModuleList((attend, feed))

    def position_bias(self, length: int, like: Tensor) -> Tensor:
        """The additive bias (1, H, L, L) of relative positions, in the dtype and on the device of ``like``."""
        places = torch.arange(length, device=like.device)
        relative = places[None, :] - places[:, None]  # key minus query
        buckets = relative_buckets(relative, self.spec.buckets, self.spec.max_distance)
        table = self.layer[0].SelfAttention.relative_attention_bias(buckets)  # (L, L, H)
        bias: Tensor = table.permute(2, 0, 1)[None].to(like.dtype)
        return bias

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attend, feed = self.layer
        x = x + self._attend(attend.layer_norm(x), bias)
        dense = feed.DenseReluDense
        h = feed.layer_norm(x)
        x = x + dense.wo(F.gelu(dense.wi_0(h), approximate="tanh") * dense.wi_1(h))
        # fp16 overflows here in T5-XXL; infinities would spread to every token.
        return x.clamp(-FP16_LIMIT, FP16_LIMIT) if x.dtype == torch.float16 else x

    def _attend(self, x: Tensor, bias: Tensor) -> Tensor:
        own = self.layer[0].SelfAttention
        batch, length, _ = x.shape
        q, k, v = (m(x).view(batch, length, self.spec.heads, -1).transpose(1, 2) for m in (own.q, own.k, own.v))
        mixed = attention(q, k, v, bias, scale=1.0)  # T5 folds the scale into its initialisation
        out: Tensor = own.o(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class RmsNorm(nn.Module):
    """Root-mean-square norm with fp32 statistics, no mean and no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=NORM_EPS).to(x.dtype)
        return normed * self.weight.to(x)


def relative_buckets(relative: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each relative position (key minus query), both directions, as T5 counts them.

    Half of the buckets are for keys to the right. Of each half, the first half holds one distance each, and the rest
    grow logarithmically up to ``max_distance``; farther positions share the last one.
    """
    half = buckets // 2
    side = torch.where(relative > 0, half, 0)
    distance = relative.abs()
    exact = half // 2
    far = exact + (
        torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    ).to(torch.long)
    return side + torch.where(distance < exact, distance, far.clamp(max=half - 1))
