"""Checks of the tensors that a run is given: their shapes, and that their numbers are finite, or in 0..1."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..adapters.channels import CELL
from ..adapters.guides import Channels, Guide, Reference, StyleTokens
from ..errors import MismatchError, UserError
from ..preprocess.control import Warn, check_finite, differs_in_aspect
from ..sampling.packing import PATCH
from ..specs.flux1 import Flux1Spec

__all__ = ["check_guide", "check_guide_sizes", "check_region", "check_unit", "tell_of_region"]

SLACK = 0.01  # beyond 0..1, which filters that resize come to
BYTES = 1.5  # above it numbers are those of bytes


def check_unit(name: str, tensor: Tensor) -> None:
    """Refuse numbers that are not finite, or not in 0..1.

    Raises:
        UserError: There are some.
    """
    check_finite(name, tensor)
    least, most = float(tensor.min()), float(tensor.max())
    if least < -SLACK or most > 1 + SLACK:
        divided = ", which are bytes divided by 255" if least >= 0 and most > BYTES else ""
        raise UserError(f"the {name} has numbers from {least:g} to {most:g}; give numbers in 0..1{divided}")


def check_region(region: Tensor) -> None:
    """Refuse a region in which nothing could act.

    Raises:
        UserError: It is black everywhere, or its numbers are no region's.
    """
    check_unit("region", region)
    if not bool((region > 0).any()):
        raise UserError(
            "the region is black everywhere, so that what it belongs to would act nowhere; give one that is white "
            "where it is to act, or none for everywhere"
        )


def tell_of_region(region: Tensor | None, size: tuple[int, int], warn: Warn) -> None:
    """Tell that a region (..., h, w) is stretched, where its aspect is not that of the run's height and width."""
    if region is None:
        return
    height, width = region.shape[-2:]
    if differs_in_aspect(region.reshape(-1, height, width), *size):
        warn(
            f"a region ({width}x{height}) has another aspect than the output ({size[1]}x{size[0]}): it is stretched, "
            "which changes its shapes"
        )


def check_guide(spec: Flux1Spec, guide: Guide) -> None:
    """Refuse an encoded guide that the run's own transformer cannot take.

    Raises:
        MismatchError: It is for another model.
        UserError: Its shape is wrong, or its numbers are not finite.
    """
    if isinstance(guide, StyleTokens):
        _check_style(spec, guide)
    elif isinstance(guide, Channels):
        check_finite("guide's latents", guide.latents)
        _check_channels(spec, guide)
    elif isinstance(guide, Reference):
        check_finite("reference's latents", guide.latents)
        _check_latents("reference's latents", guide.latents, spec.latent_channels)


def _check_style(spec: Flux1Spec, style: StyleTokens) -> None:
    shape = tuple(style.tokens.shape)
    if len(shape) != 3 or shape[0] != 1:
        raise UserError(f"the style tokens have shape {shape}; give one of (1, tokens, {spec.context_width})")
    if shape[-1] != spec.context_width:
        raise MismatchError(
            f"the style tokens have width {shape[-1]}, but {spec.title} takes {spec.context_width}; "
            "use the Redux adapter of its family"
        )
    check_finite("style tokens", style.tokens)
    if style.weights is None:
        return
    if tuple(style.weights.shape) != shape[1:2]:
        raise UserError(
            f"the style tokens' weights have shape {tuple(style.weights.shape)}; give one for each of {shape[1]} tokens"
        )
    check_finite("style tokens' weights", style.weights)


def _check_channels(spec: Flux1Spec, guide: Channels) -> None:
    if guide.model is not None:
        raise UserError(
            f"the channels are for a further model by the name {guide.model}, which a request has not; give their "
            "picture as a ControlInput with the model"
        )
    width = spec.in_channels - spec.out_channels if guide.lora is None else guide.lora.channels
    if not width:
        raise MismatchError(
            f"{spec.title} takes no channels beside the picture's; choose a Fill, Canny or Depth model, or give a "
            "control LoRA with them"
        )
    _check_latents("guide's latents", guide.latents, width // PATCH**2)


def _check_latents(name: str, latents: Tensor, channels: int) -> None:
    if latents.ndim != 4 or latents.shape[:2] != (1, channels) or 0 in latents.shape:
        raise UserError(f"the {name} have shape {tuple(latents.shape)}; give one of (1, {channels}, h, w)")


def check_guide_sizes(guides: Sequence[object], size: tuple[int, int]) -> None:
    """Refuse channels that do not lie on the run's latent cells.

    Args:
        guides: What else is among them is passed over.
        size: Height and width of the run in pixels.

    Raises:
        UserError: They are of another size.
    """
    height, width = size[0] // CELL, size[1] // CELL
    for guide in guides:
        if isinstance(guide, Channels) and guide.latents.shape[-2:] != (height, width):
            found = f"{guide.latents.shape[-1]}x{guide.latents.shape[-2]}"
            raise UserError(
                f"the guide's latents are of {found} cells, and the run of {width}x{height}, {CELL} pixels each; "
                f"encode a picture of {size[1]}x{size[0]}, or give the run another size"
            )
