"""Evil GGUF files: (what it is, its bytes, words that its refusal must have)."""

from __future__ import annotations

import math
import struct

from flux.weights.readers.header import MAX_NAME, MAX_TENSORS

__all__ = ["GGUF", "STRING", "U8", "array", "field", "gguf", "string", "tensor"]

MB = 1 << 20
U8, U32, I32, STRING, ARRAY = 0, 4, 5, 8, 9
SEVEN = struct.pack("<I", 7)


def string(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def field(key="k", kind=U32, value=SEVEN):
    return string(key) + struct.pack("<I", kind) + value


def array(kind, count, items=b"", key="k"):
    return field(key, ARRAY, struct.pack("<IQ", kind, count) + items)


def tensor(name="a", sides=(4,), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)


def gguf(fields=(), tensors=(), data=bytes(64), counts=None, version=3, alignment=32):
    tensor_count, field_count = counts or (len(tensors), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, field_count) + b"".join((*fields, *tensors))
    return head + bytes(-len(head) % alignment) + data


def shape_of(sides, kind=I32, name="a"):
    return array(kind, len(sides), struct.pack(f"<{len(sides)}i", *sides), f"comfy.gguf.orig_shape.{name}")


Q8_0, Q4_K = 8, 12
INFINITE = struct.pack("<e", math.inf)

GGUF = [
    ("zero bytes", b"", "is empty (0 bytes)"),
    ("four bytes", b"GGUF", "is not a GGUF file"),
    ("a web page", b"<!DOCTYPE html><html></html>", "is a web page"),
    ("an LFS pointer", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ("a pickle", b"\x80\x02}q\x00." + bytes(20), "is a pickle file"),
    ("2^60 tensors", gguf(counts=(2**60, 0)), "claims 1152921504606846976 tensors"),
    ("2^60 fields", gguf(counts=(0, 2**60)), "claims 1152921504606846976 fields"),
    ("more tensors than any model has", gguf(counts=(MAX_TENSORS + 1, 0), data=bytes(24 * MAX_TENSORS + 99)), "claims"),
    ("no fields where a thousand are claimed", gguf(counts=(0, 1000), data=b""), "claims 1000 fields"),
    ("version 4", gguf(version=4), "is GGUF version 4"),
    ("a key of 2^64 - 1 bytes", gguf([struct.pack("<Q", 2**64 - 1)]), "bytes long"),
    ("a key of a thousand letters", gguf([field("x" * 1000)]), "longer than 512 characters"),
    ("a key with a line break", gguf([field("a\nb")]), "cannot be printed"),
    ("a key that is no text", gguf([field(b"\xff")]), "is not text"),
    ("a name of 300 letters", gguf([], [tensor("x" * 300)]), f"longer than {MAX_NAME} characters"),
    ("a name that clears the screen", gguf([], [tensor("\x1b[2J")]), "cannot be printed"),
    ("a text of 2^62 bytes", gguf([field(kind=STRING, value=struct.pack("<Q", 2**62))]), "bytes long"),
    ("a text past the end", gguf([field(kind=STRING, value=struct.pack("<Q", 9000))]), "past the end"),
    ("an array of 2^61 numbers", gguf([array(U32, 2**61)]), "more than the file has room for"),
    ("an array of 2^64 - 1 bytes", gguf([array(U8, 2**64 - 1)]), "more than the file has room for"),
    ("an array of 2^61 texts", gguf([array(STRING, 2**61)]), "more than the file has room for"),
    ("an array of 2^60 arrays", gguf([array(ARRAY, 2**60)]), "more than the file has room for"),
    ("arrays in arrays in arrays", gguf([array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 9)]), "nested more than 2"),
    ("a value of type 13", gguf([field(kind=13)]), "of type 13"),
    ("a key twice", gguf([field(), field()]), "'k' stands twice"),
    ("a tensor twice", gguf([], [tensor(), tensor(offset=32)]), "'a' stands twice"),
    ("an alignment of 0", gguf([field("general.alignment", value=bytes(4))]), "alignment is 0"),
    ("an alignment of 2^31", gguf([field("general.alignment", value=struct.pack("<I", 2**31))]), "alignment is"),
    ("an alignment of 12", gguf([field("general.alignment", value=struct.pack("<I", 12))]), "alignment is 12"),
    ("an alignment of true", gguf([field("general.alignment", 7, b"\x01")]), "alignment is True"),
    (
        "an alignment past the end",
        gguf([field("general.alignment", value=struct.pack("<I", MB))], [tensor()]),
        "cut off",
    ),
    ("a rank of 5", gguf([], [tensor(sides=(1,) * 5)]), "claims 5 dimensions"),
    ("a rank of 2^32 - 1", gguf([], [string("a") + struct.pack("<I", 2**32 - 1)]), "claims 4294967295 dimensions"),
    ("a side of 2^63", gguf([], [tensor(sides=(2**63,))]), "claims shape"),
    ("sides whose product is 0 in 64 bits", gguf([], [tensor(sides=(2**32, 2**32))]), "ends at byte"),
    ("nothing by 2^40 by 2^40 by 2^40", gguf([], [tensor(sides=(0, 2**40, 2**40, 2**40))]), "claims shape"),
    ("a type that does not exist", gguf([], [tensor(kind=4_000_000_000)]), "ggml type 4000000000"),
    (
        "a type that is known and not unpacked",
        gguf([], [tensor(sides=(256,), kind=16)], bytes(66)),
        "stored as IQ2_XXS",
    ),
    ("half a block", gguf([], [tensor(sides=(16,), kind=Q8_0)]), "not a multiple of Q8_0's 32"),
    ("a block in two rows", gguf([], [tensor(sides=(128, 2), kind=Q4_K)], bytes(144)), "not a multiple of Q4_K's 256"),
    ("an offset of 2^64 - 32", gguf([], [tensor(offset=2**64 - 32)]), "ends at byte"),
    ("an offset that is not aligned", gguf([], [tensor(offset=16)]), "not at a multiple of 32"),
    ("a tensor past the end", gguf([], [tensor(sides=(17,))]), "ends at byte 68 of 64"),
    ("a file cut in its last tensor", gguf([], [tensor()], bytes(15)), "ends at byte 16 of 15"),
    ("tensors that overlap", gguf([], [tensor(sides=(16,)), tensor("b", offset=32)]), "overlap"),
    ("an original shape of other size", gguf([shape_of((5,))], [tensor()]), "does not fit [4]"),
    ("an original shape that is negative", gguf([shape_of((-2, -2))], [tensor()]), "does not fit [4]"),
    ("an original shape of floats", gguf([shape_of((4,), 6)], [tensor()]), "does not fit [4]"),
    ("an original shape of five sides", gguf([shape_of((1, 1, 1, 1, 4))], [tensor()]), "is not a list of up to 4"),
    (
        "an original shape of nothing by 2^40 and more",
        gguf(
            [array(10, 3, struct.pack("<3Q", 0, 2**40, 2**40), "comfy.gguf.orig_shape.a")],
            [tensor(sides=(0, 4))],
        ),
        "claims shape",
    ),
    ("an infinite scale", gguf([], [tensor(sides=(32,), kind=Q8_0)], INFINITE + bytes(62)), "scale that is not finite"),
    (
        "an infinite minimum",
        gguf([], [tensor(sides=(256,), kind=Q4_K)], bytes(2) + INFINITE + bytes(140)),
        "not finite",
    ),
]
