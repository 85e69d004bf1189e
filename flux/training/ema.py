"""Exponential moving average of a module's parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Ema"]


class Ema:
    """Averaged weights, kept beside the module that is trained.

    The decay warms up as (1 + n) / (10 + n) over the first updates, so that early averages are not the initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        mine, theirs = [], []
        for name, parameter in module.named_parameters():
            mine.append(self.weights[name])
            theirs.append(parameter.detach())
        torch._foreach_lerp_(mine, theirs, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Give the module the averaged weights."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.weights[name])

    def load(self, weights: Mapping[str, Tensor], updates: int) -> None:
        """Take up an average that was saved after ``updates`` updates."""
        self.weights = {name: weights[name].clone() for name in self.weights}
        self.updates = updates
