"""Small valid files of every kind that is read: what the fuzzing starts from.

Each file opens, and every tensor in it decodes; a test holds that. Bytes are drawn from a fixed seed.
"""

from __future__ import annotations

import functools
import json
import random
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from safetensors.torch import save
from torch import Tensor

from flux.weights.formats import bnb, fp4, scaled
from flux.weights.formats.base import DATA, Format
from flux.weights.formats.floats import PLAIN
from flux.weights.formats.gguf_blocks import BLOCKS, GGUF_FORMATS
from flux.weights.formats.gguf_checks import SCALE_PLACES
from flux.weights.formats.naming import comfy_quant, companion_names
from flux.weights.readers.safetensors import DTYPES
from tests.fixtures.listings import LISTINGS

__all__ = ["INDEX", "READERS", "Mark", "Seed", "gguf_seeds", "safetensors_seeds", "seeds"]

READERS = ("safetensors", "gguf")
ROWS, COLUMNS = 48, 64
LAYER = "double_blocks.0.img_mlp.0"
WEIGHT = f"{LAYER}.weight"
METADATA = "_quantization_metadata"
INDEX = "model.safetensors.index.json"
MODELS = ("flux1-dev", "flux1-dev, diffusers", "flux2-klein-4b", "flux1-ae", "flux2-vae, diffusers", "clip-l", "t5xxl")
LATER_BLOCK = re.compile(r"(blocks?|layers|down|up)\.[1-9]\d*\.")
SMALLER = 256  # times, each side of a model's tensors


@dataclass(frozen=True)
class Mark:
    """Where something stands in a GGUF file's header: a "number", a "text" (without its length) or an "entry"."""

    kind: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Seed:
    """A valid file, or several that belong together.

    Attributes:
        name: What it is.
        files: Contents by file name.
        opened: The file to open; "" for the folder.
        marks: Of the only file, where it is GGUF.
    """

    name: str
    files: dict[str, bytes]
    opened: str
    marks: tuple[Mark, ...] = field(default=(), repr=False)


@functools.cache
def seeds(reader: str) -> tuple[Seed, ...]:
    """All of a reader's."""
    return tuple({"safetensors": safetensors_seeds, "gguf": gguf_seeds}[reader]())


def safetensors_seeds() -> Iterator[Seed]:
    torch.manual_seed(0)
    plain = {f"tensor.{name}": (torch.randn(3, 8) * 20).to(DTYPES[name]) for name in PLAIN}
    yield _one("plain", {**plain, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}, {"made": "here"})
    for name in MODELS:
        yield _one(name, _model(name), {"format": "pt", "note": "ü" * 9})
    yield from _eight_bits()
    yield from _small_blocks()
    yield from _four_bits()
    yield _sharded()


def _one(name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Seed:
    return Seed(name=name, files={"m.safetensors": save(tensors, metadata)}, opened="m.safetensors")


def _numbers(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return torch.randn(rows, columns)


def _model(name: str) -> dict[str, Tensor]:
    """A real model's names, of the first blocks alone, its shapes made small: for what recognises it."""
    _, listing, _ = LISTINGS[name]
    own = {tensor: shape for tensor, shape in listing.items() if LATER_BLOCK.search(tensor) is None}
    return {tensor: torch.randn([-(-side // SMALLER) for side in shape]).bfloat16() for tensor, shape in own.items()}


def _layer(row: Format, parts: dict[str, Tensor], *, comfy: bool = False) -> dict[str, Tensor]:
    names = companion_names(WEIGHT, row, parts)
    tensors = {names[role]: part for role, part in parts.items()}
    marker = comfy_quant(row) if comfy else None
    return tensors if marker is None else {**tensors, f"{LAYER}.comfy_quant": marker}


def _by_metadata(*rows: tuple[str, str]) -> dict[str, str]:
    layers = {layer: {"format": kind} for layer, kind in rows}
    return {METADATA: json.dumps({"format_version": "1.0", "layers": layers})}


def _eight_bits() -> Iterator[Seed]:
    """Scaled fp8 in both key styles, and int8."""
    numbers, one = _numbers(), torch.tensor(0.5)
    fp8, rows = scaled.encode_fp8(numbers, per_row=False), scaled.encode_fp8(numbers, per_row=True)
    marker = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    old = {WEIGHT: fp8[DATA], f"{LAYER}.scale_weight": fp8[scaled.SCALE], f"{LAYER}.scale_input": one}
    yield _one("scaled fp8, old keys", {**old, **marker})
    e5m2 = {DATA: fp8[DATA].float().to(torch.float8_e5m2), scaled.SCALE: fp8[scaled.SCALE]}
    new = {**_layer(scaled.FP8_E5M2_SCALED, e5m2), f"{LAYER}.input_scale": one}
    yield _one("scaled fp8, new keys", new)
    yield _one("fp8 per row", _layer(scaled.FP8_PER_ROW, rows))
    yield _one("fp8 by comfy_quant", _layer(scaled.FP8_E4M3FN_SCALED, fp8, comfy=True))
    yield _one(
        "fp8 by metadata",
        _layer(scaled.FP8_E4M3FN_SCALED, fp8),
        _by_metadata((LAYER, "float8_e4m3fn")),
    )
    yield _one("int8", _layer(scaled.INT8, scaled.encode_int8(numbers, per_row=False), comfy=True))
    yield _one("int8 per row", _layer(scaled.INT8_PER_ROW, scaled.encode_int8(numbers, per_row=True)))
    turned = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    yield _one(
        "int8 rotated",
        {**_layer(scaled.INT8, scaled.encode_int8(numbers, per_row=False)), f"{LAYER}.comfy_quant": _json(turned)},
    )


def _json(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _small_blocks() -> Iterator[Seed]:
    """mxfp8 and nvfp4."""
    numbers = _numbers(64)
    yield _one("mxfp8", _layer(fp4.MXFP8, fp4.encode_mxfp8(numbers), comfy=True))
    yield _one("mxfp8 by metadata", _layer(fp4.MXFP8, fp4.encode_mxfp8(numbers)), _by_metadata((LAYER, "mxfp8")))
    nvfp4 = fp4.encode_nvfp4(numbers)
    smoothed = {**nvfp4, fp4.PRE_QUANT_SCALE: torch.rand(COLUMNS) + 0.5}
    yield _one("nvfp4", _layer(fp4.NVFP4, nvfp4, comfy=True))
    yield _one("nvfp4 with smoothing", _layer(fp4.NVFP4, smoothed, comfy=True))
    rows = fp4.from_blocked(nvfp4[fp4.BLOCK_SCALE], 64, COLUMNS // fp4.NVFP4_BLOCK).contiguous()
    linear = {**nvfp4, fp4.BLOCK_SCALE: rows.view(torch.float8_e4m3fn)}
    yield _one("nvfp4 linear", {**_layer(fp4.NVFP4_LINEAR, linear), f"{LAYER}.input_scale": torch.tensor(1.0)})


def _four_bits() -> Iterator[Seed]:
    """bitsandbytes, with absmax as it is and in codes."""
    parts = bnb.encode_nf4(_numbers())
    parts_fp4 = {**parts, bnb.QUANT_MAP: torch.linspace(-1, 1, bnb.CODES), bnb.QUANT_STATE: _state("fp4")}
    yield _one("nf4", _layer(bnb.NF4, parts))
    yield _one("fp4", _layer(bnb.FP4, parts_fp4))
    nested = {
        bnb.ABSMAX: torch.randint(0, 256, parts[bnb.ABSMAX].shape, dtype=torch.uint8),
        bnb.NESTED_ABSMAX: torch.rand(1),
        bnb.NESTED_MAP: torch.linspace(-1, 1, 256),
    }
    yield _one("nf4 nested", _layer(bnb.NF4, {**parts, **nested, bnb.QUANT_STATE: _state("nf4", nested=True)}))
    yield _one("fp4 nested", _layer(bnb.FP4, {**parts_fp4, **nested, bnb.QUANT_STATE: _state("fp4", nested=True)}))


def _state(kind: str, *, nested: bool = False) -> Tensor:
    state = {"quant_type": kind, "blocksize": bnb.BLOCK, "dtype": "bfloat16", "shape": [ROWS, COLUMNS]}
    return _json(
        {**state, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25} if nested else state
    )


def _sharded() -> Seed:
    names = [f"model-{place:05}-of-00002.safetensors" for place in (1, 2)]
    tensors = [{"a.weight": torch.randn(3, 4)}, {"b.weight": torch.randn(2, 2).half(), "c": torch.randn(5)}]
    home = {tensor: name for name, own in zip(names, tensors, strict=True) for tensor in own}
    index = json.dumps({"metadata": {"total_size": 76}, "weight_map": home}).encode()
    files = {name: save(own) for name, own in zip(names, tensors, strict=True)}
    return Seed(name="sharded", files={INDEX: index, **files}, opened="")


PLAIN_BLOCKS = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
VALUES: tuple[tuple[int, bytes], ...] = (  # one of every type of value, by GGUF's number
    (0, b"\x07"), (1, b"\xf9"), (2, b"\x07\x00"), (3, b"\xf9\xff"), (4, b"\x07\0\0\0"), (5, b"\xf9\xff\xff\xff"),
    (6, struct.pack("<f", 0.5)), (7, b"\x01"), (10, struct.pack("<Q", 2**40)), (11, struct.pack("<q", -5)),
    (12, struct.pack("<d", 0.25)),
)  # fmt: skip
STRING, ARRAY, INT32, UINT32 = 8, 9, 5, 4
LONG_ARRAY = 300  # more items than a reader keeps


class _GgufText:
    """A GGUF header as it is written, with the marks of what stands where."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.marks: list[Mark] = []

    def number(self, value: int, width: int) -> None:
        self.raw("number", value.to_bytes(width, "little"))

    def text(self, value: str | bytes) -> None:
        raw = value if isinstance(value, bytes) else value.encode()
        self.number(len(raw), 8)
        self.raw("text", raw)

    def raw(self, kind: str, data: bytes) -> None:
        self.marks.append(Mark(kind, len(self.data), len(self.data) + len(data)))
        self.data += data

    def entry(self, start: int) -> None:
        self.marks.append(Mark("entry", start, len(self.data)))

    def field(self, key: str, kind: int, value: bytes) -> None:
        start = len(self.data)
        self.text(key)
        self.number(kind, 4)
        if kind == STRING:
            self.text(value)
        else:
            self.raw("number", value)
        self.entry(start)

    def array(self, key: str, kind: int, items: Sequence[bytes]) -> None:
        start = len(self.data)
        self.text(key)
        self.number(ARRAY, 4)
        self.number(kind, 4)
        self.number(len(items), 8)
        for item in items:
            if kind == STRING:
                self.text(item)
            else:
                self.raw("number", item)
        self.entry(start)

    def tensor(self, name: str, sides: Sequence[int], kind: int, offset: int) -> None:
        start = len(self.data)
        self.text(name)
        self.number(len(sides), 4)
        for side in sides:
            self.number(side, 8)
        self.number(kind, 4)
        self.number(offset, 8)
        self.entry(start)


def gguf_seeds() -> Iterator[Seed]:
    yield _gguf("plain numbers", PLAIN_BLOCKS, version=2)
    names = list(GGUF_FORMATS)
    for group in (names[:4], names[4:8], names[8:]):
        yield _gguf(f"blocks, {' '.join(group)}", ("F32", *group))
    yield _gguf("every field", ("F16", "Q8_0"), rich=True)
    yield _gguf("another alignment", ("BF16", "Q4_K"), alignment=128)
    yield _gguf("original shapes", ("Q5_0", "F32"), original=True)


def _gguf(
    name: str,
    types: Sequence[str],
    *,
    version: int = 3,
    alignment: int = 32,
    rich: bool = False,
    original: bool = False,
) -> Seed:
    """Two rows of two blocks of each type."""
    head, rng = _GgufText(), random.Random(name)
    contents, rows, offset = [], [], 0
    for place, kind in enumerate(types):
        block = BLOCKS[kind]
        data = _blocks(kind, 4, rng)
        rows.append((f"double_blocks.{place}.img_mlp.0.weight", (2 * block.values, 2), block.code, offset))
        contents.append(data + bytes(-len(data) % alignment))
        offset += len(contents[-1])
    fields = [lambda: head.field("general.architecture", STRING, b"flux")]
    if rich:
        fields += _every_field(head)
    if original:
        fields += [functools.partial(_original_shape, head, row[0], (row[1][0] // 2, 2, row[1][1])) for row in rows]
    if alignment != 32:
        fields.append(lambda: head.field("general.alignment", UINT32, struct.pack("<I", alignment)))
    head.data += b"GGUF"
    for count, width in ((version, 4), (len(rows), 8), (len(fields), 8)):
        head.number(count, width)
    for write in fields:
        write()
    for row in rows:
        head.tensor(*row)
    head.data += bytes(-len(head.data) % alignment)
    content = bytes(head.data) + b"".join(contents)
    return Seed(name=name, files={"m.gguf": content}, opened="m.gguf", marks=tuple(head.marks))


def _every_field(head: _GgufText) -> list:
    scalars = [functools.partial(head.field, f"value.{kind}", kind, value) for kind, value in VALUES]
    arrays = [functools.partial(head.array, f"array.{kind}", kind, [value] * 3) for kind, value in VALUES]
    words = [f"word {n}".encode() for n in range(LONG_ARRAY)]
    return [
        *scalars,
        *arrays,
        functools.partial(head.field, "text", STRING, "wörds ".encode() * 20),
        functools.partial(head.array, "words", STRING, words[:4]),
        functools.partial(head.array, "tokenizer.ggml.tokens", STRING, words),
        functools.partial(head.array, "tokenizer.ggml.scores", 6, [struct.pack("<f", 0.5)] * LONG_ARRAY),
        functools.partial(_nested_array, head),
    ]


def _nested_array(head: _GgufText) -> None:
    """Two arrays of two numbers in an array."""
    start = len(head.data)
    head.text("nested")
    head.number(ARRAY, 4)
    head.number(ARRAY, 4)
    head.number(2, 8)
    for _ in range(2):
        head.number(INT32, 4)
        head.number(2, 8)
        for value in (1, 2):
            head.number(value, 4)
    head.entry(start)


def _original_shape(head: _GgufText, tensor: str, sides: Sequence[int]) -> None:
    items = [side.to_bytes(4, "little") for side in reversed(sides)]
    head.array(f"comfy.gguf.orig_shape.{tensor}", INT32, items)


def _blocks(kind: str, count: int, rng: random.Random) -> bytes:
    """Blocks of random codes, their scales finite."""
    size = BLOCKS[kind].bytes
    data = bytearray(rng.randbytes(count * size))
    for place in SCALE_PLACES.get(kind, ()):
        for block in range(count):
            data[block * size + place + 1] &= 0x3B  # an exponent that is not all ones
    return bytes(data)
