"""Which predictions make up a step when guides have strengths, regions and times, and with what weights.

Guides that act through attention or through a LoRA take part in one prediction together. Guides that fill a model's
input channels exclude each other, and have no strength in the weights: several, or one at less than full strength, are
a weighted mean of predictions. With v_i of guides with strengths s_i (times their regions), and v_0 without any:

    v = (sum_i s_i v_i + max(0, 1 - sum_i s_i) v_0) / max(1, sum_i s_i)

A single guide with a strength above 1 goes beyond its prediction instead: v = v_0 + s (v_1 - v_0). Where only further
models have such guides, and the run's own model follows control LoRAs, v_0 is counted as one of them with strength 1. A
control LoRA with a region parts each of the own model's predictions in one with and one without it.

Shapes: h and w in latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        counted: Whether a prediction without any of these takes part like one of them, for it follows control LoRAs.
        inside: Control LoRAs with a region that it follows: it counts where that is.
        outside: Those that it does not follow: it counts where theirs is not.
    """

    guides: tuple[Guide, ...]
    start: float
    end: float
    own: Channels | None = None
    others: tuple[Channels, ...] = ()
    counted: bool = False
    inside: tuple[Channels, ...] = ()
    outside: tuple[Channels, ...] = ()

    def covers(self, fraction: float) -> bool:
        """Whether it takes part at a moment of the schedule."""
        moment = fraction + ROUNDING  # what a step begins at is its own, from whichever side it is rounded
        return self.start <= moment and (moment < self.end or self.end == 1)

    @property
    def model(self) -> str | None:
        """Which of a run's models makes it; None for the run's own."""
        return None if self.own is None else self.own.model

    def weight(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """Its weight (1, 1, h, w) or () in a picture of h x w latent cells."""
        weight = self._share(size, device)
        for guide in self.inside:
            weight = weight * _place(guide, size, device)
        for guide in self.outside:
            weight = weight * (1 - _place(guide, size, device))
        return weight

    def _share(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """Its share among guides that fill channels."""
        shares = [guide.strength * _place(guide, size, device) for guide in self.others]
        alone = len(shares) == 1 and not self.counted
        total = sum(shares, torch.full((), float(self.counted), device=device))
        if self.own is None:
            rest = torch.ones((), device=device) if self.counted else 1 - total
            return rest / total.clamp(min=1) if self.counted else rest if alone else rest.clamp(min=0)
        share = self.own.strength * _place(self.own, size, device)
        return share if alone else share / total.clamp(min=1)


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
    channels = [guide for guide in active if isinstance(guide, Channels)]
    sharing = tuple(guide for guide in channels if guide.lora is None)
    loras = tuple(guide for guide in channels if guide.lora is not None)
    common = tuple(guide for guide in active if guide not in channels)
    everywhere = tuple(guide for guide in loras if guide.region is None)
    counted = bool(loras) and bool(sharing) and all(guide.model is not None for guide in sharing)
    made = []
    for guide in sharing:
        followed = everywhere if guide.model is None else ()  # LoRAs are the run's own model's
        made.append(Prediction((*common, *followed, guide), start, end, guide, sharing, counted))
    if counted or _leaves_rest(sharing):
        made.append(Prediction((*common, *everywhere), start, end, None, sharing, counted))
    local = [guide for guide in loras if guide.region is not None]
    return [parted for one in made for parted in (_parted(one, local) if one.model is None else [one])]


def _parted(prediction: Prediction, local: Sequence[Channels]) -> list[Prediction]:
    """A prediction with and without each LoRA that acts in a region only."""
    parts = [prediction]
    for guide in local:
        parts = [
            new
            for part in parts
            for new in (
                replace(part, guides=(*part.guides, guide), inside=(*part.inside, guide)),
                replace(part, outside=(*part.outside, guide)),
            )
        ]
    return parts


def _leaves_rest(sharing: Sequence[Channels]) -> bool:
    """Whether guides that share leave a part to a prediction without them."""
    strengths = [guide.strength for guide in sharing]
    local = any(guide.region is not None for guide in sharing)
    return local or (strengths != [1.0] if len(strengths) == 1 else sum(strengths) < 1)


def _place(guide: Guide, size: tuple[int, int], device: torch.device) -> Tensor:
    """Where a guide acts, () or by place (1, 1, h, w)."""
    return torch.ones((), device=device) if guide.region is None else fitted(guide.region, size).to(device)


def fitted(region: Tensor, size: tuple[int, int]) -> Tensor:
    """A region (1, 1, H, W) at another size: each place's mean where it shrinks, so that it does not bleed."""
    if region.shape[-2:] == size:
        return region.float()
    if region.shape[-2] >= size[0] and region.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(region.float(), size)
    return F.interpolate(region.float(), size, mode="bilinear")
