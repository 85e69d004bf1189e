"""What guides add to the attention: style tokens, references, and how much each is looked at.

Style tokens stand behind the prompt's, references behind the image's.

A strength s becomes a bias of ln(s) on the logits of a guide's tokens as keys, for every query but its own tokens, so
that its share of the attention is multiplied by s before the softmax divides. ComfyUI's StyleModelApply ("attn_bias")
does the same. Where a guide has a region, image tokens see it as far as they are inside, and all other tokens, the
prompt's and other guides', as far as every place does, so that they do not carry it out.

Shapes: B batch, L tokens in all, T of the text with styles, I of the image, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.positions import image_ids, reference_ids, text_ids
from ..sampling.packing import PATCH, pack, pad_to_patch, token_grid
from .blending import fitted
from .guides import Guide, Reference, StyleTokens

__all__ = ["Span", "Tokens", "attention_bias", "gather"]


@dataclass(frozen=True)
class Span:
    """Where in the joint sequence a guide's tokens are, and how much each is looked at.

    Attributes:
        start: The first one's place.
        weights: (N,) in 0..2; what ln is taken of.
        region: See ``Guide``.
    """

    start: int
    weights: Tensor
    region: Tensor | None = None


@dataclass(frozen=True)
class Tokens:
    """What goes into a transformer beside the noisy latent.

    Attributes:
        text: (1 or B, T, D).
        text_ids: (T, 3).
        references: (B, R, 4C), or None.
        image_ids: (I + R, 3).
        bias: (1, 1, L, L), or None.
    """

    text: Tensor
    text_ids: Tensor
    references: Tensor | None
    image_ids: Tensor
    bias: Tensor | None


def gather(prompt: Tensor, guides: Sequence[Guide], size: tuple[int, int], layout: str = "offset") -> Tokens:
    """Put guides' tokens beside a prompt's and an image's.

    Args:
        prompt: T5 tokens (1 or B, T, D).
        guides: Those that act; others than styles and references are passed over.
        size: Of the image in latent cells.
        layout: Of references: one of ``models.positions.LAYOUTS``.
    """
    styles = [guide for guide in guides if isinstance(guide, StyleTokens)]
    references = [guide for guide in guides if isinstance(guide, Reference)]
    spans: list[Span] = []
    text = [prompt]
    for style in styles:
        tokens, weights = _kept(style, prompt)
        spans.append(Span(sum(part.shape[1] for part in text), weights * style.strength, style.region))
        text.append(tokens)
    rows = max(len(part) for part in text)
    joined = torch.cat([part.expand(rows, -1, -1) for part in text], dim=1)
    grid = token_grid(*size)
    behind = joined.shape[1] + grid[0] * grid[1]
    packed: list[Tensor] = []
    for reference in references:
        packed.append(pack(pad_to_patch(reference.latents.to(prompt))[0]))
        count = packed[-1].shape[1]
        spans.append(Span(behind, torch.full((count,), reference.strength, device=prompt.device), reference.region))
        behind += count
    ids = image_ids(*grid, prompt.device)
    if references:
        sizes = [(int(r.latents.shape[-2]), int(r.latents.shape[-1])) for r in references]
        ids = torch.cat((ids, reference_ids(sizes, size, layout, prompt.device)))
    rows = max((len(part) for part in packed), default=1)
    return Tokens(
        joined,
        text_ids(joined.shape[1], prompt.device),
        torch.cat([part.expand(rows, -1, -1) for part in packed], dim=1) if packed else None,
        ids,
        attention_bias(spans, joined.shape[1], grid, behind),
    )


def _kept(style: StyleTokens, like: Tensor) -> tuple[Tensor, Tensor]:
    """A style's tokens (1 or B, N, D) and weights (N,), without tokens of weight 0."""
    tokens = style.tokens.to(like)
    if style.weights is None:
        return tokens, torch.ones(tokens.shape[1], device=like.device)
    weights = style.weights.to(like.device, torch.float32)
    kept = weights > 0
    return tokens[:, kept], weights[kept]


def attention_bias(spans: Sequence[Span], text: int, grid: tuple[int, int], length: int) -> Tensor | None:
    """The bias (1, 1, L, L) of guides' spans; None where none is weighed.

    Args:
        spans: Of style tokens, which lie before ``text``, and of references, which lie behind the image.
        text: T.
        grid: Rows and columns of image tokens, which begin at ``text``.
        length: L.
    """
    weighed = [span for span in spans if span.region is not None or bool((span.weights != 1).any())]
    if not weighed:
        return None
    bias = torch.zeros(length, length, device=weighed[0].weights.device)
    image = slice(text, text + grid[0] * grid[1])
    for span in weighed:
        own = slice(span.start, span.start + len(span.weights))
        before = bias[own, own].clone()
        bias[:, own] += span.weights.float().log()
        if span.region is not None:
            places = fitted(span.region, (grid[0] * PATCH, grid[1] * PATCH)).to(bias.device)
            inside = torch.nn.functional.avg_pool2d(places, PATCH).flatten().clamp(min=0)
            bias[image, own] += inside.log()[:, None]
            everywhere = inside.min().log()
            bias[: image.start, own] += everywhere
            bias[image.stop :, own] += everywhere
        bias[own, own] = before
    return bias[None, None]
