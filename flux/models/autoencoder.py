"""The FLUX autoencoder: pictures to latents of 1/8 the size, and back.

Parameter names are those of Black Forest Labs' ``ae.safetensors``. The skeleton is the convolutional autoencoder of
Latent Diffusion (Rombach et al. 2022) without quantisation convolutions.

Shapes: B batch, H and W in pixels, h = H / 8, w = W / 8, C latent channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.attention import attention
from ..specs.autoencoder import AutoencoderSpec

__all__ = ["Autoencoder", "Decoder", "Encoder"]

NORM_EPS = 1e-6
LOG_VARIANCES = (-30.0, 20.0)  # to which the posterior's are cut before a sample is drawn, as diffusers does


class Autoencoder(nn.Module):
    """Encoder and decoder with the affine map between the decoder's latents and the transformer's."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w), taking the posterior's mean."""
        return self.to_model(self.encode_mean(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to pictures (B, 3, H, W), nominally in [-1, 1] and not clamped."""
        return self.decode_mean(self.from_model(latents))

    def encode_sample(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """As ``encode``, but a sample of the posterior, drawn on the CPU in fp32."""
        return self.sample_of(self.encoder(pixels), generator)

    def sample_of(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents drawn from the posterior with these means and log-variances (B, 2C, h, w)."""
        mean, log_variance = moments.chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        return self.to_model(mean + (log_variance.clamp(*LOG_VARIANCES) / 2).exp() * noise)

    def encode_mean(self, pixels: Tensor) -> Tensor:
        """Posterior mean (B, C, h, w) in the autoencoder's own space: no scale, no shift."""
        moments: Tensor = self.encoder(pixels)
        return moments.chunk(2, dim=1)[0]

    def decode_mean(self, latents: Tensor) -> Tensor:
        """Pictures from latents in the autoencoder's own space."""
        pixels: Tensor = self.decoder(latents)
        return pixels

    def to_model(self, latents: Tensor) -> Tensor:
        """From the autoencoder's space to the transformer's: ``scale * (z - shift)``."""
        return self.spec.scale * (latents - self.spec.shift)

    def from_model(self, latents: Tensor) -> Tensor:
        """From the transformer's space to the autoencoder's: ``z / scale + shift``."""
        return latents / self.spec.scale + self.spec.shift


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) to mean and log-variance (B, 2C, h, w)."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        widths = [spec.base_channels * m for m in spec.channel_multipliers]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        channels = widths[0]
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            self.down.append(DownLevel(channels, width, spec, downsample=not last))
            channels = width
        self.mid = Middle(channels, spec.norm_groups)
        self.norm_out = group_norm(channels, spec.norm_groups)
        self.conv_out = nn.Conv2d(channels, 2 * spec.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        h = self.conv_in(pixels)
        for level in self.down:
            h = level(h)
        moments: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return moments


class Decoder(nn.Module):
    """Latents (B, C, h, w) in the autoencoder's space to pixels (B, 3, H, W)."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        widths = [spec.base_channels * m for m in spec.channel_multipliers]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(spec.latent_channels, channels, 3, padding=1)
        self.mid = Middle(channels, spec.norm_groups)
        levels: list[UpLevel] = []
        for index, width in reversed(list(enumerate(widths))):
            levels.insert(0, UpLevel(channels, width, spec, upsample=index > 0))
            channels = width
        self.up = nn.ModuleList(levels)  # stored finest level first, run coarsest first
        self.norm_out = group_norm(channels, spec.norm_groups)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            h = level(h)
        pixels: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return pixels


class DownLevel(nn.Module):
    """One resolution of the encoder."""

    def __init__(self, channels: int, width: int, spec: AutoencoderSpec, *, downsample: bool) -> None:
        super().__init__()
        inputs = [channels] + [width] * (spec.res_blocks - 1)
        self.block = nn.ModuleList(ResBlock(c, width, spec.norm_groups) for c in inputs)
        self.downsample = Downsample(width) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class UpLevel(nn.Module):
    """One resolution of the decoder, with a block more than the encoder has."""

    def __init__(self, channels: int, width: int, spec: AutoencoderSpec, *, upsample: bool) -> None:
        super().__init__()
        inputs = [channels] + [width] * spec.res_blocks
        self.block = nn.ModuleList(ResBlock(c, width, spec.norm_groups) for c in inputs)
        self.upsample = Upsample(width) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class Middle(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, around a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        skip = x if self.nin_shortcut is None else self.nin_shortcut(x)
        out: Tensor = skip + h
        return out


class AttentionBlock(nn.Module):
    """Single-head attention over all positions; q, k, v and the output are 1x1 convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = attention(*self.heads(self.norm(x))).transpose(2, 3).reshape(batch, channels, height, width)
        out: Tensor = x + self.proj_out(h)
        return out

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, 1, hw, C) of normed maps (B, C, h, w), each position's numbers side by side.

        Fused attention asks for that; without it torch writes out all logits, which are hw times hw.
        """
        batch, channels = h.shape[:2]
        q, k, v = (
            conv(h).reshape(batch, 1, channels, -1).transpose(2, 3).contiguous() for conv in (self.q, self.k, self.v)
        )
        return q, k, v


class Downsample(nn.Module):
    """Halve the size: zeros to the right and below, then a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class Upsample(nn.Module):
    """Double the size: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled
