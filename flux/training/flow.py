"""Flow matching (Lipman et al. 2022; rectified flow, Liu et al. 2022) for FLUX transformers.

``x_t = (1 - t) x0 + t noise``; the network predicts ``noise - x0``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.flux1 import Conditions, Flux1
from ..models.positions import image_ids, reference_ids, text_ids
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

    def repeated(self, count: int) -> TextBatch:
        """Its only row ``count`` times."""
        return TextBatch(self.tokens.expand(count, -1, -1), self.pooled.expand(count, -1))

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
    model: Flux1,
    noisy: Tensor,
    times: Tensor,
    text: TextBatch,
    guidance: Tensor | None = None,
    *,
    channels: Tensor | None = None,
    references: Sequence[Tensor] = (),
    bias: Tensor | None = None,
) -> Tensor:
    """Packed velocities (B, tokens, 4C) of latents; gradients flow.

    Args:
        model: The transformer.
        noisy: Latents (B, C, h, w).
        times: Flow times (B,).
        text: Encoded prompts.
        guidance: Strengths (B,) for the guidance embedding.
        channels: Further input channels (B, c, h, w), of Fill and control models.
        references: Latents (B, C, h', w') of pictures that the model may look at.
        bias: Added to the attention's logits, broadcastable to (B, H, L, L).
    """
    rows, columns = noisy.shape[-2] // 2, noisy.shape[-1] // 2
    vec = model.embed(times, text.pooled, guidance)
    tokens = pack(noisy if channels is None else torch.cat((noisy, channels), dim=1))
    ids = image_ids(rows, columns, noisy.device)
    if references:
        tokens = torch.cat((tokens, *(pack(reference) for reference in references)), dim=1)
        sizes = [(reference.shape[-2], reference.shape[-1]) for reference in references]
        ids = torch.cat((ids, reference_ids(sizes, (noisy.shape[-2], noisy.shape[-1]), device=noisy.device)))
    conditions = Conditions(text.tokens, text_ids(text.tokens.shape[1], noisy.device), ids, bias)
    velocity: Tensor = model(tokens, conditions, model.modulate(vec))
    return velocity[:, : rows * columns]
