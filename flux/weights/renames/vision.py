"""What files call the tensors of SigLIP's vision tower and of the Redux adapter.

Our names are those of Hugging Face's files and of Black Forest Labs'; diffusers keeps Redux under the same. Whole
SigLIP models are accepted for the tower in them, which stands below any prefix in models of vision and language.
"""

from __future__ import annotations

from .tables import Layout, Row, Table, left_out, native, pairs

__all__ = ["REDUX", "SIGLIP", "SIGLIP_BARE"]

KINDS = ("weight", "bias")
TOWER = "vision_model."  # a level that transformers 5 leaves out of what it saves
BARE_PREFIXES = ("vision_tower.", "model.vision_tower.", "image_encoder.", "")  # without that level names tell little

LAYERS = tuple(
    f"encoder.layers.{{}}.{layer}"
    for layer in (
        "layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm2",
        "mlp.fc1", "mlp.fc2",
    )
)  # fmt: skip
PATCHES, PLACES = "embeddings.patch_embedding", "embeddings.position_embedding"
ROWS = (
    *pairs({TOWER + layer: layer for layer in (PATCHES, *LAYERS, "post_layernorm")}, KINDS),
    *pairs({TOWER + PLACES: PLACES}, ("weight",)),
)
UNUSED = ("head.*", "embeddings.position_ids")  # the pooling head, and a list of numbers that old files have
WHOLE_MODEL = ("text_model.*", "logit_scale", "logit_bias")
MARKS = (f"{PATCHES}.weight", "encoder.layers.0.layer_norm1.weight", "encoder.layers.0.self_attn.q_proj.weight")
OTHER_TOWERS = ("embeddings.class_embedding", "embeddings.cls_token", "pre_layrnorm.weight")  # CLIP's and its like

REDUX_ROWS: tuple[Row, ...] = native(pairs({"redux_up": "redux_up", "redux_down": "redux_down"}, KINDS))

SIGLIP = Layout(
    name="siglip-hf",
    part="vision",
    family="",
    table=Table(
        "SigLIP's vision tower in Hugging Face's names",
        (*native(ROWS), *left_out((*(TOWER + name for name in UNUSED), *WHOLE_MODEL))),
    ),
    marks=tuple(TOWER + mark for mark in MARKS),
    absent=tuple(TOWER + name for name in OTHER_TOWERS),
)
SIGLIP_BARE = Layout(
    name="siglip-hf5",
    part="vision",
    family="",
    table=Table("SigLIP's vision tower in the names of transformers 5", (*ROWS, *left_out(UNUSED))),
    marks=MARKS,
    absent=OTHER_TOWERS,
    prefixes=BARE_PREFIXES,
)
REDUX = Layout(
    name="redux-bfl",
    part="redux",
    family="flux1",
    table=Table("the Redux adapter in Black Forest Labs' names", REDUX_ROWS),
    marks=("redux_up.weight", "redux_down.weight"),
)
