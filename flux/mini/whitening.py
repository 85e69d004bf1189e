"""Even out the latents' spread, inside the autoencoder's own weights.

Trained for pixels alone, most of the latents' variance lies along two or three directions (the colours of large areas),
and what tells a star from a circle has a tenth of it, where a diffusion model at most times sees only noise. A linear
map between encoder and decoder shrinks the difference. It is folded into the convolutions on either side of the
latents, so that the file keeps its layout and the pictures stay what they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.autoencoder import Autoencoder

__all__ = ["evening_map", "fold_map"]

LEAST_VARIANCE = 1e-6  # of the largest
EXPONENT = 0.25  # variances become their fourth root: 1 would leave them, 0 would make all equal


def evening_map(latents: Tensor, exponent: float = EXPONENT) -> tuple[Tensor, Tensor]:
    """The map ``z -> matrix (z - mean)`` that takes every principal variance to its power, mean variance 1.

    Args:
        latents: Samples (N, C, h, w) in the transformer's space.
        exponent: Of the variances.

    Returns:
        ``matrix`` (C, C), symmetric, and ``mean`` (C,).
    """
    samples = latents.cpu().double().permute(1, 0, 2, 3).flatten(1)  # not every device has fp64
    mean = samples.mean(dim=1)
    variances, directions = torch.linalg.eigh(torch.cov(samples))
    variances = variances.clamp_min(LEAST_VARIANCE * variances.max())  # degenerate directions may come out below zero
    wanted = variances**exponent
    gains = (wanted / wanted.mean() / variances).sqrt()
    return (directions * gains @ directions.T).float().to(latents.device), mean.float().to(latents.device)


@torch.no_grad()
def fold_map(autoencoder: Autoencoder, matrix: Tensor, mean: Tensor) -> None:
    """Make the encoder give mapped latents and the decoder take them, in place.

    The decoder pads its input with zeros, which mean something else after the map, so the outermost cells change a
    little; training the decoder further takes care of it.
    """
    spec = autoencoder.spec
    channels = spec.latent_channels
    shift = torch.full((channels,), spec.shift, device=matrix.device)
    inverse = torch.linalg.inv(matrix.cpu().double()).float().to(matrix.device)
    out = autoencoder.encoder.conv_out
    assert out.bias is not None
    out.weight[:channels] = torch.einsum("ij,jklm->iklm", matrix, out.weight[:channels])
    out.bias[:channels] = matrix @ (out.bias[:channels] - shift - mean / spec.scale) + shift
    conv = autoencoder.decoder.conv_in
    assert conv.bias is not None
    constant = shift + mean / spec.scale - inverse @ shift
    conv.bias += torch.einsum("oikl,i->o", conv.weight, constant)
    conv.weight.copy_(torch.einsum("oikl,ij->ojkl", conv.weight, inverse))
