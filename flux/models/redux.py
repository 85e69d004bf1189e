"""FLUX.1 Redux (Black Forest Labs 2024): a vision tower's tokens to text tokens.

Parameter names are those of Black Forest Labs' file. Shapes: B batch, N patches.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.layers import TORCH_LAYERS, Layers
from ..specs.vision import ReduxSpec

__all__ = ["Redux"]

WIDENING = 3  # of the layer between, in widths of the text tokens


class Redux(nn.Module):
    """Hidden states (B, N, vision width) to tokens (B, N, text width) that stand behind a prompt's."""

    def __init__(self, spec: ReduxSpec, layers: Layers = TORCH_LAYERS) -> None:
        super().__init__()
        self.spec = spec
        self.redux_up = layers.Linear(spec.vision_width, WIDENING * spec.text_width)
        self.redux_down = layers.Linear(WIDENING * spec.text_width, spec.text_width)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.redux_down(F.silu(self.redux_up(hidden)))
        return out
