"""The encoder of T5 v1.1 (Raffel et al. 2020; gated GELU as in Shazeer 2020).

Parameter names are those of Hugging Face's encoder files. Shapes: B batch, L tokens, D width, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.attention import attention
from ...ops.dtypes import clamp_to_range
from ...ops.layers import TORCH_LAYERS, Layers
from ...specs.text import T5Spec

__all__ = ["T5Encoder", "relative_buckets"]

NORM_EPS = 1e-6
GATED_LIMIT = 1024.0  # to which fp16 scales the gated features down: far enough from its limit for the sum behind


class T5Encoder(nn.Module):
    """Token ids (B, L) to hidden states (B, L, D) after the final norm."""

    def __init__(self, spec: T5Spec, layers: Layers = TORCH_LAYERS) -> None:
        super().__init__()
        self.spec = spec
        self.shared = layers.Embedding(spec.vocabulary, spec.width)
        self.encoder = Stack(spec, layers)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode.

        Args:
            ids: Token ids (B, L).
            mask: (B, L), True where a token may be attended. None attends to padding too, as FLUX.1 does.
        """
        out: Tensor = self.encoder(self.shared(ids), mask)
        return out

    def block_names(self) -> list[str]:
        """The parameter prefixes of every layer's two parts, in the order in which they run.

        Of T5-XXL's layers of 0.4 GB two would have to be in memory for one to come while the other one runs.
        """
        return [f"encoder.block.{index}.layer.{part}" for index in range(self.spec.layers) for part in range(2)]


class Stack(nn.Module):
    """Blocks and final norm. The position table of all blocks is the first one's."""

    def __init__(self, spec: T5Spec, layers: Layers) -> None:
        super().__init__()
        first = Block(spec, layers, has_positions=True)
        self.first = (first,)  # a tuple, so that it is registered once, below
        self.block = nn.ModuleList((first, *(Block(spec, layers) for _ in range(spec.layers - 1))))
        self.final_layer_norm = RmsNorm(spec.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        bias = self.first[0].position_bias(x)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)
        for block in self.block:
            x = block(x, bias)
        out: Tensor = self.final_layer_norm(x)
        return out


class Block(nn.Module):
    """Attention, then the gated feed-forward, under the names of Hugging Face's two-element list."""

    def __init__(self, spec: T5Spec, layers: Layers, *, has_positions: bool = False) -> None:
        super().__init__()
        self.layer = nn.ModuleList((AttentionLayer(spec, layers, has_positions), FeedForwardLayer(spec, layers)))

    def position_bias(self, like: Tensor) -> Tensor:
        """The additive bias (1, H, L, L) of the positions of ``like`` (B, L, D)."""
        attend = self.layer[0]
        assert isinstance(attend, AttentionLayer)
        return attend.SelfAttention.position_bias(like)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attend, feed = self.layer
        x = x + attend(x, bias)
        x = x + feed(x)
        return clamp_to_range(x)  # T5-XXL overflows here


class AttentionLayer(nn.Module):
    """Norm and attention."""

    def __init__(self, spec: T5Spec, layers: Layers, has_positions: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(spec, layers, has_positions)
        self.layer_norm = RmsNorm(spec.width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = self.SelfAttention(self.layer_norm(x), bias)
        return out


class SelfAttention(nn.Module):
    """Multi-head attention without scale or bias terms; relative positions add to the logits."""

    def __init__(self, spec: T5Spec, layers: Layers, has_positions: bool) -> None:
        super().__init__()
        self.spec = spec
        inner = spec.heads * spec.head_width
        self.q = layers.Linear(spec.width, inner, bias=False)
        self.k = layers.Linear(spec.width, inner, bias=False)
        self.v = layers.Linear(spec.width, inner, bias=False)
        self.o = layers.Linear(inner, spec.width, bias=False)
        if has_positions:
            self.relative_attention_bias = layers.Embedding(spec.buckets, spec.heads)

    def position_bias(self, like: Tensor) -> Tensor:
        """The additive bias (1, H, L, L) of relative positions, in dtype and device of ``like`` (B, L, D)."""
        places = torch.arange(like.shape[1], device=like.device)
        relative = places[None, :] - places[:, None]  # key minus query
        buckets = relative_buckets(relative, self.spec.buckets, self.spec.max_distance)
        table: Tensor = self.relative_attention_bias(buckets)  # (L, L, H)
        return table.permute(2, 0, 1)[None].to(like.dtype)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (m(x).view(batch, length, self.spec.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = attention(q, k, v, bias, scale=1.0)  # T5 folds the scale into its initialisation
        out: Tensor = self.o(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class FeedForwardLayer(nn.Module):
    """Norm and gated feed-forward."""

    def __init__(self, spec: T5Spec, layers: Layers) -> None:
        super().__init__()
        self.DenseReluDense = GatedDense(spec, layers)
        self.layer_norm = RmsNorm(spec.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.DenseReluDense(self.layer_norm(x))
        return out


class GatedDense(nn.Module):
    """``wo(gelu(wi_0 x) * (wi_1 x))`` with the tanh form of GELU."""

    def __init__(self, spec: T5Spec, layers: Layers) -> None:
        super().__init__()
        self.wi_0 = layers.Linear(spec.width, spec.mlp_width, bias=False)
        self.wi_1 = layers.Linear(spec.width, spec.mlp_width, bias=False)
        self.wo = layers.Linear(spec.mlp_width, spec.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, features = F.gelu(self.wi_0(x), approximate="tanh"), self.wi_1(x)
        out: Tensor = self.wo_in_range(gate, features) if x.dtype == torch.float16 else self.wo(gate * features)
        return out

    def wo_in_range(self, gate: Tensor, features: Tensor) -> Tensor:
        """``wo(gate * features)`` in fp16, whose range T5-XXL's products leave.

        The products are taken in fp32 and scaled down for each token before ``wo``, the result up again after it.
        """
        gated = gate.float() * features.float()
        scale = (gated.abs().amax(dim=-1, keepdim=True) / GATED_LIMIT).clamp(min=1)
        out: Tensor = self.wo((gated / scale).to(gate.dtype))
        return clamp_to_range((out.float() * scale).to(out.dtype))


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
