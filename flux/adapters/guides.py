"""What guides a run beside its prompt, encoded: further channels, text tokens and image tokens.

Every guide has a strength, a region of the picture where it acts, and a time.

Shapes: B batch, C latent channels, h and w in latent cells, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError
from .control_lora import ControlLora

__all__ = ["MAX_STRENGTH", "Channels", "Guide", "Reference", "StyleTokens", "check_span", "check_strength"]

MAX_STRENGTH = 2.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Guide:
    """What every guide has.

    Attributes:
        strength: 0 is nothing, 1 what the model was trained for.
        region: (1, 1, H, W) in 0..1, of any size: where in the picture it acts; None for everywhere.
        start: Where it begins, as a fraction of the schedule.
        end: Where it ends, likewise.
    """

    strength: float = 1.0
    region: Tensor | None = None
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_strength(self.strength)
        check_span(self.start, self.end)


def check_strength(strength: float) -> None:
    """Refuse a strength outside of 0..2.

    Raises:
        UserError: It is.
    """
    if not 0 <= strength <= MAX_STRENGTH:
        raise UserError(f"the strength is {strength:g}; give a number from 0 to {MAX_STRENGTH:g}, of which 1 is usual")


def check_span(start: float, end: float) -> None:
    """Refuse a time that is none.

    Raises:
        UserError: One is not in 0..1, or ``start`` is not before ``end``.
    """
    if not 0 <= start < end <= 1:
        raise UserError(
            f"it starts at {start:g} and ends at {end:g}; give fractions of the run, of which the first is smaller, "
            "as 0 and 0.5"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Channels(Guide):
    """Further input channels: what Fill repaints, or what a control model follows.

    A strength other than 1, or a region, blends the prediction with one that has no such guide, at the price of a
    second pass; only the strength of a control LoRA is its own, and costs nothing.

    Attributes:
        latents: (1 or B, C, h, w) in the transformer's space, as they stand behind the noisy latent's channels.
        lora: The control LoRA that takes them; None where a model itself does.
        model: Which of a run's further models takes them, by name; None for the run's own.
    """

    latents: Tensor
    lora: ControlLora | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class StyleTokens(Guide):
    """Tokens that stand behind the prompt's: what Redux makes of a picture.

    The strength weighs what every other token sees of them: ln(strength) is added to the attention's logits.

    Attributes:
        tokens: (1 or B, N, context width).
        weights: How much of each token (N,), 0..1; None for all of each.
    """

    tokens: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference(Guide):
    """A picture whose tokens stand behind the image's: a Kontext reference. Its strength acts as ``StyleTokens``'.

    Attributes:
        latents: (1 or B, C, h, w) in the transformer's space.
    """

    latents: Tensor
