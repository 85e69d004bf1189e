"""The roles that companions of packed numbers have."""

from __future__ import annotations

__all__ = ["BLOCK_EXPONENT", "BLOCK_SCALE", "PRE_QUANT_SCALE", "SCALE", "TENSOR_SCALE"]

SCALE = "scale"  # fp32, one number, or one for each row
BLOCK_SCALE = "block_scale"  # e4m3 or its bytes
BLOCK_EXPONENT = "block_exponent"  # e8m0 or its bytes: 2^(byte - 127)
TENSOR_SCALE = "tensor_scale"  # fp32, one number
PRE_QUANT_SCALE = "pre_quant_scale"  # (K,): inputs are to be multiplied by it, so the decoder multiplies columns
