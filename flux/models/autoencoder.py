"""The FLUX autoencoder: pictures to latents of 1/8 the size, and back.

Parameter names are those of Black Forest Labs' ``ae.safetensors``. The skeleton is the convolutional autoencoder of
Latent Diffusion (Rombach et al. 2022) without quantisation convolutions.

Shapes: B batch, H and W in pixels, h = H / 8, w = W / 8, C latent channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.attention import attention
from ..specs.autoencoder import AutoencoderSpec

__all__ = ["Autoencoder", "Decoder", "Encoder"]

NORM_EPS = 1e-6


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

    def encode_mean(self, pixels: Tensor) -> Tensor:
        """Posterior mean (B, C, h, w) in the autoencoder's own space: no scale, no shift."""
        mean, _ = self.encoder(pixels).chunk(2, dim=1)
        return mean

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
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(spec.res_blocks):
                level.block.append(ResBlock(channels, width, spec.norm_groups))
                channels = width
            if index < len(widths) - 1:
                level.downsample = Downsample(channels)
            self.down.append(level)
        self.mid = middle(channels, spec.norm_groups)
        self.norm_out = group_norm(channels, spec.norm_groups)
        self.conv_out = nn.Conv2d(channels, 2 * spec.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        h = self.conv_in(pixels)
        for level in self.down:
            for block in level.block:
                h = block(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = run_middle(self.mid, h)
        moments: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return moments


class Decoder(nn.Module):
    """Latents (B, C, h, w) in the autoencoder's space to pixels (B, 3, H, W)."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        widths = [spec.base_channels * m for m in spec.channel_multipliers]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(spec.latent_channels, channels, 3, padding=1)
        self.mid = middle(channels, spec.norm_groups)
        levels = []
        for index in reversed(range(len(widths))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(spec.res_blocks + 1):
                level.block.append(ResBlock(channels, widths[index], spec.norm_groups))
                channels = widths[index]
            if index > 0:
                level.upsample = Upsample(channels)
            levels.insert(0, level)  # stored finest level first, run coarsest first
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(channels, spec.norm_groups)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = run_middle(self.mid, self.conv_in(latents))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        pixels: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return pixels


def middle(channels: int, groups: int) -> nn.Module:
    """The two residual blocks with attention between them, under the checkpoint's names."""
    mid = nn.Module()
    mid.block_1 = ResBlock(channels, channels, groups)
    mid.attn_1 = AttentionBlock(channels, groups)
    mid.block_2 = ResBlock(channels, channels, groups)
    return mid


def run_middle(mid: nn.Module, h: Tensor) -> Tensor:
    """Forward of ``middle``, which is only a namespace."""
    for name in ("block_1", "attn_1", "block_2"):
        h = mid.get_submodule(name)(h)
    return h


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
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
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
        h = self.norm(x)
        q, k, v = (
            conv(h).reshape(batch, 1, channels, height * width).transpose(2, 3) for conv in (self.q, self.k, self.v)
        )  # (B, 1, hw, C)
        h = attention(q, k, v).transpose(2, 3).reshape(batch, channels, height, width)
        out: Tensor = x + self.proj_out(h)
        return out


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
