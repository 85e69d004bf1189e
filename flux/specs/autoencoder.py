"""What each FLUX autoencoder is.

The rows hold every number that the convolutional skeleton needs, so that the model code reads fields and never a name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["AUTOENCODERS", "RECOGNISED_AUTOENCODERS", "AutoencoderSpec"]


@dataclass(frozen=True, kw_only=True)
class AutoencoderSpec:
    """One autoencoder of the FLUX layout.

    Attributes:
        base_channels: Channels of the first resolution level.
        channel_multipliers: Channels of each level as multiples of ``base_channels``, finest level first.
        res_blocks: Residual blocks a level in the encoder; the decoder has one more.
        latent_channels: Channels of the latent; the encoder emits twice as many (mean and log-variance).
        norm_groups: Groups of every GroupNorm.
        scale: Factor of ``z = scale * (mean - shift)``.
        shift: Offset of the same.
        batch_norm: Whether the latent is normalised by a mean and a variance for each channel of its 2x2 patches, which
            the weights hold, in place of scale and shift, and stands between two 1x1 convolutions.
    """

    name: str
    base_channels: int
    channel_multipliers: tuple[int, ...]
    res_blocks: int
    latent_channels: int
    norm_groups: int
    scale: float
    shift: float
    batch_norm: bool = False

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent cell."""
        return 1 << (len(self.channel_multipliers) - 1)


FLUX1 = AutoencoderSpec(
    name="flux1-ae",
    base_channels=128,
    channel_multipliers=(1, 2, 4, 4),
    res_blocks=2,
    latent_channels=16,
    norm_groups=32,
    scale=0.3611,
    shift=0.1159,
)

MINI = replace(
    FLUX1,
    name="flux1-mini-ae",
    base_channels=16,
    channel_multipliers=(1, 2, 3, 4),
    res_blocks=1,
    norm_groups=8,
)

FLUX2 = replace(FLUX1, name="flux2-vae", latent_channels=32, scale=1.0, shift=0.0, batch_norm=True)

AUTOENCODERS: dict[str, AutoencoderSpec] = {spec.name: spec for spec in (FLUX1, MINI)}
RECOGNISED_AUTOENCODERS: dict[str, AutoencoderSpec] = {**AUTOENCODERS, FLUX2.name: FLUX2}  # the last is not run yet
