"""What guides a run as a user has it, pictures and masks, and its way to the guides that a transformer takes.

Pictures: (1 or B, 3, H, W) in 0..1; masks (1 or B, 1, H, W) in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.channels import CELL, GREY, ROUNDINGS, fill_channels, hidden_and_shown
from ..adapters.control_lora import ControlLora, check_control_lora
from ..adapters.guides import Channels, Guide, Reference, StyleTokens, check_span, check_strength
from ..errors import MismatchError, NumericError, UserError
from ..models.flux1 import Flux1
from ..preprocess.control import check_finite, differs_in_aspect
from ..sampling.packing import PATCH
from ..specs.flux1 import Flux1Spec
from .denoiser import Guidance
from .given import check_guide, check_guide_sizes, check_region, check_unit, tell_of_region
from .parts import Part
from .strips import AnyPart, StripedPart, in_strips_if_need

__all__ = [
    "POSTERIORS", "ROUNDINGS", "AnyInput", "ControlInput", "FillInput", "Input", "ReferenceInput", "check_inputs",
    "check_sizes", "described", "encode_picture", "fill_latents", "guidance_of", "resized", "size_of_inputs",
]  # fmt: skip

Warn = Callable[[str], None]
Encoder = AnyPart | StripedPart

POSTERIORS = ("mean", "sample")


@dataclass(frozen=True, kw_only=True, eq=False)
class Input:
    """What every input has; see ``adapters.guides.Guide``."""

    strength: float = 1.0
    region: Tensor | None = None
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_strength(self.strength)
        check_span(self.start, self.end)


@dataclass(frozen=True, kw_only=True, eq=False)
class FillInput(Input):
    """A picture of which a part is painted anew, for a Fill model.

    Attributes:
        picture: Of the run's size, else it is resized.
        mask: 1 where it is painted anew; soft values are allowed.
        rounding: How soft masks are taken; see ``adapters.channels.hidden_and_shown``.
        posterior: "mean" of what the autoencoder gives, or a "sample" of it (diffusers).
        mask_checked: Whether ``editing.masks.check_mask`` saw the whole mask, so that nothing is said of a part of it.
    """

    picture: Tensor
    mask: Tensor
    rounding: str = "soft"
    posterior: str = "mean"
    mask_checked: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlInput(Input):
    """Edges, depth or another picture that is followed, for a control model or a control LoRA.

    Attributes:
        picture: As the model is to see it; of the run's size, else it is resized.
        lora: The control LoRA that follows it, on the run's own model.
        model: The control model that follows it, where that is not the run's own.
        posterior: See ``FillInput``.
    """

    picture: Tensor
    lora: ControlLora | None = None
    model: Part[Flux1Spec, Flux1] | None = None
    posterior: str = "mean"


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceInput(Input):
    """A picture that the model may look at, for Kontext. Of any size; padded to the grid, never cropped.

    Attributes:
        picture: The picture.
    """

    picture: Tensor


AnyInput = FillInput | ControlInput | ReferenceInput | Guide


def described(given: AnyInput) -> dict[str, object]:
    """An input as plain values, for a picture's settings."""
    facts: dict[str, object] = {"kind": KINDS[type(given)], "strength": given.strength}
    if (given.start, given.end) != (0.0, 1.0):
        facts |= {"start": given.start, "end": given.end}
    if given.region is not None:
        facts["region"] = True
    facts |= {name: value for name, usual in USUAL.items() if (value := getattr(given, name, usual)) != usual}
    if isinstance(given, ControlInput):
        facts |= {"lora": given.lora.name} if given.lora is not None else {}
        facts |= {"model": given.model.path.name} if given.model is not None else {}
    return facts


KINDS: dict[type, str] = {
    FillInput: "fill", ControlInput: "control", ReferenceInput: "reference",
    Channels: "channels", StyleTokens: "style", Reference: "reference",
}  # fmt: skip
USUAL = {"rounding": ROUNDINGS[0], "posterior": POSTERIORS[0]}


def size_of_inputs(inputs: Sequence[AnyInput]) -> tuple[int, int] | None:
    """Height and width that inputs give a run: Fill's picture, else a control's, else the first reference's."""
    for kind in (FillInput, ControlInput, ReferenceInput):
        for given in inputs:
            if isinstance(given, kind):
                return int(given.picture.shape[-2]), int(given.picture.shape[-1])
    return None


def check_inputs(spec: Flux1Spec, inputs: Sequence[AnyInput], warn: Warn) -> None:
    """Refuse what a model has no use for, and a model that lacks what it needs.

    Args:
        spec: The run's own transformer.
        inputs: What was given.
        warn: Told of what has no effect, and of what looks like a mistake.

    Raises:
        MismatchError: The model and an input do not go together.
        UserError: An input is not one.
    """
    for given in inputs:
        _check_shapes(given)
        _check_numbers(given)
        if isinstance(given, Guide):
            check_guide(spec, given)
        if isinstance(given, FillInput) and spec.task != "fill":
            raise MismatchError(f"{spec.title} has no input for a picture with a hole; choose {_models('fill')}")
        if isinstance(given, ControlInput):
            _check_control(spec, given)
    fills = sum(isinstance(given, FillInput) for given in inputs)
    own = sum(isinstance(g, ControlInput) and g.lora is None and g.model is None for g in inputs)
    if fills > 1:
        raise UserError("two pictures with holes were given; give one, with a mask of all that is to be painted anew")
    if own > 1:
        raise UserError(
            "two controls were given to one control model; give one of them a control model of its own, or use control "
            "LoRAs"
        )
    channels = sum(isinstance(given, Channels) and given.lora is None for given in inputs)
    _check_needs(spec, fills + channels, own + channels)
    for given in inputs:
        if isinstance(given, FillInput):
            _check_hole(given, warn)
    if spec.task != "edit" and any(isinstance(given, ReferenceInput | Reference) for given in inputs):
        warn(f"{spec.title} was not trained to look at references; choose {_models('edit')}")
    if not spec.heeds_redux and any(isinstance(given, StyleTokens) and given.strength for given in inputs):
        warn(f"{spec.title} was not trained to heed Redux; choose {_models('redux')}")


def _check_numbers(given: AnyInput) -> None:
    if given.region is not None:
        check_region(given.region)
    if isinstance(given, FillInput):
        check_unit("mask", given.mask)
    if not isinstance(given, Guide):
        check_finite("picture", given.picture)


def _check_hole(given: FillInput, warn: Warn) -> None:
    """Refuse an empty mask, and tell of one that looks like a mistake."""
    from ..editing.masks import check_mask, tell_of_size  # which bring OpenCV, and most runs have no hole

    mask = given.mask[:, 0]
    check_mask(mask, None if given.mask_checked else warn)
    tell_of_size(mask, int(given.picture.shape[-2]), int(given.picture.shape[-1]), warn)


def check_sizes(inputs: Sequence[AnyInput], size: tuple[int, int], warn: Warn) -> None:
    """Tell of pictures and regions that the run's size stretches, and refuse encoded guides of another size.

    Args:
        inputs: Checked by ``check_inputs``.
        size: Height and width of the run in pixels.
        warn: Told of each.

    Raises:
        UserError: A guide's latents do not lie on the run's cells.
    """
    check_guide_sizes(inputs, size)
    for given in inputs:
        tell_of_region(given.region, size, warn)
        if isinstance(given, FillInput | ControlInput) and differs_in_aspect(given.picture.movedim(1, -1), *size):
            what = "picture with the hole" if isinstance(given, FillInput) else "control picture"
            height, width = given.picture.shape[-2:]
            warn(
                f"the {what} ({width}x{height}) has another aspect than the output ({size[1]}x{size[0]}): it is "
                "stretched, which changes its shapes"
            )


def _check_control(spec: Flux1Spec, given: ControlInput) -> None:
    if given.lora is not None:
        if given.model is not None:
            raise UserError("a control was given both a LoRA and a model; give one of them")
        check_control_lora(given.lora, spec)
        return
    taking = spec if given.model is None else given.model.spec
    if taking.in_channels != taking.out_channels + spec.latent_channels * PATCH**2:
        raise MismatchError(
            f"{taking.title} has no input for a control picture; choose {_models('canny')}, {_models('depth')}, or a "
            "control LoRA on a text-to-image model"
        )


def _check_needs(spec: Flux1Spec, fills: int, own: int) -> None:
    if spec.task == "fill" and not fills:
        raise MismatchError(f"{spec.title} paints into a picture: give it one, with a mask; {_draws()}")
    if spec.task in ("canny", "depth") and not own:
        what = "the edges" if spec.task == "canny" else "the depth"
        raise MismatchError(f"{spec.title} follows {what} of a picture: give it one; {_draws()}")


def _draws() -> str:
    return "to draw from a prompt alone choose a text-to-image model"


def _models(task: str) -> str:
    return {
        "fill": "FLUX.1 Fill (or fill-mini)",
        "canny": "FLUX.1 Canny (or canny-mini)",
        "depth": "FLUX.1 Depth (or depth-mini)",
        "edit": "FLUX.1 Kontext (or kontext-mini)",
        "redux": "FLUX.1 [dev] (or redux-mini)",
    }[task]


def _check_shapes(given: AnyInput) -> None:
    tensors = {"picture": 3, "mask": 1, "region": 1}
    for name, channels in tensors.items():
        tensor = getattr(given, name, None)
        if tensor is not None and (tensor.ndim != 4 or tensor.shape[:2] != (1, channels) or 0 in tensor.shape):
            raise UserError(
                f"the {name} has shape {tuple(tensor.shape)}; give one of (1, {channels}, H, W) with values in 0..1"
            )
    for name, known in (("rounding", ROUNDINGS), ("posterior", POSTERIORS)):
        value = getattr(given, name, known[0])
        if value not in known:
            raise UserError(f"there is no {name} {value!r}; choose one of: {', '.join(known)}")


def stand_ins(inputs: Sequence[AnyInput]) -> tuple[list[Guide], dict[str, Part[Flux1Spec, Flux1]]]:
    """Inputs as guides that have nothing encoded yet, by which it is known which predictions a run will make.

    Returns:
        The guides, and the further models that they name.
    """
    models: dict[str, Part[Flux1Spec, Flux1]] = {}
    guides: list[Guide] = []
    for given in inputs:
        nothing = torch.empty(1, 0, 1, 1)
        if isinstance(given, Guide):
            guides.append(given)
        elif isinstance(given, ReferenceInput):
            guides.append(Reference(latents=nothing, **_common(given)))
        else:
            model, lora = getattr(given, "model", None), getattr(given, "lora", None)
            name = None if model is None else _named(models, model)
            guides.append(Channels(latents=nothing, lora=lora, model=name, **_common(given)))
    return guides, models


def guidance_of(
    inputs: Sequence[AnyInput],
    autoencoder: Encoder,
    size: tuple[int, int],
    *,
    layout: str = "offset",
    norms_by_strength: bool = False,
    seed: int = 0,
) -> Guidance:
    """Encode inputs.

    Args:
        inputs: Checked by ``check_inputs``. Guides are taken as they are.
        autoencoder: Encodes pictures.
        size: Height and width of the run in pixels, multiples of 16.
        layout: Of references.
        norms_by_strength: Of control LoRAs; see ``Guidance``.
        seed: Of samples of the posterior, for each input anew, so that their order does not matter.
    """
    guides: list[Guide] = []
    models: dict[str, Part[Flux1Spec, Flux1]] = {}
    for given in inputs:
        generator = torch.Generator().manual_seed(seed)
        if isinstance(given, Guide):
            guides.append(given)
        elif isinstance(given, FillInput):
            guides.append(Channels(latents=fill_latents(given, autoencoder, size, generator), **_common(given)))
        elif isinstance(given, ReferenceInput):
            guides.append(Reference(latents=_reference(given, autoencoder), **_common(given)))
        else:
            name = None if given.model is None else _named(models, given.model)
            picture = resized(given.picture, size)
            latents = encode_picture(autoencoder, picture, given.posterior, generator)
            guides.append(Channels(latents=latents, lora=given.lora, model=name, **_common(given)))
    partly = any(isinstance(given, FillInput) and not _acts_throughout(given) for given in inputs)
    empty = empty_fill(autoencoder, size) if partly else None
    return Guidance(guides=guides, models=models, layout=layout, norms_by_strength=norms_by_strength, empty=empty)


def _named(models: dict[str, Part[Flux1Spec, Flux1]], model: Part[Flux1Spec, Flux1]) -> str:
    """The name of a further model, which is written down under it."""
    for name, known in models.items():
        if known is model:
            return name
    name = f"{model.spec.name} {len(models) + 1}"
    models[name] = model
    return name


def _common(given: Input) -> dict[str, Any]:
    return {"strength": given.strength, "region": given.region, "start": given.start, "end": given.end}


def fill_latents(
    given: FillInput, autoencoder: Encoder, size: tuple[int, int], generator: torch.Generator | None = None
) -> Tensor:
    """Fill's further channels (B, C + 64, h, w) of a picture and a mask, brought to a size in pixels."""
    picture = resized(given.picture, size)
    mask = resized(given.mask, size)
    hidden, shown = hidden_and_shown(mask, given.rounding)
    latents = encode_picture(autoencoder, picture * (1 - hidden) + GREY * hidden, given.posterior, generator)
    return fill_channels(latents, shown)


def empty_fill(autoencoder: Encoder, size: tuple[int, int]) -> Tensor:
    """Fill's further channels (1, C + 64, h, w) of a picture all of which is painted anew."""
    picture = torch.zeros(1, 3, *size)
    return fill_latents(FillInput(picture=picture, mask=torch.ones(1, 1, *size)), autoencoder, size)


def _acts_throughout(given: Input) -> bool:
    return given.strength == 1 and given.region is None and (given.start, given.end) == (0.0, 1.0)


def _reference(given: ReferenceInput, autoencoder: Encoder) -> Tensor:
    """Latents of a picture, its right and bottom edges repeated up to the grid of tokens."""
    grid = PATCH * CELL
    height, width = given.picture.shape[-2:]
    padded = F.pad(given.picture.float(), (0, -width % grid, 0, -height % grid), mode="replicate")
    return encode_picture(autoencoder, padded)


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture or mask (B, C, H, W) in 0..1 at a size, height first."""
    if picture.shape[-2:] == size:
        return picture.float()
    return F.interpolate(picture.float(), size, mode="bicubic", antialias=True).clamp(0, 1)


@torch.inference_mode()
def encode_picture(
    part: Encoder, picture: Tensor, posterior: str = "mean", generator: torch.Generator | None = None
) -> Tensor:
    """Latents (B, C, h, w) of pictures (B, 3, H, W) in the transformer's space, fp32 on the CPU.

    Args:
        part: The autoencoder.
        picture: In 0..1.
        posterior: One of ``POSTERIORS``.
        generator: Of a sample.

    Raises:
        NumericError: The result was not finite.
    """
    state = None if generator is None else generator.get_state()

    def encoded(part: Encoder) -> Tensor:
        if generator is not None and state is not None:
            generator.set_state(state)
        with part.resident() as autoencoder:
            pixels = (picture * 2 - 1).to(part.device, part.dtype)
            mean = posterior == "mean"
            latents = autoencoder.encode(pixels) if mean else autoencoder.encode_sample(pixels, generator)
            return latents.float().cpu()

    latents = in_strips_if_need(part, encoded)
    if not bool(torch.isfinite(latents).all()):
        raise NumericError(
            f"encoding a picture gave numbers that are not finite; {part.path.name} is damaged, or the number format "
            "overflows: try another dtype (bf16 or fp32), or a fresh copy of the file"
        )
    return latents
