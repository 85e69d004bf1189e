"""What else people have in their folders: adapters, encoders and models that no layout of the engine's own fits.

Names tell families, and shapes tell sizes: for which FLUX model a LoRA was made, and which language model a text
encoder is. Everything is asked of one text of all names, so that thousands of tensors cost a millisecond or two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from .flux1 import FLUX1, Flux1Spec
from .flux2 import FLUX2, Flux2Spec
from .releases import PART_TITLES

__all__ = ["LANGUAGE_MODELS", "Foreign", "HasShape", "LanguageModel", "find_foreign", "model_title"]


class HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


Tensors = Mapping[str, HasShape]


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """Something that is not a part of ours.

    Attributes:
        role: What it does in a run: "model", "autoencoder", "clip", "t5", "text-encoder" (a language model), "lora",
            "controlnet", "ip-adapter", "redux", "vision", or "other".
        title: For people, with an article.
        family: "flux1", "flux2" or "flux3" where it belongs to that family alone, "other" where it belongs to none of
            them, "" where nothing tells.
        name: Of an encoder that a FLUX spec asks for.
        width: What has to fit the model: of a LoRA, ControlNet or IP-Adapter the width of the model's token stream, of
            Redux that of its text tokens, of an encoder that of its hidden states; 0 where nothing tells.
    """

    role: str
    title: str
    family: str = ""
    name: str = ""
    width: int = 0


def find_foreign(tensors: Tensors) -> Foreign | None:
    """What a file's tensors are, by their own names and shapes; None when nothing in it is known."""
    names = _Names(tensors)
    return next((found for look in LOOKS if (found := look(names)) is not None), None)


class _Names:
    """A file's names as one text, a name a line, and its shapes."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._text = "\n".join(("", *tensors, ""))

    def has(self, *parts: str) -> bool:
        """Whether one of these stands in any name."""
        return any(part in self._text for part in parts)

    def numbers(self, pattern: re.Pattern[str]) -> Iterator[int]:
        """The pattern's group, a number, wherever the pattern is found."""
        return (int(found) for found in pattern.findall(self._text))

    def ending(self, end: str) -> str:
        """The first name that ends so, empty when none does; a line break before it asks for the whole name."""
        if f"{end}\n" not in self._text:
            return ""
        return next((name for name in self._tensors if f"\n{name}".endswith(end)), "")

    def layer(self, layers: tuple[str, ...], marks: tuple[str, ...]) -> str:
        """The first name with one of these layers and, behind it, one of these marks; empty when there is none."""
        for name in self._tensors:
            for layer in layers:
                place = name.find(layer)
                if place >= 0 and any(mark in name[place + len(layer) :] for mark in marks):
                    return name
        return ""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape) if name in self._tensors else ()

    def side(self, name: str, dimension: int = 0) -> int:
        """One side of a tensor's shape; 0 where there is no such tensor or side."""
        shape = self.shape(name)
        return shape[dimension] if dimension < len(shape) else 0


# Adapters. Their names contain their model's, so they come before models.

LORA_MARKS = (
    ".lora_A", ".lora_B", "lora_down.", "lora_up.", ".lora.down.", ".lora.up.", "_lora.down.", "_lora.up.",
    "lora_linear_layer.", "hada_w1_", "lokr_w", "processor.qkv_lora", "processor.proj_lora", ".oft_blocks",
)  # fmt: skip
LORA_NOUNS = (("lokr_w", "a LoKr"), ("hada_w1_", "a LoHa"), (".oft_blocks", "an OFT adapter"), ("", "a LoRA"))
LORA_PROGRAMS = (  # who writes names so; the first that fits
    ("lora_unet_", "kohya's names"),
    ("lora_transformer_", "OneTrainer's names"),
    ("lycoris_", "LyCORIS' names"),
    (".processor.", "XLabs' names"),
    ("base_model.model.", "fal's names"),
    (".lora_A.default.", "DiffSynth's names"),
    ("diffusion_model.", "ComfyUI's names"),
    ("transformer_blocks.", "diffusers' names"),
    ("", "Black Forest Labs' names"),
)
FLUX_BLOCKS = ("double_blocks", "single_blocks", "single_transformer_blocks")
OTHER_LORAS = (
    (("content_mode_blocks", "early_stream_modulations"), "FLUX.3", "flux3"),
    (("distilled_guidance_layer",), "Chroma", "other"),
    (("img_mlp.fc1", "img_mlp_fc1", "img_mod.linear", "individual_token_refiner"), "HunyuanVideo", "other"),
    (("img_mod.1", "img_mod_1", "img_mlp.net", "img_mlp_net"), "Qwen-Image", "other"),
    (("joint_blocks",), "Stable Diffusion 3", "other"),
    (("blocks.0.cross_attn", "blocks_0_cross_attn"), "Wan", "other"),
    (("noise_refiner", "layers.0.attention.", "layers_0_attention_"), "Z-Image or Lumina", "other"),
)
FLUX2_LORA_LAYERS = (
    "to_qkv_mlp_proj", "ff.linear_in", "ff_linear_in", "ff_context.linear_in", "ff_context_linear_in",
    "double_stream_modulation", "single_stream_modulation",
)  # fmt: skip
FLUX1_LORA_LAYERS = (
    "img_mod", "txt_mod", "modulation.lin", "modulation_lin", "proj_mlp", "vector_in", "time_text_embed", "ff.net.0",
    "ff_net_0", "norm1.linear", "norm1_linear",
)  # fmt: skip
DOWN, UP = ("lora_A", "lora_down", ".down."), ("lora_B", "lora_up", ".up.")
STREAM_LAYERS = (  # whose input is the token stream
    "attn.qkv", "attn_qkv", "linear1", "attn.to_q", "attn_to_q", "to_qkv_mlp_proj", "processor.qkv_lora",
    "mlp.0", "mlp_0",
)  # fmt: skip
OUTPUT_LAYERS = ("linear2", "attn.proj", "attn_proj", "mlp.2", "mlp_2", "processor.proj_lora")  # whose output is it
LINEAR1_ROWS = {"flux1": 7, "flux2": 9}  # of a single block's first layer, as multiples of the token stream's width
DOUBLE_NUMBER = re.compile(r"(?:double_blocks|(?<!single_)transformer_blocks)[._](\d{1,4})(?!\d)")
SINGLE_NUMBER = re.compile(r"single(?:_transformer)?_blocks[._](\d{1,4})(?!\d)")
CROSS_ATTENTION = ("attn2.to_k", "attn2_to_k")
CONTEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
UNET_BLOCKS = ("unet_down_blocks", "unet_input_blocks", "unet.down_blocks", "down_blocks.", "unet_up_blocks")


def _lora(names: _Names) -> Foreign | None:
    if not names.has(*LORA_MARKS):
        return None
    noun = next(noun for mark, noun in LORA_NOUNS if names.has(mark))
    for marks, model, family in OTHER_LORAS:
        if names.has(*marks):
            return Foreign(role="lora", title=f"{noun} for {model}", family=family)
    if names.has(*FLUX_BLOCKS):
        return _flux_lora(names, noun)
    if names.has(*UNET_BLOCKS, "attn2"):
        width = names.side(names.layer(CROSS_ATTENTION, DOWN), 1)
        return Foreign(role="lora", title=f"{noun} for {CONTEXT_WIDTHS.get(width, 'Stable Diffusion')}", family="other")
    return Foreign(role="lora", title=noun)


def _flux_lora(names: _Names, noun: str) -> Foreign:
    """A LoRA for one of FLUX's families, or for several where it leaves out what they differ in."""
    width = names.side(names.layer(STREAM_LAYERS, DOWN), 1) or names.side(names.layer(OUTPUT_LAYERS, UP))
    family = _lora_family(names, width)
    fitting = _models_that_fit(names, width, family)
    families = {name for name, _ in fitting}
    if families == {"flux1"} and names.ending("img_in.lora_A.weight") and names.has("norm.key_norm.scale"):
        return Foreign(role="lora", title="a control LoRA for FLUX.1 (Canny or Depth)", family="flux1", width=width)
    models = " or ".join(dict.fromkeys(model_title(spec, exactly=width > 0) for _, spec in fitting))
    program = next(title for mark, title in LORA_PROGRAMS if names.has(mark))
    return Foreign(
        role="lora",
        title=f"{noun} for {models or f'a model like FLUX of width {width}'} in {program}",
        family=families.pop() if len(families) == 1 else family,
        width=width,
    )


def _lora_family(names: _Names, width: int) -> str:
    """The family that layers and their rows tell; empty where both have the like."""
    if names.has(*FLUX2_LORA_LAYERS):
        return "flux2"
    if names.has(*FLUX1_LORA_LAYERS):
        return "flux1"
    rows = names.side(names.layer(("linear1",), UP))
    return next((family for family, times in LINEAR1_ROWS.items() if rows and rows == times * width), "")


def _models_that_fit(names: _Names, width: int, family: str) -> list[tuple[str, Flux1Spec | Flux2Spec]]:
    """Of FLUX's models those with blocks enough and tokens of this width, with their family."""
    double = max(names.numbers(DOUBLE_NUMBER), default=-1)
    single = max(names.numbers(SINGLE_NUMBER), default=-1)
    every: list[tuple[str, Flux1Spec | Flux2Spec]] = []
    every += [("flux1", spec) for spec in FLUX1.values()]
    every += [("flux2", spec) for spec in FLUX2.values()]
    return [
        (name, spec) for name, spec in every
        if family in ("", name) and width in (0, spec.hidden)
        and double < spec.double_blocks and single < spec.single_blocks
    ]  # fmt: skip


def model_title(spec: Flux1Spec | Flux2Spec, exactly: bool = True) -> str:
    """What all models of a spec's sizes are called; of its whole family where it need not be exact."""
    flux2 = isinstance(spec, Flux2Spec)
    if not exactly or (not flux2 and spec.hidden == FLUX1["flux1-dev"].hidden):
        return "FLUX.2" if flux2 else "FLUX.1"
    rows: list[Flux1Spec | Flux2Spec] = [*(FLUX2 if flux2 else FLUX1).values()]
    return next((row.title for row in rows if row.hidden == spec.hidden), spec.title)


def _flux_of_width(width: int, family: str) -> str:
    """The models of a family whose token stream has this width, else the family with the width."""
    rows: list[Flux1Spec | Flux2Spec] = [*(FLUX2 if family == "flux2" else FLUX1).values()]
    for row in rows:
        if row.hidden == width:
            return model_title(row)
    return ("FLUX.2" if family == "flux2" else "FLUX.1") + (f" of width {width}" if width else "")


def _redux(names: _Names) -> Foreign | None:
    down = names.ending("redux_down.weight")
    if not down and not names.has("redux_up.weight"):
        return None
    title = f"some tensors of a Redux adapter{SHARD}"  # a whole one has a layout
    return Foreign(role="redux", title=title, family="flux1", width=names.side(down))


STABLE_DIFFUSION_CONTROL = ("control_model.", "controlnet_cond_embedding.", "controlnet_down_blocks.", "lllite_")


def _controlnet(names: _Names) -> Foreign | None:
    if names.has("control_transformer_blocks.") and names.has("ff.linear_in."):
        return _flux_controlnet(names.side(names.ending("control_img_in.weight")), "flux2", "VideoX-Fun's layout")
    if names.has("controlnet_x_embedder."):
        if names.has("img_mod.1", "img_mlp.net"):
            return Foreign(role="controlnet", title="a ControlNet for Qwen-Image", family="other")
        modes = names.side(names.ending("controlnet_mode_embedder.weight"))
        layout = f"diffusers' layout, a union of {modes} modes" if modes else "diffusers' layout"
        return _flux_controlnet(names.side(names.ending("controlnet_x_embedder.weight")), "flux1", layout)
    if names.has("controlnet_blocks.") and names.has("double_blocks.0."):
        return _flux_controlnet(names.side(names.ending("img_in.weight")), "flux1", "XLabs' layout")
    if names.has("controlnet_blocks.") and names.has("pos_embed_input."):
        return Foreign(role="controlnet", title="a ControlNet for Stable Diffusion 3", family="other")
    if names.has(*STABLE_DIFFUSION_CONTROL):
        return Foreign(role="controlnet", title="a ControlNet for Stable Diffusion", family="other")
    return Foreign(role="controlnet", title="a ControlNet") if names.has("controlnet_blocks.") else None


def _flux_controlnet(width: int, family: str, layout: str) -> Foreign:
    title = f"a ControlNet for {_flux_of_width(width, family)} ({layout})"
    return Foreign(role="controlnet", title=title, family=family, width=width)


def _ip_adapter(names: _Names) -> Foreign | None:
    xlabs = names.ending("ip_adapter_double_stream_k_proj.weight")
    if xlabs:
        title = "an IP-Adapter for FLUX.1 (XLabs' layout)"
        return Foreign(role="ip-adapter", title=title, family="flux1", width=names.side(xlabs))
    if names.has("pulid_ca."):
        return Foreign(role="ip-adapter", title="PuLID's face adapter for FLUX.1", family="flux1")
    keys = names.ending("to_k_ip.weight")
    dev = FLUX1["flux1-dev"]
    if keys and names.shape(keys)[:2] == (dev.hidden, dev.context_width):
        title = "an IP-Adapter for FLUX.1 (InstantX' layout)"
        return Foreign(role="ip-adapter", title=title, family="flux1", width=dev.hidden)
    if keys or names.has("ip_adapter."):
        return Foreign(role="ip-adapter", title="an IP-Adapter for Stable Diffusion", family="other")
    return None


# Language models, which are FLUX.2's text encoders.


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A language model that is some image model's text encoder.

    Attributes:
        name: As a spec asks for it; that of no FLUX model's encoder is its title.
        user: Whose text encoder it is.
        width: Of the hidden states.
        layers: That it has.
        needed: That its user needs; files without the further ones exist.
        query_norm: Whether queries and keys are normalised in every layer.
        vocabulary: Rows of the embedding.
    """

    name: str
    user: str
    width: int
    layers: int
    needed: int
    query_norm: bool
    vocabulary: int


LANGUAGE_MODELS: dict[str, LanguageModel] = {
    row.name: row
    for row in (
        LanguageModel(
            name="mistral-small-24b", user=FLUX2["flux2-dev"].title,
            width=5120, layers=40, needed=30, query_norm=False, vocabulary=131072,
        ),
        LanguageModel(
            name="qwen3-4b", user=FLUX2["flux2-klein-4b"].title,
            width=2560, layers=36, needed=27, query_norm=True, vocabulary=151936,
        ),
        LanguageModel(
            name="qwen3-8b", user=FLUX2["flux2-klein-9b"].title,
            width=4096, layers=36, needed=27, query_norm=True, vocabulary=151936,
        ),
        LanguageModel(
            name="Qwen2.5-VL 7B", user="Qwen-Image",
            width=3584, layers=28, needed=28, query_norm=False, vocabulary=152064,
        ),
        LanguageModel(
            name="Gemma 2 2B", user="Lumina 2",
            width=2304, layers=26, needed=26, query_norm=False, vocabulary=256000,
        ),
        LanguageModel(
            name="Llama 3 8B", user="HunyuanVideo and HiDream",
            width=4096, layers=32, needed=32, query_norm=False, vocabulary=128256,
        ),
    )
}  # fmt: skip
FIRST_NORMS = (".layers.0.input_layernorm.weight", "\nblk.0.attn_norm.weight")  # Hugging Face's, llama.cpp's names
LANGUAGE_MARKS = ("model.layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight")
EMBEDDINGS = ("embed_tokens.weight", "token_embd.weight")
LAYER_NUMBER = re.compile(r"(?:\blayers|\bblk)\.(\d{1,4})\.(?:input_layernorm|attn_norm)\.")
VISION_TOWERS = ("visual.", "vision_tower.")


def _language_model(names: _Names) -> Foreign | None:
    norm = next((name for end in FIRST_NORMS if (name := names.ending(end))), "")
    if not norm:
        return Foreign(role="text-encoder", title="a language model") if names.has(*LANGUAGE_MARKS) else None
    width, layers = names.side(norm), max(names.numbers(LAYER_NUMBER), default=0) + 1
    words = next((names.side(name) for end in EMBEDDINGS if (name := names.ending(end))), 0)
    has_norm = names.has("layers.0.self_attn.q_norm.", "blk.0.attn_q_norm.")
    for row in LANGUAGE_MODELS.values():
        fits = (row.width, row.query_norm) == (width, has_norm) and row.needed <= layers <= row.layers
        if fits and words in (0, row.vocabulary):
            return _known_language_model(names, row)
    return Foreign(
        role="text-encoder", title=f"a language model of width {width} with {layers} layers, which no FLUX model uses",
        family="other", width=width,
    )  # fmt: skip


def _known_language_model(names: _Names, row: LanguageModel) -> Foreign:
    if row.name == "qwen3-4b" and names.has(*VISION_TOWERS):
        title = "the Qwen3-VL 4B text encoder (of FLUX.3)"
        return Foreign(role="text-encoder", title=title, family="flux3", width=row.width)
    if row.name not in PART_TITLES:
        title = f"the {row.name} text encoder (of {row.user})"
        return Foreign(role="text-encoder", title=title, family="other", width=row.width)
    title = f"{PART_TITLES[row.name]} (of {row.user})"
    return Foreign(role="text-encoder", title=title, family="flux2", name=row.name, width=row.width)


# Models.

NUNCHAKU = (".qweight", ".wscales")
MODELS: tuple[tuple[tuple[str, ...], str], ...] = (  # one of these in a name, and whose it is
    (("distilled_guidance_layer",), "a Chroma diffusion model"),
    (("txt_in.individual_token_refiner.", "context_embedder.token_refiner."), "a HunyuanVideo diffusion model"),
    (("img_mlp.gate_proj.",), "an Ovis-Image diffusion model"),
    (("transformer_blocks.0.img_mod.1.weight",), "a Qwen-Image diffusion model"),
    (("cap_pad_token",), "a Z-Image diffusion model"),
    (("time_caption_embed.",), "an OmniGen2 diffusion model"),
    (("noise_refiner.0.",), "a Lumina or Z-Image diffusion model"),
    (("double_layers.0.attn.w1q.weight",), "an AuraFlow diffusion model"),
    (("patchify_proj.weight",), "an LTX video model"),
    (("y_embedder.y_proj.fc1.weight", "caption_projection.y_proj.fc1.weight"), "a PixArt diffusion model"),
    (("joint_blocks.0.x_block",), "a Stable Diffusion 3 model"),
    (("clip_txt_mapper.weight", "clip_txt_pooled_mapper.weight"), "a Stable Cascade model"),
    (("double_stream_blocks.0.block.",), "a HiDream diffusion model"),
    (("mlp_t5.0.weight",), "a HunyuanDiT diffusion model"),
    (("t5_yproj.weight",), "a Mochi video model"),
    (("blocks.block0.blocks.0.block.attn.", "llm_adapter."), "a Cosmos diffusion model"),
    (("conditioner.embedders.1.", "label_emb.0.0.weight"), "a Stable Diffusion XL model"),
    (("blocks.0.cross_attn.norm_k.weight",), "a Wan video model"),
)
UNET_KEYS = (  # of the first cross attention: in the original layout, in diffusers', in that of its XL model
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
)
LONGCAT_CONTEXT = 3584  # of Qwen2.5-VL, where FLUX.1 has T5's 4096


def _model(names: _Names) -> Foreign | None:
    if all(names.has(mark) for mark in NUNCHAKU):
        family = "flux1" if names.has("single_transformer_blocks.") else ""
        title = "a model in Nunchaku's own 4-bit layout (SVDQuant), which only its kernels read"
        return Foreign(role="model", title=title, family=family)
    if names.has("early_stream_modulations."):
        title = "a FLUX.3 diffusion model, which this version does not run yet"
        return Foreign(role="model", title=title, family="flux3")
    for marks, title in MODELS:
        if names.has(*marks):
            return Foreign(role="model", title=title, family="other")
    contexts = [names.side(names.ending(end), 1) for end in ("txt_in.weight", "context_embedder.weight")]
    if LONGCAT_CONTEXT in contexts and names.has(*FLUX_BLOCKS):
        return Foreign(role="model", title="a LongCat-Image diffusion model", family="other")
    keys = next((name for end in UNET_KEYS if (name := names.ending(end))), "")
    if keys:
        title = CONTEXT_WIDTHS.get(names.side(keys, 1), "Stable Diffusion 1 or 2")
        return Foreign(role="model", title=f"a {title} model", family="other")
    return None


# Parts of models.


def _vision(names: _Names) -> Foreign | None:
    """A vision tower that is not SigLIP's in Hugging Face's names: that has a layout, unless tensors are lost."""
    if names.has(*TIMM_TOWERS):
        title = "a SigLIP vision tower in OpenCLIP's layout, which this version does not read"
        return Foreign(role="vision", title=title)
    if names.has(*OPEN_CLIP_TOWERS) and not names.has("token_embedding."):
        return Foreign(role="vision", title="a CLIP vision tower in OpenCLIP's layout")
    is_clip = names.has(*CLIP_TOWERS)
    if not is_clip and not names.has("vision_model.encoder.layers."):
        return None
    norm = names.ending("vision_model.post_layernorm.weight") or names.ending("\npost_layernorm.weight")
    width, layers = names.side(norm), max(names.numbers(VISION_NUMBER), default=0) + 1
    if not is_clip:
        return Foreign(role="vision", title=f"some tensors of a SigLIP vision tower{SHARD}", width=width)
    title = CLIP_VISION.get((width, layers), f"a CLIP vision tower of width {width} with {layers} layers")
    return Foreign(role="vision", title=title, width=width)


TIMM_TOWERS, OPEN_CLIP_TOWERS = ("visual.trunk.blocks.0.",), ("visual.transformer.resblocks.0.",)
CLIP_TOWERS = ("vision_model.embeddings.class_embedding", "\nembeddings.class_embedding", "pre_layrnorm.")
VISION_NUMBER = re.compile(r"(?:vision_model\.|\n)encoder\.layers\.(\d{1,4})\.")
CLIP_VISION = {  # by width and layers
    (1024, 24): "the CLIP-L vision tower, which XLabs' IP-Adapter needs",
    (1280, 32): "the CLIP-H vision tower",
    (1664, 48): "the CLIP-G vision tower",
}
FLUX2_LATENT = 32
VIDEO_RANK = 5  # sides of a convolution's weight over time, rows and columns
VIDEO_MARKS = ("decoder.conv_in.conv.", "decoder.conv1.", "per_channel_statistics", "decoder.up_blocks.0.res_blocks.")
AUTOENCODER_MARKS = ("decoder.conv_in.", "decoder.up_blocks.0", "decoder.up.0.")


def _autoencoder(names: _Names) -> Foreign | None:
    entry = names.ending("decoder.conv_in.weight")
    if names.has(*VIDEO_MARKS) or len(names.shape(entry)) == VIDEO_RANK:
        title = "an autoencoder of another family, for video"
    elif names.side(entry, 1) == FLUX2_LATENT and names.has("bn.running_mean"):
        return Foreign(role="autoencoder", title="a FLUX.2 autoencoder that is not whole", family="flux2")
    elif entry and not names.has("encoder.conv_in."):
        title = f"the decoder alone of an autoencoder with {names.side(entry, 1)} latent channels"
    elif entry:
        title = f"an autoencoder of another family, with {names.side(entry, 1)} latent channels"
    elif names.has(*AUTOENCODER_MARKS):
        title = "an autoencoder of another family"
    else:
        return None
    return Foreign(role="autoencoder", title=title)


SHARD = ", without the rest: one file of several, or a damaged one"
REMAINS: tuple[tuple[tuple[str, ...], Foreign], ...] = (
    (
        ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.", "enc.blk.1.attn_rel_b."),
        Foreign(role="t5", title="a umT5 text encoder, which Wan uses and FLUX does not", family="other"),
    ),
    (
        ("transformer.resblocks.0.",),
        Foreign(role="clip", title="a CLIP text encoder in OpenCLIP's layout, which FLUX does not use", family="other"),
    ),
    (("pretrained.blocks.0.", "depth_head."), Foreign(role="other", title="a depth estimation model")),
    (("conv_first.", ".RDB1.", "model.1.sub.0."), Foreign(role="other", title="an upscaler", family="other")),
    (("emb_params", "string_to_param"), Foreign(role="other", title="a textual inversion embedding", family="other")),
    (
        ("double_stream_modulation_img.",),
        Foreign(role="model", title=f"some tensors of a FLUX.2 diffusion model{SHARD}", family="flux2"),
    ),
    (FLUX_BLOCKS, Foreign(role="model", title=f"some tensors of a FLUX diffusion model{SHARD}")),
    (("encoder.block.", "enc.blk."), Foreign(role="t5", title=f"some tensors of a T5 text encoder{SHARD}")),
)


def _remains(names: _Names) -> Foreign | None:
    return next((foreign for marks, foreign in REMAINS if names.has(*marks)), None)


LOOKS: tuple[Callable[[_Names], Foreign | None], ...] = (
    _lora, _redux, _controlnet, _ip_adapter, _model, _language_model, _vision, _autoencoder, _remains,
)  # fmt: skip
