"""CONDITIONING: made from prompts, given a guidance, and checked against a model."""

from __future__ import annotations

from typing import Any

import node_helpers
from torch import Tensor

from ...flux.errors import MismatchError
from ...flux.specs.flux1 import Flux1Spec
from .preflight import ENCODERS, check_together, given_of

__all__ = ["check_conditioning", "check_widths", "encode", "with_guidance"]

Conditioning = list[list[Any]]
TOKENS = ("l", "t5xxl")  # the host's names of the two encoders' tokens
UNKNOWN_ENCODERS = "the text encoders that belong to it"


def encode(clip: Any, clip_prompt: str, t5_prompt: str, guidance: float) -> Conditioning:
    """Encode a prompt with any CLIP of FLUX.1.

    Args:
        clip: Ours, or a core loader's of type flux.
        clip_prompt: For CLIP-L.
        t5_prompt: For T5.
        guidance: Strength that is written beside the text.

    Raises:
        MismatchError: The CLIP is another family's.
    """
    apart = t5_prompt != clip_prompt
    tokens = clip.tokenize(clip_prompt, **({"cut_told_of": ("l",)} if apart else {}))
    missing = [name for name in TOKENS if name not in tokens]
    if missing:
        raise MismatchError(
            f"this CLIP has the encoders {', '.join(tokens)}, but FLUX.1 needs CLIP-L and T5-XXL; load them with "
            "Load FLUX Text Encoders, or with DualCLIPLoader and type flux"
        )
    if apart:
        tokens["t5xxl"] = clip.tokenize(t5_prompt, cut_told_of=("t5xxl",))["t5xxl"]
    return clip.encode_from_tokens_scheduled(tokens, add_dict={"guidance": guidance})


def with_guidance(conditioning: Conditioning, guidance: float) -> Conditioning:
    """A copy that carries another guidance."""
    return node_helpers.conditioning_set_values(conditioning, {"guidance": guidance})


def check_widths(spec: Flux1Spec, text: Tensor | None, pooled: Tensor | None) -> None:
    """Refuse text that was encoded for another model.

    Raises:
        MismatchError: Its width is not the model's; the message names both.
    """
    check_against(spec.title, spec.context_width, spec.pooled_width, " and ".join(spec.text_encoders), text, pooled)


def check_conditioning(patcher: Any, conditioning: Conditioning) -> None:
    """The same for a whole CONDITIONING and any FLUX MODEL, also one that a core loader made.

    Raises:
        MismatchError: The text encoders are another model's, or a width is not the model's.
    """
    for _, extra in conditioning:
        check_together(given_of(patcher.model), extra.get(ENCODERS) or ())
    spec = getattr(patcher.model, "spec", None)
    config = patcher.model.model_config.unet_config
    if "context_in_dim" not in config or "vec_in_dim" not in config:
        return
    for text, extra in conditioning:
        if isinstance(spec, Flux1Spec):
            check_widths(spec, text, extra.get("pooled_output"))
        else:
            widths = config["context_in_dim"], config["vec_in_dim"]
            check_against("this MODEL", *widths, UNKNOWN_ENCODERS, text, extra.get("pooled_output"))


def check_against(
    title: str, width: int, pooled_width: int, encoders: str, text: Tensor | None, pooled: Tensor | None
) -> None:
    """Refuse widths other than a model's; a pooled vector may be absent, which counts as zeros."""
    found = None if text is None else text.shape[-1]
    found_pooled = pooled_width if pooled is None else pooled.shape[-1]
    if found is not None and (found, found_pooled) != (width, pooled_width):
        raise MismatchError(
            f"the CONDITIONING has width {found} with a pooled vector of {found_pooled}, but {title} takes {width} and "
            f"{pooled_width}; encode the prompt with {encoders}"
        )
