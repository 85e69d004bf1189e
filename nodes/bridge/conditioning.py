"""CONDITIONING: made from prompts, given a guidance, and checked against a model."""

from __future__ import annotations

from typing import Any

import node_helpers
from torch import Tensor

from ...flux.errors import MismatchError
from ...flux.pipelines.given import tell_of_region
from ...flux.specs.flux1 import Flux1Spec
from .control_lora import FIRST_LAYER, control_slots, takes_hole
from .entries import MASK as REGION
from .experts import EXPERT, expert_of, our_spec
from .pictures import CONTROLS, IMAGE, MASK, taken_by
from .preflight import check_together, files_of, given_of
from .progress import say
from .prompts import encode_tokens
from .references import LATENTS, VIEWS, views_of
from .styles import STYLES

__all__ = [
    "check_channels", "check_conditioning", "check_widths", "encode", "sample_and_tell", "tell_of_regions",
    "with_guidance",
]  # fmt: skip

Conditioning = list[list[Any]]
Extra = dict[str, Any]
TOKENS = ("l", "t5xxl")  # the host's names of the two encoders' tokens
EDIT = "edit"  # the task of models that look at references
# Our keys, what each is, and what to do instead of loading another MODEL.
ONLY_OURS = {
    VIEWS: ("a reference with a strength or a region", ", or set its strength to 1 and take the region out"),
    CONTROLS: ("a second control picture", ", or take one FLUX Control out"),
    EXPERT: ("what FLUX Combine made", " and connect the model output of FLUX Combine"),
}
UNKNOWN_ENCODERS = "the text encoders that belong to it"


def encode(
    clip: Any, clip_prompt: str, t5_prompt: str, guidance: float, *, kept: bool = False, on_disk: bool = False
) -> Conditioning:
    """Encode a prompt with any CLIP of FLUX.1.

    Args:
        clip: Ours, or a core loader's of type flux.
        clip_prompt: For CLIP-L.
        t5_prompt: For T5.
        guidance: Strength that is written beside the text.
        kept: Whether what our CLIP makes is kept in memory, and given again for the same prompt.
        on_disk: Whether on disk, too.

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
    return encode_tokens(clip, tokens, {"guidance": guidance}, kept=kept, on_disk=on_disk)


def with_guidance(conditioning: Conditioning, guidance: float) -> Conditioning:
    """A copy that carries another guidance."""
    return node_helpers.conditioning_set_values(conditioning, {"guidance": guidance})


def check_widths(spec: Flux1Spec, text: Tensor | None, pooled: Tensor | None) -> None:
    """Refuse text that was encoded for another model.

    Raises:
        MismatchError: Its width is not the model's; the message names both.
    """
    check_against(spec.title, spec.context_width, spec.pooled_width, " and ".join(spec.text_encoders), text, pooled)


def check_conditioning(patcher: Any, conditioning: Conditioning, *, masked: bool) -> None:
    """Refuse what does not fit a MODEL, also one that a core loader made.

    Args:
        patcher: The MODEL.
        conditioning: All entries of a run.
        masked: Whether the run has a noise mask.

    Raises:
        MismatchError: The text encoders are another model's, a width is not the model's, or something needs our MODEL.
    """
    if our_spec(patcher) is None:
        check_foreign(patcher, conditioning)
        _tell_foreign(patcher, conditioning, masked=masked)
        return
    for text, extra in conditioning:
        maker = _maker(patcher, extra)
        check_together(given_of(maker.model), files_of(extra))
        check_widths(our_spec(maker), text, extra.get("pooled_output"))


def _maker(patcher: Any, extra: Extra) -> Any:
    """Which MODEL predicts an entry."""
    expert = expert_of(extra)
    return patcher if expert is None else expert.patcher


def check_foreign(patcher: Any, conditioning: Conditioning) -> None:
    """The same for a MODEL that was not loaded by us.

    Raises:
        MismatchError: A width is not the model's, or an entry carries what only our MODEL reads.
    """
    config = patcher.model.model_config.unet_config
    for text, extra in conditioning:
        for key, (what, otherwise) in ONLY_OURS.items():
            if views_of(extra) if key == VIEWS else extra.get(key):
                raise MismatchError(
                    f"the CONDITIONING carries {what}, which only a MODEL of FLUX Foundry takes; load it with "
                    f"Load FLUX Model{otherwise}"
                )
        if "context_in_dim" in config and "vec_in_dim" in config:
            widths = config["context_in_dim"], config["vec_in_dim"]
            check_against("this MODEL", *widths, UNKNOWN_ENCODERS, text, extra.get("pooled_output"))


def _tell_foreign(patcher: Any, conditioning: Conditioning, *, masked: bool) -> None:
    """Warn of a picture that a MODEL of another loader has no input for, where it is not the noise mask's."""
    config = patcher.model.model_config.unet_config
    channels = [config.get(name) for name in ("in_channels", "out_channels")]
    if masked or None in channels or FIRST_LAYER in patcher.patches:
        return
    if channels[0] == channels[1] and any(extra.get(IMAGE) is not None for _, extra in conditioning):
        say("the CONDITIONING carries a picture, but this MODEL has no input for one: choose Fill, Canny or Depth")


def tell_of_regions(conditioning: Conditioning, size: tuple[int, int]) -> None:
    """Warn of regions whose aspect is not that of a picture of this height and width in pixels."""
    told: dict[str, None] = {}
    for _, extra in conditioning:
        styles, views = extra.get(STYLES), extra.get(VIEWS) or ()
        regions = [extra.get(REGION), *(span.region for span in (styles.spans if styles else ()))]
        regions += [view["region"] for view in views if view]
        for region in regions:
            tell_of_region(region, size, lambda sentence: told.setdefault(sentence))
    for sentence in told:
        say(sentence)


def check_channels(patcher: Any, entry: Extra, *, masked: bool) -> None:
    """Refuse a picture that a MODEL has no input for.

    Args:
        patcher: A MODEL of ours.
        entry: Of a CONDITIONING.
        masked: Whether the latent has a noise mask, by which a picture with a hole takes effect on any MODEL.

    Raises:
        MismatchError: There is one that would have no effect.
    """
    spec = patcher.model.spec if patcher is not None else None
    if spec is None:
        return
    slots = control_slots(patcher, spec)
    absent = [slot for slot in entry.get(CONTROLS) or () if slot > slots]
    if absent:
        raise MismatchError(
            f"the CONDITIONING carries a picture for control {absent[0]}, but the MODEL takes "
            f"{_counted(slots)}; put one Load FLUX Control LoRA behind another for several, or take FLUX Control out"
        )
    if takes_hole(spec) and entry.get(IMAGE) is not None and entry.get(MASK) is None and not masked:
        raise MismatchError(
            f"the CONDITIONING carries a control picture, but {spec.title} takes a picture with a hole in its place; "
            "put FLUX Fill before or behind FLUX Control, or choose FLUX.1 Canny or Depth in Load FLUX Model"
        )
    if entry.get(IMAGE) is None or slots or takes_hole(spec):
        return
    if entry.get(MASK) is None:
        raise MismatchError(
            f"the CONDITIONING carries a control picture, but {spec.title} has no input for one; choose FLUX.1 Canny "
            "or Depth in Load FLUX Model, or put Load FLUX Control LoRA behind it"
        )
    if not masked:
        raise MismatchError(
            f"the CONDITIONING carries a picture with a hole, but {spec.title} has no input for one, so that it would "
            "have no effect; choose FLUX.1 Fill in Load FLUX Model, or turn noise_mask on in InpaintModelConditioning"
        )


def _counted(slots: int) -> str:
    return {0: "none", 1: "1"}.get(slots, f"only {slots}")


def sample_and_tell(executor: Any, guider: Any, *rest: Any) -> Any:
    """Wrapper of a sampling run, of any sampler node, that first warns of what each MODEL was not given."""
    makers: dict[int, tuple[Any, list[Extra]]] = {}
    for entry in (entry for entries in guider.conds.values() for entry in entries or ()):
        maker = _maker(guider.model_patcher, entry)
        makers.setdefault(id(maker), (maker, []))[1].append(entry)
    for maker, entries in makers.values():
        tell_of_pictures(maker, entries)
    return executor(guider, *rest)


def tell_of_pictures(patcher: Any, entries: list[Extra]) -> None:
    """Warn of what a MODEL of ours was not given, or was not made for."""
    spec: Flux1Spec = patcher.model.spec
    slots, title = control_slots(patcher, spec), spec.title
    entries = [taken_by(entry, hole=takes_hole(spec), slots=slots) for entry in entries]
    pictures = any(entry.get(IMAGE) is not None for entry in entries)
    holes = any(entry.get(MASK) is not None for entry in entries)
    if takes_hole(spec) and not pictures:
        say(f"{title} got no picture, so that it paints all of an empty one: add FLUX Fill or InpaintModelConditioning")
    if slots and (takes_hole(spec) or not pictures) and not any(entry.get(CONTROLS) for entry in entries):
        say(f"{title} got no control picture, so that it follows an empty one: add FLUX Control")
    if holes and not takes_hole(spec):
        seen = "takes the picture with a hole for a control picture" if slots else "does not see the picture's hole"
        say(f"{title} {seen}: to paint into a picture choose FLUX.1 Fill in Load FLUX Model")
    if spec.task != EDIT and any(entry.get(LATENTS) for entry in entries):
        say(f"{title} was not trained to look at references: choose FLUX.1 Kontext in Load FLUX Model")
    if not spec.heeds_redux and any(entry.get(STYLES) for entry in entries):
        say(f"{title} was not trained to heed Redux: choose mini redux in Load FLUX (embedded)")


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
