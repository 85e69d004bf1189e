"""Control pictures: edges and depth, and into a CONDITIONING for a control model or a control LoRA.

Shapes: IMAGE (B, H, W, 3) in 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor, nn

from ...flux.adapters.guides import check_strength
from ...flux.errors import UserError
from ...flux.pipelines.text_to_image import round_size
from ...flux.preprocess.canny import automatic_canny, canny
from ...flux.preprocess.control import as_rgb, fit_control, has_colours, is_black_and_white, lacks_edges
from ...flux.preprocess.depth import normalise_depth, open_depth
from .compat import patch, to_intermediate
from .control_lora import control_slots
from .entries import Conditioning, check_region
from .experts import receiver
from .filling import CELL, encode, tell_of_area, with_both
from .pictures import CONTROL, CONTROLS, IMAGE, has_hole, if_taken, marked, with_room
from .preflight import encoded_by
from .progress import check_cancelled, say

__all__ = ["KINDS", "Edges", "add_control", "control_picture", "depth_of", "edges_of"]

CANNY, DEPTH, READY = "canny", "depth", "image"
KINDS = (CANNY, DEPTH, READY)
RATIO = "downscale_ratio_spacial"  # the host's key, so spelt, for pixels of a latent's cell
WORKING_BYTES = 1 << 30  # of a depth model at the 518 pixels that it looks at

Extra = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Edges:
    """What counts as an edge.

    Attributes:
        low: Threshold of the gradient where edges end.
        high: Where they begin.
        automatic: Let each picture choose both.
    """

    low: float
    high: float
    automatic: bool


def edges_of(image: Tensor, edges: Edges) -> Tensor:
    """Edges (B, H, W, 3) of any IMAGE, white on black.

    Raises:
        UserError: It is no IMAGE, or the thresholds are none.
    """
    found = []
    for picture in as_rgb(image)[:, None]:
        check_cancelled()
        found.append(automatic_canny(picture) if edges.automatic else canny(picture, edges.low, edges.high))
    drawn = torch.cat(found)
    if lacks_edges(drawn):
        say("no edges were found: lower the thresholds, or turn automatic on")
    return drawn


def depth_of(image: Tensor, folder: Path, normalisation: str, invert: bool) -> Tensor:
    """Depth (B, H, W, 3) of any IMAGE by a depth model, bright where near, under the host's memory management.

    Args:
        image: IMAGE.
        folder: Of a model in transformers' format.
        normalisation: One of ``preprocess.depth.NORMALISATIONS``.
        invert: Turn it over, for models that are bright where things are far.

    Raises:
        UserError: The folder holds no whole depth model, or it is no IMAGE.
        NumericError: The model gave numbers that are not finite.
    """
    management = comfy.model_management
    pictures = as_rgb(image)
    estimator = open_depth(folder)
    managed = nn.Module()  # the host sets an attribute on what it manages that transformers' models do not let it set
    managed.model = estimator.model
    patcher = patch(managed, management.get_torch_device(), management.unet_offload_device(), plain=True)
    management.load_models_gpu([patcher], memory_required=WORKING_BYTES, force_full_load=True)
    bar, seen = comfy.utils.ProgressBar(len(pictures)), []
    for picture in pictures[:, None]:
        check_cancelled()
        seen.append(estimator.estimate(picture))
        bar.update(1)
    return to_intermediate(normalise_depth(torch.cat(seen), normalisation, invert))


def control_picture(image: Tensor, kind: str, latent: dict[str, Any] | None, fit: str, edges: Edges) -> Tensor:
    """What the model will see (B, height, width, 3).

    Args:
        image: IMAGE: a photo for ``CANNY``, else the control picture itself.
        kind: One of ``KINDS``.
        latent: Gives the size; None for the image's own, at multiples of 16.
        fit: How an image of another aspect is brought to it, one of ``preprocess.control.FITS``.
        edges: For ``CANNY``.

    Raises:
        UserError: The image, the kind or the thresholds are none.
    """
    if kind not in KINDS:
        raise UserError(f"there is no control of kind {kind!r}; choose one of {', '.join(KINDS)}")
    picture = as_rgb(image, background=0.0)
    _tell_of_kind(picture, kind)
    height, width = _size(picture, latent)
    fitted = fit_control(picture, height, width, fit, say)
    tell_of_area(fitted)
    return edges_of(fitted, edges) if kind == CANNY else fitted


def _size(picture: Tensor, latent: dict[str, Any] | None) -> tuple[int, int]:
    """Height and width in pixels."""
    if latent is not None:
        cell = int(latent.get(RATIO) or CELL)
        return latent["samples"].shape[-2] * cell, latent["samples"].shape[-1] * cell
    height, width = picture.shape[1:3]
    high, wide = round_size(height), round_size(width)
    if (high, wide) != (height, width):
        say(f"the control picture's sides ({width}x{height}) do not divide by 16: it is brought to {wide}x{high}")
    return high, wide


def _tell_of_kind(picture: Tensor, kind: str) -> None:
    """Warn of a picture (B, H, W, 3) that looks like another kind's."""
    if kind == DEPTH and has_colours(picture):
        say(
            "the control picture has colours, so that it is no depth picture: put FLUX Depth, or any other node that "
            "makes one, before it"
        )
    if kind == CANNY and is_black_and_white(picture):
        say("the control picture is black and white, as edges are: if it is edges already, set kind to image")


def add_control(
    positive: Conditioning,
    negative: Conditioning | None,
    vae: Any,
    picture: Tensor,
    *,
    strength: float,
    start: float,
    end: float,
    slot: int,
    region: Tensor | None,
    latent: dict[str, Any] | None,
) -> tuple[Conditioning, Conditioning, dict[str, Any]]:
    """Give a control picture to a control model, or to a control LoRA on any MODEL of ours.

    The first one lies under the host's key, so that a core-loaded MODEL takes it too. Further ones lie under ours, and
    so do all of a prompt with a hole, which has its place there, also in entries that are without it.

    Args:
        positive: Any node's.
        negative: Likewise; None where there is none.
        vae: Any VAE of FLUX.1.
        picture: As the model is to see it.
        strength: 0..2; how much of the prediction follows it, the rest follows nothing.
        start: From when, as a fraction of the run.
        end: Until when.
        slot: Which control of the MODEL it is for, from 1.
        region: MASK (1, H, W) of where in the new picture it is followed; None for everywhere.
        latent: What is drawn on; None for an empty one of the picture's size.

    Returns:
        Both CONDITIONINGs, and the LATENT: the one that came in as it is.

    Raises:
        UserError: The strength, the times or the region are none.
        MismatchError: The VAE is another family's.
    """
    check_strength(strength)
    check_region(region, "the control would be followed nowhere")
    latents = encode(vae, picture)
    entries = [*positive, *(negative or ())]
    replaced, holed = False, has_hole(entries)
    given = receiver(entries, lambda patcher: control_slots(patcher, patcher.model.spec) >= slot)

    def change(text: Tensor, extra: Extra) -> tuple[Tensor, Extra]:
        nonlocal replaced
        if given(extra) is False:
            return text, extra
        extra = encoded_by(vae, extra if given(extra) else if_taken(extra, CONTROL))
        if slot == 1 and not holed:
            replaced |= extra.get(IMAGE) is not None
            return text, {**extra, IMAGE: latents}
        before = extra.get(CONTROLS) or {}
        replaced |= slot in before
        return text, {**extra, CONTROLS: {**before, slot: latents}}

    def without(text: Tensor, extra: Extra) -> tuple[Tensor, Extra]:
        return (text, extra) if given(extra) is False else marked(text, extra)

    if holed:
        positive, negative = with_room(positive), None if negative is None else with_room(negative)
    both = with_both(positive, negative, change, start=start, end=end, share=strength, region=region, without=without)
    if replaced:
        say(
            f"the prompt carries a picture for control {slot} already, which this one replaces: for both choose "
            f"another slot, and put a further Load FLUX Control LoRA on the model"
        )
    return *both, {"samples": torch.zeros_like(latents)} if latent is None else latent
