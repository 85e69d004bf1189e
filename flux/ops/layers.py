"""The layers that models are built from, as an argument.

A model takes a ``Layers`` and never names ``torch.nn`` for a layer with weights, so that a host (or a quantised format)
can supply layers that bring their weights when they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

from torch import nn

__all__ = ["TORCH_LAYERS", "Layers"]


class Layers(Protocol):
    """Constructors with ``torch.nn``'s signatures."""

    @property
    def Linear(self) -> Callable[..., nn.Module]: ...  # noqa: D102, N802
    @property
    def Embedding(self) -> Callable[..., nn.Module]: ...  # noqa: D102, N802
    @property
    def LayerNorm(self) -> Callable[..., nn.Module]: ...  # noqa: D102, N802


TORCH_LAYERS = cast(Layers, nn)
