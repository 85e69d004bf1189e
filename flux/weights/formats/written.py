"""The formats that can be written, by the names that users give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from . import bnb, floats, fp4, scaled
from .base import DATA, Format
from .gguf_blocks import BLOCKS, GGUF_FORMATS
from .gguf_encode import ENCODERS, encode

__all__ = ["GGUF", "WRITTEN", "Written"]

Encode = Callable[[Tensor], dict[str, Tensor]]

GGUF = "gguf:"  # before a ggml type
FP8_MULTIPLE = 16  # sides that fp8 units take


@dataclass(frozen=True, kw_only=True)
class Written:
    """One format.

    Attributes:
        name: As users give it.
        title: For people.
        row: What reads it.
        encode: Numbers (N, K) to the stored tensors by role.
        block: Numbers that rows must be a multiple of.
        packs: Whether it is for matrices of blocks alone; all other tensors are then stored as plain numbers.
    """

    name: str
    title: str
    row: Format
    encode: Encode
    block: int = 1
    packs: bool = True

    def suits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be stored so."""
        if not self.packs:
            return True
        return len(shape) == 2 and shape[1] % self.block == 0


def _plain(name: str, title: str, row: Format, store: Encode) -> Written:
    return Written(name=name, title=title, row=row, encode=store, packs=False)


def _encode_fp32(numbers: Tensor) -> dict[str, Tensor]:
    return {DATA: floats.require_finite(numbers).float()}


def _gguf(kind: str) -> Written:
    def store(numbers: Tensor) -> dict[str, Tensor]:
        return {DATA: encode(kind, numbers)}

    bits = GGUF_FORMATS[kind].bits
    return Written(
        name=GGUF + kind, title=f"GGUF {kind}, {bits:g} bits", row=GGUF_FORMATS[kind], encode=store,
        block=BLOCKS[kind].values,
    )  # fmt: skip


WRITTEN: dict[str, Written] = {
    row.name: row
    for row in (
        _plain("fp32", "32-bit floats", floats.F32, _encode_fp32),
        _plain("bf16", "bfloat16", floats.BF16, floats.encode_bf16),
        _plain("fp16", "16-bit floats", floats.F16, floats.encode_fp16),
        Written(
            name="fp8", title="fp8 e4m3fn, a scale for each tensor", row=scaled.FP8_E4M3FN_SCALED,
            encode=partial(scaled.encode_fp8, per_row=False), block=FP8_MULTIPLE,
        ),
        Written(
            name="fp8-row", title="fp8 e4m3fn, a scale for each row", row=scaled.FP8_PER_ROW,
            encode=partial(scaled.encode_fp8, per_row=True), block=FP8_MULTIPLE,
        ),
        Written(
            name="mxfp8", title="mxfp8", row=fp4.MXFP8, encode=fp4.encode_mxfp8, block=fp4.MXFP8_BLOCK,
        ),
        Written(
            name="nvfp4", title="nvfp4 in ComfyUI's dialect", row=fp4.NVFP4, encode=fp4.encode_nvfp4,
            block=fp4.NVFP4_BLOCK,
        ),
        Written(
            name="int8", title="int8, a scale for each tensor", row=scaled.INT8,
            encode=partial(scaled.encode_int8, per_row=False),
        ),
        Written(
            name="int8-row", title="int8, a scale for each row", row=scaled.INT8_PER_ROW,
            encode=partial(scaled.encode_int8, per_row=True),
        ),
        Written(
            name="nf4", title="bitsandbytes' nf4", row=bnb.NF4, encode=bnb.encode_nf4, block=bnb.BLOCK,
        ),
        _plain(GGUF + "F32", "GGUF F32", floats.F32, _encode_fp32),
        _plain(GGUF + "BF16", "GGUF BF16", floats.BF16, floats.encode_bf16),
        _plain(GGUF + "F16", "GGUF F16", floats.F16, floats.encode_fp16),
        *(_gguf(kind) for kind in ENCODERS),
    )
}  # fmt: skip
