"""What a file is, from its tensors' names and shapes alone.

A function for each part that this engine runs reads the spec off the shapes; foreign families are rows of a table with
a test on the names. First dimensions decide where they can, for packed formats halve the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from ..errors import MismatchError
from .autoencoder import AUTOENCODERS, AutoencoderSpec
from .flux1 import FLUX1, Flux1Spec
from .text import CLIP_TEXT, T5_ENCODERS, ClipTextSpec, T5Spec

__all__ = ["HasShape", "Recognised", "recognise", "recognise_kind"]


class HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


Tensors = Mapping[str, HasShape]
AnySpec = Flux1Spec | AutoencoderSpec | ClipTextSpec | T5Spec

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "model.", "transformer.", "net.", "")
AUTOENCODER_PREFIXES = ("first_stage_model.", "vae.", "")
CLIP_PREFIXES = ("text_encoders.clip_l.transformer.", "")
T5_PREFIXES = ("text_encoders.t5xxl.transformer.", "")


@dataclass(frozen=True)
class Recognised:
    """What was found.

    Attributes:
        kind: "transformer", "autoencoder", "clip", "t5", or "foreign".
        title: For people.
        spec: None for what this engine does not run.
        prefix: Before every tensor name of the part.
        notes: What was assumed, and what else to know.
    """

    kind: str
    title: str
    spec: AnySpec | None = None
    prefix: str = ""
    notes: tuple[str, ...] = ()


def recognise(tensors: Tensors, file_name: str = "", metadata: Mapping[str, str] | None = None) -> list[Recognised]:
    """Everything that a file holds; empty when nothing in it is known."""
    found = [part for look in (_flux1, _autoencoder, _clip, _t5) if (part := look(tensors, file_name, metadata or {}))]
    if any(part.kind == "transformer" for part in found):
        return found
    family = _first(FOREIGN_MODELS, tensors)
    if family is not None:  # Stable Diffusion 3 has an autoencoder of FLUX.1's shapes with another scale
        return [Recognised("foreign", family), *(part for part in found if part.kind in ("clip", "t5"))]
    other = None if found else _first(FOREIGN_PARTS, tensors)
    return found if other is None else [Recognised("foreign", other)]


def _first(rows: tuple[tuple[str, Callable[[Tensors], bool]], ...], tensors: Tensors) -> str | None:
    return next((title for title, test in rows if test(tensors)), None)


TITLES = {
    "transformer": "a FLUX.1 diffusion model",
    "autoencoder": "a FLUX.1 autoencoder (VAE)",
    "clip": "a CLIP-L text encoder",
    "t5": "a T5 text encoder",
}


def recognise_kind(kind: str, tensors: Tensors, file_name: str, metadata: Mapping[str, str]) -> Recognised:
    """The part of one kind in a file.

    Raises:
        MismatchError: The file holds something else, which the message names.
    """
    found = recognise(tensors, file_name, metadata)
    for part in found:
        if part.kind == kind:
            return part
    what = " and ".join(part.title for part in found) or "of no kind that is known here"
    raise MismatchError(f"{file_name} is {what}, but {TITLES[kind]} is needed here; choose another file")


def _prefix(tensors: Tensors, candidates: tuple[str, ...], key: str) -> str | None:
    return next((prefix for prefix in candidates if prefix + key in tensors), None)


def _side(tensors: Tensors, name: str, dimension: int = 0) -> int:
    """One side of a tensor's shape; 0 where there is no such tensor or side."""
    shape = tensors[name].shape if name in tensors else ()
    return shape[dimension] if dimension < len(shape) else 0


def _flux1(tensors: Tensors, file_name: str, metadata: Mapping[str, str]) -> Recognised | None:
    prefix = _prefix(tensors, PREFIXES, "double_blocks.0.img_mod.lin.weight")
    if prefix is None or prefix + "img_in.weight" not in tensors or prefix + "vector_in.in_layer.weight" not in tensors:
        return None
    if any("distilled_guidance_layer" in name for name in tensors):
        return None
    fields = _flux1_fields(tensors, prefix)
    fitting = [spec for spec in FLUX1.values() if all(getattr(spec, k) == v for k, v in fields.items())]
    spec, notes = _choose(fitting, file_name, metadata)
    if spec is None:
        spec, notes = _another_size(fields, file_name, metadata)
    if spec is None:
        return Recognised("foreign", f"a FLUX.1-like diffusion model whose layout cannot be run here ({notes[0]})")
    return Recognised("transformer", f"the {spec.title} diffusion model", spec, prefix, notes)


def _flux1_fields(tensors: Tensors, prefix: str) -> dict[str, int | float | bool]:
    """The spec's fields that shapes tell; 0 stands for what is not there."""
    hidden = _side(tensors, prefix + "img_in.weight")
    norm = prefix + "double_blocks.0.img_attn.norm.key_norm."
    head = _side(tensors, norm + "scale") or _side(tensors, norm + "weight")
    return {
        "in_channels": _side(tensors, prefix + "img_in.weight", 1),
        "out_channels": _side(tensors, prefix + "final_layer.linear.weight"),
        "hidden": hidden,
        "heads": hidden // head if head else 0,
        "context_width": _side(tensors, prefix + "txt_in.weight", 1),
        "pooled_width": _side(tensors, prefix + "vector_in.in_layer.weight", 1),
        "double_blocks": _count(tensors, prefix + "double_blocks."),
        "single_blocks": _count(tensors, prefix + "single_blocks."),
        "mlp_ratio": _side(tensors, prefix + "double_blocks.0.img_mlp.0.weight") / max(1, hidden),
        "guidance_embedding": prefix + "guidance_in.in_layer.weight" in tensors,
    }


def _another_size(
    fields: Mapping[str, int | float | bool], file_name: str, metadata: Mapping[str, str]
) -> tuple[Flux1Spec | None, tuple[str, ...]]:
    """A spec for sizes that no release has, from the row that is nearest; None with the reason where there is none."""
    rows = [
        s for s in FLUX1.values()
        if (s.in_channels, s.guidance_embedding) == (fields["in_channels"], fields["guidance_embedding"])
    ]  # fmt: skip
    base, _ = _choose([s for s in rows if s.context_width == fields["context_width"]] or rows, file_name, metadata)
    if base is None:
        return None, (f"{fields['in_channels']} input channels",)
    if not all(value for name, value in fields.items() if name not in ("guidance_embedding", "single_blocks")):
        absent = [name for name, value in fields.items() if not value and name != "guidance_embedding"]
        return None, (f"tensors are missing that tell {', '.join(absent)}",)
    try:
        spec = replace(base, name=f"{base.name}-variant", title=f"{base.title}, another size", **fields)  # type: ignore[arg-type]
    except ValueError as error:
        return None, (str(error),)
    note = (
        f"its sizes are no release's: {spec.double_blocks} double and {spec.single_blocks} single blocks of width "
        f"{spec.hidden}; treated as {base.title}"
    )
    return spec, (note,)


def _choose(
    fitting: list[Flux1Spec], file_name: str, metadata: Mapping[str, str]
) -> tuple[Flux1Spec | None, tuple[str, ...]]:
    """Of variants that shapes cannot tell apart, the one that metadata or file name points to, else the first."""
    if len(fitting) < 2:
        return (fitting[0] if fitting else None), ()
    hints = " ".join(
        (metadata.get("modelspec.architecture", ""), metadata.get("modelspec.title", ""), file_name)
    ).lower()
    words = {"kontext": "kontext", "krea": "krea", "depth": "depth", "canny": "canny"}
    for word, part in words.items():
        if word in hints:
            for spec in fitting:
                if part in spec.name:
                    return spec, (f"taken for {spec.title} by its name; tensors cannot tell",)
    others = ", ".join(spec.title for spec in fitting[1:])
    return fitting[0], (f"taken for {fitting[0].title}; by its tensors it could also be {others}",)


def _count(tensors: Tensors, prefix: str) -> int:
    return len({name[len(prefix) :].split(".", 1)[0] for name in tensors if name.startswith(prefix)})


def _autoencoder(tensors: Tensors, file_name: str, metadata: Mapping[str, str]) -> Recognised | None:
    prefix = _prefix(tensors, AUTOENCODER_PREFIXES, "decoder.conv_in.weight")
    if prefix is None or prefix + "encoder.conv_in.weight" not in tensors:
        return None
    if prefix + "quant_conv.weight" in tensors or prefix + "encoder.down.0.block.0.conv1.weight" not in tensors:
        return None
    latent = _side(tensors, prefix + "decoder.conv_in.weight", 1)
    base = _side(tensors, prefix + "encoder.conv_in.weight")
    for spec in AUTOENCODERS.values():
        if (spec.latent_channels, spec.base_channels) == (latent, base):
            return Recognised("autoencoder", f"the autoencoder {spec.name}", spec, prefix)
    return None


def _clip(tensors: Tensors, file_name: str, metadata: Mapping[str, str]) -> Recognised | None:
    prefix = _prefix(tensors, CLIP_PREFIXES, "text_model.final_layer_norm.weight")
    if prefix is None:
        return None
    width = _side(tensors, prefix + "text_model.final_layer_norm.weight")
    layers = _count(tensors, prefix + "text_model.encoder.layers.")
    for spec in CLIP_TEXT.values():
        if (spec.width, spec.layers) == (width, layers):
            return Recognised("clip", f"the text encoder {spec.name}", spec, prefix)
    return Recognised("foreign", f"a CLIP text encoder of width {width}, which FLUX does not use")


def _t5(tensors: Tensors, file_name: str, metadata: Mapping[str, str]) -> Recognised | None:
    prefix = _prefix(tensors, T5_PREFIXES, "encoder.final_layer_norm.weight")
    if prefix is None or prefix + "encoder.block.0.layer.0.SelfAttention.q.weight" not in tensors:
        return None
    width = _side(tensors, prefix + "encoder.final_layer_norm.weight")
    layers = _count(tensors, prefix + "encoder.block.")
    words = _side(tensors, prefix + "shared.weight") or _side(tensors, prefix + "encoder.embed_tokens.weight")
    for spec in T5_ENCODERS.values():
        if (spec.width, spec.layers, spec.vocabulary) == (width, layers, words):
            return Recognised("t5", f"the text encoder {spec.name}", spec, prefix)
    return Recognised(
        "foreign", f"a T5 encoder of width {width} with {layers} layers and {words} words, which FLUX.1 does not use"
    )


def _any(*parts: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(part in name for name in tensors for part in parts)


def _conv_in(latent_channels: int) -> Callable[[Tensors], bool]:
    """A convolutional decoder of this many latent channels."""
    return lambda tensors: any(
        name.endswith("decoder.conv_in.weight") and _side(tensors, name, 1) == latent_channels for name in tensors
    )


Foreign = tuple[tuple[str, Callable[[Tensors], bool]], ...]

# A LoRA's names contain its model's, so it comes first.
FOREIGN_MODELS: Foreign = (
    (
        "a LoRA",
        _any(
            "lora_A.",
            "lora_B.",
            "lora_down.",
            "lora_up.",
            "hada_w1_a",
            "lokr_w",
            "processor.qkv_lora",
            "processor.proj_lora",
        ),
    ),
    ("a Redux adapter", _any("redux_up.weight")),
    (
        "a ControlNet",
        _any("controlnet_x_embedder.", "controlnet_blocks.", "control_model.", "controlnet_cond_emb"),
    ),
    ("a Chroma diffusion model", _any("distilled_guidance_layer")),
    ("a FLUX.3 diffusion model, which this version does not run yet", _any("early_stream_modulations.")),
    ("a FLUX.2 diffusion model, which this version does not run yet", _any("double_stream_modulation_img.")),
    ("a FLUX model in diffusers' layout, which this version does not read yet", _any("single_transformer_blocks.0.")),
    ("a HunyuanVideo diffusion model", _any("txt_in.individual_token_refiner.")),
    ("a Qwen-Image diffusion model", _any("transformer_blocks.0.img_mod.1.weight")),
    ("a Lumina or Z-Image diffusion model", _any("noise_refiner.0.")),
    ("an AuraFlow diffusion model", _any("double_layers.0.attn.w1q.weight")),
    ("an LTX video model", _any("patchify_proj.weight")),
    ("a PixArt diffusion model", _any("y_embedder.y_proj.fc1.weight", "caption_projection.y_proj.fc1.weight")),
    ("a Stable Diffusion 3 model", _any("joint_blocks.0.x_block")),
    ("a Stable Cascade model", _any("clip_txt_mapper.weight", "clip_txt_pooled_mapper.weight")),
    ("a Stable Diffusion XL model", _any("conditioner.embedders.1.", "label_emb.0.0.weight")),
    ("a Stable Diffusion 1 or 2 model", _any("input_blocks.1.1.transformer_blocks.0.attn2.to_k")),
    ("a Stable Diffusion model in diffusers' layout", _any("down_blocks.0.attentions.0.transformer_blocks.0.attn2.")),
    ("a Wan video model", _any("blocks.0.cross_attn.norm_k.weight")),
)
FOREIGN_PARTS: Foreign = (
    ("a SigLIP or CLIP vision model", _any("vision_model.encoder.layers.0")),
    ("the FLUX.2 autoencoder, which this version does not run yet", _conv_in(32)),
    (
        "an autoencoder in diffusers' layout, which this version does not read yet",
        lambda tensors: _conv_in(16)(tensors) and _any("decoder.up_blocks.0.")(tensors),
    ),
    ("an autoencoder of another family", _any("decoder.conv_in.weight", "decoder.up_blocks.0", "decoder.conv1.weight")),
    ("a language model", _any("model.layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight")),
)
