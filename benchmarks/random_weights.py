"""A FLUX.1 transformer of any size with random weights and no file: drawn on the device, kept in the host's memory.

From there they come as from a file that lies in memory: some stay on the device, others are streamed. Deviations are
those of ``random_files``, so that a signal keeps its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flux.memory.residency import Residency
from flux.models.flux1 import Flux1
from flux.ops.layers import on_meta
from flux.ops.pieces import copy_bytes
from flux.pipelines.modules import block_names
from flux.pipelines.parts import Part
from flux.specs.fit import Given
from flux.specs.flux1 import Flux1Spec
from flux.specs.recognition import Recognised
from flux.weights.formats.base import DATA, Format
from flux.weights.formats.floats import BF16, E4M3, E4M3_MAX, for_device
from flux.weights.formats.scaled import FP8_E4M3FN_SCALED, SCALE
from flux.weights.packed import Packed, PackedPart
from flux.weights.renames.plans import Piece, Recipe
from flux.weights.storing import packs

from .random_files import deviation

__all__ = ["STORED", "HostWeight", "draw", "open_random"]

STORED = ("bf16", "fp8")
REACH = 4.5  # deviations that the largest fp8 code stands for


@dataclass(frozen=True)
class HostWeight:
    """A weight in the host's memory, as a ``residency.Weight``."""

    kept: Packed

    @property
    def nbytes(self) -> int:
        return self.kept.nbytes

    @property
    def parameters(self) -> int:
        return torch.Size(self.kept.shape).numel()

    @property
    def pieces(self) -> tuple[int, ...]:
        return tuple(tensor.nbytes for tensor in self.kept.tensors().values())

    def numbers(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        return self.packed(device).numbers(dtype)

    def packed(self, device: torch.device | None = None) -> Packed:
        return self.kept if device is None else self.kept.to(device)

    def outline(self, device: torch.device) -> Packed:
        kept = {name: for_device(tensor.to("meta"), device) for name, tensor in self.kept.tensors().items()}
        return self.kept.with_tensors(kept)

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        for name, tensor in self.kept.tensors().items():
            copy_bytes(targets[name], tensor.reshape(-1).view(torch.uint8))  # by as many threads as read a file

    def forget(self) -> None:
        """Nothing is mapped."""


def draw(spec: Flux1Spec, device: torch.device, stored: str = "bf16", seed: int = 0) -> dict[str, HostWeight]:
    """Every parameter: matrices random, in ``stored``; biases 0 and the scales of norms 1, in bf16.

    Args:
        spec: Of the transformer.
        device: Where numbers are drawn.
        stored: One of ``STORED``.
        seed: Of all of them.
    """
    assert stored in STORED
    with on_meta():
        module = Flux1(spec)
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        if len(shape) < 2:
            numbers = torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
            weights[name] = _host_weight(name, shape, BF16, {DATA: numbers.bfloat16()})
            continue
        numbers = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        if stored == "fp8" and packs("transformer", name):
            unit = E4M3_MAX / REACH
            parts = {DATA: (numbers * unit).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3), SCALE: _scale(shape, unit)}
            weights[name] = _host_weight(name, shape, FP8_E4M3FN_SCALED, parts)
        else:
            weights[name] = _host_weight(name, shape, BF16, {DATA: numbers.mul_(deviation(shape))})
    return weights


def _scale(shape: tuple[int, ...], unit: float) -> Tensor:
    return torch.tensor(deviation(shape) / unit)


def _host_weight(name: str, shape: tuple[int, ...], row: Format, parts: Mapping[str, Tensor]) -> HostWeight:
    part = PackedPart(row, shape, {role: tensor.cpu() for role, tensor in parts.items()})
    return HostWeight(Packed(shape, Recipe((Piece(name),)), {name: part}))


def open_random(
    spec: Flux1Spec, weights: Mapping[str, HostWeight], device: torch.device, dtype: torch.dtype
) -> Part[Flux1Spec, Flux1]:
    """A transformer of such weights; those in fp8 stay so.

    Args:
        spec: That they were drawn for.
        weights: From ``draw``.
        device: Where it runs.
        dtype: Of its numbers there.
    """
    with on_meta():
        module = Flux1(spec).eval()
    packed = any(own.kept.formats != (BF16,) for own in weights.values())
    residency = Residency(
        module, weights, device=device, dtype=dtype, keeps_packed=packed, blocks=block_names(module)
    )  # fmt: skip
    return Part(spec, module, residency, Given(Path("random"), Recognised("transformer", spec.title, spec)))
