"""Damaged copies of files, for readers that must refuse or read them and never crash, hang or take memory."""

from __future__ import annotations

import random

MOST_CHANGES = 4
EDGES = (
    0,
    1,
    2,
    8,
    2**7,
    2**8 - 1,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The data with a few changes: bits and bytes, numbers at the edges of their types, cuts, repetitions, moves."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, MOST_CHANGES)):
        if changed:
            rng.choice(CHANGES)(changed, rng)
    return bytes(changed)


def _span(data: bytearray, rng: random.Random, longest: int = 64) -> slice:
    start = rng.randrange(len(data))
    return slice(start, min(len(data), start + rng.randint(1, longest)))


def flip_a_bit(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def change_a_byte(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def write_an_edge(data: bytearray, rng: random.Random) -> None:
    """Some bytes become a number that is huge, or one off a power of two."""
    width = rng.choice((1, 2, 4, 8))
    start = rng.randrange(len(data))
    number = (rng.choice(EDGES) + rng.choice((-1, 0, 0, 1))) % (1 << 8 * width)
    data[start : start + width] = number.to_bytes(width, "little")[: len(data) - start]


def add_to_a_number(data: bytearray, rng: random.Random) -> None:
    span = slice(start := rng.randrange(len(data)), start + rng.choice((1, 4, 8)))
    width = len(data[span])
    number = int.from_bytes(data[span], "little") + rng.choice((-1, 1, rng.randint(-256, 256)))
    data[span] = (number % (1 << 8 * width)).to_bytes(width, "little")


def write_digits(data: bytearray, rng: random.Random) -> None:
    """For headers that are text."""
    span = _span(data, rng, 20)
    data[span] = bytes(rng.choice(b'0123456789-.e"[]{},:') for _ in data[span])


def cut_the_end(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def take_out(data: bytearray, rng: random.Random) -> None:
    del data[_span(data, rng)]


def repeat(data: bytearray, rng: random.Random) -> None:
    span = _span(data, rng)
    data[span.stop : span.stop] = data[span] * rng.randint(1, 4)


def move(data: bytearray, rng: random.Random) -> None:
    span, to = _span(data, rng), rng.randrange(len(data))
    piece = bytes(data[span])
    data[to : to + len(piece)] = piece


def insert(data: bytearray, rng: random.Random) -> None:
    place = rng.randrange(len(data) + 1)
    data[place:place] = rng.randbytes(rng.randint(1, 64))


def blank(data: bytearray, rng: random.Random) -> None:
    span = _span(data, rng)
    data[span] = bytes([rng.choice((0, 0xFF))]) * len(data[span])


CHANGES = (
    flip_a_bit,
    change_a_byte,
    write_an_edge,
    write_an_edge,
    write_an_edge,
    add_to_a_number,
    write_digits,
    cut_the_end,
    take_out,
    repeat,
    move,
    insert,
    blank,
)
