"""Nodes that load models: files of the user's, or the small ones that ship with the pack."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge.paths import CLIPS, EMBEDDED_MODELS, MODELS, T5S, VAES, Choice, resolve_embedded
from .fields import ROOT, budget, dtype, memory, memory_policy, policy, schema

__all__ = ["NODES"]

CATEGORY = f"{ROOT}/loaders"
FILES_NOTE = (
    ".safetensors and .gguf files of any storage format, and the .index.json of a model in several files. Entries that "
    "begin with 'embedded' ship with the pack; 'checkpoints' are all-in-one files from that folder."
)
T5_LENGTHS = ("512", "256")
AUTO = "auto"
# Variants with the same tensors.
VARIANTS = ("flux1-dev", "flux1-krea-dev", "flux1-kontext-dev", "flux1-canny-dev", "flux1-depth-dev")

MODEL_TOOLTIP = "The diffusion model, for FLUX Sampler, KSampler, LoRA loaders and every other node that takes a MODEL."
CLIP_TOOLTIP = "Both text encoders, for FLUX Text Encode, CLIP Text Encode and every other node that takes a CLIP."
VAE_TOOLTIP = "The autoencoder, for FLUX Decode, VAE Encode, VAE Decode and every other node that takes a VAE."


def file_combo(name: str, choice: Choice, tooltip: str) -> io.Input:
    """A combo of files, whose tooltip tells what each is."""
    return io.Combo.Input(
        name, options=choice.names(), tooltip="\n".join(filter(None, (f"{tooltip} {FILES_NOTE}", choice.told())))
    )


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
                file_combo("model", MODELS, "A FLUX.1 diffusion model in ComfyUI's diffusion_models folder."),
                dtype(),
                io.Combo.Input(
                    "variant",
                    options=[AUTO, *VARIANTS],
                    default=AUTO,
                    optional=True,
                    tooltip="What the model is, where its tensors cannot tell: [dev], Krea and Kontext have the same, "
                    "and so have Canny and Depth. auto: by the file's metadata and name. It sets the defaults that "
                    "samplers take from the model; a variant that the tensors contradict is refused.",
                ),
                memory("the model"),
                budget(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=MODEL_TOOLTIP)],
        )

    @classmethod
    def execute(
        cls, model: str, dtype: str, variant: str = AUTO, memory: str = AUTO, budget: float = 0.0
    ) -> io.NodeOutput:
        from .bridge.model import load_model
        from .bridge.preflight import show_loaded

        path = str(MODELS.resolve(model))
        patcher = load_model(path, dtype, None if variant == AUTO else variant, policy(memory, budget))
        show_loaded(patcher.model.given)
        return io.NodeOutput(patcher)


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
                file_combo(
                    "clip_l",
                    CLIPS,
                    "CLIP-L's file in ComfyUI's text_encoders folder (clip_l.safetensors). It gives the pooled vector "
                    "that sets the picture's overall style.",
                ),
                file_combo(
                    "t5",
                    T5S,
                    "T5-XXL's file in the same folder (t5xxl_fp16.safetensors). It gives the tokens that the picture "
                    "follows word by word.",
                ),
                io.Combo.Input(
                    "t5_length",
                    options=list(T5_LENGTHS),
                    default=T5_LENGTHS[0],
                    tooltip="Tokens that T5's text is padded to: 512 as FLUX.1 [dev] was trained, 256 for [schnell]. "
                    "Longer prompts still go in whole up to 512. Ignored by the embedded encoder.",
                ),
                memory("each encoder"),
                budget(),
            ],
            outputs=[io.Clip.Output(display_name="clip", tooltip=CLIP_TOOLTIP)],
        )

    @classmethod
    def execute(cls, clip_l: str, t5: str, t5_length: str, memory: str = AUTO, budget: float = 0.0) -> io.NodeOutput:
        from .bridge.clip import load_clip
        from .bridge.preflight import show_loaded

        granted = policy(memory, budget)
        clip = load_clip(str(CLIPS.resolve(clip_l)), str(T5S.resolve(t5)), int(t5_length), granted)
        show_loaded(*clip.cond_stage_model.given)
        return io.NodeOutput(clip)


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
                file_combo("vae", VAES, "FLUX.1's autoencoder in ComfyUI's vae folder (ae.safetensors)."),
                memory_policy(
                    "Whether pictures are encoded and decoded in one piece, or in strips of rows, which take "
                    "a third of the memory and twice the time, and leave no seams. auto: in strips where one piece "
                    "would not fit. keep: in one piece. balance: in strips from about 1 GiB on. save: in strips. "
                    "budget: in strips where one piece would take more than the number of GiB below.",
                ),
                budget(),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip=VAE_TOOLTIP)],
        )

    @classmethod
    def execute(cls, vae: str, memory: str = AUTO, budget: float = 0.0) -> io.NodeOutput:
        from .bridge.preflight import show_loaded
        from .bridge.vae import load_vae

        loaded = load_vae(str(VAES.resolve(vae)), policy(memory, budget))
        show_loaded(loaded.given)
        return io.NodeOutput(loaded)


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
                    "Both draw coloured shapes and short words on 128x128 pixels. mini fill, canny, depth, "
                    "kontext and redux do with such pictures what FLUX Fill, FLUX Control, FLUX Reference and FLUX "
                    "Redux ask for; 16 steps, guidance 3 (redux: 2).",
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
