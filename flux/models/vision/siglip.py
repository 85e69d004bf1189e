"""The vision tower of SigLIP (Zhai et al. 2023): a picture to one hidden state for each patch.

Parameter names are those of Hugging Face's files; the attention-pooling head is left out, for FLUX does not use it.
Shapes: B batch, N patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.attention import attention
from ...ops.layers import TORCH_LAYERS, Layers
from ...specs.vision import SiglipSpec

__all__ = ["SiglipVision"]

NORM_EPS = 1e-6


class SiglipVision(nn.Module):
    """Pictures (B, 3, side, side) in -1..1 to hidden states (B, N, D), N row by row, after the final norm."""

    def __init__(self, spec: SiglipSpec, layers: Layers = TORCH_LAYERS) -> None:
        super().__init__()
        self.spec = spec
        self.vision_model = VisionModel(spec, layers)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.vision_model(pixels)
        return out

    def block_names(self) -> list[str]:
        """Every layer's parameter prefix, in the order in which they run."""
        return [f"vision_model.encoder.layers.{index}" for index in range(self.spec.layers)]


class VisionModel(nn.Module):
    """Embeddings, layers, final norm."""

    def __init__(self, spec: SiglipSpec, layers: Layers) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(spec, layers)
        self.encoder = LayerStack(spec, layers)
        self.post_layernorm = layers.LayerNorm(spec.width, eps=NORM_EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.post_layernorm(self.encoder(self.embeddings(pixels)))
        return out


class PatchEmbeddings(nn.Module):
    """Of patches and of their places, which are learned."""

    def __init__(self, spec: SiglipSpec, layers: Layers) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, spec.width, spec.patch, spec.patch)
        self.position_embedding = layers.Embedding(spec.grid**2, spec.width)

    def forward(self, pixels: Tensor) -> Tensor:
        weight, bias = self.patch_embedding.weight.to(pixels), self.patch_embedding.bias
        patches = F.conv2d(pixels, weight, None if bias is None else bias.to(pixels), self.patch_embedding.stride)
        tokens = patches.flatten(2).transpose(1, 2)
        places: Tensor = self.position_embedding(torch.arange(tokens.shape[1], device=pixels.device))
        return tokens + places.to(tokens)


class LayerStack(nn.Module):
    """The layers, one after the other."""

    def __init__(self, spec: SiglipSpec, layers: Layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(spec, layers) for _ in range(spec.layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, spec: SiglipSpec, layers: Layers) -> None:
        super().__init__()
        self.layer_norm1 = layers.LayerNorm(spec.width, eps=NORM_EPS)
        self.self_attn = SelfAttention(spec, layers)
        self.layer_norm2 = layers.LayerNorm(spec.width, eps=NORM_EPS)
        self.mlp = FeedForward(spec, layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class SelfAttention(nn.Module):
    """Multi-head attention of all patches to all."""

    def __init__(self, spec: SiglipSpec, layers: Layers) -> None:
        super().__init__()
        self.heads = spec.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (layers.Linear(spec.width, spec.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            project(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.out_proj(attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return out


class FeedForward(nn.Module):
    """Two layers with tanh-GELU between."""

    def __init__(self, spec: SiglipSpec, layers: Layers) -> None:
        super().__init__()
        self.fc1 = layers.Linear(spec.width, spec.mlp_width)
        self.fc2 = layers.Linear(spec.mlp_width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out
