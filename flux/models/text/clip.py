"""The CLIP text tower (Radford et al. 2021), as far as FLUX.1 uses it: its pooled vector.

Parameter names are those of Hugging Face's ``text_encoder`` files. Shapes: B batch, L tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops.attention import attention
from ...ops.layers import TORCH_LAYERS, Layers
from ...specs.text import ClipTextSpec

__all__ = ["ClipText"]

NORM_EPS = 1e-5
QUICK_GELU_SLOPE = 1.702


class ClipText(nn.Module):
    """Token ids to the final hidden states and the pooled vector."""

    def __init__(self, spec: ClipTextSpec, layers: Layers = TORCH_LAYERS) -> None:
        super().__init__()
        self.spec = spec
        self.text_model = TextModel(spec, layers)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            ids: Token ids (B, L), L at most ``spec.positions``, with at least one end token each.

        Returns:
            Hidden states (B, L, D) after the final norm, and the pooled vectors (B, D): the hidden state at each
            row's first end token. There is no projection.
        """
        hidden: Tensor = self.text_model(ids)
        ends = (ids == self.spec.eos).int().argmax(dim=-1)
        pooled = hidden[torch.arange(len(ids), device=ids.device), ends]
        return hidden, pooled

    def block_names(self) -> list[str]:
        """Every layer's parameter prefix, in the order in which they run."""
        return [f"text_model.encoder.layers.{index}" for index in range(self.spec.layers)]


class TextModel(nn.Module):
    """Embeddings, causal layers, final norm."""

    def __init__(self, spec: ClipTextSpec, layers: Layers) -> None:
        super().__init__()
        self.embeddings = Embeddings(spec, layers)
        self.encoder = LayerStack(spec, layers)
        self.final_layer_norm = layers.LayerNorm(spec.width, eps=NORM_EPS)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        out: Tensor = self.final_layer_norm(self.encoder(self.embeddings(ids), causal))
        return out


class Embeddings(nn.Module):
    """Of tokens and of their places."""

    def __init__(self, spec: ClipTextSpec, layers: Layers) -> None:
        super().__init__()
        self.token_embedding = layers.Embedding(spec.vocabulary, spec.width)
        self.position_embedding = layers.Embedding(spec.positions, spec.width)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        out: Tensor = self.token_embedding(ids) + self.position_embedding(places)
        return out


class LayerStack(nn.Module):
    """The layers, one after the other."""

    def __init__(self, spec: ClipTextSpec, layers: Layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(spec, layers) for _ in range(spec.layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, spec: ClipTextSpec, layers: Layers) -> None:
        super().__init__()
        self.self_attn = SelfAttention(spec, layers)
        self.layer_norm1 = layers.LayerNorm(spec.width, eps=NORM_EPS)
        self.layer_norm2 = layers.LayerNorm(spec.width, eps=NORM_EPS)
        self.mlp = FeedForward(spec, layers)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class SelfAttention(nn.Module):
    """Multi-head attention under a causal mask."""

    def __init__(self, spec: ClipTextSpec, layers: Layers) -> None:
        super().__init__()
        self.heads = spec.heads
        self.q_proj = layers.Linear(spec.width, spec.width)
        self.k_proj = layers.Linear(spec.width, spec.width)
        self.v_proj = layers.Linear(spec.width, spec.width)
        self.out_proj = layers.Linear(spec.width, spec.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            project(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.out_proj(attention(q, k, v, mask).transpose(1, 2).reshape(batch, length, width))
        return out


class FeedForward(nn.Module):
    """Two layers with quick GELU, x * sigmoid(1.702 x), between."""

    def __init__(self, spec: ClipTextSpec, layers: Layers) -> None:
        super().__init__()
        self.fc1 = layers.Linear(spec.width, spec.mlp_width)
        self.fc2 = layers.Linear(spec.mlp_width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        out: Tensor = self.fc2(h * torch.sigmoid(QUICK_GELU_SLOPE * h))
        return out
