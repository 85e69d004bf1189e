"""Pictures to style tokens with any STYLE_MODEL and CLIP_VISION of FLUX.1 Redux, and into a CONDITIONING.

Shapes: T views of a picture, g patches along a view's side, N tokens, D width of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.clip_vision
import comfy.utils
import torch
from torch import Tensor

from ...flux.adapters.guides import check_span, check_strength
from ...flux.errors import MismatchError, NumericError, UserError
from ...flux.pipelines.redux import fewer_tokens
from ...flux.preprocess.vision import VisionViews, vision_pixels
from ...flux.specs.releases import PART_TITLES, where_to_get
from ...flux.specs.vision import REDUX, REDUXES, ReduxSpec
from .entries import Conditioning, check_region, with_part
from .preflight import ENCODERS, given_of, users_files
from .progress import check_cancelled, say
from .styles import ATTENTION, STRENGTH_MODES, TOKENS, Style, append_styles
from .vision import FoundryClipVision, check_pair

__all__ = ["Taking", "apply_redux"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Taking:
    """What is taken over of pictures, and how.

    Attributes:
        strength: 0..2.
        mode: "attention" weighs how much is looked at the tokens, "tokens" multiplies the tokens themselves.
        detail: Tokens along each side that a view's are averaged to; 0 for all.
        most: Tokens of a picture that are left after merging; 0 for all.
        fit: How the tower sees a picture: one of ``preprocess.vision.VIEWS``.
        mask: MASK (1 or B, H, W) of what is taken over; None for all.
        region: MASK (1 or B, H, W) of where in the output; None for everywhere.
        start: From when, as a fraction of the run.
        end: Until when.
    """

    strength: float = 1.0
    mode: str = ATTENTION
    detail: int = 0
    most: int = 0
    fit: str = "stretch"
    mask: Tensor | None = None
    region: Tensor | None = None
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in STRENGTH_MODES:
            raise UserError(f"there is no strength mode {self.mode!r}; choose one of {', '.join(STRENGTH_MODES)}")
        check_strength(self.strength)
        check_span(self.start, self.end)


@dataclass(frozen=True)
class Tower:
    """What is to know of a CLIP_VISION.

    Attributes:
        width: Of its hidden states.
        patch: Pixels along a patch's side.
        side: Pixels along the side of the pictures that it takes.
    """

    width: int
    patch: int
    side: int


def apply_redux(
    conditioning: Conditioning, style_model: Any, clip_vision: Any, image: Tensor, taking: Taking
) -> tuple[Conditioning, Tensor | None]:
    """A CONDITIONING with what pictures show behind its text, and what the tower sees, as an IMAGE, if it looks.

    Args:
        conditioning: Of FLUX.1.
        style_model: A Redux adapter, ours or the host's.
        clip_vision: The tower that it takes, likewise.
        image: IMAGE (B, H, W, C), each a reference of its own, as in so many calls with one each.
        taking: What of them is taken over.

    Raises:
        UserError: A mask is empty, or not one.
        MismatchError: The models do not fit each other, or the text.
        NumericError: A token is not finite.
    """
    tower = _check_models(style_model, clip_vision)
    _check_text(style_model, conditioning)
    if taking.strength == 0 and taking.mode == ATTENTION:
        return conditioning, None
    regions = _regions(taking.region, len(image))
    views = vision_pixels(image, tower.side, taking.fit, taking.mask, tower.patch, say)
    seen = _look(clip_vision, views, tower)
    per_picture = len(seen) // len(image)
    made = [_tokens(style_model, hidden) for hidden in seen]
    styles = []
    for index, region in enumerate(regions):
        own = slice(index * per_picture, (index + 1) * per_picture)
        weights = None if views.weights is None else views.weights[own]
        styles.append(_style(torch.cat(made[own]), weights, region, taking))
    change = partial(append_styles, styles=styles, stretch=comfy.utils.upscale_dit_mask)
    return with_part(conditioning, change, start=taking.start, end=taking.end), views.shown()


def _look(clip_vision: Any, views: VisionViews, tower: Tower) -> list[Tensor]:
    """Hidden states (1, g * g, vision width) of every view, one by one: alike in any company."""
    bar = comfy.utils.ProgressBar(len(views.pixels))
    seen = []
    for view in views.pixels:
        check_cancelled()
        hidden = _hidden(clip_vision, view[None])
        if hidden.shape[1:] != ((tower.side // tower.patch) ** 2, tower.width):
            raise MismatchError(
                f"the CLIP_VISION gave {list(hidden.shape)} for a picture of {tower.side} pixels, not a token for each "
                f"patch; load {where_to_get(REDUX.tower)} with Load FLUX Redux"
            )
        seen.append(hidden)
        bar.update(1)
    return seen


def _hidden(clip_vision: Any, pixels: Tensor) -> Tensor:
    """What any tower makes of pictures (1, 3, side, side) in -1..1."""
    if isinstance(clip_vision, FoundryClipVision):
        return clip_vision.look(pixels)
    image = (pixels.movedim(1, -1) + 1) / 2  # of the tower's size, so that it does no more than round to 8 bits
    hidden: Tensor = clip_vision.encode_image(image, crop=False).last_hidden_state
    return hidden


def _tokens(style_model: Any, hidden: Tensor) -> Tensor:
    """What one view became (1, g * g, D)."""
    check_cancelled()
    output = comfy.clip_vision.Output()
    output["last_hidden_state"] = hidden
    tokens: Tensor = style_model.get_cond(output)
    if not bool(torch.isfinite(tokens).all()):
        raise NumericError(
            "the vision tower and Redux gave numbers that are not finite; one of their files is damaged, or the number "
            "format overflows: start ComfyUI with --fp32-text-enc"
        )
    return tokens


def _style(tokens: Tensor, weights: Tensor | None, region: Tensor | None, taking: Taking) -> Style:
    """One picture's tokens (T, g * g, D), with how much of each is taken over (T, g * g), as it goes into a text."""
    tokens, weights = fewer_tokens(tokens, weights, taking.detail or None, taking.most or None)
    counted = torch.ones(tokens.shape[1]) if weights is None else weights.float()
    kept = counted > 0
    tokens, counted = tokens[:, kept], counted[kept]
    if taking.mode == TOKENS:
        return Style(tokens * taking.strength, counted, region)
    return Style(tokens, counted * taking.strength, region)


def _regions(region: Tensor | None, pictures: int) -> Sequence[Tensor | None]:
    """Each picture's region (1, 1, H, W)."""
    if region is None:
        return [None] * pictures
    check_region(region, "the picture would be taken over nowhere", pictures)
    return [own.float().clamp(0, 1)[None, None] for own in region.expand(pictures, -1, -1)]


def _check_models(style_model: Any, clip_vision: Any) -> Tower:
    """Refuse a STYLE_MODEL that is no Redux adapter, and a CLIP_VISION that it does not take."""
    widths = _style_widths(style_model)
    if widths is None:
        raise MismatchError(
            f"the STYLE_MODEL is a {type(style_model.model).__name__}, no FLUX.1 Redux adapter; load "
            f"{where_to_get(REDUX.name)} with Load FLUX Redux"
        )
    adapter, own = given_of(style_model), given_of(clip_vision)
    if adapter is not None and own is not None:
        check_pair(adapter, own)
    tower = _tower(clip_vision)
    if tower is None or tower.width != widths[0]:
        found = "is no SigLIP tower" if tower is None else f"has hidden states {tower.width} wide"
        names = [spec.tower for spec in REDUXES.values() if spec.vision_width == widths[0]]
        needed = f"{PART_TITLES[names[0]]}: {where_to_get(names[0])}" if names else "the tower it was trained with"
        source = "" if own is None else f" from {own.path.name}"
        raise MismatchError(
            f"the CLIP_VISION{source} {found}, but the STYLE_MODEL{_source(style_model)} takes those of a SigLIP tower "
            f"{widths[0]} wide; load {needed}"
        )
    return tower


def _check_text(style_model: Any, conditioning: Conditioning) -> None:
    """Refuse text of another width than the adapter's tokens."""
    widths = _style_widths(style_model)
    assert widths is not None, "models are checked before"
    for text, extra in conditioning:
        if text.shape[-1] == widths[1]:
            continue
        encoders = extra.get(ENCODERS) or ()
        source = f" from {' and '.join(given.path.name for given in encoders)}" if encoders else ""
        fitting = [
            own.name
            for own in users_files(("redux",))
            if isinstance(own.found.spec, ReduxSpec) and own.found.spec.text_width == text.shape[-1]
        ]
        usual = [spec.name for spec in REDUXES.values() if spec.text_width == text.shape[-1]]
        way_out = f"of your files these fit: {', '.join(fitting)}" if fitting else ""
        get = f"get {where_to_get(usual[0])}" if usual else "encode the prompt with FLUX.1's text encoders"
        raise MismatchError(
            f"the CONDITIONING{source} has width {text.shape[-1]}, but the STYLE_MODEL{_source(style_model)} makes "
            f"tokens of width {widths[1]}; {way_out or get}"
        )


def _source(owner: Any) -> str:
    """Where one of our objects comes from, as a phrase; empty for others'."""
    given = given_of(owner)
    return "" if given is None else f" from {given.path.name}"


def _style_widths(style_model: Any) -> tuple[int, int] | None:
    """Widths of what a STYLE_MODEL takes and gives; None for what is no Redux adapter."""
    up, down = (getattr(style_model.model, name, None) for name in ("redux_up", "redux_down"))
    return None if up is None or down is None else (up.in_features, down.out_features)


def _tower(clip_vision: Any) -> Tower | None:
    """What a CLIP_VISION is; None for what is no SigLIP tower of a fixed size."""
    embeddings = getattr(getattr(clip_vision.model, "vision_model", None), "embeddings", None)
    weight = getattr(getattr(embeddings, "patch_embedding", None), "weight", None)
    if weight is None or weight.ndim != 4 or getattr(embeddings, "class_embedding", None) is not None:
        return None
    return Tower(weight.shape[0], weight.shape[-1], clip_vision.image_size)
