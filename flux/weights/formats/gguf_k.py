"""GGUF's k-quants to numbers: blocks of 256 that share a scale of scales.

Layouts are those of llama.cpp (``ggml-common.h``, ``dequantize_row_*`` in ``ggml-quants.c``). Every product and sum is
rounded as that code rounds it, so that results are equal bit for bit. A function takes a run of blocks and gives what
is packed in them; all of it lies in scratch memory, which the next run uses again.

A torch operation is at its fastest on one contiguous run and still fast on equal rows at equal distances; a third
dimension costs five times as much. So bytes are copied out of their blocks first, and fields that have the same place
in their bytes are taken for all blocks at once. They make a plane of the block's numbers.

Shapes: C blocks, each of 256 numbers; a part is 32 of them, a group the 16 or 32 that share a scale. A plane is
(C, g, w); planes stacked to (C, g, planes, w) are the block's numbers in order.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "IQ4_TABLE",
    "K_UNPACKS",
    "Scratch",
    "Unpack",
    "Unpacked",
    "bits_to_bytes",
    "from_table",
    "halves",
    "nibbles",
    "packed",
]

PART = 32
LOW_NIBBLE = 0x0F
NIBBLE = 4  # bits
PAIR = 2  # bits of the fields in Q2_K, Q3_K and the upper part of Q6_K
PARTS_IN_BYTE = 4  # such fields in a byte, each of another part
SIX_BITS, UPPER_TWO, LOWER_FOUR = 0x3F3F3F3F, 0x30303030, 0x0F0F0F0F  # of each byte of a word
EVERY_BYTE = 0x0101_0101_0101_0101
OWN_BIT = 0x8040_2010_0804_0201 - (1 << 64)  # bit i of byte i, as torch's signed numbers write it
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl in llama.cpp


class Scratch:
    """Memory by name on one device, kept from one run of blocks to the next.

    Args:
        device: Where it lies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Memory of a shape, with whatever stands in it. A name keeps one dtype."""
        count = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name] = torch.empty(count, dtype=dtype, device=self._device)
        return buffer[:count].view(shape)


class Unpacked(NamedTuple):
    """What blocks hold: numbers are scale * code + offset.

    Attributes:
        planes: Codes (C, g, w), of any type.
        scales: One for each group (C, groups), in fp32.
        offsets: Likewise, or None.
    """

    planes: list[Tensor]
    scales: Tensor
    offsets: Tensor | None = None


Unpack = Callable[[Tensor, Scratch], Unpacked]  # of blocks (C, bytes) uint8


def packed(blocks: Tensor, start: int, count: int, scratch: Scratch, name: str = "packed") -> Tensor:
    """Bytes ``start`` to ``start + count`` of every block, contiguous (C, count)."""
    return scratch(name, len(blocks), count).copy_(blocks[:, start : start + count])


def halves(blocks: Tensor, start: int, scratch: Scratch) -> Tensor:
    """The fp16 number that stands at an even byte of every block, in fp32 (C, 1)."""
    column = blocks.view(torch.float16)[:, start // 2, None]
    return scratch(f"half {start}", len(blocks), 1, dtype=torch.float32).copy_(column)


def nibbles(data: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Low and high halves of bytes, each in the bytes' own shape."""
    low = torch.bitwise_and(data, LOW_NIBBLE, out=scratch("low nibbles", *data.shape))
    return low, torch.bitwise_right_shift(data, NIBBLE, out=scratch("high nibbles", *data.shape))


def bits_to_bytes(data: Tensor, value: int, scratch: Scratch) -> Tensor:
    """Bits to bytes that are 0 or ``value``, a power of two up to 64: bit i of a byte to byte i of eight.

    Args:
        data: Bytes (C, n).
        value: Of the byte for a bit that is set.
        scratch: For the result.

    Returns:
        Bytes (C, 8 n).
    """
    wide = scratch("bits", *data.shape, dtype=torch.int64).copy_(data)
    wide.mul_(EVERY_BYTE).bitwise_and_(OWN_BIT)  # the byte eight times over, and of each copy its own bit
    wide.add_(EVERY_BYTE * 0x7F)  # carries any bit that is set into the byte's highest
    wide.bitwise_right_shift_(7 - value.bit_length() + 1).bitwise_and_(EVERY_BYTE * value)
    return wide.view(torch.uint8)


def from_table(places: Tensor, scratch: Scratch, name: str) -> Tensor:
    """Places in IQ4's table of sixteen to the values there, in fp32."""
    table = torch.tensor(IQ4_TABLE, dtype=torch.float32, device=places.device)
    indices = scratch("indices", places.numel(), dtype=torch.int32).copy_(places.view(-1))
    values = scratch(name, places.numel(), dtype=torch.float32)
    return torch.index_select(table, 0, indices, out=values).view(places.shape)


def _pairs(data: Tensor, place: int, to: int, scratch: Scratch, name: str = "pairs") -> Tensor:
    """The two-bit field at ``place`` (0 to 3) of every byte, moved to the byte's bit ``to``; contiguous."""
    return _moved(data, to - PAIR * place, 3 << to, scratch(name, *data.shape))


def _bit(data: Tensor, place: int, to: int, scratch: Scratch) -> Tensor:
    """The bit at ``place`` of every byte, moved to the byte's bit ``to``; contiguous."""
    return _moved(data, to - place, 1 << to, scratch("bit", *data.shape))


def _moved(data: Tensor, left: int, mask: int, out: Tensor) -> Tensor:
    move = torch.bitwise_left_shift if left >= 0 else torch.bitwise_right_shift
    return move(data, abs(left), out=out).bitwise_and_(mask)


def _or_rows(rows: Tensor, more: Tensor, out: Tensor) -> None:
    """``out = rows | more`` on rows of 32 bytes that lie apart, eight bytes at a time."""
    torch.bitwise_or(rows.view(torch.int64), more.view(torch.int64), out=out.view(torch.int64))


def _six_bit_scales(blocks: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Scales and offsets (C, 8) of Q4_K and Q5_K: six bits each in bytes 4 to 15, times the fp16 at bytes 0 and 2.

    The twelve bytes are three words: one with six bits of scales 0 to 3 and the upper two of 4 to 7, one with the same
    of the minimums, one with the lower four of both. The four bytes of a word are worked on at once, and scales and
    minimums together: a block has few of these, so that the number of calls counts.
    """
    count = len(blocks)
    words = scratch("scale words", 3, count, dtype=torch.int32).copy_(blocks.view(torch.int32)[:, 1:4].t())
    own, shifts = words[:2], torch.tensor([[0], [NIBBLE]], dtype=torch.int32, device=blocks.device)
    lower = torch.bitwise_right_shift(words[2], shifts, out=scratch("lower bits", 2, count, dtype=torch.int32))
    upper = torch.bitwise_right_shift(own, PAIR, out=scratch("upper bits", 2, count, dtype=torch.int32))
    fields = scratch("scale fields", 2, count, 2, dtype=torch.int32)
    torch.bitwise_and(own, SIX_BITS, out=fields[:, :, 0])
    torch.bitwise_or(lower.bitwise_and_(LOWER_FOUR), upper.bitwise_and_(UPPER_TWO), out=fields[:, :, 1])
    factors = scratch("scale factors", 2, count, dtype=torch.float32).copy_(blocks.view(torch.float16)[:, :2].t())
    factors[1].neg_()
    numbers = scratch("scales", 2, count, 8, dtype=torch.float32)
    numbers.view(-1).copy_(fields.view(torch.uint8).view(-1))
    scales, offsets = numbers.mul_(factors[:, :, None])
    return scales, offsets


def unpack_q4_k(blocks: Tensor, scratch: Scratch) -> Unpacked:
    """d, dmin, 12 bytes of scales, 128 of nibbles: 32 bytes hold one part's codes low and the next part's high."""
    sides = nibbles(packed(blocks, 16, 128, scratch), scratch)
    return Unpacked([side.view(-1, 4, PART) for side in sides], *_six_bit_scales(blocks, scratch))


def unpack_q5_k(blocks: Tensor, scratch: Scratch) -> Unpacked:
    """As Q4_K, with 32 bytes before the nibbles whose bit j is the fifth bit of part j."""
    fifth = packed(blocks, 16, 32, scratch, "fifth")
    sides = [side.view(-1, 4, PART) for side in nibbles(packed(blocks, 48, 128, scratch), scratch)]
    codes = scratch("codes in bytes", len(blocks), 8, PART)
    for part in range(8):
        _or_rows(sides[part % 2][:, part // 2], _bit(fifth, part, 4, scratch), codes[:, part])
    return Unpacked([codes], *_six_bit_scales(blocks, scratch))


def unpack_q6_k(blocks: Tensor, scratch: Scratch) -> Unpacked:
    """128 bytes of low nibbles, 64 of upper pairs of bits, 16 int8 scales, d; halves of 128 codes, 16 to a scale."""
    low = [side.view(-1, 2, 2, PART) for side in nibbles(packed(blocks, 0, 128, scratch), scratch)]
    upper = packed(blocks, 128, 64, scratch, "upper")
    codes = scratch("codes in bytes", len(blocks), 2, PARTS_IN_BYTE, PART)
    for part in range(PARTS_IN_BYTE):
        pairs = _pairs(upper, part, NIBBLE, scratch).view(-1, 2, PART)
        _or_rows(low[part // 2][:, :, part % 2], pairs, codes[:, :, part])
    scales = scratch("scales", len(blocks), 16, dtype=torch.float32).copy_(blocks[:, 192:208].view(torch.int8))
    return Unpacked([_signed(codes, 32)], scales.mul_(halves(blocks, 208, scratch)))


def _signed(codes: Tensor, less: int) -> Tensor:
    """Codes of a block less a number, as a plane (C, 1, n) of int8; in place."""
    return codes.sub_(less).view(torch.int8).view(len(codes), 1, -1)


def unpack_q2_k(blocks: Tensor, scratch: Scratch) -> Unpacked:
    """16 bytes of scale (low nibble) and minimum (high), 64 of pairs of bits, d, dmin."""
    data = packed(blocks, 16, 64, scratch)
    planes = [_pairs(data, part, 0, scratch, f"part {part}").view(-1, 2, PART) for part in range(PARTS_IN_BYTE)]
    low, high = nibbles(packed(blocks, 0, 16, scratch, "scale bytes"), scratch)
    scales = scratch("scales", *low.shape, dtype=torch.float32).copy_(low)
    minimums = scratch("minimums", *high.shape, dtype=torch.float32).copy_(high)
    return Unpacked(planes, scales.mul_(halves(blocks, 80, scratch)), minimums.mul_(halves(blocks, 82, scratch).neg_()))


def unpack_q3_k(blocks: Tensor, scratch: Scratch) -> Unpacked:
    """32 bytes whose bit j is the third bit of part j, 64 of pairs of bits, 12 of scales, d; codes are -4 to 3."""
    third = packed(blocks, 0, 32, scratch, "third")
    data = packed(blocks, 32, 64, scratch)
    codes = scratch("codes in bytes", len(blocks), 2, PARTS_IN_BYTE, PART)
    for part in range(PARTS_IN_BYTE):
        pairs = _pairs(data, part, 0, scratch).view(-1, 2, PART)
        for half in range(2):
            bits = _bit(third, PARTS_IN_BYTE * half + part, 2, scratch)
            _or_rows(pairs[:, half], bits, codes[:, half, part])
    return Unpacked([_signed(codes, 4)], _q3_scales(blocks, scratch).mul_(halves(blocks, 108, scratch)))


def _q3_scales(blocks: Tensor, scratch: Scratch) -> Tensor:
    """Sixteen scales of six bits (C, 16), -32 to 31: four bits in bytes 96 to 103, the upper two in 104 to 107."""
    low = [side.view(-1, 2, 4) for side in nibbles(packed(blocks, 96, 8, scratch, "scale bytes"), scratch)]
    upper = packed(blocks, 104, 4, scratch, "upper scale bytes")
    fields = scratch("scale fields", len(blocks), 4, 4)
    for row in range(4):
        torch.bitwise_or(low[row // 2][:, row % 2], _pairs(upper, row, NIBBLE, scratch), out=fields[:, row])
    return scratch("scales", len(blocks), 16, dtype=torch.float32).copy_(_signed(fields, 32)[:, 0])


def unpack_iq4_xs(blocks: Tensor, scratch: Scratch) -> Unpacked:
    """d, 2 bytes of upper and 4 of lower scale bits, 128 of nibbles: 16 bytes a part, low nibbles its first half."""
    sides = nibbles(packed(blocks, 8, 128, scratch), scratch)
    planes = [from_table(side, scratch, f"side {n}").view(-1, 8, PART // 2) for n, side in enumerate(sides)]
    fields = scratch("scale fields", len(blocks), 4, 2)
    for side, low in enumerate(nibbles(packed(blocks, 4, 4, scratch, "scale bytes"), scratch)):
        fields[:, :, side].copy_(low)
    upper = packed(blocks, 2, 2, scratch, "upper scale bytes")
    rows = fields.view(-1, 2, PARTS_IN_BYTE)
    for place in range(PARTS_IN_BYTE):
        rows[:, :, place].bitwise_or_(_pairs(upper, place, NIBBLE, scratch))
    scales = scratch("scales", len(blocks), 8, dtype=torch.float32).copy_(_signed(fields, 32)[:, 0])
    return Unpacked(planes, scales.mul_(halves(blocks, 0, scratch)))


K_UNPACKS: dict[str, Unpack] = {
    "Q6_K": unpack_q6_k,
    "Q5_K": unpack_q5_k,
    "Q4_K": unpack_q4_k,
    "Q3_K": unpack_q3_k,
    "Q2_K": unpack_q2_k,
    "IQ4_XS": unpack_iq4_xs,
}
