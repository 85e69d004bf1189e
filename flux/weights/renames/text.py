"""What files call the tensors of FLUX.1's text encoders.

Our names are those of Hugging Face's files. Whole CLIP and T5 models are accepted for the encoder in them.
"""

from __future__ import annotations

from .tables import Layout, Row, Table, left_out, native, pairs

__all__ = ["CLIP", "CLIP_BARE", "T5", "T5_GGUF"]

CLIP_PREFIXES = ("text_encoders.clip_l.transformer.", "")
T5_PREFIXES = ("text_encoders.t5xxl.transformer.", "")

TOWER = "text_model."  # a level that transformers 5 leaves out of what it saves
CLIP_LAYERS = tuple(
    f"encoder.layers.{{}}.{layer}"
    for layer in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm1", "layer_norm2",
        "mlp.fc1", "mlp.fc2",
    )
)  # fmt: skip
CLIP_ROWS = (
    *pairs({TOWER + layer: layer for layer in (*CLIP_LAYERS, "final_layer_norm")}, ("weight", "bias")),
    *pairs(
        {TOWER + f"embeddings.{kind}_embedding": f"embeddings.{kind}_embedding" for kind in ("token", "position")},
        ("weight",),
    ),
)
CLIP_LEFT_OUT = (
    "text_model.embeddings.position_ids",
    "embeddings.position_ids",
    "text_projection",
    "text_projection.weight",
    "logit_scale",
    "visual_projection.weight",
    "vision_model.*",
)

T5_GGUF_LAYERS = {
    "encoder.block.{}.layer.0.layer_norm": "enc.blk.{}.attn_norm",
    "encoder.block.{}.layer.0.SelfAttention.q": "enc.blk.{}.attn_q",
    "encoder.block.{}.layer.0.SelfAttention.k": "enc.blk.{}.attn_k",
    "encoder.block.{}.layer.0.SelfAttention.v": "enc.blk.{}.attn_v",
    "encoder.block.{}.layer.0.SelfAttention.o": "enc.blk.{}.attn_o",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "enc.blk.0.attn_rel_b",
    "encoder.block.{}.layer.1.layer_norm": "enc.blk.{}.ffn_norm",
    "encoder.block.{}.layer.1.DenseReluDense.wi_0": "enc.blk.{}.ffn_gate",
    "encoder.block.{}.layer.1.DenseReluDense.wi_1": "enc.blk.{}.ffn_up",
    "encoder.block.{}.layer.1.DenseReluDense.wo": "enc.blk.{}.ffn_down",
    "encoder.final_layer_norm": "enc.output_norm",
    "shared": "token_embd",
}
T5_GGUF_ROWS = pairs(T5_GGUF_LAYERS, ("weight",))
T5_EMBEDDING = Row("shared.weight", ("encoder.embed_tokens.weight",), is_duplicate=True)
T5_LEFT_OUT = ("decoder.*", "lm_head.weight", "spiece_model")
T5_GGUF_LEFT_OUT = ("dec.*", "output.weight")

CLIP = Layout(
    name="clip-hf",
    part="clip",
    family="",
    table=Table("CLIP-L in Hugging Face's names", (*native(CLIP_ROWS), *left_out(CLIP_LEFT_OUT))),
    marks=("text_model.final_layer_norm.weight", "text_model.encoder.layers.0.self_attn.q_proj.weight"),
    absent=("text_model.head.weight",),  # SigLIP's text encoder has it
    prefixes=CLIP_PREFIXES,
)
CLIP_BARE = Layout(
    name="clip-hf5",
    part="clip",
    family="",
    table=Table("CLIP-L in the names of transformers 5", (*CLIP_ROWS, *left_out(CLIP_LEFT_OUT))),
    marks=("embeddings.token_embedding.weight", "final_layer_norm.weight", "encoder.layers.0.self_attn.q_proj.weight"),
    prefixes=CLIP_PREFIXES,
)
T5 = Layout(
    name="t5-hf",
    part="t5",
    family="",
    table=Table("T5 in Hugging Face's names", (*native(T5_GGUF_ROWS), T5_EMBEDDING, *left_out(T5_LEFT_OUT))),
    marks=("encoder.final_layer_norm.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    # UMT5, which other families use, has a table of positions in every block.
    absent=("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",),
    prefixes=T5_PREFIXES,
)
T5_GGUF = Layout(
    name="t5-gguf",
    part="t5",
    family="",
    table=Table("T5 in llama.cpp's names", (*T5_GGUF_ROWS, *left_out(T5_GGUF_LEFT_OUT))),
    marks=("enc.output_norm.weight", "enc.blk.0.attn_q.weight"),
    absent=("enc.blk.1.attn_rel_b.weight",),
    prefixes=T5_PREFIXES,
)
