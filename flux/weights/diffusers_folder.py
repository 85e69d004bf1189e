"""What diffusers wants beside a file of weights: a folder, a name, and the config that it builds the model from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..specs.autoencoder import AUTOENCODERS, AutoencoderSpec
from ..specs.flux1 import Flux1Spec

__all__ = ["CONFIG", "WEIGHTS", "config_of", "write_config"]

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
VERSION = "0.30.0"  # of diffusers, the first that has FLUX.1


def config_of(spec: object) -> dict[str, Any] | None:
    """The config of a model in diffusers' own terms; None for what is not written so."""
    if isinstance(spec, Flux1Spec):
        return {
            "_class_name": "FluxTransformer2DModel",
            "_diffusers_version": VERSION,
            "patch_size": 1,
            "in_channels": spec.in_channels,
            "out_channels": spec.out_channels,
            "num_layers": spec.double_blocks,
            "num_single_layers": spec.single_blocks,
            "attention_head_dim": spec.hidden // spec.heads,
            "num_attention_heads": spec.heads,
            "joint_attention_dim": spec.context_width,
            "pooled_projection_dim": spec.pooled_width,
            "guidance_embeds": spec.guidance_embedding,
            "axes_dims_rope": list(spec.axes),
        }
    if isinstance(spec, AutoencoderSpec) and spec.name in AUTOENCODERS:
        levels = len(spec.channel_multipliers)
        return {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": VERSION,
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": [spec.base_channels * multiplier for multiplier in spec.channel_multipliers],
            "layers_per_block": spec.res_blocks,
            "act_fn": "silu",
            "latent_channels": spec.latent_channels,
            "norm_num_groups": spec.norm_groups,
            "scaling_factor": spec.scale,
            "shift_factor": spec.shift,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": True,
            "force_upcast": True,
        }
    return None


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Put the config into a folder, whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    part = folder / f".{CONFIG}.part"
    try:
        part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder / CONFIG)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"{folder / CONFIG} cannot be written: {error.strerror}; check the folder and its room"
        ) from error
