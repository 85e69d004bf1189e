"""Numbers to GGUF's block formats.

Q8_0 is rounded as llama.cpp rounds it. For all others the scales are searched for: rounding with some scales around the
one that just spans a group, the best scale (and minimum) for the codes that come of each in closed form, and of these
the pair with the least squared error. llama.cpp searches in the same way (``make_qkx2_quants``, ``make_qx_quants``),
but weighs large numbers more; here all count alike, since what is wanted of a diffusion model's weights is a small
error of the product, whatever the input.

A group's numbers lie along the first dimension, so that every step is one operation on contiguous memory.

Shapes: C blocks, G groups (numbers that share a scale) of n numbers, n first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ...errors import MismatchError, NumericError
from .gguf_blocks import BLOCKS
from .gguf_k import IQ4_TABLE

__all__ = ["ENCODERS", "encode"]

RUN = 1 << 18  # numbers encoded at a time: some dozen times that many are held between
TINY = 1e-30  # divisors below it count as zero: what is divided then is next to nothing too
LARGEST = 2.0**15  # numbers up to here leave every scale and minimum well within fp16
SEARCH = [step / 8 for step in range(-8, 9)]  # codes more or fewer than just span a group, as tried scales
TABLE_SEARCH = 8  # times as wide in IQ4's table, whose values lie that much farther apart

Encoder = Callable[[Tensor], list[Tensor]]  # numbers (C, values) fp32 to a block's fields, uint8 (C, bytes) each


def encode(name: str, numbers: Tensor) -> Tensor:
    """Encode a tensor.

    Args:
        name: A key of ``ENCODERS``.
        numbers: In rows of a multiple of the format's block (..., K), of any floating-point type.

    Returns:
        Blocks (C, bytes of a block) uint8, on the numbers' device.

    Raises:
        MismatchError: There is no encoder of that name, or rows do not divide into blocks.
        NumericError: A number is not finite, or too large for scales in fp16.
    """
    if name not in ENCODERS:
        raise MismatchError(f"{name} is not a format that can be written; choose one of {', '.join(ENCODERS)}")
    block = BLOCKS[name]
    if numbers.dim() == 0 or numbers.shape[-1] % block.values:
        raise MismatchError(
            f"rows of shape {list(numbers.shape)} do not divide into {name}'s blocks of {block.values} numbers; "
            "store this tensor in another format"
        )
    rows = numbers.reshape(numbers.numel() // block.values, block.values)
    blocks = torch.empty(len(rows), block.bytes, dtype=torch.uint8, device=rows.device)
    run = RUN // block.values
    for start in range(0, len(rows), run):
        some = rows[start : start + run].float().contiguous()
        if not some.abs().max() <= LARGEST:  # as NaN is not either
            raise NumericError(f"a number is not finite or beyond {LARGEST:.0f}, which {name} cannot hold; use BF16")
        torch.cat(ENCODERS[name](some), dim=1, out=blocks[start : start + run])
    return blocks


def _half_bytes(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (C,) as fp16 bytes (C, 2), and as what they then are in fp32."""
    halves = numbers.to(torch.float16)
    return halves[:, None].view(torch.uint8), halves.float()


def _joined(fields: Tensor, bits: int) -> Tensor:
    """Fields (..., P, n) of so many bits that lie in a byte together, the first lowest, to bytes (..., n)."""
    places = torch.arange(fields.shape[-2], device=fields.device, dtype=torch.uint8)[:, None] * bits
    return (fields << places).sum(-2, dtype=torch.uint8)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A quotient, zero where the denominator is."""
    return torch.where(denominator.abs() < TINY, 0, numerator / denominator)


def _rounded(numbers: Tensor, scales: Tensor, lowest: int, highest: int) -> Tensor:
    """Codes of numbers (n, G) under scales (G,), as fp32; zero where the scale is."""
    return torch.round(numbers * _ratio(torch.ones_like(scales), scales)).clamp_(lowest, highest)


def _search_scale(numbers: Tensor, code: Callable[[Tensor], Tensor], targets: Sequence[float]) -> Tensor:
    """The scale under which ``scale * code(numbers / scale)`` is nearest to the numbers.

    For given codes q the best scale is <x, q> / <q, q>, and its error |x|^2 - <x, q>^2 / <q, q>.

    Args:
        numbers: Groups (n, G).
        code: Rounds quotients to codes, both (n, G).
        targets: What the number of largest magnitude becomes, before rounding, under the scales that are tried.

    Returns:
        Scales (G,), of either sign.
    """
    place = numbers.abs().argmax(dim=0, keepdim=True)
    extreme = numbers.gather(0, place)[0]
    best, best_gain = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for target in targets:
        codes = code(numbers * _ratio(torch.full_like(extreme, target), extreme))
        product, square = (numbers * codes).sum(0), codes.square().sum(0)
        scale = _ratio(product, square)
        gain = product * scale
        better = gain > best_gain
        best, best_gain = torch.where(better, scale, best), torch.where(better, gain, best_gain)
    return best


def _search_scale_and_low(numbers: Tensor, top: int, below_zero: bool) -> tuple[Tensor, Tensor]:
    """The pair under which ``scale * code + low``, codes 0 to ``top``, is nearest to the numbers.

    For given codes both follow from the normal equations of least squares.

    Args:
        numbers: Groups (n, G).
        top: The largest code.
        below_zero: Whether ``low`` may not be positive.

    Returns:
        Scales (G,), which are not negative, and lows (G,).
    """
    count = len(numbers)
    start = numbers.amin(0)
    start = start.clamp(max=0) if below_zero else start
    above = numbers - start
    span = above.amax(0)
    total, power = above.sum(0), above.square().sum(0)
    best, best_low, best_error = torch.zeros_like(span), start, power
    for step in SEARCH:
        codes = torch.round(above * _ratio(torch.full_like(span, top + step), span)).clamp_(0, top)
        first, second, product = codes.sum(0), codes.square().sum(0), (above * codes).sum(0)
        determinant = count * second - first.square()
        scale = _ratio(count * product - total * first, determinant)
        low = _ratio(second * total - first * product, determinant)
        if below_zero:  # where the best low is too high, the best scale for the highest that may be
            high = (low > -start) | (determinant == 0)
            low = torch.where(high, -start, low)
            scale = torch.where(high, _ratio(product - low * first, second), scale)
        error = power - 2 * (scale * product + low * total)
        error += scale.square() * second + 2 * scale * low * first + count * low.square()
        better = (error < best_error) & (scale > 0)
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
        best_low = torch.where(better, start + low, best_low)
    return best, best_low


def _groups(numbers: Tensor, count: int) -> Tensor:
    """Numbers (C, values) to ``count`` groups a block: (n, G)."""
    return numbers.view(len(numbers) * count, -1).t().contiguous()


def _codes(groups: Tensor, blocks: int) -> Tensor:
    """Codes (n, G) in fp32, back in the numbers' order: uint8 (C, values)."""
    return groups.to(torch.int16).t().reshape(blocks, -1).to(torch.uint8)


def _nibble_bytes(codes: Tensor) -> Tensor:
    """Codes of four bits (C, 32) to bytes (C, 16): the first half low."""
    return _joined(codes.view(-1, 2, 16), 4)


def _q8_0(numbers: Tensor) -> list[Tensor]:
    extreme = numbers.abs().amax(1)
    scales = extreme / 127
    field, _ = _half_bytes(scales)
    quotients = numbers * _ratio(torch.ones_like(scales), scales)[:, None]
    size = quotients.abs()
    whole = size.floor()
    codes = torch.where(size - whole >= 0.5, whole + 1, whole).copysign_(quotients)  # halves away from zero, as C does
    return [field, codes.to(torch.int8).view(torch.uint8)]


def _symmetric(numbers: Tensor, bits: int) -> list[Tensor]:
    """Q4_0 and Q5_0: d * (q - half)."""
    groups, half = _groups(numbers, 1), 1 << (bits - 1)
    scales = _search_scale(groups, lambda x: torch.round(x).clamp_(-half, half - 1), [step - half for step in SEARCH])
    field, scales = _half_bytes(scales)
    codes = _codes(_rounded(groups, scales, -half, half - 1) + half, len(numbers))
    return [field, *_upper_and_nibbles(codes, bits)]


def _with_low(numbers: Tensor, bits: int) -> list[Tensor]:
    """Q4_1 and Q5_1: d * q + m."""
    groups, top = _groups(numbers, 1), (1 << bits) - 1
    scales, lows = _search_scale_and_low(groups, top, below_zero=False)
    (field, scales), (low_field, lows) = _half_bytes(scales), _half_bytes(lows)
    codes = _codes(_rounded(groups - lows, scales, 0, top), len(numbers))
    return [field, low_field, *_upper_and_nibbles(codes, bits)]


def _upper_and_nibbles(codes: Tensor, bits: int) -> list[Tensor]:
    nibbles = _nibble_bytes(codes & 15)
    return [nibbles] if bits == 4 else [_joined((codes >> 4).view(-1, 4, 8, 1), 1).view(-1, 4), nibbles]


def _iq4_nl(numbers: Tensor) -> list[Tensor]:
    groups = _groups(numbers, 1)
    table = torch.tensor(IQ4_TABLE, dtype=torch.float32, device=numbers.device)
    between = (table[1:] + table[:-1]) / 2
    targets = [IQ4_TABLE[0] + TABLE_SEARCH * step for step in SEARCH]
    scales = _search_scale(groups, lambda x: table[torch.bucketize(x, between)], targets)
    field, scales = _half_bytes(scales)
    codes = torch.bucketize(groups * _ratio(torch.ones_like(scales), scales), between)
    return [field, _nibble_bytes(_codes(codes, len(numbers)))]


def _scale_of_scales(scales: Tensor, blocks: int, lowest: int, highest: int) -> tuple[Tensor, Tensor, Tensor]:
    """A block's scales (G,) as one fp16 scale and small codes.

    Returns:
        The fp16 scale's bytes (C, 2), codes (C, groups) int16, and the scales (G,) that these stand for.
    """
    table = scales.view(blocks, -1)
    bound = lowest if lowest else highest
    extreme = table.gather(1, table.abs().argmax(1, keepdim=True))[:, 0]
    field, factor = _half_bytes(extreme / bound)
    codes = _rounded(table.t(), factor, lowest, highest).t()
    return field, codes.to(torch.int16), (codes * factor[:, None]).reshape(-1)


def _affine_k(numbers: Tensor, count: int, bits: int, scale_bits: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Q2_K, Q4_K and Q5_K: fields of d and dmin, codes of scales and of minimums (C, groups), codes (C, 256)."""
    groups, top = _groups(numbers, count), (1 << bits) - 1
    scales, lows = _search_scale_and_low(groups, top, below_zero=True)
    highest = (1 << scale_bits) - 1
    d, scale_codes, scales = _scale_of_scales(scales, len(numbers), 0, highest)
    rest = groups - scales * _rounded(groups - lows, scales, 0, top)
    lows = rest.mean(0).clamp_(max=0)  # the best for the scales as they are now stored
    dmin, low_codes, minimums = _scale_of_scales(-lows, len(numbers), 0, highest)
    codes = _codes(_rounded(groups + minimums, scales, 0, top), len(numbers))
    return [d, dmin], scale_codes.to(torch.uint8), low_codes.to(torch.uint8), codes


def _symmetric_k(numbers: Tensor, bits: int, lowest: int, highest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q3_K and Q6_K, groups of 16: the field of d, codes of scales (C, 16) int16, codes (C, 256)."""
    groups, half = _groups(numbers, 16), 1 << (bits - 1)
    scales = _search_scale(groups, lambda x: torch.round(x).clamp_(-half, half - 1), [step - half for step in SEARCH])
    d, scale_codes, scales = _scale_of_scales(scales, len(numbers), lowest, highest)
    return d, scale_codes, _codes(_rounded(groups, scales, -half, half - 1) + half, len(numbers))


def _six_bit_fields(scales: Tensor, minimums: Tensor) -> Tensor:
    """Scales and minimums (C, 8) of six bits to the 12 bytes of Q4_K and Q5_K."""
    own = [(table[:, :4] | (table[:, 4:] >> 4) << 6) for table in (scales, minimums)]
    return torch.cat([*own, (scales[:, 4:] & 15) | minimums[:, 4:] << 4], dim=1)


def _q4_k(numbers: Tensor) -> list[Tensor]:
    fields, scales, minimums, codes = _affine_k(numbers, 8, 4, 6)
    return [*fields, _six_bit_fields(scales, minimums), _joined(codes.view(-1, 4, 2, 32), 4).view(-1, 128)]


def _q5_k(numbers: Tensor) -> list[Tensor]:
    fields, scales, minimums, codes = _affine_k(numbers, 8, 5, 6)
    fifth, nibbles = _joined((codes >> 4).view(-1, 8, 32), 1), _joined((codes & 15).view(-1, 4, 2, 32), 4)
    return [*fields, _six_bit_fields(scales, minimums), fifth, nibbles.view(-1, 128)]


def _q2_k(numbers: Tensor) -> list[Tensor]:
    fields, scales, minimums, codes = _affine_k(numbers, 16, 2, 4)
    return [scales | minimums << 4, _pair_bytes(codes), *fields]


def _pair_bytes(codes: Tensor) -> Tensor:
    """Codes of two bits (C, 256) to bytes (C, 64): in each half of 128, four parts of 32 to 32 bytes."""
    return _joined(codes.view(-1, 2, 4, 32), 2).view(-1, 64)


def _q6_k(numbers: Tensor) -> list[Tensor]:
    d, scales, codes = _symmetric_k(numbers, 6, -128, 127)
    nibbles = _joined((codes & 15).view(-1, 2, 2, 64), 4).view(-1, 128)
    return [nibbles, _pair_bytes(codes >> 4), scales.to(torch.int8).view(torch.uint8), d]


def _q3_k(numbers: Tensor) -> list[Tensor]:
    d, scales, codes = _symmetric_k(numbers, 3, -32, 31)
    third = _joined((codes >> 2).view(-1, 8, 32), 1)
    fields = (scales + 32).to(torch.uint8)
    low, upper = _joined((fields & 15).view(-1, 2, 8), 4), _joined((fields >> 4).view(-1, 4, 4), 2)
    return [third, _pair_bytes(codes & 3), low, upper, d]


ENCODERS: dict[str, Encoder] = {
    "Q8_0": _q8_0,
    "Q6_K": _q6_k,
    "Q5_K": _q5_k,
    "Q4_K": _q4_k,
    "Q3_K": _q3_k,
    "Q2_K": _q2_k,
    "Q5_1": partial(_with_low, bits=5),
    "Q5_0": partial(_symmetric, bits=5),
    "Q4_1": partial(_with_low, bits=4),
    "Q4_0": partial(_symmetric, bits=4),
    "IQ4_NL": _iq4_nl,
}
