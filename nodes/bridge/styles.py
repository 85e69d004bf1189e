"""Style tokens in a CONDITIONING, in the host's own form: behind the prompt's, and weighed by an attention mask.

The mask is a bias on the attention's logits of all text and image tokens, the image's on a grid that the model
stretches to the run's. The host's StyleModelApply reads and writes the same, so that both chain in any order. What is
ours is remembered beside it, so that the order of ours makes no difference.

Shapes: T text tokens, I image tokens of the mask's grid, N tokens of a style, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...flux.adapters.attending import Span, attention_bias
from ...flux.errors import UserError

__all__ = [
    "ATTENTION", "MASK", "MASK_GRID", "NEVER", "STRENGTH_MODES", "STYLES", "TOKENS", "Style", "append_styles",
    "grid_of",
]  # fmt: skip

ATTENTION, TOKENS = STRENGTH_MODES = ("attention", "tokens")  # what a style's strength acts on
MASK, MASK_GRID = "attention_mask", "attention_mask_img_shape"  # the host's keys in a CONDITIONING
STYLES = "fluxfoundry_styles"  # ours: a ``Placed``
# In place of minus infinity, of which the host's interpolation makes NaN where a weight is 0. No logit is so large,
# and fp16, which the host's own style node writes masks in, holds it exactly.
NEVER = -10_000.0
MASK_DTYPE = torch.float16
TOKEN_SIDE = 16  # pixels along an image token's side
MAX_CELLS = 64 * 64  # of a mask's grid: tokens of a picture of 1024x1024, at which a mask takes some 60 MB
ANY_GRID = (1, 1)  # of a mask that weighs all of the picture alike

Grid = tuple[int, int]
Extra = dict[str, Any]
Stretch = Callable[[Tensor, Grid, Grid], Tensor]


@dataclass(frozen=True, eq=False)
class Style:
    """What is taken over of one picture.

    Attributes:
        tokens: (1, N, D).
        weights: (N,), all above 0: how much the other tokens look at each, where 1 is what the model was trained for.
        region: (1, 1, H, W) in 0..1: where in the output it acts; None for everywhere.
    """

    tokens: Tensor
    weights: Tensor
    region: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Placed:
    """Our styles in a text.

    Attributes:
        prompt: How many tokens stood before the first.
        spans: Where they are, and how they are weighed.
    """

    prompt: int
    spans: tuple[Span, ...]


def append_styles(text: Tensor, extra: Extra, styles: Sequence[Style], stretch: Stretch) -> tuple[Tensor, Extra]:
    """An entry of a CONDITIONING with styles behind its text; what came in is not changed.

    Args:
        text: (B, T, D).
        extra: Its dict.
        styles: In any order.
        stretch: Gives a mask (B, T + I, T + I) for another grid: from which, to which; the host's own function.

    Raises:
        UserError: The entry has an attention mask of another length.
    """
    before = extra.get(STYLES) or Placed(text.shape[1], ())
    spans, parts, behind = list(before.spans), [text], text.shape[1]
    for style in styles:
        spans.append(Span(behind, style.weights.to(text.device, torch.float32), style.region))
        parts.append(style.tokens.to(text).expand(len(text), -1, -1))
        behind += len(style.weights)
    placed = Placed(before.prompt, tuple(spans))
    joined, out = torch.cat(parts, dim=1), {**extra, STYLES: placed}
    masked = _mask(placed, text.shape[1], joined.shape[1], _known_mask(extra, text.shape[1]), stretch)
    if masked is not None:
        out[MASK], out[MASK_GRID] = masked
    return joined, out


def grid_of(region: Tensor) -> Grid:
    """The grid of image tokens of a picture of a region's size (1, 1, H, W), made coarser where it is very large.

    Where the output has the region's size nothing is interpolated.
    """
    rows, columns = (math.ceil(side / TOKEN_SIDE) for side in region.shape[-2:])
    share = min(1.0, math.sqrt(MAX_CELLS / (rows * columns)))
    return max(1, math.floor(rows * share)), max(1, math.floor(columns * share))


def _known_mask(extra: Extra, text: int) -> tuple[Tensor, Grid] | None:
    """The mask (B, T + I, T + I) that an entry has, as a finite bias, and its grid; None where FLUX would see none."""
    mask, grid = extra.get(MASK), extra.get(MASK_GRID)
    if mask is None or grid is None:
        return None
    mask = mask if mask.ndim == 3 else mask[None]
    rows, columns = grid
    if mask.shape[-1] != text + rows * columns:
        raise UserError(
            f"the CONDITIONING has {text} text tokens, but its attention mask is made for "
            f"{mask.shape[-1] - rows * columns}: a node between changed one of them; put nodes that join texts, as "
            "Conditioning (Concat), before those that add styles"
        )
    bias = torch.where(mask, 0.0, NEVER) if mask.dtype == torch.bool else mask.float().clamp(min=NEVER)
    return bias, (rows, columns)


def _mask(
    placed: Placed, before: int, text: int, known: tuple[Tensor, Grid] | None, stretch: Stretch
) -> tuple[Tensor, Grid] | None:
    """The mask (B, T + I, T + I) of a text that grew from ``before`` to T, and its grid; None where all counts alike.

    Columns of our own tokens are computed anew, so that those added later weigh the earlier ones too, on a finer grid
    if there is one; all others are kept.
    """
    old_grid = ANY_GRID if known is None else known[1]
    regions = [span.region for span in placed.spans if span.region is not None]
    grid = max([old_grid, *map(grid_of, regions)], key=lambda g: (g[0] * g[1], g))
    length = text + grid[0] * grid[1]
    own = attention_bias(placed.spans, text, grid, length)
    if known is None and own is None:
        return None
    if known is None:
        mask = torch.zeros(1, length, length, dtype=MASK_DTYPE, device=placed.spans[0].weights.device)
    else:
        mask = _widened(stretch(known[0], old_grid, grid), before, text)
    for span in placed.spans:
        columns = slice(span.start, span.start + len(span.weights))
        mask[:, :, columns] = 0 if own is None else own[0, 0, :, columns].clamp(min=NEVER).to(mask)
    return mask, grid


def _widened(mask: Tensor, before: int, text: int) -> Tensor:
    """A mask with room for tokens between its text and its image, which are neither weighed nor weigh others."""
    more = text - before
    out = mask.new_zeros(len(mask), mask.shape[1] + more, mask.shape[2] + more, dtype=MASK_DTYPE)
    old_parts, new_parts = (slice(None, before), slice(before, None)), (slice(None, before), slice(text, None))
    for old_rows, new_rows in zip(old_parts, new_parts, strict=True):
        for old_columns, new_columns in zip(old_parts, new_parts, strict=True):
            out[:, new_rows, new_columns] = mask[:, old_rows, old_columns].to(MASK_DTYPE)
    return out
