"""The norms of queries and keys as the host's layers, so that its patches (LoRA) reach them wherever they are."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from ...flux.models.flux1 import NORM_EPS, HeadNorm, head_norm
from .compat import cast_once
from .weights import HostLayers

__all__ = ["host_state", "use_host_norms"]

SCALE, WEIGHT = "_norm.scale", "_norm.weight"  # Black Forest Labs' name of the parameter, and the host's


@cache
def norm_class(base: Any) -> Any:
    """A class of one of the host's RMS norms that computes as the engine's does."""

    class HostHeadNorm(base):  # type: ignore[misc]
        """``HeadNorm``, its weight where and as the host has it."""

        def forward(self, x: Tensor) -> Tensor:
            if not (self.comfy_cast_weights or self.weight_function):
                return head_norm(x, self.weight.to(x))
            with cast_once(self, x) as (weight, _):
                return head_norm(x, weight.to(x))

        def scale_for(self, x: Tensor) -> Tensor:
            """See ``HeadNorm``; a copy, for the host may take back what it brought."""
            if not (self.comfy_cast_weights or self.weight_function):
                return cast(Tensor, self.weight.to(x))
            with cast_once(self, x) as (weight, _):
                return weight.to(x, copy=True)

    return HostHeadNorm


def use_host_norms(module: nn.Module, layers: HostLayers) -> None:
    """Put the host's norms in the places of the engine's."""
    build = norm_class(layers.operations.RMSNorm)
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, HeadNorm):
                norm = build(len(child.scale), eps=NORM_EPS, dtype=layers.numbers.weights, device="meta")
                setattr(owner, name, norm)


def host_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the host's names of the norms' weights."""
    return {
        name.removesuffix(SCALE) + WEIGHT if name.endswith(SCALE) else name: tensor for name, tensor in state.items()
    }
