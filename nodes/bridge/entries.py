"""CONDITIONING as a list of entries, and how a part is put into it for a time, in a region, with a strength.

The host's sampler runs a model once for every entry that is active at a step, and gives the mean of the predictions,
weighed by each entry's mask and strength. So a part that acts only for a while, somewhere, or not fully, is two entries
where there was one: with it, and without. Any MODEL and any sampler of the host's understands that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...flux.adapters.guides import check_span
from ...flux.errors import UserError

__all__ = ["END", "START", "STRENGTH", "Change", "Conditioning", "check_region", "with_part"]

Conditioning = list[list[Any]]
Extra = dict[str, Any]
Change = Callable[[Tensor, Extra], tuple[Tensor, Extra]]

START, END, MASK, MASK_STRENGTH, STRENGTH = "start_percent", "end_percent", "mask", "mask_strength", "strength"
NUDGE = 1e-4  # of a run: borders lie just before the step at that place, so that none of the two entries shares it


def with_part(
    conditioning: Conditioning,
    change: Change,
    *,
    start: float = 0.0,
    end: float = 1.0,
    share: float = 1.0,
    region: Tensor | None = None,
    without: Change | None = None,
) -> Conditioning:
    """A CONDITIONING with a part in every entry; nothing that came in is changed.

    Args:
        conditioning: Any node's.
        change: Gives an entry's text (1, T, D) and its dict with the part; gets a dict of its own.
        start: From when the part acts, as a fraction of the run.
        end: Until when.
        share: How much of the prediction is made with the part; the rest is made without it.
        region: MASK (B, H, W) of where in the picture the part acts; None for everywhere.
        without: What is done to entries in which it does not act, beside those in which it does; None for nothing.

    Raises:
        UserError: ``start`` is not before ``end``, or one is not in 0..1.
    """
    check_span(start, end)
    bare = _unchanged if without is None else without
    out: Conditioning = []
    for text, extra in conditioning:
        first, last = extra.get(START, 0.0), extra.get(END, 1.0)
        begins, ends = max(first, _border(start)), min(last, _border(end))
        if begins >= ends:
            out.append(list(bare(text, dict(extra))))
            continue
        if first < begins:
            out.append(list(bare(text, {**extra, START: first, END: begins})))
        timed = dict(extra) if (begins, ends) == (first, last) else {**extra, START: begins, END: ends}
        if share > 0:
            out.append(list(change(text, _weighed(timed, share, region, inside=True))))
        if share != 1 or region is not None:
            out.append(list(bare(text, _weighed(timed, share, region, inside=False))))
        if ends < last:
            out.append(list(bare(text, {**extra, START: ends, END: last})))
    return out


def check_region(region: Tensor | None, nowhere: str, pictures: int = 1) -> None:
    """Refuse a MASK that is no region.

    Args:
        region: (1 or pictures, H, W); None for everywhere.
        nowhere: What would come of a black one, for the message.
        pictures: How many pictures may have one each.

    Raises:
        UserError: Its shape is another one, or one of it is black everywhere.
    """
    if region is None:
        return
    if region.ndim != 3 or len(region) not in (1, pictures):
        each = "for every picture alike" if pictures == 1 else f"or one a picture, of which there are {pictures}"
        raise UserError(f"the region has shape {list(region.shape)}; give one mask (1, height, width), {each}")
    if not bool((region > 0).flatten(1).any(dim=1).all()):
        raise UserError(
            f"the region's mask is black everywhere, so {nowhere}; paint white where it is to act, invert the mask, or "
            "leave it open for everywhere"
        )


def _unchanged(text: Tensor, extra: Extra) -> tuple[Tensor, Extra]:
    return text, extra


def _border(moment: float) -> float:
    return moment if moment in (0.0, 1.0) else max(0.0, moment - NUDGE)


def _weighed(extra: Extra, share: float, region: Tensor | None, *, inside: bool) -> Extra:
    """An entry's dict with the weight of the part, or of what the part leaves."""
    if region is None:
        weight = share if inside else 1 - share
        return dict(extra) if weight == 1 else {**extra, STRENGTH: extra.get(STRENGTH, 1.0) * weight}
    weights = region.float() * share if inside else 1 - region.float() * share
    before = extra.get(MASK)
    if before is not None:
        weights = weights * _resized(before.float(), weights)
    return {**extra, MASK: weights, MASK_STRENGTH: extra.get(MASK_STRENGTH, 1.0)}


def _resized(mask: Tensor, like: Tensor) -> Tensor:
    """A mask (B, H, W) at the size of another."""
    mask = mask if mask.ndim == like.ndim else mask[None]
    if mask.shape[-2:] == like.shape[-2:]:
        return mask
    return torch.nn.functional.interpolate(mask[:, None], like.shape[-2:], mode="bilinear")[:, 0]
