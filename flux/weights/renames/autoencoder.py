"""What files call the tensors of the FLUX.1 autoencoder and of the FLUX.2 VAE.

Our names are those of Black Forest Labs' releases. diffusers counts the decoder's levels from the coarsest, and its
middle attention has linear layers in place of 1x1 convolutions. The FLUX.2 VAE has two more convolutions around the
latent, which ComfyUI and diffusers keep outside encoder and decoder, and statistics of the latent.
"""

from __future__ import annotations

from .tables import Change, Layout, Row, Table, native, pairs

__all__ = ["BFL", "DIFFUSERS", "FLUX2_BFL", "FLUX2_DIFFUSERS"]

KINDS = ("weight", "bias")
PREFIXES = ("first_stage_model.", "vae.", "")

LEVELS = {"encoder.down.{}": "encoder.down_blocks.{}", "decoder.up.{}": "decoder.up_blocks.{-}"}
RESAMPLERS = {
    "encoder.down.{}.downsample.conv": "encoder.down_blocks.{}.downsamplers.0.conv",
    "decoder.up.{}.upsample.conv": "decoder.up_blocks.{-}.upsamplers.0.conv",
}
BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
MIDDLE = {"mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1"}
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
SIDES = ("encoder", "decoder")


def skeleton() -> tuple[Row, ...]:
    """Rows of what both autoencoders have."""
    attention = {f"{side}.mid.attn_1": f"{side}.mid_block.attentions.0" for side in SIDES}
    blocks = {f"{ours}.block.{{}}": f"{theirs}.resnets.{{}}" for ours, theirs in LEVELS.items()}
    middle = {f"{side}.{ours}": f"{side}.{theirs}" for side in SIDES for ours, theirs in MIDDLE.items()}
    projections = _below(attention, PROJECTIONS)
    return (
        *pairs({f"{side}.{ours}": f"{side}.{theirs}" for side in SIDES for ours, theirs in ENDS.items()}, KINDS),
        *pairs(_below(blocks | middle, BLOCK), KINDS),
        *pairs(RESAMPLERS, KINDS),
        *pairs(_below(attention, {"norm": "group_norm"}), KINDS),
        *pairs(projections, ("weight",), Change.LINEAR),
        *pairs(projections, ("bias",)),
    )


def _below(layers: dict[str, str], names: dict[str, str]) -> dict[str, str]:
    """Every layer's names with each of those below it."""
    return {
        f"{our_layer}.{ours}": f"{their_layer}.{theirs}"
        for our_layer, their_layer in layers.items()
        for ours, theirs in names.items()
    }


OUTSIDE = {"encoder.quant_conv": "quant_conv", "decoder.post_quant_conv": "post_quant_conv"}
STATISTICS = tuple(Row(name, (name,)) for name in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"))

ROWS = skeleton()
FLUX2_ROWS = (*ROWS, *pairs(OUTSIDE, KINDS), *STATISTICS)

BFL_MARKS = ("decoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight")
DIFFUSERS_MARKS = (
    "decoder.conv_in.weight",
    "encoder.down_blocks.0.resnets.0.conv1.weight",
    "decoder.up_blocks.0.resnets.0.conv1.weight",
)
STATISTICS_MARK = "bn.running_mean"
NOT_FLUX1 = ("quant_conv.weight", "encoder.quant_conv.weight", STATISTICS_MARK)  # Stable Diffusion's has the first

BFL = Layout(
    name="flux1-ae-bfl",
    part="autoencoder",
    family="flux1",
    table=Table("the FLUX.1 autoencoder in Black Forest Labs' names", native(ROWS)),
    marks=BFL_MARKS,
    absent=NOT_FLUX1,
    prefixes=PREFIXES,
)
DIFFUSERS = Layout(
    name="flux1-ae-diffusers",
    part="autoencoder",
    family="flux1",
    table=Table("the FLUX.1 autoencoder in diffusers' names", ROWS),
    marks=DIFFUSERS_MARKS,
    absent=NOT_FLUX1,
    prefixes=PREFIXES,
)
FLUX2_BFL = Layout(
    name="flux2-vae-bfl",
    part="autoencoder",
    family="flux2",
    table=Table("the FLUX.2 VAE in Black Forest Labs' names", (*native(FLUX2_ROWS), *pairs(OUTSIDE, KINDS))),
    marks=(*BFL_MARKS, STATISTICS_MARK),
    prefixes=PREFIXES,
)
FLUX2_DIFFUSERS = Layout(
    name="flux2-vae-diffusers",
    part="autoencoder",
    family="flux2",
    table=Table("the FLUX.2 VAE in diffusers' names", FLUX2_ROWS),
    marks=(*DIFFUSERS_MARKS, STATISTICS_MARK),
    prefixes=PREFIXES,
)
