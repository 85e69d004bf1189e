"""Depth maps by a depth model in transformers' format, from a folder on this machine; nothing is ever downloaded.

Depth here is larger where things are nearer, as MiDaS and Depth Anything give it.

Shapes: B pictures of H by W pixels.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import FileError, MissingFileError, NumericError, UserError
from .control import as_bytes, as_rgb, choose

__all__ = ["NORMALISATIONS", "DepthEstimator", "normalise_depth", "open_depth"]

NORMALISATIONS = ("minmax", "bfl", "none")
BFL_SCALE = 255.0  # BFL shows the autoencoder raw / 127.5 - 1; a picture x in 0..1 is shown to it as 2 x - 1

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
EXAMPLE = "depth-anything/Depth-Anything-V2-Small-hf"
DISTANCE_MODELS = frozenset({"zoedepth", "glpn"})  # whose configs do not say that they give metres
NEAREST = 0.1  # metres; what a model puts nearer counts as this near, so that no distance of 0 is inverted


class DepthEstimator:
    """A depth model with its processor; ``open_depth`` makes one.

    Args:
        model: Pixels (1, 3, h, w) to an output with ``predicted_depth`` (1, h', w').
        processor: Bytes (1, 3, H, W) to the model's ``pixel_values``.
        gives_distance: Whether the model's numbers are larger where things are farther.
    """

    def __init__(self, model: Any, processor: Any, gives_distance: bool) -> None:
        self.model = model
        self.processor = processor
        self.gives_distance = gives_distance

    @torch.inference_mode()
    def estimate(self, image: Tensor) -> Tensor:
        """Depth as the model gives it, one picture after another, resized as BFL does.

        Args:
            image: Pictures (B, H, W, 1 to 4) in 0..1.

        Returns:
            (B, H, W) on the CPU, larger where nearer: the model's own numbers, or 1 / metres where it gives distances.

        Raises:
            UserError: It is no batch of pictures.
            NumericError: The model gave numbers that are not finite.
        """
        pictures = torch.from_numpy(as_bytes(as_rgb(image))).movedim(-1, 1)
        return torch.stack([self._estimate_one(picture) for picture in pictures])

    def _estimate_one(self, picture: Tensor) -> Tensor:
        """Bytes (3, H, W) to (H, W)."""
        inputs = self.processor(images=picture[None], return_tensors="pt")
        depth: Tensor = self.model(inputs["pixel_values"].to(self.model.device, torch.float32)).predicted_depth
        if not depth.isfinite().all():
            raise NumericError("the depth model gave numbers that are not finite; try another one")
        if self.gives_distance:
            depth = 1 / depth.clamp(min=NEAREST)
        resized = F.interpolate(depth[:, None].float(), picture.shape[-2:], mode="bicubic", antialias=True)
        return resized[0, 0].cpu()


def open_depth(folder: Path, device: torch.device | str = "cpu") -> DepthEstimator:
    """Open a depth model, in fp32.

    Args:
        folder: Holds ``config.json``, ``preprocessor_config.json`` and the weights as safetensors.
        device: Where it runs.

    Raises:
        MissingFileError: There is no such folder, or a file is missing in it.
        FileError: The files are damaged, incomplete, or not a depth model's.
        UserError: transformers is not installed.
    """
    config = _checked_config(folder)
    transformers = _transformers()
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **options)
        model, report = transformers.AutoModelForDepthEstimation.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # of many kinds, some of packages behind transformers
        raise FileError(
            f"{folder} cannot be opened as a depth model ({_first_line(error)}); download {EXAMPLE} again, or another "
            "model for depth estimation in transformers' format"
        ) from error
    if report["missing_keys"]:
        raise FileError(
            f"{folder} is not whole: {len(report['missing_keys'])} of the model's tensors are missing, such as "
            f"{min(report['missing_keys'])}; download it again"
        )
    gives_distance = config.get("depth_estimation_type") == "metric" or config.get("model_type") in DISTANCE_MODELS
    return DepthEstimator(model.to(device, torch.float32).eval(), processor, gives_distance)


def normalise_depth(raw: Tensor, how: str = "minmax", invert: bool = False) -> Tensor:
    """Depth to pictures of it, as the autoencoder is to see them.

    Args:
        raw: (B, H, W), larger where nearer.
        how: "minmax" brings each picture to 0..1, as most depth nodes do; one that is the same everywhere becomes 0.
            "bfl" is raw / 255, neither stretched nor cut, so that the autoencoder sees raw / 127.5 - 1 as with BFL.
            "none" leaves the numbers.
        invert: For maps that are bright where things are far: each picture is turned over within its own range first.

    Returns:
        (B, H, W, 3).

    Raises:
        UserError: There is no such way.
    """
    choose(how, NORMALISATIONS, "normalisation of depth")
    low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
    depth = low + high - raw if invert else raw
    if how == "minmax":
        span = high - low
        depth = (depth - low) / torch.where(span > 0, span, 1)
    elif how == "bfl":
        depth = depth / BFL_SCALE
    return depth[..., None].repeat(1, 1, 1, 3)


def _checked_config(folder: Path) -> dict[str, Any]:
    """The folder's config, after a look at what is there; see ``open_depth`` for what it raises."""
    if not folder.is_dir():
        raise MissingFileError(f"the folder {folder} was not found; download a depth model such as {EXAMPLE} into it")
    missing = [name for name in (CONFIG, PROCESSOR) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in WEIGHTS):
        missing.append(WEIGHTS[0])
    if missing:
        raise MissingFileError(
            f"{folder} has no {' and no '.join(missing)}; a depth model's folder needs {CONFIG}, {PROCESSOR} and "
            f"{WEIGHTS[0]}, as those of {EXAMPLE}"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{folder / CONFIG} cannot be read ({error}); download it again") from error
    if not isinstance(config, dict):
        raise FileError(f"{folder / CONFIG} is not a model's config; download it again")
    if config.get("backbone") and not config.get("backbone_config"):
        raise FileError(
            f"{folder / CONFIG} only names its backbone ({config['backbone']}), which would have to be downloaded; "
            f"choose a model whose config holds it, such as {EXAMPLE}"
        )
    return config


def _transformers() -> Any:
    """The package, which is imported only here."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"estimating depth needs the package transformers ({error}); run `{sys.executable} -m pip install "
            "transformers`, or give a depth map as a picture"
        ) from error


def _first_line(error: Exception) -> str:
    """An error's first line that says something, for a sentence."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
