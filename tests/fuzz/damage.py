"""Valid files made invalid: bytes changed blindly, and, so that deeper checks are reached, what the bytes mean.

A changed header is written with its right length and a changed tensor with its right offsets mostly, for a file that is
refused at its first byte tests nothing behind it.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from flux.weights.readers.header import ITEM_BITS
from tests.mutations import EDGES, mutated

from .json_trees import mutated_json
from .seeds import Mark, Seed

__all__ = ["damaged"]

JSON_SUFFIX, SAFETENSORS_SUFFIX = ".json", ".safetensors"
LENGTH_BYTES = 8
BYTE = 8
CHANGES = (1, 1, 2, 3)  # made to a file, of which each is drawn equally often

WORDS = (
    *("weight", "weight_scale", "scale_weight", "input_scale", "scale_input", "weight_scale_2", "pre_quant_scale"),
    *("comfy_quant", "scaled_fp8", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.quant_state"),
    *("weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
    *("bias", "weight_scale_inv", "qweight", "SCB", ""),
)
ODD_TEXTS = (
    *(b"", b"\xff\xfe", b"a\nb", b"\x1b[2J", "\U0001f600".encode() * 50, b"x" * 1_025, b"x" * 70_000, b"../../x"),
    *(
        b"general.alignment",
        b"comfy.gguf.orig_shape.double_blocks.0.img_mlp.0.weight",
        b"double_blocks.0.img_mlp.0.weight",
    ),
)
POISONS = tuple(struct.pack("<f", value) for value in (float("nan"), float("inf"), -1.0, 0.0, 3e38, 1e-40)) + (
    *(b"\xff\x7f", b"\x00\x7c", b"\xff", b"\x7f", b"\x80", b"\x00"),
)


def damaged(seed: Seed, rng: random.Random) -> dict[str, bytes]:
    """The seed's files with at least one of them changed, or gone."""
    files = dict(seed.files)
    if len(files) > 1 and rng.random() < 0.1:
        _mix_files(files, rng)
        return files
    name = rng.choice(list(files))
    data = files[name]
    if rng.random() < 0.25:
        changed = mutated(data, rng)
    elif name.endswith(JSON_SUFFIX):
        changed = mutated_json(data, rng).encode("utf-8", "surrogatepass")
    elif name.endswith(SAFETENSORS_SUFFIX):
        changed = rng.choice((_changed_header, _changed_tensors))(data, rng)
    else:
        changed = _changed_gguf(data, seed.marks, rng)
    if rng.random() < 0.1:
        changed = mutated(changed, rng)
    if rng.random() < 0.03:
        changed = rng.choice((b"", changed + rng.randbytes(1_000), changed[: len(changed) // 2], bytes(len(changed))))
    files[name] = changed
    return files


def _mix_files(files: dict[str, bytes], rng: random.Random) -> None:
    one, other = rng.sample(list(files), 2)
    if rng.random() < 0.5:
        files[one], files[other] = files[other], files[one]
    else:
        del files[one]


# safetensors: the header as it stands, and the file as tensors


def _changed_header(data: bytes, rng: random.Random) -> bytes:
    """The header's JSON changed, the tensors' bytes left as they are."""
    stop = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    text = mutated_json(data[LENGTH_BYTES:stop], rng).encode("utf-8", "surrogatepass")
    length = len(text)
    if rng.random() < 0.1:
        length = rng.choice((*EDGES, length + 1, length - 1)) % 2**64
    return length.to_bytes(LENGTH_BYTES, "little") + text + data[stop:]


@dataclass
class _Tensor:
    name: str
    dtype: str
    shape: list[int]
    data: bytes


def _changed_tensors(data: bytes, rng: random.Random) -> bytes:
    """Tensors changed so that the header still fits the bytes."""
    metadata, tensors = _unpacked(data)
    for _ in range(rng.choice(CHANGES)):
        if tensors:
            rng.choice(TENSOR_CHANGES)(metadata, tensors, rng)
    return _packed(metadata, tensors)


def _unpacked(data: bytes) -> tuple[dict[str, Any], list[_Tensor]]:
    stop = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    header = json.loads(data[LENGTH_BYTES:stop])
    metadata = header.pop("__metadata__", {})
    tensors = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors.append(_Tensor(name, entry["dtype"], entry["shape"], data[stop + start : stop + end]))
    return metadata, tensors


def _packed(metadata: dict[str, Any], tensors: list[_Tensor]) -> bytes:
    pairs, offset = [f'"__metadata__":{json.dumps(metadata)}'] if metadata else [], 0
    for tensor in tensors:
        end = offset + len(tensor.data)
        entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        pairs.append(f"{json.dumps(tensor.name)}:{json.dumps(entry)}")
        offset = end
    text = ("{" + ",".join(pairs) + "}").encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + b"".join(tensor.data for tensor in tensors)


Metadata = dict[str, Any]


def see_as_another_type(metadata: Metadata, tensors: list[_Tensor], rng: random.Random) -> None:
    """The same bytes in another dtype, the last side fitted to it."""
    tensor = rng.choice(tensors)
    tensor.dtype = rng.choice(list(ITEM_BITS))
    count = len(tensor.data) * BYTE // ITEM_BITS[tensor.dtype]
    rest = prod(tensor.shape[:-1])
    tensor.shape = [*tensor.shape[:-1], count // rest] if rest and count % rest == 0 else [count]


def see_in_another_shape(metadata: Metadata, tensors: list[_Tensor], rng: random.Random) -> None:
    tensor = rng.choice(tensors)
    count = prod(tensor.shape)
    shapes = [[count], [1, count], [count, 1], tensor.shape[::-1], [1] * 3 + tensor.shape, tensor.shape + [1] * 9]
    if count == 0:
        shapes += [[0, 2**31], [2**40, 0], [0, 2**62, 2**62], [0, 2**70]]
    if count == 1:
        shapes.append([])
    tensor.shape = rng.choice(shapes)


def change_the_size(metadata: Metadata, tensors: list[_Tensor], rng: random.Random) -> None:
    """Rows more or fewer, with their bytes."""
    tensor = rng.choice(tensors)
    rows = tensor.shape[0] if tensor.shape else 1
    row = tensor.data[: len(tensor.data) // rows] if rows else b""
    rows = rng.choice((0, 1, 2, rows + 1, max(0, rows - 1), 2 * rows))
    tensor.shape = [rows, *tensor.shape[1:]]
    tensor.data = row * rows


def call_it_otherwise(metadata: Metadata, tensors: list[_Tensor], rng: random.Random) -> None:
    tensor = rng.choice(tensors)
    layer = rng.choice(tensors).name.partition(".weight")[0]
    odd = ("", "x" * 1_025, "a\nb", "\x1b[2J", "\ud800", "\u202e", ".", "..", ".weight", "weight", "comfy_quant")
    tensor.name = rng.choice((f"{layer}.{rng.choice(WORDS)}", f"{layer}.{rng.choice(WORDS)}", rng.choice(odd)))


def take_it_out(metadata: Metadata, tensors: list[_Tensor], rng: random.Random) -> None:
    del tensors[rng.randrange(len(tensors))]


def exchange_them(metadata: Metadata, tensors: list[_Tensor], rng: random.Random) -> None:
    one, other = rng.choice(tensors), rng.choice(tensors)
    one.name, other.name = other.name, one.name


def poison_the_numbers(metadata: Metadata, tensors: list[_Tensor], rng: random.Random) -> None:
    """Numbers that are not finite, negative, zero or absurd, at a place or everywhere; small tensors are the scales."""
    tensor = min(rng.sample(tensors, min(2, len(tensors))), key=lambda tensor: len(tensor.data))
    poison = rng.choice(POISONS)
    count = len(tensor.data) // len(poison)
    if count:
        at = rng.randrange(count) * len(poison)
        data = tensor.data[:at] + poison + tensor.data[at + len(poison) :]
        tensor.data = poison * count + tensor.data[count * len(poison) :] if rng.random() < 0.3 else data


def change_a_text(metadata: Metadata, tensors: list[_Tensor], rng: random.Random) -> None:
    """A JSON text that is a tensor, or one of the metadata."""
    texts = [tensor for tensor in tensors if tensor.data[:1] == b"{"]
    if texts and rng.random() < 0.8:
        tensor = rng.choice(texts)
        tensor.data = _changed_text(tensor.data, rng)
        tensor.shape = [len(tensor.data)]
    elif metadata:
        key = rng.choice(list(metadata))
        value = metadata[key]
        is_json = isinstance(value, str) and value.startswith("{")
        metadata[key] = _changed_text(value.encode(), rng).decode("utf-8", "replace") if is_json else "\x00" * 9


def _changed_text(text: bytes, rng: random.Random) -> bytes:
    try:
        return mutated_json(text, rng).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # it was changed before, and is no JSON any more
        return mutated(text, rng)


def add_metadata(metadata: Metadata, tensors: list[_Tensor], rng: random.Random) -> None:
    layer = rng.choice(tensors).name.removesuffix(".weight")
    kind = rng.choice(("float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4", "int8_tensorwise", "convrot_w4a4", "other"))
    metadata["_quantization_metadata"] = json.dumps({"layers": {layer: {"format": kind}}})


TENSOR_CHANGES: tuple[Callable[[Metadata, list[_Tensor], random.Random], None], ...] = (
    see_as_another_type,
    see_in_another_shape,
    change_the_size,
    change_the_size,
    call_it_otherwise,
    take_it_out,
    exchange_them,
    poison_the_numbers,
    poison_the_numbers,
    change_a_text,
    change_a_text,
    add_metadata,
)


# GGUF: the header's numbers, texts and entries, found by their marks


def _changed_gguf(data: bytes, marks: tuple[Mark, ...], rng: random.Random) -> bytes:
    """Numbers and bytes of tensors changed in place, and then at most one change that moves what follows."""
    changed = bytearray(data)
    for _ in range(rng.choice(CHANGES)):
        rng.choice((_change_a_number, _change_a_number, _exchange_numbers, _poison_a_block))(changed, marks, rng)
    if rng.random() < 0.4:
        rng.choice((_change_a_gguf_text, _move_an_entry))(changed, marks, rng)
    return bytes(changed)


def _of(kind: str, marks: tuple[Mark, ...], rng: random.Random) -> Mark:
    return rng.choice([mark for mark in marks if mark.kind == kind])


def _change_a_number(data: bytearray, marks: tuple[Mark, ...], rng: random.Random) -> None:
    mark = _of("number", marks, rng)
    width = mark.stop - mark.start
    old = int.from_bytes(data[mark.start : mark.stop], "little")
    new = rng.choice((rng.choice(EDGES), rng.randrange(48), old + 1, old - 1, old * 2, old // 2, old + 32))
    data[mark.start : mark.stop] = (new % (1 << BYTE * width)).to_bytes(width, "little")


def _exchange_numbers(data: bytearray, marks: tuple[Mark, ...], rng: random.Random) -> None:
    one, other = _of("number", marks, rng), _of("number", marks, rng)
    width = min(one.stop - one.start, other.stop - other.start)
    here, there = slice(one.start, one.start + width), slice(other.start, other.start + width)
    data[here], data[there] = data[there], data[here]


def _poison_a_block(data: bytearray, marks: tuple[Mark, ...], rng: random.Random) -> None:
    """Bytes behind the header that make an fp16 infinite or no number, wherever it stands."""
    start = rng.randrange(marks[-1].stop, len(data) + 1)
    stop = min(len(data), start + rng.choice((2, 4, 64)))
    data[start:stop] = b"\xff" * (stop - start)


def _change_a_gguf_text(data: bytearray, marks: tuple[Mark, ...], rng: random.Random) -> None:
    """A text becomes another, its length with it, mostly."""
    mark = _of("text", marks, rng)
    new = rng.choice((*ODD_TEXTS, bytes(data[slice(*_span(_of("text", marks, rng)))])))
    data[mark.start : mark.stop] = new
    if rng.random() < 0.8:
        data[mark.start - LENGTH_BYTES : mark.start] = len(new).to_bytes(LENGTH_BYTES, "little")


def _span(mark: Mark) -> tuple[int, int]:
    return mark.start, mark.stop


def _move_an_entry(data: bytearray, marks: tuple[Mark, ...], rng: random.Random) -> None:
    """A field or a tensor's entry doubled, taken out or moved; its count with it, mostly."""
    entry, place = _of("entry", marks, rng), _of("entry", marks, rng)
    content = bytes(data[entry.start : entry.stop])
    more = rng.choice((-1, 1))
    if more < 0:
        del data[entry.start : entry.stop]
    else:
        data[place.start : place.start] = content
    if rng.random() < 0.8:
        mark = rng.choice(marks[1:3])  # how many tensors there are, and fields
        count = int.from_bytes(data[mark.start : mark.stop], "little") + more
        data[mark.start : mark.stop] = (count % (1 << 64)).to_bytes(LENGTH_BYTES, "little")
