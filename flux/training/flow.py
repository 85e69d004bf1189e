"""Flow matching (Lipman et al. 2022; rectified flow, Liu et al. 2022) for FLUX transformers.

``x_t = (1 - t) x0 + t noise``; the network predicts ``noise - x0``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.flux1 import Conditions, Flux1
from ..models.positions import image_ids, text_ids
from ..sampling.packing import pack

__all__ = ["TextBatch", "flow_targets", "predict_velocity", "sample_times"]


@dataclass(frozen=True)
class TextBatch:
    """Encoded prompts: T5 tokens (B, T, width) and pooled vectors (B, width)."""

    tokens: Tensor
    pooled: Tensor

    def select(self, mask: Tensor, other: TextBatch) -> TextBatch:
        """Rows of ``other`` where ``mask`` (B,) is true, own rows elsewhere."""
        return TextBatch(
            torch.where(mask[:, None, None], other.tokens, self.tokens),
            torch.where(mask[:, None], other.pooled, self.pooled),
        )

    def joined(self, other: TextBatch) -> TextBatch:
        """Own rows, then those of ``other``."""
        return TextBatch(torch.cat((self.tokens, other.tokens)), torch.cat((self.pooled, other.pooled)))


def sample_times(count: int, *, mean: float, deviation: float, generator: torch.Generator | None = None) -> Tensor:
    """Flow times (count,) from a logit-normal distribution (Esser et al. 2024)."""
    return torch.sigmoid(mean + deviation * torch.randn(count, generator=generator))


def flow_targets(latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocities to predict, both (B, C, h, w), at times (B,)."""
    t = times[:, None, None, None]
    return (1 - t) * latents + t * noise, noise - latents


def predict_velocity(
    model: Flux1, noisy: Tensor, times: Tensor, text: TextBatch, guidance: Tensor | None = None
) -> Tensor:
    """Packed velocities (B, tokens, 4C) of latents (B, C, h, w); gradients flow."""
    rows, columns = noisy.shape[-2] // 2, noisy.shape[-1] // 2
    vec = model.embed(times, text.pooled, guidance)
    conditions = Conditions(
        text.tokens,
        text_ids(text.tokens.shape[1], noisy.device),
        image_ids(rows, columns, noisy.device),
    )
    velocity: Tensor = model(pack(noisy), conditions, model.modulate(vec))
    return velocity
