"""References: pictures whose tokens stand behind the image's, for a MODEL to look at, and how much it does.

They ride in the host's CONDITIONING under the host's key, so that core nodes and core MODELs understand them; strength
and region of each stand beside it under a key of ours, which only our MODEL reads.

Shapes: B batch, L tokens in all, T of the text, I of the image, C latent channels, h and w in latent cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.conds
import torch
from torch import Tensor
from torch.nn import functional as F

from ...flux.adapters.attending import Span, attention_bias
from ...flux.adapters.blending import fitted
from ...flux.adapters.guides import check_strength
from ...flux.editing.inpaint import Box, Crop
from ...flux.errors import MismatchError, UserError
from ...flux.models.positions import image_ids, reference_ids
from ...flux.preprocess.references import FittedReference, fit_reference
from ...flux.sampling.packing import PATCH, pack, pad_to_patch, token_grid
from .entries import Conditioning, check_region, with_part
from .filling import ScaledCrop, encode
from .preflight import encoded_by
from .progress import say

__all__ = [
    "LATENTS", "METHOD", "VIEWS", "ReferenceViews", "View", "add_reference", "as_bias", "joint_bias", "positions",
    "reference_tokens", "views_of",
]  # fmt: skip

LATENTS, METHOD = "reference_latents", "reference_latents_method"  # the host's keys
VIEWS = "fluxfoundry_references"  # ours: a list of {"strength", "region"} or None, one for each of the host's list
TIMESTEP_ZERO = "index_timestep_zero"
PIXELS_OF_MEGAPIXEL = 1024 * 1024
KEEPS_PLACE = "pad"  # the way to fit a reference by which no pixel moves

Extra = dict[str, Any]
View = tuple[float, Tensor | None]  # strength, and region (1, 1, h, w) of the image's latent cells
PLAIN: View = (1.0, None)


class ReferenceViews(comfy.conds.CONDConstant):  # type: ignore[misc]
    """How much a model looks at each reference, as the host passes it from a CONDITIONING to the denoiser."""

    def process_cond(self, batch_size: int, area: Sequence[int] | None = None, **_: Any) -> ReferenceViews:
        """The same for a part of the image: its height, width, top and left in latent cells."""
        del batch_size
        if area is None:
            return self
        height, width, top, left = area
        cut = (..., slice(top, top + height), slice(left, left + width))
        return ReferenceViews(
            tuple((strength, None if region is None else region[cut]) for strength, region in self.cond)
        )

    def can_concat(self, other: ReferenceViews) -> bool:
        """Whether two prompts are looked at alike, so that they may share a call."""
        return len(self.cond) == len(other.cond) and all(
            one == two and _equal(mine, theirs)
            for (one, mine), (two, theirs) in zip(self.cond, other.cond, strict=True)
        )


def _equal(mine: Tensor | None, theirs: Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    return torch.equal(mine, theirs)


def views_of(extra: Mapping[str, Any], size: tuple[int, int] | None = None) -> tuple[View, ...]:
    """How each reference of a CONDITIONING's entry is looked at; none at all where every one is as the host has it.

    Args:
        extra: The entry's dict.
        size: Height and width of the image in latent cells, for regions; None leaves them as they are.

    Raises:
        UserError: A strength is outside of 0..2.
    """
    views: list[View] = []
    for asked in extra.get(VIEWS) or ():
        strength = 1.0 if asked is None else float(asked.get("strength", 1.0))
        check_strength(strength)
        region = None if asked is None else asked.get("region")
        if region is not None:
            region = region.reshape(-1, 1, *region.shape[-2:])[:1]
            region = region if size is None else fitted(region, _padded(size))
        views.append((strength, region))
    return () if all(view == PLAIN for view in views) else tuple(views)


def _padded(size: tuple[int, int]) -> tuple[int, int]:
    rows, columns = token_grid(*size)
    return rows * PATCH, columns * PATCH


def reference_tokens(latents: Sequence[Tensor], width: int, channels: int) -> list[Tensor]:
    """Tokens (B, N, width) of each reference (B, C, h, w), with zeros for channels that only the image has.

    Args:
        latents: Any node's.
        width: Of the image's tokens, with what stands behind the noisy latent's channels.
        channels: C, the latent's that the model draws.

    Raises:
        MismatchError: A reference is another family's.
    """
    for latent in latents:
        if latent.ndim != 4 or latent.shape[1] != channels:
            raise MismatchError(
                f"the CONDITIONING carries a reference of shape {list(latent.shape)}, but the MODEL looks at latents "
                f"of pictures with {channels} channels; encode the picture with the MODEL's own VAE"
            )
    packed = [pack(pad_to_patch(latent)[0]) for latent in latents]
    return [F.pad(tokens, (0, width - tokens.shape[-1])) for tokens in packed]


def positions(
    size: tuple[int, int],
    references: Sequence[tuple[int, int]],
    layout: str,
    options: Mapping[str, float],
    device: torch.device,
) -> Tensor:
    """Positions (I + R, 3) of the image's tokens and of the references'.

    Args:
        size: Height and width of the image in latent cells.
        references: The same of each reference.
        layout: One of the host's methods.
        options: The host's ``rope_options``: they scale the positions within a picture and shift all, axis by axis.
        device: Where they go.

    Raises:
        UserError: The method is not one that FLUX.1 takes.
    """
    if layout == TIMESTEP_ZERO and references:
        raise UserError(
            f"the references' method is {TIMESTEP_ZERO}, which FLUX Foundry's MODEL does not take; choose offset, "
            "index or uxo, and take Flux KV Cache out, or load the model with ComfyUI's Load Diffusion Model"
        )
    within = torch.cat([image_ids(*token_grid(*each), device) for each in (size, *references)])
    placed = within
    if references:
        own = len(within) - sum(rows * columns for rows, columns in (token_grid(*each) for each in references))
        placed = torch.cat((within[:own], reference_ids(references, size, layout, device)))
    if not options:
        return placed
    scale = placed.new_tensor([1.0, options.get("scale_y", 1.0), options.get("scale_x", 1.0)])
    shift = placed.new_tensor([options.get(f"shift_{axis}", 0.0) for axis in "tyx"])
    return placed + within * (scale - 1) + shift


def joint_bias(
    mask: Tensor | None,
    views: Sequence[View],
    text: int,
    size: tuple[int, int],
    counts: Sequence[int],
    device: torch.device,
) -> Tensor | None:
    """What is added to the attention's logits (1 or B, L, L); None for nothing.

    Args:
        mask: A CONDITIONING's attention mask (B, n, n), additive or boolean, n the tokens of text and image;
            references are attended to freely, and look at the text as its first token does, so that they do not carry
            a style out of where it is let in.
        views: How the first references are looked at; further ones plainly.
        text: T.
        size: Height and width of the image in latent cells.
        counts: Tokens of each reference.
        device: Where it goes.

    Raises:
        UserError: The mask has another number of tokens.
    """
    grid = token_grid(*size)
    start = text + grid[0] * grid[1]
    length = start + sum(counts)
    spans = []
    for index, count in enumerate(counts):
        strength, region = views[index] if index < len(views) else PLAIN
        spans.append(Span(start, torch.full((count,), strength, device=device), region))
        start += count
    bias = attention_bias(spans, text, grid, length)
    own = None if bias is None else bias[0]
    if mask is None:
        return own
    if mask.shape[-1] != length - sum(counts) or mask.shape[-2] != mask.shape[-1]:
        raise UserError(
            f"the CONDITIONING's attention mask is for {mask.shape[-1]} tokens, but its text and the image have "
            f"{length - sum(counts)}; apply the style model to the text that is sampled with, and change it no further"
        )
    added = as_bias(mask)
    added = F.pad(added if added.ndim == 3 else added[None], (0, sum(counts), 0, sum(counts)))
    added[:, length - sum(counts) :, :text] = added[:, :1, :text]
    return added if own is None else added + own.to(added)


def as_bias(mask: Tensor) -> Tensor:
    """A mask as what is added to logits; of a boolean one True takes part."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)


def add_reference(
    conditioning: Conditioning,
    vae: Any,
    image: Tensor,
    *,
    strength: float,
    region: Tensor | None,
    start: float,
    end: float,
    layout: str | None,
    fit: str,
    megapixels: float,
) -> tuple[Conditioning, dict[str, Any], Crop]:
    """Put a picture into a CONDITIONING for the MODEL to look at.

    Args:
        conditioning: Any node's.
        vae: Any VAE, which is the MODEL's.
        image: IMAGE (B, H, W, C); picture k of a batch is looked at by picture k of the latent.
        strength: 0..2; 0 leaves the reference out.
        region: MASK (1, H, W) of where in the new picture it is seen; None for everywhere.
        start: From when, as a fraction of the run.
        end: Until when.
        layout: Where its tokens are placed; None for the MODEL's own way.
        fit: How it is brought to a size that the MODEL takes.
        megapixels: Larger ones are scaled down to it.

    Returns:
        The CONDITIONING, an empty LATENT of the reference's size, and what cuts the padding off a picture of that size.

    Raises:
        UserError: The picture, the strength, the times or the region are none.
        MismatchError: The VAE is another family's.
        NumericError: The latents are not finite.
    """
    check_strength(strength)
    check_region(region, "the reference would be seen nowhere")
    reference = fit_reference(image, fit, round(megapixels * PIXELS_OF_MEGAPIXEL), warn=say)
    latents = encode(vae, reference.picture)
    view = None if strength == 1 and region is None else {"strength": strength, "region": region}

    def change(text: Tensor, extra: Extra) -> tuple[Tensor, Extra]:
        extra = encoded_by(vae, extra)
        before, views = list(extra.get(LATENTS) or ()), list(extra.get(VIEWS) or ())
        views += [None] * (len(before) - len(views))
        added = {LATENTS: [*before, latents], VIEWS: [*views[: len(before)], view]}
        return text, {**extra, **added, **({} if layout is None else {METHOD: layout})}

    out = with_part(conditioning, change, start=start, end=end) if strength > 0 else list(conditioning)
    own = (int(image.shape[1]), int(image.shape[2]))
    return out, {"samples": torch.zeros_like(latents)}, cutting(reference, own if fit == KEEPS_PLACE else None)


def cutting(reference: FittedReference, own: tuple[int, int] | None) -> Crop:
    """What FLUX Stitch takes, to cut off a painted picture what was added to the reference on the right and below.

    Args:
        reference: As it was encoded.
        own: Height and width that the rest is scaled back to; None leaves it as large as the reference was encoded.
    """
    size = reference.size
    content = reference.picture[:, : size.height, : size.width]
    whole = torch.ones(len(content), size.padded_height, size.padded_width)
    box = Box(0, 0, size.padded_height, size.padded_width)
    parts = reference.picture, whole, content, whole[:, : size.height, : size.width], box
    if own is None or own == (size.height, size.width):
        return Crop(*parts)
    say(f"FLUX Stitch scales the result back to the reference's own size, {own[1]}x{own[0]}")
    return ScaledCrop(*parts, own)
