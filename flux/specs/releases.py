"""Where the parts of a model are found: what people call each, the names that its files go by, and who offers them.

Keys are the names of specs: those of transformers, of autoencoders, of text encoders, of vision towers and of Redux.
"""

from __future__ import annotations

from .flux1 import FLUX1
from .flux2 import FLUX2

__all__ = ["FILE_NAMES", "FLUX2_FILE_NAMES", "PAGES", "PART_TITLES", "where_to_get"]

PART_TITLES: dict[str, str] = {
    "clip-l": "the CLIP-L text encoder",
    "t5xxl": "the T5-XXL text encoder",
    "flux1-ae": "the FLUX.1 autoencoder (VAE)",
    "clip-mini": "Foundry Mini's CLIP text encoder",
    "t5-mini": "Foundry Mini's T5 text encoder",
    "flux1-mini-ae": "Foundry Mini's autoencoder (VAE)",
    "siglip-so400m-384": "the SigLIP so400m vision tower (patch 14, 384 pixels)",
    "siglip-mini": "Foundry Mini's SigLIP vision tower",
    "flux1-redux-dev": "the FLUX.1 Redux [dev] adapter (image prompts)",
    "flux1-redux-mini": "Foundry Mini's Redux adapter (image prompts)",
    "flux2-vae": "the FLUX.2 autoencoder (VAE)",
    "mistral-small-24b": "the Mistral Small 24B text encoder",
    "qwen3-4b": "the Qwen3 4B text encoder",
    "qwen3-8b": "the Qwen3 8B text encoder",
}
FILE_NAMES: dict[str, tuple[str, ...]] = {  # of each part, the names that its releases go by, the usual one first
    "clip-l": ("clip_l.safetensors",),
    "t5xxl": ("t5xxl_fp16.safetensors", "t5xxl_bf16.safetensors", "t5xxl.safetensors", "t5xxl_fp8_e4m3fn.safetensors"),
    "flux1-ae": ("ae.safetensors", "flux1-ae.safetensors", "flux_vae.safetensors"),
    "clip-mini": ("clip.safetensors",),
    "t5-mini": ("t5.safetensors",),
    "flux1-mini-ae": ("ae.safetensors",),
    "siglip-so400m-384": ("sigclip_vision_patch14_384.safetensors",),
    "siglip-mini": ("siglip-mini.safetensors",),
    "flux1-redux-dev": ("flux1-redux-dev.safetensors",),
    "flux1-redux-mini": ("flux1-redux-mini.safetensors",),
}
FLUX2_FILE_NAMES: dict[str, tuple[str, ...]] = {  # of the parts that are recognised, and not run yet
    "flux2-vae": ("flux2-vae.safetensors",),
    "mistral-small-24b": ("mistral_3_small_flux2_bf16.safetensors", "mistral_3_small_flux2_fp8.safetensors"),
    "qwen3-4b": ("qwen_3_4b.safetensors",),
    "qwen3-8b": ("qwen_3_8b.safetensors", "qwen_3_8b_fp8mixed.safetensors"),
}
HUB = "https://huggingface.co/"
PAGES: dict[str, str] = {
    "clip-l": HUB + "comfyanonymous/flux_text_encoders",
    "t5xxl": HUB + "comfyanonymous/flux_text_encoders",
    "flux1-ae": HUB + "black-forest-labs/FLUX.1-schnell",
    "siglip-so400m-384": HUB + "Comfy-Org/sigclip_vision_384",
    "flux1-redux-dev": HUB + "black-forest-labs/FLUX.1-Redux-dev",
    "tokenizers": HUB + "black-forest-labs/FLUX.1-schnell",
    "flux2-vae": HUB + "Comfy-Org/flux2-dev",
    "mistral-small-24b": HUB + "Comfy-Org/flux2-dev",
    "qwen3-4b": HUB + "Comfy-Org/vae-text-encorder-for-flux-klein-4b",  # spelt so
    "qwen3-8b": HUB + "Comfy-Org/Flux-2-Klein-9B",
    "flux1-dev": HUB + "black-forest-labs/FLUX.1-dev",
    "flux1-schnell": HUB + "black-forest-labs/FLUX.1-schnell",
    "flux1-krea-dev": HUB + "black-forest-labs/FLUX.1-Krea-dev",
    "flux1-kontext-dev": HUB + "black-forest-labs/FLUX.1-Kontext-dev",
    "flux1-fill-dev": HUB + "black-forest-labs/FLUX.1-Fill-dev",
    "flux1-canny-dev": HUB + "black-forest-labs/FLUX.1-Canny-dev",
    "flux1-depth-dev": HUB + "black-forest-labs/FLUX.1-Depth-dev",
    "flux2-dev": HUB + "black-forest-labs/FLUX.2-dev",
    "flux2-klein-4b": HUB + "black-forest-labs/FLUX.2-klein-4B",
    "flux2-klein-9b": HUB + "black-forest-labs/FLUX.2-klein-9B",
    "flux2-klein-base-4b": HUB + "black-forest-labs/FLUX.2-klein-base-4B",
    "flux2-klein-base-9b": HUB + "black-forest-labs/FLUX.2-klein-base-9B",
    "flux2-klein-9b-kv": HUB + "black-forest-labs/FLUX.2-klein-9b-kv",
}


def where_to_get(name: str) -> str:
    """The usual file of a part or transformer and its page, as a phrase; empty for a name that has no release."""
    files = FILE_NAMES.get(name) or FLUX2_FILE_NAMES.get(name)
    if files is None:
        row = FLUX1.get(name) or FLUX2.get(name)
        files = row.files if row is not None else ()
    if not files:
        return ""
    return f"{files[0]} from {PAGES[name]}" if name in PAGES else f"{files[0]}, which is inside the pack"
