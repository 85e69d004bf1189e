"""Nodes that load models: files of the user's, or the small ones that ship with the pack."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge.paths import CLIPS, EMBEDDED_MODELS, MODELS, T5S, VAES, resolve_embedded
from .fields import ROOT, dtype, schema

__all__ = ["NODES"]

CATEGORY = f"{ROOT}/loaders"
EMBEDDED_NOTE = "The entries that begin with 'embedded' ship with the pack and need no download."
T5_LENGTHS = ("512", "256")

MODEL_TOOLTIP = "The diffusion model, for FLUX Sampler, KSampler, LoRA loaders and every other node that takes a MODEL."
CLIP_TOOLTIP = "Both text encoders, for FLUX Text Encode, CLIP Text Encode and every other node that takes a CLIP."
VAE_TOOLTIP = "The autoencoder, for FLUX Decode, VAE Encode, VAE Decode and every other node that takes a VAE."


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryLoadModel",
            display_name="Load FLUX Model",
            category=CATEGORY,
            description="Loads a FLUX.1 diffusion model with FLUX Foundry's own engine.",
            search_aliases=["unet loader", "diffusion model", "flux checkpoint", "flux dev", "flux schnell"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=MODELS.names(),
                    tooltip="A .safetensors file of a FLUX.1 diffusion model in ComfyUI's diffusion_models folder, in "
                    f"Black Forest Labs' layout. {EMBEDDED_NOTE}",
                ),
                dtype(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=MODEL_TOOLTIP)],
        )

    @classmethod
    def execute(cls, model: str, dtype: str) -> io.NodeOutput:
        from .bridge.model import load_model

        return io.NodeOutput(load_model(str(MODELS.resolve(model)), dtype))


class LoadTextEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryLoadTextEncoders",
            display_name="Load FLUX Text Encoders",
            category=CATEGORY,
            description="Loads FLUX.1's two text encoders, CLIP-L and T5-XXL.",
            search_aliases=["dual clip loader", "clip loader", "t5xxl", "clip_l"],
            inputs=[
                io.Combo.Input(
                    "clip_l",
                    options=CLIPS.names(),
                    tooltip="CLIP-L's file in ComfyUI's text_encoders folder (clip_l.safetensors). It gives the pooled "
                    f"vector that sets the picture's overall style. {EMBEDDED_NOTE}",
                ),
                io.Combo.Input(
                    "t5",
                    options=T5S.names(),
                    tooltip="T5-XXL's file in the same folder (t5xxl_fp16.safetensors). It gives the tokens that the "
                    f"picture follows word by word. {EMBEDDED_NOTE}",
                ),
                io.Combo.Input(
                    "t5_length",
                    options=list(T5_LENGTHS),
                    default=T5_LENGTHS[0],
                    tooltip="Tokens that T5's text is padded to: 512 as FLUX.1 [dev] was trained, 256 for [schnell]. "
                    "Longer prompts still go in whole up to 512. Ignored by the embedded encoder.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip", tooltip=CLIP_TOOLTIP)],
        )

    @classmethod
    def execute(cls, clip_l: str, t5: str, t5_length: str) -> io.NodeOutput:
        from .bridge.clip import load_clip

        return io.NodeOutput(load_clip(str(CLIPS.resolve(clip_l)), str(T5S.resolve(t5)), int(t5_length)))


class LoadAutoencoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryLoadAutoencoder",
            display_name="Load FLUX Autoencoder",
            category=CATEGORY,
            description="Loads FLUX.1's autoencoder, which turns latents into pictures and back.",
            search_aliases=["vae loader", "load vae", "ae.safetensors"],
            inputs=[
                io.Combo.Input(
                    "vae",
                    options=VAES.names(),
                    tooltip=f"FLUX.1's autoencoder in ComfyUI's vae folder (ae.safetensors). {EMBEDDED_NOTE}",
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip=VAE_TOOLTIP)],
        )

    @classmethod
    def execute(cls, vae: str) -> io.NodeOutput:
        from .bridge.vae import load_vae

        return io.NodeOutput(load_vae(str(VAES.resolve(vae))))


class LoadEmbedded(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryLoadEmbedded",
            display_name="Load FLUX (embedded)",
            category=CATEGORY,
            description="Loads the small FLUX model that ships with the pack: diffusion model, text encoders and "
            "autoencoder at once, without a download.",
            search_aliases=["foundry mini", "checkpoint loader", "quick start", "demo model"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(EMBEDDED_MODELS),
                    tooltip="mini: takes 16 steps and guidance 3. mini schnell: takes 4 steps and has no guidance. "
                    "Both draw coloured shapes and short words on 128x128 pixels.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip=MODEL_TOOLTIP),
                io.Clip.Output(display_name="clip", tooltip=CLIP_TOOLTIP),
                io.Vae.Output(display_name="vae", tooltip=VAE_TOOLTIP),
            ],
        )

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        from .bridge.clip import load_clip
        from .bridge.model import load_model
        from .bridge.vae import load_vae

        files = resolve_embedded(model)
        return io.NodeOutput(
            load_model(str(files.transformer)),
            load_clip(str(files.clip), str(files.t5)),
            load_vae(str(files.autoencoder)),
        )


NODES: list[type[io.ComfyNode]] = [LoadModel, LoadTextEncoders, LoadAutoencoder, LoadEmbedded]
