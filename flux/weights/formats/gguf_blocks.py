"""GGUF's block formats: numbers in blocks of 32 or 256, each with scales of its own, decoded on any torch device.

Results are those of llama.cpp in fp32 bit for bit; another type is rounded to once. Blocks are decoded run by run, so
that what stands between bytes and numbers stays in the processor's cache and a tensor's decoding needs no more memory
than its numbers. One thread of an AMD EPYC decodes 1 to 3 numbers a nanosecond.

Shapes: C blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...ops.host_memory import empty
from .base import DATA, Format, Parts
from .gguf_k import K_UNPACKS, Scratch, Unpack, Unpacked, bits_to_bytes, from_table, halves, nibbles, packed
from .threads import Pace, Span, share_out, spans_of

__all__ = ["BLOCKS", "GGUF_FORMATS", "BlockType"]

BITS = 8
CPU_RUN = 1 << 20  # numbers a thread has at a time: smaller runs cost more calls, larger ones fall out of the cache
DEVICE_RUN = 1 << 24  # elsewhere calls are dear and caches small; this bounds the scratch memory to some 200 MB
SLOW = 2e8  # numbers a second: a fifth of what one idle core does, and above what waiting threads do
WORD = 4  # bytes; blocks whose fields are read as words must begin at one


@dataclass(frozen=True)
class BlockType:
    """A ggml type.

    Attributes:
        code: Its number in a file.
        values: Numbers in a block.
        bytes: Of a block.
    """

    code: int
    values: int
    bytes: int


# GGML_QUANT_SIZES of ggml: every type that a file may name. The numbers left out were withdrawn.
BLOCKS: dict[str, BlockType] = {
    "F32": BlockType(0, 1, 4),
    "F16": BlockType(1, 1, 2),
    "Q4_0": BlockType(2, 32, 18),
    "Q4_1": BlockType(3, 32, 20),
    "Q5_0": BlockType(6, 32, 22),
    "Q5_1": BlockType(7, 32, 24),
    "Q8_0": BlockType(8, 32, 34),
    "Q8_1": BlockType(9, 32, 40),
    "Q2_K": BlockType(10, 256, 84),
    "Q3_K": BlockType(11, 256, 110),
    "Q4_K": BlockType(12, 256, 144),
    "Q5_K": BlockType(13, 256, 176),
    "Q6_K": BlockType(14, 256, 210),
    "Q8_K": BlockType(15, 256, 292),
    "IQ2_XXS": BlockType(16, 256, 66),
    "IQ2_XS": BlockType(17, 256, 74),
    "IQ3_XXS": BlockType(18, 256, 98),
    "IQ1_S": BlockType(19, 256, 50),
    "IQ4_NL": BlockType(20, 32, 18),
    "IQ3_S": BlockType(21, 256, 110),
    "IQ2_S": BlockType(22, 256, 82),
    "IQ4_XS": BlockType(23, 256, 136),
    "I8": BlockType(24, 1, 1),
    "I16": BlockType(25, 1, 2),
    "I32": BlockType(26, 1, 4),
    "I64": BlockType(27, 1, 8),
    "F64": BlockType(28, 1, 8),
    "IQ1_M": BlockType(29, 256, 56),
    "BF16": BlockType(30, 1, 2),
    "TQ1_0": BlockType(34, 256, 54),
    "TQ2_0": BlockType(35, 256, 66),
    "MXFP4": BlockType(39, 32, 17),
    "NVFP4": BlockType(40, 64, 36),
    "Q1_0": BlockType(41, 128, 18),
}


def unpack_q8_0(blocks: Tensor, scratch: Scratch) -> Unpacked:
    """d, 32 int8: d * q."""
    return Unpacked([blocks[:, None, 2:].view(torch.int8)], halves(blocks, 0, scratch))


def unpack_q4_0(blocks: Tensor, scratch: Scratch) -> Unpacked:
    """d, 16 bytes whose low nibbles are the first half: d * (q - 8)."""
    return Unpacked(_sides(blocks, 2, 8, scratch), halves(blocks, 0, scratch))


def unpack_q4_1(blocks: Tensor, scratch: Scratch) -> Unpacked:
    """d, m, nibbles: d * q + m."""
    return Unpacked(_sides(blocks, 4, 0, scratch), halves(blocks, 0, scratch), halves(blocks, 2, scratch))


def unpack_q5_0(blocks: Tensor, scratch: Scratch) -> Unpacked:
    """d, 4 bytes with the fifth bits in order, nibbles: d * (q - 16)."""
    return Unpacked(_sides(blocks, 6, 16, scratch, fifth=2), halves(blocks, 0, scratch))


def unpack_q5_1(blocks: Tensor, scratch: Scratch) -> Unpacked:
    """d, m, fifth bits, nibbles: d * q + m."""
    return Unpacked(_sides(blocks, 8, 0, scratch, fifth=4), halves(blocks, 0, scratch), halves(blocks, 2, scratch))


def _sides(blocks: Tensor, start: int, less: int, scratch: Scratch, fifth: int | None = None) -> list[Tensor]:
    """A block's two halves (C, 1, 16), less a number: nibbles from a byte on, and fifth bits from another."""
    sides = nibbles(packed(blocks, start, 16, scratch), scratch)
    if fifth is not None:
        bits = bits_to_bytes(packed(blocks, fifth, 4, scratch, "fifth"), 0x10, scratch).view(-1, 2, 16)
        for side, codes in enumerate(sides):
            codes.view(torch.int64).bitwise_or_(bits[:, side].view(torch.int64))
    return [codes.sub_(less).view(torch.int8)[:, None] for codes in sides]


def unpack_iq4_nl(blocks: Tensor, scratch: Scratch) -> Unpacked:
    """d, nibbles that are places in a table: d * table[q]."""
    sides = nibbles(packed(blocks, 2, 16, scratch), scratch)
    planes = [from_table(side, scratch, f"side {n}")[:, None] for n, side in enumerate(sides)]
    return Unpacked(planes, halves(blocks, 0, scratch))


UNPACKS: dict[str, Unpack] = {
    "Q8_0": unpack_q8_0,
    "Q5_1": unpack_q5_1,
    "Q5_0": unpack_q5_0,
    "Q4_1": unpack_q4_1,
    "Q4_0": unpack_q4_0,
    "IQ4_NL": unpack_iq4_nl,
    **K_UNPACKS,
}


_pace = Pace(SLOW)


def _decode(name: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of a tensor, whose ``DATA`` is uint8 (C, bytes of a block)."""
    block, unpack = BLOCKS[name], UNPACKS[name]
    data = _at_words(parts[DATA])
    data = data.view(data.numel() // block.bytes, block.bytes)
    numbers = empty((len(data) * block.values,), dtype, data.device).view(-1, block.values)

    def work(left: Iterable[Span]) -> None:
        scratch = Scratch(data.device)
        for start, stop in left:
            _write(unpack(data[start:stop], scratch), numbers[start:stop], scratch)

    if data.device.type != "cpu":
        work(spans_of(len(data), DEVICE_RUN // block.values))
        return numbers.view(shape)
    threads, run = torch.get_num_threads(), CPU_RUN // block.values
    if _pace.together():
        start = time.perf_counter()
        work(spans_of(len(data), run * threads))
        _pace.told(numbers.numel(), time.perf_counter() - start)
    else:
        spans = spans_of(len(data), run)
        share_out(work, spans, min(threads, len(spans)))
    return numbers.view(shape)


def _write(unpacked: Unpacked, numbers: Tensor, scratch: Scratch) -> None:
    """Stack planes to codes, then scale * code + offset (C, values).

    Numbers are written in order and by the last operation alone, for they lie outside the cache.
    """
    planes, scales, offsets = unpacked
    codes = scratch("codes", *numbers.shape, dtype=torch.float32)
    count, groups, width = planes[0].shape
    rows = codes.view(count, groups, len(planes), width)
    for place, plane in enumerate(planes):
        rows[:, :, place].copy_(plane)
    grouped = codes.view(scales.numel(), -1)
    out = numbers.view(grouped.shape) if numbers.dtype == torch.float32 else grouped
    if offsets is None:
        torch.mul(grouped, scales.view(-1, 1), out=out)
    else:
        torch.add(grouped.mul_(scales.view(-1, 1)), offsets.view(-1, 1), out=out)
    if out is grouped:
        numbers.copy_(codes)


def _at_words(data: Tensor) -> Tensor:
    """The data so that it can be seen as words; a copy only where it cannot."""
    data = data.contiguous()
    return data.clone() if data.storage_offset() % WORD else data


def _pick_rows(block: int, parts: Parts, shape: tuple[int, ...], places: Tensor) -> dict[str, Tensor]:
    """Rows of whole blocks of ``block`` bytes."""
    return {DATA: parts[DATA].view(shape[0], -1)[places].view(-1, block)}


def _row(name: str) -> Format:
    block = BLOCKS[name]
    bits = block.bytes * BITS / block.values
    return Format(name=name, bits=bits, decode=partial(_decode, name), rows=partial(_pick_rows, block.bytes))


GGUF_FORMATS: dict[str, Format] = {name: _row(name) for name in UNPACKS}
