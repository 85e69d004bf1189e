"""How tensors that belong together are named in safetensors files, for reading and for writing them."""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from torch import Tensor

from . import bnb, fp4, scaled
from .base import DATA, Format

__all__ = [
    "BNB_PARTS", "BNB_STATE", "COMFY_NAMES", "COMFY_QUANT", "INPUT_SCALES", "PRE_QUANT_SCALE", "ROLE_NAMES", "SCALES",
    "TENSOR_SCALE", "WEIGHT", "comfy_quant", "companion_names", "owner_of",
]  # fmt: skip

WEIGHT = ".weight"
SCALES = ("weight_scale", "scale_weight")  # new style, old style
INPUT_SCALES = ("input_scale", "scale_input")
TENSOR_SCALE, PRE_QUANT_SCALE, COMFY_QUANT = "weight_scale_2", "pre_quant_scale", "comfy_quant"
BESIDE_WEIGHT = frozenset({*SCALES, *INPUT_SCALES, TENSOR_SCALE, PRE_QUANT_SCALE, COMFY_QUANT})
BNB_PARTS = frozenset({bnb.ABSMAX, bnb.QUANT_MAP, bnb.NESTED_ABSMAX, bnb.NESTED_MAP})
BNB_STATE = ".quant_state.bitsandbytes__"

ROLE_NAMES = {
    scaled.SCALE: SCALES[0],
    fp4.BLOCK_SCALE: SCALES[0],
    fp4.BLOCK_EXPONENT: SCALES[0],
    fp4.TENSOR_SCALE: TENSOR_SCALE,
    fp4.PRE_QUANT_SCALE: PRE_QUANT_SCALE,
}
"""A companion's last word by its role; other roles are their own word, behind the weight's name."""

COMFY_NAMES = {
    scaled.FP8_E4M3FN_SCALED.name: "float8_e4m3fn",
    scaled.FP8_E5M2_SCALED.name: "float8_e5m2",
    scaled.FP8_PER_ROW.name: "float8_e4m3fn",  # so that a reader without rows refuses, rather than drops the scales
    scaled.FP8_E5M2_PER_ROW.name: "float8_e5m2",
    scaled.INT8.name: "int8_tensorwise",
    scaled.INT8_PER_ROW.name: "int8_tensorwise",
    fp4.MXFP8.name: "mxfp8",
    fp4.NVFP4.name: "nvfp4",
}
"""ComfyUI's name of a format by ours."""


def owner_of(name: str) -> tuple[str | None, str]:
    """Whose companion a tensor is by its name, None for nobody's, and its last word."""
    head, _, word = name.rpartition(".")
    if word in BESIDE_WEIGHT and head:
        return head + WEIGHT, word
    if word in BNB_PARTS and head.endswith(WEIGHT):
        return head, word
    if BNB_STATE in name:
        return name.partition(BNB_STATE)[0], bnb.QUANT_STATE
    return None, word


def companion_names(weight: str, row: Format, roles: Iterable[str]) -> dict[str, str]:
    """Under which names a writer puts the parts of ``weight`` ("….weight"), by role."""
    layer = weight.removesuffix(WEIGHT)
    names = {role: f"{layer}.{ROLE_NAMES[role]}" if role in ROLE_NAMES else f"{weight}.{role}" for role in roles}
    fixed = {DATA: weight, bnb.QUANT_STATE: f"{weight}{BNB_STATE}{row.name}"}
    return {role: fixed.get(role, name) for role, name in names.items()}


def comfy_quant(row: Format) -> Tensor | None:
    """The bytes of a layer's ``comfy_quant`` tensor; None for rows that ComfyUI has no name for."""
    name = COMFY_NAMES.get(row.name)
    return None if name is None else torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
