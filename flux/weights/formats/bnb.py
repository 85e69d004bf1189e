"""bitsandbytes' nf4 and fp4: four-bit codes into a table of 16 numbers, times the largest magnitude of their block.

W = quant_map[code] · absmax, two codes to a byte, the first in the high half. Blocks run through the flattened tensor
and hold 64 numbers as a rule. Where absmax is nested ("double quantised", Dettmers et al. 2023, QLoRA, section 3) it
is codes of one byte: absmax = nested_quant_map[byte] · nested_absmax + offset, with blocks of 256. The offset stands in
the JSON of the file's quant_state alone, so it belongs to the format.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .base import DATA, Format, Parts
from .chunks import BYTE_VALUES, as_bytes, look_up
from .floats import require_finite
from .scaled import SLAB

__all__ = [
    "ABSMAX",
    "BLOCK",
    "CODES",
    "FP4",
    "NESTED_ABSMAX",
    "NESTED_MAP",
    "NF4",
    "NF4_VALUES",
    "QUANT_MAP",
    "QUANT_STATE",
    "QuantState",
    "bnb_format",
    "encode_nf4",
    "parse_state",
]

ABSMAX = "absmax"  # fp32, one for each block; bytes where nested
QUANT_MAP = "quant_map"  # fp32 (16,)
NESTED_ABSMAX = "nested_absmax"  # fp32, one for each 256 bytes of absmax
NESTED_MAP = "nested_quant_map"  # fp32 (256,)
QUANT_STATE = "quant_state"  # the JSON's bytes; encoders give it, decoders do not need it

BLOCK, NESTED_BLOCK = 64, 256
CODES = 16
BLOCKS = frozenset(2**power for power in range(5, 13))  # 32 to 4096, what bitsandbytes offers
MAX_RANK = 8
MAX_NUMBERS = 1 << 48  # that sides multiply to, 0 left out: torch does the same within 64 bits
MAX_OFFSET = 1e30  # as absurd as a scale

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NormalFloat's 16 numbers, quantiles of the normal distribution: QLoRA, appendix E."""


def _decode(
    parts: Parts, shape: tuple[int, ...], dtype: torch.dtype, *, block: int, nested_block: int, offset: float
) -> Tensor:
    absmax = parts[ABSMAX]
    if NESTED_ABSMAX in parts:
        table = parts[NESTED_MAP].float().view(-1, 1)
        absmax = look_up(absmax, table, torch.float32, parts[NESTED_ABSMAX].reshape(-1).float(), nested_block) + offset
    pairs = _pairs(parts[QUANT_MAP].float())
    numbers = look_up(as_bytes(parts[DATA]), pairs, dtype, absmax.reshape(-1).float(), block)
    return numbers[: math.prod(shape)].view(shape)  # an odd count is padded by one code


def _pairs(quant_map: Tensor) -> Tensor:
    """What a byte of two codes stands for, fp32 (256, 2)."""
    high = quant_map.view(-1, 1).expand(CODES, CODES)
    return torch.stack((high, high.T), dim=-1).reshape(BYTE_VALUES, 2)


@functools.lru_cache(maxsize=16)  # without nesting a file's tensors share a row; with it, each has an offset of its own
def bnb_format(
    kind: str, block: int, nested: bool = False, nested_block: int = NESTED_BLOCK, offset: float = 0.0
) -> Format:
    """The row of nf4 or fp4.

    Args:
        kind: "nf4" or "fp4". They differ by the table alone, which the file brings.
        block: Numbers that share an absmax.
        nested: Whether absmax is itself in codes.
        nested_block: Codes of absmax that share a nested absmax.
        offset: Added to each absmax that was in codes.
    """
    bits = 8 / block + 32 / (block * nested_block) if nested else 32 / block
    return Format(
        name=kind,
        bits=4 + bits,
        decode=partial(_decode, block=block, nested_block=nested_block, offset=offset),
        companions=(ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_MAP) if nested else (ABSMAX, QUANT_MAP),
    )


NF4 = bnb_format("nf4", BLOCK)
FP4 = bnb_format("fp4", BLOCK)


@dataclass(frozen=True, kw_only=True)
class QuantState:
    """What a quant_state's JSON says: nf4 or fp4, the numbers' shape, and what ``bnb_format`` takes."""

    kind: str
    shape: tuple[int, ...]
    block: int
    nested_block: int | None = None
    offset: float = 0.0

    @property
    def format(self) -> Format:
        """The row that decodes such a tensor."""
        if self.nested_block is None:
            return bnb_format(self.kind, self.block)
        return bnb_format(self.kind, self.block, True, self.nested_block, self.offset)


def parse_state(state: Mapping[str, Any]) -> QuantState | None:
    """The checked contents of a quant_state's JSON; None where a field is missing or cannot be."""
    kind, shape, block = state.get("quant_type"), state.get("shape"), state.get("blocksize")
    if kind not in (NF4.name, FP4.name) or not _is_block(block) or not isinstance(shape, list):
        return None
    if len(shape) > MAX_RANK or not all(type(side) is int and side >= 0 for side in shape):
        return None
    if math.prod(side or 1 for side in shape) > MAX_NUMBERS:
        return None
    found = QuantState(kind=kind, shape=tuple(shape), block=block)
    if "nested_blocksize" not in state:
        return found
    nested, offset = state["nested_blocksize"], state.get("nested_offset")
    if not _is_block(nested) or not isinstance(offset, int | float) or not abs(offset) <= MAX_OFFSET:
        return None
    return QuantState(kind=kind, shape=found.shape, block=block, nested_block=nested, offset=float(offset))


def _is_block(value: object) -> TypeGuard[int]:
    return type(value) is int and value in BLOCKS


def encode_nf4(numbers: Tensor, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Numbers of any shape as nf4 in blocks of 64, absmax in fp32.

    Args:
        numbers: Any floating-point type.
        dtype: What the file says that the tensor was before.

    Returns:
        Bytes (n / 2, 1), ``ABSMAX`` (n / 64,), ``QUANT_MAP`` (16,), ``QUANT_STATE`` bytes; n / 2 and n / 64 rounded up.

    Raises:
        UserError: A number is not finite.
    """
    flat = require_finite(numbers).reshape(-1)
    table = torch.tensor(NF4_VALUES)
    count = flat.numel()
    data, absmax = torch.empty(-(-count // 2), dtype=torch.uint8), torch.empty(-(-count // BLOCK))
    for start in range(0, count, SLAB):
        own = _encode_slab(flat[start : start + SLAB].float(), table)
        data[start // 2 :][: len(own[0])], absmax[start // BLOCK :][: len(own[1])] = own
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": str(dtype).removeprefix("torch.")}
    text = json.dumps({**state, "shape": list(numbers.shape)})
    return {
        DATA: data.view(-1, 1),
        ABSMAX: absmax,
        QUANT_MAP: table,
        QUANT_STATE: torch.tensor(list(text.encode()), dtype=torch.uint8),
    }


def _encode_slab(numbers: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Whole blocks of fp32 numbers, the last of a tensor perhaps shorter, as bytes and absmax."""
    count = numbers.numel()
    blocks = torch.nn.functional.pad(numbers, (0, -count % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks / torch.where(absmax > 0, absmax, torch.ones_like(absmax))[:, None]
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True).view(-1)
    return (codes[0::2] * CODES + codes[1::2]).to(torch.uint8)[: -(-count // 2)], absmax
