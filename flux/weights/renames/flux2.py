"""What files call the tensors of FLUX.2's transformers, which have weights and no biases.

Our names are those of Black Forest Labs' releases. Unlike with FLUX.1, diffusers keeps the single blocks' projections
fused, and the gate and the values of every feed-forward layer too.
"""

from __future__ import annotations

from .flux1 import NORM_ENDINGS, stream_rows
from .tables import Layout, Table, alternatives, native, pairs

__all__ = ["BFL", "DIFFUSERS"]

KINDS = ("weight",)

LAYERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
    "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.linear_in",
    "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.linear_out",
    "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.linear_in",
    "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.linear_out",
    "single_blocks.{}.linear1": "single_transformer_blocks.{}.attn.to_qkv_mlp_proj",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.attn.to_out",
    "final_layer.linear": "proj_out",
}

ROWS = (*pairs(LAYERS, KINDS), *stream_rows(KINDS))
BFL_ROWS = native(ROWS)

BFL = Layout(
    name="flux2-bfl",
    part="transformer",
    family="flux2",
    table=Table("FLUX.2 in Black Forest Labs' names", (*BFL_ROWS, *alternatives(BFL_ROWS, NORM_ENDINGS))),
    marks=("img_in.weight", "double_stream_modulation_img.lin.weight", "final_layer.linear.weight"),
)
DIFFUSERS = Layout(
    name="flux2-diffusers",
    part="transformer",
    family="flux2",
    table=Table("FLUX.2 in diffusers' names", ROWS),
    marks=("x_embedder.weight", "double_stream_modulation_img.linear.weight", "proj_out.weight"),
)
