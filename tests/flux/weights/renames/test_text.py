"""The text encoders' names against transformers' modules and the ``gguf`` package's table."""

from __future__ import annotations

import gguf
import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from flux.errors import FileError
from flux.models.text.clip import ClipText
from flux.models.text.t5 import T5Encoder
from flux.specs.text import CLIP_L, T5_XXL
from flux.weights.renames.text import CLIP, CLIP_BARE, T5, T5_GGUF
from tests.fixtures.listings import clip_l, t5_gguf, t5_hf, t5_hf_full

CLIP_EXTRAS = ("text_model.embeddings.position_ids", "text_projection.weight", "logit_scale", "vision_model.a.b.0.c")


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def on_meta(build, *args):
    with torch.device("meta"):
        return build(*args)


def t5_config():
    return T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )


def test_our_encoders_have_the_listed_names_and_shapes():
    assert shapes_of(on_meta(ClipText, CLIP_L)) == clip_l()
    assert shapes_of(on_meta(T5Encoder, T5_XXL)) == t5_hf()


def test_transformers_clip_becomes_ours_with_and_without_the_tower_level():
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    bare = shapes_of(on_meta(CLIPTextModel, config))
    assert CLIP_BARE.table.to_ours(bare).shapes(bare.__getitem__) == clip_l()
    assert set(CLIP_BARE.table.to_foreign(clip_l())) == set(bare)
    projected = shapes_of(on_meta(CLIPTextModelWithProjection, config))
    plan = CLIP.table.to_ours(projected)
    assert plan.shapes(projected.__getitem__) == clip_l()
    assert plan.dropped == ("text_projection.weight",)


def test_what_clip_files_hold_beside_the_encoder_is_left_out():
    plan = CLIP.table.to_ours([*clip_l(), *CLIP_EXTRAS])
    assert set(plan) == set(clip_l())
    assert plan.dropped == CLIP_EXTRAS


def test_transformers_t5_becomes_ours_alone_and_out_of_the_whole_model():
    config = t5_config()
    for build in (T5EncoderModel, T5ForConditionalGeneration):
        theirs = shapes_of(on_meta(build, config))
        plan = T5.table.to_ours(theirs)
        assert plan.shapes(theirs.__getitem__) == t5_hf()
        assert plan["shared.weight"].sources == ("shared.weight",)
        assert "encoder.embed_tokens.weight" in plan.dropped
    assert theirs == t5_hf_full()


def test_the_embedding_is_found_under_its_other_name():
    names = [name.replace("shared.weight", "encoder.embed_tokens.weight") for name in t5_hf()]
    plan = T5.table.to_ours(names)
    assert plan["shared.weight"].sources == ("encoder.embed_tokens.weight",)
    assert plan.dropped == ()


def test_a_position_table_belongs_to_the_first_block_only():
    strange = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    with pytest.raises(FileError, match=r"t5 has tensors that T5 .* does not have: encoder\.block\.1\."):
        T5.table.to_ours([*t5_hf(), strange], "t5")


def test_gguf_names_and_shapes_are_the_same_encoder():
    assert T5_GGUF.table.to_ours(t5_gguf()).shapes(t5_gguf().__getitem__) == t5_hf()
    assert T5_GGUF.table.to_foreign(t5_hf()).shapes(t5_hf().__getitem__) == t5_gguf()


def test_gguf_names_are_those_of_the_gguf_package():
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, T5_XXL.layers)
    for name, recipe in T5_GGUF.table.to_foreign(t5_hf()).items():
        (ours,) = recipe.sources
        assert table.get_name(ours, try_suffixes=(".weight",)) == name


def test_the_decoder_in_a_gguf_file_is_left_out():
    decoder = ("dec.blk.0.attn_q.weight", "dec.output_norm.weight", "output.weight")
    plan = T5_GGUF.table.to_ours([*t5_gguf(), *decoder])
    assert set(plan) == set(t5_hf())
    assert plan.dropped == decoder
