"""What a file is, from its tensors' names and shapes alone.

Each known kind is a row of ``KINDS``: a test on the names, and a function that reads the spec off the shapes. First
dimensions decide where they can, for packed formats halve the second.
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
    if not any(part.kind == "transformer" for part in found):
        found += [Recognised("foreign", title) for title, test in FOREIGN if test(tensors)][: 1 if not found else 0]
    return found


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


def _flux1(tensors: Tensors, file_name: str, metadata: Mapping[str, str]) -> Recognised | None:
    prefix = _prefix(tensors, PREFIXES, "double_blocks.0.img_mod.lin.weight")
    if prefix is None or prefix + "img_in.weight" not in tensors or prefix + "vector_in.in_layer.weight" not in tensors:
        return None
    if any("distilled_guidance_layer" in name for name in tensors):
        return None

    def shape(name: str) -> tuple[int, ...]:
        return tensors[prefix + name].shape

    hidden, in_channels = shape("img_in.weight")[:2]
    head = tensors.get(prefix + "double_blocks.0.img_attn.norm.key_norm.scale") or tensors.get(
        prefix + "double_blocks.0.img_attn.norm.key_norm.weight"
    )
    if head is None:
        return None
    guided = prefix + "guidance_in.in_layer.weight" in tensors
    fields = {
        "in_channels": in_channels,
        "out_channels": shape("final_layer.linear.weight")[0],
        "hidden": hidden,
        "heads": hidden // head.shape[0],
        "context_width": shape("txt_in.weight")[1],
        "pooled_width": shape("vector_in.in_layer.weight")[1],
        "double_blocks": _count(tensors, prefix + "double_blocks."),
        "single_blocks": _count(tensors, prefix + "single_blocks."),
        "guidance_embedding": guided,
    }
    fitting = [spec for spec in FLUX1.values() if all(getattr(spec, k) == v for k, v in fields.items())]
    spec, notes = _choose(fitting, file_name, metadata)
    if spec is None:
        close = [s for s in FLUX1.values() if s.in_channels == in_channels and s.guidance_embedding == guided]
        base, _ = _choose(
            [s for s in close if s.context_width == fields["context_width"]] or close, file_name, metadata
        )
        if base is None:
            return None
        spec = replace(base, name=f"{base.name}-variant", title=f"{base.title}, another size", **fields)  # type: ignore[arg-type]
        notes = (f"its sizes are no release's: {fields['double_blocks']} double and {fields['single_blocks']} single "
                 f"blocks of width {hidden}; treated as {base.title}",)  # fmt: skip
    return Recognised("transformer", f"the {spec.title} diffusion model", spec, prefix, notes)


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
    latent = tensors[prefix + "decoder.conv_in.weight"].shape[1]
    base = tensors[prefix + "encoder.conv_in.weight"].shape[0]
    for spec in AUTOENCODERS.values():
        if (spec.latent_channels, spec.base_channels) == (latent, base):
            return Recognised("autoencoder", f"the autoencoder {spec.name}", spec, prefix)
    return None


def _clip(tensors: Tensors, file_name: str, metadata: Mapping[str, str]) -> Recognised | None:
    prefix = _prefix(tensors, CLIP_PREFIXES, "text_model.final_layer_norm.weight")
    if prefix is None:
        return None
    width = tensors[prefix + "text_model.final_layer_norm.weight"].shape[0]
    layers = _count(tensors, prefix + "text_model.encoder.layers.")
    for spec in CLIP_TEXT.values():
        if (spec.width, spec.layers) == (width, layers):
            return Recognised("clip", f"the text encoder {spec.name}", spec, prefix)
    return Recognised("foreign", f"a CLIP text encoder of width {width}, which FLUX does not use")


def _t5(tensors: Tensors, file_name: str, metadata: Mapping[str, str]) -> Recognised | None:
    prefix = _prefix(tensors, T5_PREFIXES, "encoder.final_layer_norm.weight")
    if prefix is None or prefix + "encoder.block.0.layer.0.SelfAttention.q.weight" not in tensors:
        return None
    width = tensors[prefix + "encoder.final_layer_norm.weight"].shape[0]
    layers = _count(tensors, prefix + "encoder.block.")
    for spec in T5_ENCODERS.values():
        if (spec.width, spec.layers) == (width, layers):
            return Recognised("t5", f"the text encoder {spec.name}", spec, prefix)
    return Recognised("foreign", f"a T5 encoder of width {width} with {layers} layers, which FLUX.1 does not use")


def _any(*parts: str) -> Callable[[Tensors], bool]:
    return lambda tensors: any(part in name for name in tensors for part in parts)


FOREIGN: tuple[tuple[str, Callable[[Tensors], bool]], ...] = (
    ("a Chroma diffusion model", _any("distilled_guidance_layer")),
    ("a FLUX.3 diffusion model, which this version does not run yet", _any("early_stream_modulations.")),
    ("a FLUX.2 diffusion model, which this version does not run yet", _any("double_stream_modulation_img.")),
    ("a FLUX model in diffusers' layout, which this version does not read yet", _any("single_transformer_blocks.0.")),
    ("a LoRA", _any("lora_A.", "lora_down.", "lora_up.")),
    ("a Redux adapter", _any("redux_up.weight")),
    ("a Stable Diffusion 3 model", _any("joint_blocks.0.x_block")),
    ("a Stable Diffusion XL model", _any("conditioner.embedders.1.", "label_emb.0.0.weight")),
    ("a Stable Diffusion 1 or 2 model", _any("input_blocks.1.1.transformer_blocks.0.attn2.to_k")),
    ("a Wan video model", _any("blocks.0.cross_attn.norm_k.weight")),
    ("a SigLIP or CLIP vision model", _any("vision_model.encoder.layers.0")),
    ("an autoencoder of another family", _any("decoder.conv_in.weight", "decoder.up_blocks.0")),
    ("a language model", _any("model.layers.0.self_attn.q_proj.weight", "layers.0.mlp.gate_proj.weight")),
)
