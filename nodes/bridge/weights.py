"""Files to state dicts for modules that are built from the host's layers.

The engine reads and judges the header; the tensors come through the host, which maps the file into memory and, with
dynamic VRAM, reads them only when they are used.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor, nn

from ...flux.errors import FileError
from ...flux.ops.dtypes import SMALL_MODEL, compute_dtype
from ...flux.pipelines.parts import match_names
from ...flux.specs.recognise import recognise_kind
from ...flux.weights.readers.safetensors import DTYPES, SafetensorsFile

__all__ = ["HostLayers", "Numbers", "Weights", "choose_numbers", "open_weights"]

logger = logging.getLogger(__name__)

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
NAMED = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Numbers:
    """The dtype that weights are kept in, and the one that they are computed with."""

    weights: torch.dtype
    compute: torch.dtype

    @property
    def cast(self) -> torch.dtype | None:
        """The compute dtype as the host wants it: None where nothing is to cast."""
        return None if self.compute == self.weights else self.compute


@dataclass(frozen=True)
class HostLayers:
    """The host's layers as the engine's ``Layers``: they can be loaded in part and cast their weights at use.

    Attributes:
        operations: One of the host's sets of layers.
        numbers: What their weights are, and what an embedding gives.
    """

    operations: Any
    numbers: Numbers

    @property
    def Linear(self) -> Callable[..., nn.Module]:  # noqa: N802
        return self._builder(self.operations.Linear)

    @property
    def LayerNorm(self) -> Callable[..., nn.Module]:  # noqa: N802
        return self._builder(self.operations.LayerNorm)

    @property
    def Embedding(self) -> Callable[..., nn.Module]:  # noqa: N802
        build, compute = self._builder(self.operations.Embedding), self.numbers.compute

        def embedding(*args: Any, **kwargs: Any) -> nn.Module:
            layer = build(*args, **kwargs)
            layer.register_forward_hook(lambda _module, _inputs, output: output.to(compute))
            return layer

        return embedding

    def _builder(self, layer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        return lambda *args, **kwargs: layer(*args, dtype=self.numbers.weights, device="meta", **kwargs)


@dataclass(frozen=True)
class Weights:
    """One recognised part of a file, bound to the parameters of a module.

    Attributes:
        spec: What it is.
        path: The file.
        metadata: Of its header.
        names: For each parameter the tensor's name in the file.
        stored: The dtype that most of its numbers have.
        parameters: How many numbers.
    """

    spec: Any
    path: Path
    metadata: dict[str, str]
    names: dict[str, str]
    stored: torch.dtype
    parameters: int

    def read(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The module's state dict; numbers of another width than ``dtype`` are converted."""
        tensors = comfy.utils.load_torch_file(str(self.path), safe_load=True)
        state = {name: tensors[source] for name, source in self.names.items()}
        return {name: t if t.dtype == dtype else t.to(dtype) for name, t in state.items()}


def open_weights(path: Path, kind: str, build: Callable[[Any], nn.Module]) -> Weights:
    """Recognise a part of a file from its header and match it with its module's parameters.

    Args:
        path: A safetensors file.
        kind: What it has to be: a kind of ``specs.recognise``.
        build: Makes the module of a spec.

    Raises:
        UserError: The file is missing, damaged or something else; the message names it.
    """
    file = SafetensorsFile(path)
    found = recognise_kind(kind, file, path.name, file.metadata)
    for note in found.notes:
        logger.info("FLUX Foundry: %s: %s", path.name, note)
    with torch.device("meta"):
        skeleton = build(found.spec)
    names = match_names(skeleton, file, found.prefix, path.name)
    counts: Counter[str] = Counter()
    for name, parameter in skeleton.named_parameters():
        entry = file[names[name]]
        if tuple(entry.shape) != tuple(parameter.shape):
            raise FileError(
                f"{path.name}: tensor {names[name]} has shape {tuple(entry.shape)}, {tuple(parameter.shape)} was "
                "expected; use the model's own release"
            )
        if entry.dtype not in DTYPES:
            raise FileError(f"{path.name}: tensor {names[name]} is stored as {entry.dtype}, which is not read here")
        counts[entry.dtype] += parameter.numel()
    stored = DTYPES[counts.most_common(1)[0][0]]
    return Weights(found.spec, path, dict(file.metadata), names, stored, counts.total())


def choose_numbers(weights: Weights, device: torch.device, wanted: str = "auto") -> Numbers:
    """What to keep the weights in and what to compute with.

    On a CPU small models become fp32 whole, and large ones are widened layer by layer to what it computes fast; on
    other devices the host decides.
    """
    asked = NAMED[wanted]
    if device.type == "cpu":
        compute = compute_dtype(device, weights.parameters)
        kept = asked or (compute if weights.parameters <= SMALL_MODEL else weights.stored)
        return Numbers(kept, torch.float32 if kept == torch.float32 else compute)
    kept = asked or comfy.model_management.unet_dtype(
        device=device, model_params=weights.parameters, supported_dtypes=FLOATS, weight_dtype=weights.stored
    )
    return Numbers(kept, comfy.model_management.unet_manual_cast(kept, device, FLOATS) or kept)
