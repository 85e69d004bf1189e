"""What steers a velocity: classifier-free guidance, and masks that keep a part of the latent as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .solvers import Velocity, widened

__all__ = ["MaskedVelocity", "masked", "true_cfg"]


def true_cfg(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: v = v_neg + scale (v_pos - v_neg) (Ho and Salimans 2022, in ComfyUI's form).

    For models without distilled guidance; no reference rescales or clips it.

    Args:
        positive: Velocity for the prompt.
        negative: Velocity for the negative prompt, of the same shape.
        scale: Strength. 1 gives ``positive`` exactly and needs no negative pass at all, 0 gives ``negative``.

    Returns:
        Velocity of the same shape, at least fp32: guidance enlarges a small difference.
    """
    positive, negative = widened(positive), widened(negative)
    return positive if scale == 1 else negative + scale * (positive - negative)


def masked(velocity: Velocity, mask: Tensor, clean: Tensor, noise: Tensor) -> MaskedVelocity:
    """Wrap a velocity so that a part of the latent stays: ComfyUI's latent ``noise_mask`` on flow models.

    Args:
        velocity: The model.
        mask: 1 where the picture is made anew, 0 where it stays, and between; broadcastable to the latent.
        clean: The latent to keep.
        noise: The noise that the run started from.

    Returns:
        A velocity for any solver, at sigmas above 0. A run to sigma 0 ends in ``clean``, bit for bit, where the mask
        is 0; wrapped in something that hides ``anchor``, only up to rounding.
    """
    return MaskedVelocity(velocity=velocity, mask=widened(mask), clean=widened(clean), noise=widened(noise))


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskedVelocity:
    """A velocity whose kept part follows the straight line from the run's noise to the clean latent.

    The model sees x m + ((1 - t) clean + t noise) (1 - m), its data estimate D becomes D m + clean (1 - m), and the
    velocity is (x - D) / t (KSamplerX0Inpaint in ComfyUI's comfy/samplers.py).

    Attributes:
        velocity: The model.
        mask: m, 1 where the picture is made anew.
        clean: The latent to keep.
        noise: The noise that the run started from.
    """

    velocity: Velocity
    mask: Tensor
    clean: Tensor
    noise: Tensor

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor:
        noised = (1 - sigma) * self.clean + sigma * self.noise
        seen = x * self.mask + noised * (1 - self.mask)
        data = seen - sigma * widened(self.velocity(seen, sigma))
        data = data * self.mask + self.clean * (1 - self.mask)
        return (x - data) / sigma

    def anchor(self, data: Tensor) -> Tensor:
        """The data estimate with ``clean`` itself where the mask is 0."""
        return torch.where(self.mask == 0, self.clean.to(data.dtype), data)
