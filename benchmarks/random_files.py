"""Model files of any size with random weights, written tensor by tensor: what is in memory is the tensor at hand.

Matrices keep the size of their signal: deviations of one through the root of the inputs. Those that are stored packed
are drawn in the packed form, for to encode twelve billion numbers takes many minutes:

- fp8: each code is one of 256 equally likely quantiles of the normal distribution;
- Q4_K: codes are equally likely, and with the same scale and minimum in every block they are even around 0.

All else is drawn as numbers and goes through the encoders, and everything through the writers that ``convert`` uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flux.ops.layers import on_meta
from flux.weights.formats.base import DATA
from flux.weights.formats.gguf_blocks import BLOCKS
from flux.weights.formats.scaled import SCALE
from flux.weights.formats.written import WRITTEN, Written
from flux.weights.packed import Packed
from flux.weights.renames import LAYOUTS
from flux.weights.storing import Outcome, Stores, packs, store

__all__ = ["FORMATS", "RandomItem", "random_format", "write_random"]

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
QUANTILES = 256
Q4_K_SCALE = 16  # the six bits of every scale and minimum; their upper two stand in two bytes
Q4_K_FIELDS = (Q4_K_SCALE | (Q4_K_SCALE & 48) << 2,) * 8 + (0,) * 4
Q4_K_MIDDLE = 7.5  # of the codes 0 to 15
Q4_K_SPREAD = 4.61  # their standard deviation

Encode = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class RandomItem:
    """One tensor of a model; ``is_drawn_packed`` ones give their shape alone, as zeros that take no memory."""

    name: str
    shape: tuple[int, ...]
    seed: int
    is_drawn_packed: bool

    @property
    def stored_as(self) -> frozenset[str]:
        return frozenset({"BF16"})

    def numbers(self) -> Tensor:
        """In bf16: random ones of a matrix, 0 for biases, 1 for the scales of norms."""
        if self.is_drawn_packed:
            return torch.zeros((), dtype=torch.bfloat16).expand(self.shape)
        if len(self.shape) < 2:
            return torch.full(self.shape, 0.0 if self.name.endswith("bias") else 1.0, dtype=torch.bfloat16)
        numbers = torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed))
        return numbers.mul_(deviation(self.shape)).bfloat16()

    def packed(self) -> Packed | None:
        return None


def deviation(shape: tuple[int, ...]) -> float:
    """Of a matrix (N, K) or a kernel (N, K, ...): what keeps the size of a signal through it."""
    return math.prod(shape[1:]) ** -0.5


def random_format(name: str, seed: int = 0) -> Written:
    """A format of ``FORMATS`` or a plain one, which draws what it stores by the shape of what it is given."""
    if name not in FORMATS:
        assert not WRITTEN[name].packs
        return WRITTEN[name]
    rng = np.random.default_rng(seed)
    draw = FORMATS[name]
    return replace(WRITTEN[name], encode=lambda numbers: draw(tuple(numbers.shape), rng))


def _draw_fp8(shape: tuple[int, ...], rng: np.random.Generator) -> dict[str, Tensor]:
    places = (torch.arange(QUANTILES) + 0.5) / QUANTILES
    quantiles = torch.special.ndtri(places.double()).float()
    unit = FP8_LARGEST / quantiles.max()
    codes = (quantiles * unit).to(FP8).view(torch.uint8).numpy()
    data = torch.from_numpy(np.take(codes, rng.integers(0, QUANTILES, shape, dtype=np.uint8))).view(FP8)
    return {DATA: data, SCALE: deviation(shape) / unit}


def _draw_q4_k(shape: tuple[int, ...], rng: np.random.Generator) -> dict[str, Tensor]:
    block = BLOCKS["Q4_K"]
    blocks = rng.integers(0, 256, (math.prod(shape) // block.values, block.bytes), dtype=np.uint8)
    scale = deviation(shape) / (Q4_K_SCALE * Q4_K_SPREAD)
    blocks[:, :4] = np.array([scale, Q4_K_MIDDLE * scale], dtype=np.float16).view(np.uint8)
    blocks[:, 4:16] = Q4_K_FIELDS
    return {DATA: torch.from_numpy(blocks)}


FORMATS: dict[str, Callable[[tuple[int, ...], np.random.Generator], dict[str, Tensor]]] = {
    "fp8": _draw_fp8,
    "gguf:Q4_K": _draw_q4_k,
}
"""What draws packed matrices, by the format's name."""


def write_random(
    path: Path, build: Callable[[], nn.Module], layout: str, written: str, title: str, seed: int = 0
) -> Outcome:
    """Write a module's parameters, random, to a new file.

    Args:
        path: The file.
        build: Makes the module; it is built on the meta device.
        layout: A key of ``LAYOUTS``.
        written: A key of ``FORMATS`` for the matrices that are packed, or a plain format.
        title: Of the model.
        seed: Of all its numbers.
    """
    with on_meta():
        module = build()
    part = LAYOUTS[layout].part
    items: Mapping[str, RandomItem] = {
        name: RandomItem(name, tuple(parameter.shape), seed + place, written in FORMATS and packs(part, name))
        for place, (name, parameter) in enumerate(module.named_parameters())
    }
    stores = Stores(
        part=part, layout=LAYOUTS[layout], written=random_format(written, seed), metadata={}, title=title
    )  # fmt: skip
    return store(path, items, stores)
