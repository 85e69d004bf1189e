"""Independent implementations that tests compare with, and what it takes to give both sides the same weights.

diffusers and transformers are imported here and in the tests only, never in ``flux``. The key tables are written out by
hand on purpose: they must not share code with the engine's own renames.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux.models.autoencoder import Autoencoder
from flux.models.flux1 import Flux1
from flux.models.text.clip import ClipText
from flux.models.text.t5 import T5Encoder

__all__ = [
    "TOLERANCE",
    "autoencoder_oracle",
    "clip_oracle",
    "flux1_oracle",
    "flux1_to_diffusers",
    "randomise",
    "relative_error",
    "rows",
    "swap_halves",
    "t5_oracle",
]

TOLERANCE = 1e-5  # of relative_error, both sides in fp32

FLUX1_NAMES = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
FLUX1_DOUBLE_NAMES = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
FLUX1_SINGLE_NAMES = {
    "modulation.lin": "norm.linear",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
# Fused rows: the names of the parts, top to bottom. What is left over after q, k and v goes to the last.
FLUX1_DOUBLE_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
FLUX1_SINGLE_FUSED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def rows(*shape: int, seed: int) -> Tensor:
    """Normal fp32 numbers that depend on nothing but ``seed`` and ``shape``."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter: matrices to keep variances, biases around 0, norm scales around 1. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(values * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.3 * values + (0.0 if name.endswith("bias") else 1.0))
    return model.eval().requires_grad_(False)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference as a share of the largest absolute value."""
    assert ours.shape == theirs.shape
    difference = (ours.double() - theirs.double()).abs().max()
    return float(difference / theirs.double().abs().max())


def swap_halves(tensor: Tensor) -> Tensor:
    """First half of the rows below the second."""
    return torch.cat(tensor.chunk(2)[::-1])


def flux1_to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A FLUX.1 state dict from Black Forest Labs' names to diffusers'."""
    hidden = state["img_in.weight"].shape[0]
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, _, kind = key.rpartition(".")
        kind = "weight" if kind == "scale" else kind
        names, fused, prefix = FLUX1_NAMES, {}, ""
        if name.startswith(("double_blocks.", "single_blocks.")):
            group, index, name = name.split(".", 2)
            double = group == "double_blocks"
            prefix = f"{'transformer_blocks' if double else 'single_transformer_blocks'}.{index}."
            names = FLUX1_DOUBLE_NAMES if double else FLUX1_SINGLE_NAMES
            fused = FLUX1_DOUBLE_FUSED if double else FLUX1_SINGLE_FUSED
        if name in fused:
            sizes = [hidden] * 3 + [tensor.shape[0] - 3 * hidden] * (len(fused[name]) - 3)
            parts = zip(fused[name], tensor.split(sizes), strict=True)
            out |= {f"{prefix}{part}.{kind}": chunk for part, chunk in parts}
        else:
            out[f"{prefix}{names[name]}.{kind}"] = tensor
    for kind in ("weight", "bias"):  # [shift, scale] here, [scale, shift] there
        out[f"norm_out.linear.{kind}"] = swap_halves(out[f"norm_out.linear.{kind}"])
    return out


def flux1_oracle(model: Flux1, guidance_embedding: bool | None = None) -> FluxTransformer2DModel:
    """diffusers' transformer with the weights of ``model``, its guidance embedder left out if told so."""
    spec = model.spec
    with_guidance = spec.guidance_embedding if guidance_embedding is None else guidance_embedding
    oracle = FluxTransformer2DModel(
        in_channels=spec.in_channels,
        out_channels=spec.out_channels,
        num_layers=spec.double_blocks,
        num_single_layers=spec.single_blocks,
        attention_head_dim=spec.hidden // spec.heads,
        num_attention_heads=spec.heads,
        joint_attention_dim=spec.context_width,
        pooled_projection_dim=spec.pooled_width,
        guidance_embeds=with_guidance,
        axes_dims_rope=spec.axes,
    )
    state = flux1_to_diffusers(model.state_dict())
    if not with_guidance:
        state = {key: tensor for key, tensor in state.items() if "guidance_embedder" not in key}
    oracle.load_state_dict(state)
    return oracle.eval().requires_grad_(False)


def autoencoder_oracle(model: Autoencoder) -> AutoencoderKL:
    """diffusers' autoencoder with the weights of ``model``."""
    spec = model.spec
    levels = len(spec.channel_multipliers)
    oracle = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(spec.base_channels * m for m in spec.channel_multipliers),
        layers_per_block=spec.res_blocks,
        latent_channels=spec.latent_channels,
        norm_num_groups=spec.norm_groups,
        scaling_factor=spec.scale,
        shift_factor=spec.shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    state = {_autoencoder_name(key, levels): tensor for key, tensor in model.state_dict().items()}
    # The middle's attention is 1x1 convolutions here and linears there.
    flat = {k: t.flatten(1) if ".attentions." in k and t.dim() == 4 else t for k, t in state.items()}
    oracle.load_state_dict(flat)
    return oracle.eval().requires_grad_(False)


def _autoencoder_name(key: str, levels: int) -> str:
    parts = key.split(".")
    side, rest = parts[0], parts[1:]
    if rest[0] in ("down", "up"):
        level = int(rest[1]) if rest[0] == "down" else levels - 1 - int(rest[1])
        kind = {"block": f"resnets.{rest[3]}", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}[rest[2]]
        tail = rest[4:] if rest[2] == "block" else rest[3:]
        name = ".".join((f"{rest[0]}_blocks.{level}", kind, *tail)).replace("nin_shortcut", "conv_shortcut")
    elif rest[0] == "mid" and rest[1] == "attn_1":
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        name = ".".join(("mid_block.attentions.0", attention[rest[2]], rest[3]))
    elif rest[0] == "mid":
        name = ".".join((f"mid_block.resnets.{int(rest[1][-1]) - 1}", *rest[2:]))
    else:
        name = ".".join(rest).replace("norm_out", "conv_norm_out")
    return f"{side}.{name}"


def clip_oracle(model: ClipText, eos_in_config: int | None = None) -> CLIPTextModel:
    """transformers' text tower with the weights of ``model``.

    ``eos_in_config`` picks how transformers pools: at the first token of that id, or, where it is 2 as in OpenAI's
    original config.json, at the largest id of the row. None takes the spec's.
    """
    spec = model.spec
    config = CLIPTextConfig(
        vocab_size=spec.vocabulary,
        hidden_size=spec.width,
        intermediate_size=spec.mlp_width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        max_position_embeddings=spec.positions,
        hidden_act="quick_gelu",
        bos_token_id=spec.bos,
        eos_token_id=spec.eos if eos_in_config is None else eos_in_config,
        pad_token_id=spec.pad,
    )
    oracle = CLIPTextModel(config)
    # transformers 5 dropped the level "text_model" that the files have.
    oracle.load_state_dict({key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()})
    return oracle.eval().requires_grad_(False)


def t5_oracle(model: T5Encoder) -> T5EncoderModel:
    """transformers' T5 encoder with the weights of ``model``."""
    spec = model.spec
    config = T5Config(
        vocab_size=spec.vocabulary,
        d_model=spec.width,
        d_kv=spec.head_width,
        d_ff=spec.mlp_width,
        num_layers=spec.layers,
        num_heads=spec.heads,
        relative_attention_num_buckets=spec.buckets,
        relative_attention_max_distance=spec.max_distance,
        feed_forward_proj="gated-gelu",
        pad_token_id=spec.pad,
        eos_token_id=spec.eos,
    )
    oracle = T5EncoderModel(config)
    state = model.state_dict()
    oracle.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    return oracle.eval().requires_grad_(False)
