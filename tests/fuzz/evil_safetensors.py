"""Evil safetensors files: (what it is, its bytes, words that its refusal must have)."""

from __future__ import annotations

import json
import math

import torch
from safetensors.torch import save

from flux.weights.formats import bnb, fp4, scaled
from flux.weights.formats.base import DATA

__all__ = ["COMPANIONS", "INDEXES", "LAYER", "SAFETENSORS", "SHARD", "WEIGHT", "entry", "header"]

MB = 1 << 20
LAYER = "double_blocks.0.img_mlp.0"
WEIGHT = f"{LAYER}.weight"
SHARD = "model-00001-of-00001.safetensors"


# The header.


def header(text, data=b"", length=None):
    """A file of a header, as text or as what JSON makes of it."""
    raw = text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def one(data=bytes(4), name="a", **changed):
    return header({name: entry(**changed)}, data)


def raw_entry(shape="[1]", offsets="[0,4]", dtype='"F32"'):
    """An entry with numbers that ``json`` would not write."""
    return header(f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}', bytes(4))


SAFETENSORS = [
    ("zero bytes", b"", "is empty (0 bytes)"),
    ("seven bytes", bytes(7), "is not a safetensors file"),
    ("eight zeros", bytes(8), "is not a safetensors file"),
    ("a header of a gigabyte in twenty bytes", header("{}" + " " * 10, length=10**9), "is not a safetensors file"),
    ("a header of 90 MB in twenty bytes", header("{}" + " " * 10, length=90 * 10**6), "header claims 90000000 bytes"),
    ("a header of 2^63 bytes", header("{}", length=2**63), "is not a safetensors file"),
    ("a header of all ones", header("{}", length=2**64 - 1), "is not a safetensors file"),
    ("a header of one byte", header("{}", length=1), "is not a safetensors file"),
    ("a header longer by one than the file", header("{}", length=3), "header claims 3 bytes"),
    ("a pickle", b"\x80\x04\x95" + bytes(40), "is a pickle file"),
    ("a web page", b"<!DOCTYPE html><html><body>Log in</body></html>", "is a web page"),
    ("a web page without a doctype", b"<html><head></head></html>", "is a web page"),
    ("an LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
    ("a header that is a list", header("[]"), "not a table of tensors"),
    ("a header that is a number", header("1 "), "not a table of tensors"),
    ("a header that is a text", header('"words"'), "not a table of tensors"),
    ("a header that is null", header("null"), "not a table of tensors"),
    ("two headers", header("{}{}"), "is not JSON"),
    ("a header in UTF-16", header('{"a": 1}'.encode("utf-16-le")), "is not JSON"),
    ("lists nested a hundred thousand deep", header("[" * 100_000), "is not JSON"),
    ("tables nested a hundred thousand deep", header('{"a":' * 100_000), "is not JSON"),
    ("a tensor twice", header('{"a":1,"a":2}'), "a name stands twice"),
    ("a field of a tensor twice", header('{"a":{"dtype":"F32","dtype":"F16"}}'), "a name stands twice"),
    ("metadata twice", header('{"__metadata__":{},"__metadata__":{}}'), "a name stands twice"),
    ("metadata that is a number", header('{"__metadata__":7}'), "not a table of texts"),
    ("metadata of numbers", header('{"__metadata__":{"a":7}}'), "not a table of texts"),
    (
        "metadata nested 900 deep",
        header('{"__metadata__":{"a":' + "[" * 900 + "]" * 900 + "}}"),
        "not a table of texts",
    ),
    ("NaN for an offset", raw_entry(offsets="[NaN,4]"), "NaN is not a number"),
    ("infinity for a side", raw_entry(shape="[Infinity]"), "Infinity is not a number"),
    ("a number beyond floats", raw_entry(shape="[1e999]"), "'a' is damaged"),
    ("a number of five thousand digits", raw_entry(shape=f"[{'9' * 5000}]"), "refused.safetensors"),
    ("a number of four thousand digits", raw_entry(shape=f"[{'9' * 4000}]"), "'a' is damaged"),
    ("bytes that are no UTF-8", header(b'{"\xff":1}'), "is not JSON"),
    ("an offset of 2^64", raw_entry(offsets=f"[0,{2**64}]"), "'a' is damaged"),
    ("a negative offset", raw_entry(offsets="[-4,0]"), "'a' is damaged"),
    ("a negative side", raw_entry(shape="[-1]"), "'a' is damaged"),
    ("two negative sides", raw_entry(shape="[-1,-1]"), "'a' is damaged"),
    ("offsets of floats", raw_entry(offsets="[0.0,4.0]"), "'a' is damaged"),
    ("offsets of booleans", raw_entry(offsets="[false,true]"), "'a' is damaged"),
    ("offsets that are texts", raw_entry(offsets='["0","4"]'), "'a' is damaged"),
    ("offsets that are a table", raw_entry(offsets="{}"), "'a' is damaged"),
    ("a shape in a shape", raw_entry(shape="[[1]]"), "'a' is damaged"),
    ("a dtype that is a number", raw_entry(dtype="32"), "'a' is damaged"),
    ("a dtype with a line break", raw_entry(dtype='"F\\n32"'), "'a' is damaged"),
    ("a dtype of a thousand letters", one(dtype="F" * 1000), "'a' is damaged"),
    ("a dtype that does not exist", one(dtype="F33"), "stored as F33"),
    ("a rank of 9", one(shape=(1,) * 9), "'a' is damaged"),
    ("a rank of a hundred thousand", one(shape=(1,) * 100_000), "'a' is damaged"),
    ("nothing by 2^47 by 2^47", one(b"", shape=(0, 2**47, 2**47), offsets=(0, 0)), "'a' claims shape"),
    ("nothing by 2^62", one(b"", shape=(0, 2**62), offsets=(0, 0)), "'a' is damaged"),
    ("a shape of 2^40 by 2^40", one(shape=(2**40, 2**40)), "does not fit shape"),
    ("a shape whose product is 1 in 64 bits", one(shape=(641, 6700417, 2**32)), "does not fit shape"),
    ("a side too many", one(shape=(2,)), "does not fit shape"),
    ("half a byte", one(dtype="F4", shape=(9,)), "does not fit shape"),
    ("past the end", one(offsets=(4, 8)), "ends at byte 8 of 4"),
    ("past the end by one", one(bytes(3)), "ends at byte 4 of 3"),
    ("backwards", one(offsets=(4, 0)), "cut off"),
    ("the same bytes twice", header({"a": entry(), "b": entry()}, bytes(4)), "'a' and 'b' overlap"),
    (
        "a tensor within another",
        header({"a": entry(shape=(4,), offsets=(0, 16)), "b": entry(offsets=(4, 8))}, bytes(16)),
        "'a' and 'b' overlap",
    ),
    ("a name of ten thousand letters", one(name="x" * 10_000), "longer than 256 characters"),
    ("a name with a line break", one(name="a\nb"), "cannot be printed"),
    ("a name that clears the screen", one(name="\x1b[2J"), "cannot be printed"),
    ("a name with a null byte", one(name="a\0"), "cannot be printed"),
    ("half of a character for a name", one(name="\ud800"), "cannot be printed"),
    ("a name that is read from right to left", one(name="a\u202eb"), "cannot be printed"),
    ("a megabyte of empty tables", header("[" + "{}," * (MB // 3) + "{}]"), "bytes of memory"),
    ("a megabyte of lists in lists", header("[" + ("[" * 900 + "]" * 900 + ",") * 600 + "0]"), "bytes of memory"),
    (
        "10 MB of letters and an emoji",
        header('{"__metadata__":{"a":"' + "x" * 10 * MB + '\U0001f600"}}'),
        "bytes of memory",
    ),
    (
        "a million tensors",
        header("{" + ",".join(f'"{n:x}":0' for n in range(1_000_000)) + "}"),
        "bytes of memory",
    ),
]


# What stands beside a weight.


def stored(**parts):
    """A weight and what stands beside it, by the last word of its name."""
    return save(
        {WEIGHT if word == "weight" else f"{LAYER}.{word}": tensor.contiguous() for word, tensor in parts.items()}
    )


def text(value):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.tensor(list(raw), dtype=torch.uint8)


NUMBERS = torch.linspace(-2, 2, 64 * 64).view(64, 64)
FP8 = scaled.encode_fp8(NUMBERS, per_row=False)[DATA]
INT8 = scaled.encode_int8(NUMBERS, per_row=False)[DATA]
MX = fp4.encode_mxfp8(NUMBERS)
NV = fp4.encode_nvfp4(NUMBERS)
NF4 = bnb.encode_nf4(NUMBERS)
ONE = torch.tensor(1.0)
COMFY = {name: text({"format": name}) for name in ("float8_e4m3fn", "mxfp8", "nvfp4", "int8_tensorwise")}


def fp8(scale, **more):
    return stored(weight=FP8, weight_scale=scale, **more)


def mxfp8(exponents):
    return stored(weight=MX[DATA], weight_scale=exponents, comfy_quant=COMFY["mxfp8"])


def nvfp4(**changed):
    parts = {"weight": NV[DATA], "weight_scale": NV[fp4.BLOCK_SCALE], "weight_scale_2": NV[fp4.TENSOR_SCALE]}
    return stored(**{**parts, "comfy_quant": COMFY["nvfp4"], **changed})


def nf4(state=None, **changed):
    """bitsandbytes' parts with some changed, and fields of the state's JSON with ``state``."""
    parts = {**NF4, **changed}
    fields = json.loads(bytes(NF4[bnb.QUANT_STATE].tolist()))
    names = {DATA: WEIGHT, bnb.QUANT_STATE: f"{WEIGHT}.quant_state.bitsandbytes__nf4"}
    if isinstance(state, dict):
        parts[bnb.QUANT_STATE] = text({**fields, **state})
    elif state is not None:
        parts[bnb.QUANT_STATE] = text(state)
    return save(
        {names.get(role, f"{WEIGHT}.{role}"): part.contiguous() for role, part in parts.items() if part is not None}
    )


NESTED = {
    bnb.ABSMAX: torch.zeros(64, dtype=torch.uint8),
    bnb.NESTED_ABSMAX: torch.ones(1),
    bnb.NESTED_MAP: torch.linspace(-1, 1, 256),
}
BLOCK_SCALES = NV[fp4.BLOCK_SCALE].view(torch.uint8)


def with_byte(tensor, byte):
    changed = tensor.clone().view(torch.uint8)
    changed[0, 0] = byte
    return changed.view(tensor.dtype)


COMPANIONS = [
    ("a scale of two numbers", fp8(torch.ones(2)), "does not fit"),
    ("a scale for each column", fp8(torch.ones(1, 64)), "does not fit"),
    ("a scale of no numbers", fp8(torch.ones(0)), "does not fit"),
    ("a scale for each square block", fp8(torch.ones(2, 2)), "does not fit"),
    ("a scale of integers", fp8(torch.tensor(1)), "does not fit"),
    ("a scale in fp64", fp8(ONE.double()), "does not fit"),
    ("a scale that is NaN", fp8(ONE * math.nan), "not finite"),
    ("a scale that is infinite", fp8(ONE * math.inf), "not finite"),
    ("a row's scale that is minus infinity", fp8(torch.full((64,), -math.inf)), "not finite"),
    ("a negative scale", fp8(-ONE), "negative"),
    ("a scale of 3e38", fp8(ONE * 3e38), "absurd"),
    ("an inputs' scale of three numbers", fp8(ONE, input_scale=torch.ones(3)), "does not fit"),
    ("a scale under both names", fp8(ONE, scale_weight=ONE.clone()), "does not belong there"),
    ("an inputs' scale under both names", fp8(ONE, input_scale=ONE + 1, scale_input=ONE + 2), "does not belong there"),
    ("fp8 with nvfp4's second scale", fp8(ONE, weight_scale_2=ONE.clone()), "does not belong there"),
    ("a scale without its weight", stored(weight_scale=ONE), "which is not in the file"),
    ("a marker of three numbers", save({WEIGHT: FP8, "scaled_fp8": torch.zeros(3)}), "marker"),
    ("int8 without a scale", stored(weight=INT8), "without their scales"),
    ("int8 with a table for a scale", stored(weight=INT8, weight_scale=NUMBERS), "does not fit"),
    ("bytes without anything", stored(weight=NV[DATA]), "without their scales"),
    ("JSON that is no JSON", fp8(ONE, comfy_quant=text(b"{")), "is not JSON"),
    ("JSON that is a list", fp8(ONE, comfy_quant=text([1])), "is not a JSON table"),
    ("JSON that names a format twice", fp8(ONE, comfy_quant=text(b'{"format":"a","format":"b"}')), "twice"),
    ("JSON nested too deep", fp8(ONE, comfy_quant=text(b'{"format":' + b"[" * 60_000)), "is not JSON"),
    (
        "JSON of a megabyte",
        fp8(ONE, comfy_quant=torch.full((MB,), 32, dtype=torch.uint8)),
        "not a JSON text of at most",
    ),
    ("JSON that is fp32", fp8(ONE, comfy_quant=torch.ones(4)), "not a JSON text"),
    ("JSON that names a number", fp8(ONE, comfy_quant=text({"format": 1})), "names no format"),
    ("JSON of an unknown format", fp8(ONE, comfy_quant=text({"format": "float1"})), "not known here"),
    ("JSON of another format than the tensor's", fp8(ONE, comfy_quant=COMFY["nvfp4"]), "the file's JSON says nvfp4"),
    (
        "int8 rotated in groups of 3",
        stored(
            weight=INT8,
            weight_scale=ONE,
            comfy_quant=text({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 3}),
        ),
        "power of 4",
    ),
    (
        "int8 rotated by a text of two lines",
        stored(weight=INT8, weight_scale=ONE, comfy_quant=text({"format": "int8_tensorwise", "convrot": "a\nb"})),
        "power of 4",
    ),
    (
        "int8 rotated in groups of 4^400",
        stored(
            weight=INT8,
            weight_scale=ONE,
            comfy_quant=text({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4**400}),
        ),
        "power of 4",
    ),
    ("mxfp8 with scales in rows", mxfp8(torch.zeros(64, 2, dtype=torch.uint8)), "does not fit"),
    ("mxfp8 with an exponent of NaN", mxfp8(torch.full((128, 4), 255, dtype=torch.uint8)), "not a number"),
    ("mxfp8 with fp32 exponents", mxfp8(torch.ones(128, 4)), "does not fit"),
    ("nvfp4 without its tensor scale", nvfp4(weight_scale_2=torch.ones(2)), "does not fit"),
    ("nvfp4 with scales in rows", nvfp4(weight_scale=NV[fp4.BLOCK_SCALE][:64].contiguous()), "does not fit"),
    ("nvfp4 with a block's scale of NaN", nvfp4(weight_scale=with_byte(NV[fp4.BLOCK_SCALE], 0x7F)), "not a number"),
    ("nvfp4 with a negative block's scale", nvfp4(weight_scale=with_byte(NV[fp4.BLOCK_SCALE], 0x81)), "negative"),
    ("nvfp4 with an infinite tensor scale", nvfp4(weight_scale_2=ONE * math.inf), "not finite"),
    ("nvfp4 with smoothing for other columns", nvfp4(pre_quant_scale=torch.ones(63)), "does not fit"),
    ("nvfp4 with smoothing of NaN", nvfp4(pre_quant_scale=torch.full((64,), math.nan)), "not finite"),
    ("nvfp4 of three dimensions", nvfp4(weight=NV[DATA].view(64, 32, 1)), "not a matrix of whole blocks"),
    ("nf4 without its quant_state", nf4(**{bnb.QUANT_STATE: None}), "is not in the file"),
    ("nf4 without its absmax", nf4(**{bnb.ABSMAX: None}), "is not in the file"),
    ("nf4 with an absmax too few", nf4(**{bnb.ABSMAX: torch.ones(63)}), "does not fit"),
    ("nf4 with a table of 15", nf4(**{bnb.QUANT_MAP: torch.ones(15)}), "does not fit"),
    ("nf4 with a table of NaN", nf4(**{bnb.QUANT_MAP: torch.full((16,), math.nan)}), "not finite"),
    ("nf4 with an infinite absmax", nf4(**{bnb.ABSMAX: torch.full((64,), math.inf)}), "not finite"),
    ("nf4 of another shape", nf4({"shape": [64, 63]}), "quant_state says"),
    ("nf4 of a shape of 2^60", nf4({"shape": [2**60, 2**60]}), "no quant_state"),
    ("nf4 of a negative shape", nf4({"shape": [-64, -64]}), "no quant_state"),
    (
        "nf4 of nothing by 2^62",
        nf4({"shape": [0, 2**62]}, **{DATA: torch.zeros(0, 1, dtype=torch.uint8), bnb.ABSMAX: torch.zeros(0)}),
        "no quant_state",
    ),
    ("nf4 of a rank of a thousand", nf4({"shape": [1] * 1000}), "no quant_state"),
    ("nf4 in blocks of 0", nf4({"blocksize": 0}), "no quant_state"),
    ("nf4 in blocks of 63", nf4({"blocksize": 63}), "no quant_state"),
    ("nf4 in blocks of 2^40", nf4({"blocksize": 2**40}), "no quant_state"),
    ("nf4 that says fp4", nf4({"quant_type": "fp4"}), "no quant_state"),
    ("nf4 with a state that is a list", nf4([1]), "is not a JSON table"),
    ("nf4 with a state of NaN", nf4(b'{"nested_offset": NaN}'), "NaN is not a number"),
    (
        "nested nf4 with an absurd offset",
        nf4({"nested_blocksize": 256, "nested_offset": 1e31}, **NESTED),
        "no quant_state",
    ),
    (
        "nested nf4 with an offset that is a text",
        nf4({"nested_blocksize": 256, "nested_offset": "1"}, **NESTED),
        "no quant_state",
    ),
    (
        "nested nf4 without its table",
        nf4({"nested_blocksize": 256, "nested_offset": 0.1}, **{**NESTED, bnb.NESTED_MAP: None}),
        "is not in the file",
    ),
    (
        "nested nf4 with a table of 16",
        nf4({"nested_blocksize": 256, "nested_offset": 0.1}, **{**NESTED, bnb.NESTED_MAP: torch.ones(16)}),
        "does not fit",
    ),
    (
        "metadata of 30 MB",
        save({WEIGHT: FP8, f"{LAYER}.weight_scale": ONE}, {"_quantization_metadata": "[" * 30 * MB}),
        "refused.safetensors",
    ),
    (
        "metadata of empty tables",
        save(
            {WEIGHT: FP8, f"{LAYER}.weight_scale": ONE},
            {"_quantization_metadata": '{"layers":[' + "{}," * 100_000 + "{}]}"},
        ),
        "refused.safetensors",
    ),
]


# The index of several files.

INDEXES = [
    ("zero bytes", b"", "has 0 bytes"),
    ("a list", b"[]", "has no weight_map"),
    ("no table", b'{"weight_map": 1}', "has no weight_map"),
    ("files that are numbers", b'{"weight_map": {"a": 1}}', "has no weight_map"),
    ("a tensor twice", f'{{"weight_map": {{"a": "{SHARD}", "a": "{SHARD}"}}}}'.encode(), "stands twice"),
    ("nested too deep", b'{"weight_map":' * 9000, "is not JSON"),
    ("a megabyte of empty tables", b"[" + b"{}," * (MB // 3) + b"{}]", "bytes of memory"),
    ("a name that cannot be printed", json.dumps({"weight_map": {"a\nb": SHARD}}).encode(), "cannot be printed"),
    ("the folder above", b'{"weight_map": {"a": "../a.safetensors"}}', "no .safetensors file beside it"),
    ("an absolute path", b'{"weight_map": {"a": "/etc/a.safetensors"}}', "no .safetensors file beside it"),
    ("a drive", b'{"weight_map": {"a": "C:\\\\a.safetensors"}}', "no .safetensors file beside it"),
    ("a pickle", b'{"weight_map": {"a": "a.bin"}}', "no .safetensors file beside it"),
    ("a null byte", b'{"weight_map": {"a": "a\\u0000.safetensors"}}', "no .safetensors file beside it"),
    ("a long name", json.dumps({"weight_map": {"a": "x" * 9000 + ".safetensors"}}).encode(), "no .safetensors file"),
    ("a name of many bytes", json.dumps({"weight_map": {"a": "ü" * 200 + ".safetensors"}}).encode(), "no .safetensors"),
]
