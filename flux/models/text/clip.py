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


class TextModel(nn.Module):
    """Embeddings, causal layers, final norm."""

    def __init__(self, spec: ClipTextSpec, layers: Layers) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = layers.Embedding(spec.vocabulary, spec.width)
        self.embeddings.position_embedding = layers.Embedding(spec.positions, spec.width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(spec, layers) for _ in range(spec.layers))
        self.final_layer_norm = layers.LayerNorm(spec.width, eps=NORM_EPS)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        places = torch.arange(length, device=ids.device)
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding(places)
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        for layer in self.encoder.layers:
            x = layer(x, causal)
        out: Tensor = self.final_layer_norm(x)
        return out


class Layer(nn.Module):
    """Pre-norm attention and feed-forward with quick GELU."""

    def __init__(self, spec: ClipTextSpec, layers: Layers) -> None:
        super().__init__()
        self.heads = spec.heads
        self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self.self_attn, name, layers.Linear(spec.width, spec.width))
        self.layer_norm1 = layers.LayerNorm(spec.width, eps=NORM_EPS)
        self.layer_norm2 = layers.LayerNorm(spec.width, eps=NORM_EPS)
        self.mlp = nn.Module()
        self.mlp.fc1 = layers.Linear(spec.width, spec.mlp_width)
        self.mlp.fc2 = layers.Linear(spec.mlp_width, spec.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self._attend(self.layer_norm1(x), mask)
        h = self.mlp.fc1(self.layer_norm2(x))
        out: Tensor = x + self.mlp.fc2(h * torch.sigmoid(QUICK_GELU_SLOPE * h))
        return out

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.self_attn.get_submodule(name)(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = attention(q, k, v, mask).transpose(1, 2).reshape(batch, length, width)
        out: Tensor = self.self_attn.out_proj(mixed)
        return out
