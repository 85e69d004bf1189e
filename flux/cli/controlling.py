"""What ``control`` draws: a picture that follows the edges or the depth of another one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.control_lora import read_control_lora
from ..errors import UserError
from ..images import BLACK, WHITE, check_output, origin_of, read_picture, save_picture
from ..pipelines.guided import ControlInput
from ..pipelines.text_to_image import check_side, round_size
from ..preprocess.canny import HIGH, LOW, automatic_canny, canny
from ..preprocess.control import fit_control, has_colours, is_black_and_white, lacks_edges
from ..preprocess.depth import NORMALISATIONS, normalise_depth, open_depth
from ..specs.flux1 import Flux1Spec, full_model
from .console import say
from .engine import Desk, Job, Warn, as_pixels, channels_first, guide_of, request_of
from .files import control_lora_file

__all__ = ["make", "run_as_trained"]

DEPTH_FILES = (".json", ".safetensors")
OWN_OPTIONS = {  # that say nothing without a type
    "canny": ("low", "high", "auto"),
    "depth": ("depth_model", "depth_scale", "invert"),
}


def make(arguments: argparse.Namespace, desk: Desk) -> Job:
    """What the options ask for.

    Raises:
        UserError: They do not fit each other, or something cannot be read or written.
    """
    _check(arguments)
    picture = _picture(arguments, desk.warn)
    _tell_of_kind(arguments, picture, desk.warn)
    height, width = _size(arguments, picture)
    fitted = fit_control(picture, round_size(height), round_size(width), arguments.fit, desk.warn)
    control, found = _control(arguments, fitted, desk.device)
    if arguments.type == "canny" and lacks_edges(control):
        desk.warn(f"there are no edges in {arguments.image.name}: {_more_edges(arguments)}")
    path = None if arguments.lora is None else control_lora_file(arguments.lora, arguments.type)
    lora = None if path is None else read_control_lora(path)
    if lora is not None:
        run_as_trained(arguments, desk.model.transformer.spec)
    given = ControlInput(picture=channels_first(control), lora=lora, strength=arguments.strength, **guide_of(arguments))
    request = request_of(arguments, desk.seed, width=width, height=height, inputs=[given])
    facts: dict[str, object] = {
        "command": "control", "type": arguments.type, "image": arguments.image.name, "fit": arguments.fit, **found,
    }  # fmt: skip
    if arguments.save_control is not None:
        save_picture(arguments.save_control, as_pixels(control).numpy(), facts)
        say(str(arguments.save_control))
    return Job(desk.model, request, facts=facts, files=_files(arguments, path))


def _check(arguments: argparse.Namespace) -> None:
    for kind, names in OWN_OPTIONS.items():
        given = [name for name in names if getattr(arguments, name) not in (None, False)]
        if given and arguments.type != kind:
            raise UserError(
                f"--{given[0].replace('_', '-')} is of --type {kind}, not of {arguments.type}; leave it out"
            )
    if arguments.ready and arguments.depth_model is not None:
        raise UserError("--ready says that IMAGE is depth already, and --depth-model looks for it; give one of them")
    if arguments.type == "depth" and arguments.depth_model is None and arguments.depth_scale is not None:
        raise UserError("--depth-scale is of what --depth-model finds, and there is none; give one, or leave it out")
    if arguments.ready and (arguments.auto or arguments.low is not None or arguments.high is not None):
        raise UserError("--ready says that IMAGE is edges already, so there are no thresholds; leave one of them out")
    if arguments.auto and (arguments.low is not None or arguments.high is not None):
        raise UserError("--auto chooses both thresholds, and one was given; give one of them")
    if arguments.save_control is not None:
        check_output(arguments.save_control)


def _picture(arguments: argparse.Namespace, warn: Warn) -> Tensor:
    """What IMAGE shows (1, H, W, 3), a photo on white, a control on black: no edge, and far away."""
    photo = arguments.depth_model is not None or (arguments.type == "canny" and not arguments.ready)
    if origin_of(arguments.image).transparent:
        ground = "white" if photo else "black, which is no edge and far away"
        warn(f"{arguments.image.name} is transparent in places: it is laid on {ground}")
    return torch.from_numpy(read_picture(arguments.image, WHITE if photo else BLACK))[None]


def run_as_trained(arguments: argparse.Namespace, spec: Flux1Spec) -> None:
    """Run with a control LoRA as the full model that follows the same, where no steps or guidance are given."""
    full = full_model(spec, arguments.type)
    if full is None:
        return
    if arguments.guidance is None and spec.guidance_embedding:
        arguments.guidance = full.guidance
    if arguments.steps is None and arguments.sigmas is None:
        arguments.steps = full.steps


def _tell_of_kind(arguments: argparse.Namespace, picture: Tensor, warn: Warn) -> None:
    """Warn of a picture (1, H, W, 3) that looks like another kind's, unless ``--ready`` says what it is."""
    name = arguments.image.name
    if arguments.ready:
        return
    if arguments.type == "depth" and arguments.depth_model is None and has_colours(picture):
        warn(
            f"{name} has colours, so that it is no depth picture: give --depth-model, which makes one of a photo, or "
            "say with --ready that it is depth"
        )
    if arguments.type == "canny" and is_black_and_white(picture):
        warn(f"{name} is black and white, as edges are: if it is edges already, say so with --ready")


def _more_edges(arguments: argparse.Namespace) -> str:
    """How there would be some."""
    if arguments.ready:
        return "leave --ready out, which finds them"
    if arguments.auto:
        return "it is too even for --auto; give --low and --high, or another picture"
    return "lower the thresholds with --low and --high, or let --auto choose them"


def _size(arguments: argparse.Namespace, picture: Tensor) -> tuple[int, int]:
    """Height and width: as asked for, of one side alone with the picture's aspect, else the picture's own."""
    height, width = picture.shape[1:3]
    if arguments.width is None and arguments.height is not None:
        height, width = arguments.height, max(1, round(width * arguments.height / height))
    elif arguments.height is None and arguments.width is not None:
        height, width = max(1, round(height * arguments.width / width)), arguments.width
    elif arguments.width is not None:
        height, width = arguments.height, arguments.width
    check_side("height", height)
    check_side("width", width)
    return height, width


def _control(
    arguments: argparse.Namespace, picture: Tensor, device: torch.device
) -> tuple[Tensor, Mapping[str, object]]:
    """What the model will see (1, H, W, 3), and how it was made."""
    if arguments.type == "canny" and not arguments.ready:
        if arguments.auto:
            return automatic_canny(picture), {"thresholds": "auto"}
        low, high = LOW if arguments.low is None else arguments.low, HIGH if arguments.high is None else arguments.high
        return canny(picture, low, high), {"thresholds": [low, high]}
    if arguments.depth_model is not None:
        raw = open_depth(arguments.depth_model, device).estimate(picture)
        scale = arguments.depth_scale or NORMALISATIONS[0]
        depth = normalise_depth(raw, scale, arguments.invert)
        return depth, {
            "depth_model": arguments.depth_model.name, "depth_scale": scale, "invert": arguments.invert,
        }  # fmt: skip
    return (1 - picture, {"invert": True}) if arguments.invert else (picture, {})


def _files(arguments: argparse.Namespace, lora: Path | None) -> dict[str, Path]:
    """What was read beside model and pictures."""
    files = {} if lora is None else {"lora": lora}
    if arguments.depth_model is not None:
        inside = sorted(path for path in arguments.depth_model.iterdir() if path.suffix in DEPTH_FILES)
        files |= {f"depth model {path.name}": path for path in inside}
    return files
