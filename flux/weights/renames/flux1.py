"""What files call the tensors of FLUX.1's transformer.

Our names are those of Black Forest Labs' releases; diffusers has names of its own and keeps queries, keys and values
apart.
"""

from __future__ import annotations

from .tables import Change, Layout, Row, Table, alternatives, native, pairs

__all__ = ["BFL", "DIFFUSERS", "NORM_ENDINGS", "stream_rows"]

KINDS = ("weight", "bias")
NORM_ENDINGS = {"_norm.scale": "_norm.weight"}  # ComfyUI renames the former to the latter, and saves it so
LINEAR1_SHARES = (1, 1, 1, 4)  # queries, keys, values and the feed-forward layer, which is four times as wide

LAYERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "double_blocks.{}.img_mod.lin": "transformer_blocks.{}.norm1.linear",
    "double_blocks.{}.txt_mod.lin": "transformer_blocks.{}.norm1_context.linear",
    "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
    "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.net.2",
    "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.net.2",
    "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}.norm.linear",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
    "final_layer.linear": "proj_out",
}
# Ours gives shift, then scale; theirs scale, then shift.
SWAPPED_LAYERS = {"final_layer.adaLN_modulation.1": "norm_out.linear"}
NORMS = {
    "double_blocks.{}.img_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_q.weight",
    "double_blocks.{}.img_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_k.weight",
    "double_blocks.{}.txt_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_added_q.weight",
    "double_blocks.{}.txt_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_added_k.weight",
    "single_blocks.{}.norm.query_norm.scale": "single_transformer_blocks.{}.attn.norm_q.weight",
    "single_blocks.{}.norm.key_norm.scale": "single_transformer_blocks.{}.attn.norm_k.weight",
}
FUSED_LAYERS = {
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
    "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"),
}
LINEAR1 = tuple(
    f"single_transformer_blocks.{{}}.{layer}" for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
)


def stream_rows(kinds: tuple[str, ...]) -> tuple[Row, ...]:
    """Rows of what FLUX.1 and FLUX.2 share: norms, attention of the double blocks, the final modulation."""
    return (
        *(Row(ours, (theirs,)) for ours, theirs in NORMS.items()),
        *(
            Row(f"{ours}.{kind}", tuple(f"{part}.{kind}" for part in parts))
            for ours, parts in FUSED_LAYERS.items()
            for kind in kinds
        ),
        *pairs(SWAPPED_LAYERS, kinds, Change.SWAPPED),
    )


ROWS = (
    *pairs(LAYERS, KINDS),
    *stream_rows(KINDS),
    *(
        Row(f"single_blocks.{{}}.linear1.{kind}", tuple(f"{part}.{kind}" for part in LINEAR1), LINEAR1_SHARES)
        for kind in KINDS
    ),
)
BFL_ROWS = native(ROWS)

BFL = Layout(
    name="flux1-bfl",
    part="transformer",
    family="flux1",
    table=Table("FLUX.1 in Black Forest Labs' names", (*BFL_ROWS, *alternatives(BFL_ROWS, NORM_ENDINGS))),
    marks=(
        "img_in.weight",
        "vector_in.in_layer.weight",
        "double_blocks.0.img_mod.lin.weight",
        "final_layer.linear.weight",
    ),
)
DIFFUSERS = Layout(
    name="flux1-diffusers",
    part="transformer",
    family="flux1",
    table=Table("FLUX.1 in diffusers' names", ROWS),
    marks=(
        "x_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "transformer_blocks.0.norm1.linear.weight",
        "proj_out.weight",
    ),
)
