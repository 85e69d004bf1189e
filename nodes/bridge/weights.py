"""Files to state dicts for modules that are built from the host's layers.

The engine reads and judges the header and binds every parameter to what it is made of. Plain tensors of safetensors
files come through the host: it maps the file so that it may be written to, and with dynamic VRAM reads it only when it
is used. Everything else comes from the engine's sources, packed or as numbers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor, nn

from ...flux.memory.policy import AUTO, Policy
from ...flux.ops.dtypes import SMALL_MODEL, compute_dtype
from ...flux.ops.packed import Linear, takes_packed
from ...flux.pipelines.parts import BoundPart, bind_part
from ...flux.specs.fit import Given
from ...flux.weights.binding import Binding
from ...flux.weights.packed import Packed
from ...flux.weights.readers.stamps import FileStamp
from .compat import asked_text_dtype
from .preflight import users_files

__all__ = ["HOSTS", "HostLayers", "Numbers", "Weights", "choose_numbers", "encoder_numbers", "open_weights"]

logger = logging.getLogger(__name__)

HOSTS = Policy()  # as much stays as the host grants
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
NAMED = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by format's name
UNPACKED = torch.bfloat16  # what a packed weight counts as where a dtype is chosen: it was made from such numbers
HOST_SUFFIXES = (".safetensors", ".sft")  # that the host opens without a pickle


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
    """One recognised part of a file, bound to the parameters of a module."""

    bound: BoundPart

    @property
    def given(self) -> Given:
        """The file, and what it was found to be."""
        return Given(self.bound.checkpoint.path, self.bound.recognised)

    @property
    def stamps(self) -> Mapping[Path, FileStamp]:
        """Its files, as they were when they were opened."""
        return self.bound.checkpoint.stamps

    @property
    def spec(self) -> Any:
        """What it is."""
        return self.bound.recognised.spec

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return self.bound.parameters

    @cached_property
    def stored(self) -> torch.dtype:
        """The dtype that most of its numbers have, or are unpacked to."""
        counts: Counter[torch.dtype] = Counter()
        for binding in self.bound.bindings.values():
            [(commonest, _)] = Counter(_dtype(source.format.name) for source in binding.sources.values()).most_common(1)
            counts[commonest] += binding.parameters
        return counts.most_common(1)[0][0]

    @cached_property
    def packed_layers(self) -> tuple[str, ...]:
        """Linear layers whose weights are stored as something else than plain floats."""
        return tuple(
            name
            for name, layer in self.bound.module.named_modules()
            if isinstance(layer, Linear) and not _is_plain(self.bound.bindings[f"{name}.weight"])
        )

    @cached_property
    def packable_layers(self) -> tuple[str, ...]:
        """Every linear layer and table, which could stay as they are stored."""
        modules = self.bound.module.named_modules()
        return tuple(name for name, layer in modules if takes_packed(layer) and f"{name}.weight" in self.bound.bindings)

    def chosen_layers(self, memory: Policy, *, unpacked: bool = False) -> tuple[str, ...]:
        """The layers that stay as they are stored: all of them, where any is packed or a policy asks for it.

        Args:
            memory: What the user grants.
            unpacked: Whether numbers of another type were asked for, which packed weights alone do not stand against.
        """
        asked = memory.name != AUTO
        return self.packable_layers if asked or (self.packed_layers and not unpacked) else ()

    def packed(self, layers: Collection[str]) -> dict[str, Packed]:
        """The weights of some layers as they are stored: views of the mapped file, never to be written to."""
        return {name: self.bound.bindings[f"{name}.weight"].packed() for name in layers}

    def read(self, dtype: torch.dtype, without: Collection[str] = (), *, streamed: bool = False) -> dict[str, Tensor]:
        """The module's state dict, of tensors that may be written to.

        Args:
            dtype: That numbers of another width are converted to.
            without: Layers whose weights are left out.
            streamed: Whether the host itself brings weights from their files while it runs, for which it has to have
                opened them. Otherwise stored tensors are ours, views of the mapped file where they serve as they are,
                which takes no time and no memory.
        """
        left = {f"{name}.weight" for name in without}
        wanted = {name: binding for name, binding in self.bound.bindings.items() if name not in left}
        suiting = {name: binding for name, binding in wanted.items() if self._suits_host(binding)}
        through_host = suiting if streamed else {}
        tensors = self._host_tensors() if through_host else {}
        state = {}
        for name, binding in wanted.items():
            if name in through_host:
                state[name] = tensors[next(iter(binding.sources))].to(dtype)
            else:
                state[name] = binding.numbers(dtype)
        return state

    def _suits_host(self, binding: Binding) -> bool:
        """Whether a stored tensor serves as it is, in a file that the host opens as we do."""
        files = self.bound.checkpoint.files
        return (
            binding.recipe.only_renames
            and _is_plain(binding)
            and all(file.suffix.lower() in HOST_SUFFIXES for file in files)
            and not self.bound.checkpoint.is_gguf
        )

    def _host_tensors(self) -> Mapping[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in self.bound.checkpoint.files:
            tensors |= comfy.utils.load_torch_file(str(file), safe_load=True)
        return tensors


def _dtype(format_name: str) -> torch.dtype:
    return PLAIN.get(format_name, UNPACKED)


def _is_plain(binding: Binding) -> bool:
    return all(source.format.name in PLAIN for source in binding.sources.values())


def open_weights(path: Path, kind: str, variant: str | None = None) -> Weights:
    """Recognise a part of a file from its header and match it with its module's parameters.

    Args:
        path: A safetensors or GGUF file, or the index of several.
        kind: What it has to be: "transformer", "autoencoder", "clip" or "t5".
        variant: What it is, where its tensors cannot tell: the name of a spec.

    Raises:
        UserError: The file is missing, damaged or something else; the message names it.
    """
    bound = bind_part(path, kind, variant, lambda: users_files((kind,)))
    for note in bound.recognised.notes:
        logger.info("FLUX Foundry: %s: %s", path.name, note)
    return Weights(bound)


def choose_numbers(weights: Weights, device: torch.device, wanted: str = "auto") -> Numbers:
    """What to keep the weights in and what to compute with; for packed ones, what they are unpacked to.

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


def encoder_numbers(weights: Weights, device: torch.device) -> Numbers:
    """Text encoders and vision towers compute in fp32 everywhere, as the host's own do; weights are widened at use.

    Off the CPU they are kept as the file has them, unless the user started the host with a flag for text encoders.
    """
    if device.type == "cpu":
        return Numbers(choose_numbers(weights, device).weights, torch.float32)
    return Numbers(asked_text_dtype(device) or weights.stored, torch.float32)
