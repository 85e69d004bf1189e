"""Which predictions make up a step when guides have strengths, regions and times, and with what weights.

Guides that act through attention or through a LoRA take part in one prediction together. Guides that fill a model's
input channels exclude each other, and have no strength in the weights: several, or one at less than full strength, are
a weighted mean of predictions. With v_i of guides with strengths s_i (times their regions), and v_0 without any:

    v = (sum_i s_i v_i + max(0, 1 - sum_i s_i) v_0) / max(1, sum_i s_i)

A single guide with a strength above 1 goes beyond its prediction instead: v = v_0 + s (v_1 - v_0).

Shapes: h and w in latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from .guides import Channels, Guide

__all__ = ["Prediction", "fitted", "predictions_of"]

ENDS = (0.0, 1.0)
ROUNDING = 1e-6  # of a moment: schedules are computed in floats, by hosts in fp32, and a step is far longer


@dataclass(frozen=True, eq=False)
class Prediction:
    """One pass of a model that takes part in a step.

    Attributes:
        guides: What it is given.
        start: From when, as a fraction of the schedule.
        end: Until when; not at this moment itself, but for 1.
        own: Its share: the guide whose strength and region give it, None for what the others leave.
        others: The guides that it shares with.
    """

    guides: tuple[Guide, ...]
    start: float
    end: float
    own: Guide | None = None
    others: tuple[Guide, ...] = ()

    def covers(self, fraction: float) -> bool:
        """Whether it takes part at a moment of the schedule."""
        moment = fraction + ROUNDING  # what a step begins at is its own, from whichever side it is rounded
        return self.start <= moment and (moment < self.end or self.end == 1)

    @property
    def model(self) -> str | None:
        """Which of a run's models makes it; None for the run's own."""
        return self.own.model if isinstance(self.own, Channels) else None

    def weight(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """Its weight (1, 1, h, w) or () in a picture of h x w latent cells."""
        shares = [_share(guide, size, device) for guide in self.others]
        total = sum(shares, torch.zeros((), device=device))
        if self.own is None:
            rest = 1 - total
            return rest if len(shares) == 1 else rest.clamp(min=0)
        share = _share(self.own, size, device)
        return share if len(shares) == 1 else share / total.clamp(min=1)


def predictions_of(guides: Sequence[Guide]) -> tuple[Prediction, ...]:
    """Every prediction of a run; at each moment the weights of those that cover it add up to 1.

    Args:
        guides: In any order; those with strength 0 are left out.
    """
    present = [guide for guide in guides if guide.strength > 0]
    moments = sorted({*ENDS, *(moment for guide in present for moment in (guide.start, guide.end))})
    found: list[Prediction] = []
    for start, end in pairwise(moments):
        active = [guide for guide in present if guide.start <= start and guide.end >= end]
        found += _shared(active, start, end)
    return tuple(found)


def _shared(active: Sequence[Guide], start: float, end: float) -> list[Prediction]:
    """The predictions of a stretch of time in which these guides act."""
    sharing = tuple(
        guide for guide in active if isinstance(guide, Channels) and (guide.lora is None or _is_local(guide))
    )
    common = tuple(guide for guide in active if guide not in sharing)
    if not sharing:
        return [Prediction(common, start, end)]
    made = [Prediction((*common, guide), start, end, guide, sharing) for guide in sharing]
    if any(_is_local(guide) for guide in sharing) or _leaves_rest(sharing):
        made.append(Prediction(common, start, end, None, sharing))
    return made


def _leaves_rest(sharing: Sequence[Channels]) -> bool:
    """Whether guides that act everywhere leave a part to a prediction without them."""
    strengths = [_strength(guide) for guide in sharing]
    return strengths != [1.0] if len(strengths) == 1 else sum(strengths) < 1


def _is_local(guide: Guide) -> bool:
    return guide.region is not None


def _strength(guide: Guide) -> float:
    """What a guide's share is where it acts: a LoRA has its strength in the weights."""
    return 1.0 if isinstance(guide, Channels) and guide.lora is not None else guide.strength


def _share(guide: Guide, size: tuple[int, int], device: torch.device) -> Tensor:
    """A guide's strength, () or by place (1, 1, h, w)."""
    share = torch.tensor(_strength(guide), device=device)
    return share if guide.region is None else share * fitted(guide.region, size).to(device)


def fitted(region: Tensor, size: tuple[int, int]) -> Tensor:
    """A region (1, 1, H, W) at another size: each place's mean where it shrinks, so that it does not bleed."""
    if region.shape[-2:] == size:
        return region.float()
    if region.shape[-2] >= size[0] and region.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(region.float(), size)
    return F.interpolate(region.float(), size, mode="bilinear")
