"""Which tensors of a safetensors file belong together: packed numbers, their scales, and markers that name a format.

Everything is checked here from the header, before a byte of data is read: dtypes and shapes of companions must fit the
numbers'. The only tensors that are read are small JSON texts. Names, with ``layer.weight`` for the numbers:

    scale_weight, scale_input, and scaled_fp8 for all layers       the old scaled fp8
    weight_scale, weight_scale_2, input_scale, pre_quant_scale     ComfyUI's and ModelOpt's
    comfy_quant, or _quantization_metadata in the header           ComfyUI's JSON: the format of a layer
    weight.absmax, weight.quant_map, weight.quant_state.…          bitsandbytes' four bits
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ...errors import FileError
from . import bnb, fp4, scaled
from .base import DATA, Format, Parts
from .chunks import as_bytes
from .floats import PLAIN
from .naming import (
    BNB_PARTS,
    BNB_STATE,
    COMFY_QUANT,
    INPUT_SCALES,
    PRE_QUANT_SCALE,
    SCALES,
    TENSOR_SCALE,
    WEIGHT,
    comfy_quant,
    companion_names,
    owner_of,
)
from .quant_json import AGAIN, MAX_JSON_BYTES, METADATA, Config, metadata_layers, names_format, read_json

__all__ = [
    "MAX_JSON_BYTES", "METADATA", "HasShapeAndDtype", "Stored", "check_scales", "comfy_quant", "companion_names",
    "storage_of",
]  # fmt: skip


class HasShapeAndDtype(Protocol):
    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How one tensor's numbers are stored.

    Attributes:
        format: The row that decodes them.
        shape: Of the numbers, unpacked. ComfyUI pads nvfp4 and mxfp8 to multiples of 16 and 32 rows and columns and
            does not say so; ``decode`` takes a smaller shape and leaves the padding away.
        names: The tensor for each role that ``decode`` wants.
        full_precision_product: The file asks for products in full precision even where fp8 or fp4 units are at hand.
        input_scale: The tensor with the inputs' scale for products in the stored format.
    """

    format: Format
    shape: tuple[int, ...]
    names: Mapping[str, str]
    full_precision_product: bool = False
    input_scale: str | None = None


Tensors = Mapping[str, HasShapeAndDtype]
Shape = tuple[int, ...]

FP8_MARKER = "scaled_fp8"
FULL_PRECISION_MARKER = 2  # elements of the marker that ask for products in full precision
NESTED_CODES = 256

WAY_OUT = "use the model's bf16, fp8 or GGUF release"
FOREIGN_PARTS = {
    "weight_scale_inv": "belongs to fp8 with a scale for each square block",
    "weight_zero_point": "belongs to a format with zero points",
    "weight_s_rel": "belongs to asym_w4a8_int8",
    "weight_s_channel": "belongs to asym_w4a8_int8",
    "weight_codebook": "belongs to asym_w4a8_int8",
    "SCB": "belongs to bitsandbytes' int8 (LLM.int8)",
    "qweight": "belongs to a format laid out for one kernel (Nunchaku's SVDQuant, AWQ or GPTQ)",
}
FOREIGN_FORMATS = {
    "convrot_w4a4": "four-bit numbers in a rotated basis",
    "asym_w4a8_int8": "four-bit numbers with a codebook in a rotated basis",
    "awq_w4a16": "AWQ's four bits, laid out for one kernel",
}

JSON_PARTS = frozenset({COMFY_QUANT, bnb.QUANT_STATE})
SCALE_DTYPES = ("F32", "F16", "BF16")
SINGLE: tuple[Shape, ...] = ((), (1,))
E4M3_OR_BYTES, E8M0_OR_BYTES = ("F8_E4M3", "U8"), ("F8_E8M0", "U8")  # older files keep small floats in bytes
FP8_FORMATS = {
    "F8_E4M3": (scaled.FP8_E4M3FN_SCALED, scaled.FP8_PER_ROW),
    "F8_E5M2": (scaled.FP8_E5M2_SCALED, scaled.FP8_E5M2_PER_ROW),
}
NVFP4_DIALECTS = {row.name: row for row in (fp4.NVFP4, fp4.NVFP4_LINEAR)}


@dataclass(frozen=True, kw_only=True)
class _File:
    """What holds for every tensor of a file."""

    tensors: Tensors
    read: Callable[[str], Tensor]
    name: str
    owned: Mapping[str, Mapping[str, str]]  # of each tensor of numbers, its companions' names by their last word
    layers: Mapping[str, Config]  # of _quantization_metadata
    is_comfyui: bool  # its JSON is in the file, so its layouts are
    full_precision: tuple[str, ...]  # prefixes of layers
    scaled: tuple[str, ...]  # prefixes below which the file says scaled fp8 and has scales
    dialect: str | None

    def refusal(self, tensor: str, what: str) -> FileError:
        return FileError(f"{self.name}: tensor {tensor} {what}")

    def describe(self, tensor: str) -> str:
        entry = self.tensors[tensor]
        return f"{entry.dtype} {list(entry.shape)}"

    def json(self, tensor: str) -> dict[str, Any]:
        return read_json(tensor, self.tensors[tensor], self.read, self.name)

    @functools.cached_property
    def dialect_by_shapes(self) -> str | None:
        """The nvfp4 dialect of the layers whose shapes tell it, None where they tell none or both."""
        layers = (_Layer(self, name, parts) for name, parts in self.owned.items() if TENSOR_SCALE in parts)
        found = {_dialect_by_shape(layer) for layer in layers} - {None}
        return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class _Layer:
    """A tensor of numbers, its companions by their last word, and what the file's JSON says of it."""

    file: _File
    name: str
    parts: Mapping[str, str]
    config: Config = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return self.file.tensors[self.name].dtype

    @property
    def shape(self) -> Shape:
        return tuple(self.file.tensors[self.name].shape)

    def refusal(self, what: str) -> FileError:
        return self.file.refusal(self.name, what)

    def __str__(self) -> str:
        return self.file.describe(self.name)

    def one_of(self, words: Iterable[str]) -> str | None:
        return next((self.parts[word] for word in words if word in self.parts), None)

    def needed(self, *words: str, what: str) -> str:
        """The name of a companion that must be there, under any of its ``words``."""
        found = self.one_of(words)
        if found is None:
            missing = f"{self.name.removesuffix(WEIGHT)}.{words[0]}"
            raise self.refusal(f"is {what}, but {missing} is not in the file; {AGAIN}, or {WAY_OUT}")
        return found

    def check(self, companion: str, dtypes: tuple[str, ...], *shapes: Shape) -> None:
        """Refuse a companion that has another dtype or shape than those that fit."""
        entry = self.file.tensors[companion]
        if entry.dtype not in dtypes or tuple(entry.shape) not in shapes:
            fitting = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise self.file.refusal(
                companion,
                f"is {self.file.describe(companion)}, which does not fit {self.name} ({self}): "
                f"{' or '.join(dtypes)} {fitting} is needed; {AGAIN}, or {WAY_OUT}",
            )

    def stored(self, row: Format, names: Mapping[str, str] | None = None, shape: Shape | None = None) -> Stored:
        """The layer as ``row``, with its companions by role."""
        full = self.config.get("full_precision_matrix_mult", False)
        if not isinstance(full, bool):
            raise self.refusal(f"has full_precision_matrix_mult {str(full)[:40]!r}, not true or false; {WAY_OUT}")
        input_scale = self.one_of(INPUT_SCALES)
        if input_scale is not None:
            self.check(input_scale, SCALE_DTYPES, *SINGLE)
        used = {input_scale, *(names or {}).values()}
        foreign = [name for word, name in self.parts.items() if name not in used and word not in JSON_PARTS]
        if foreign:
            raise self.refusal(
                f"is {self}, read as {row.name}, with {foreign[0]} beside it, which does not belong there; {WAY_OUT}"
            )
        return Stored(
            format=row,
            shape=self.shape if shape is None else shape,
            names={DATA: self.name, **(names or {})},
            full_precision_product=full or self.name.startswith(self.file.full_precision),
            input_scale=input_scale,
        )


def storage_of(
    tensors: Tensors,
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
    *,
    file: str = "this file",
    nvfp4_dialect: str | None = None,
) -> dict[str, Stored]:
    """The storage of every tensor that holds numbers; companions and markers are left out.

    Args:
        tensors: The header's entries.
        metadata: The header's own texts.
        read: Brings a tensor; called for small JSON texts only.
        file: Its name, for messages.
        nvfp4_dialect: "nvfp4" (ComfyUI) or "nvfp4 linear" (ModelOpt) for files that do not tell; None to find out.

    Returns:
        By tensor name, in the header's order.

    Raises:
        FileError: A format that is not read here, a companion that is missing or does not fit, or a damaged JSON text.
        ValueError: There is no such dialect.
    """
    if nvfp4_dialect is not None and nvfp4_dialect not in NVFP4_DIALECTS:
        raise ValueError(f"{nvfp4_dialect!r} is no dialect of nvfp4; choose one of {', '.join(NVFP4_DIALECTS)}")
    owned, markers, companions = _group(tensors, file)
    context = _File(
        tensors=tensors,
        read=read,
        name=file,
        owned=owned,
        layers=metadata_layers(metadata, file),
        is_comfyui=METADATA in metadata or any(COMFY_QUANT in parts for parts in owned.values()),
        full_precision=tuple(m.removesuffix(FP8_MARKER) for m in markers if _asks_full_precision(tensors, m, file)),
        scaled=_scaled_prefixes(markers, owned),
        dialect=nvfp4_dialect,
    )
    return {name: _stored(context, name) for name in tensors if name not in companions}


def _scaled_prefixes(markers: Iterable[str], owned: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """Of the prefixes with a marker of scaled fp8, those below which a weight has a scale."""
    with_scale = [name for name, parts in owned.items() if any(word in parts for word in SCALES)]
    prefixes = {marker.removesuffix(FP8_MARKER) for marker in markers}
    return tuple(prefix for prefix in prefixes if any(name.startswith(prefix) for name in with_scale))


def _group(tensors: Tensors, file: str) -> tuple[dict[str, dict[str, str]], list[str], set[str]]:
    """Companions by owner and last word, the fp8 markers, and the names of them all."""
    owned: dict[str, dict[str, str]] = {}
    markers: list[str] = []
    companions: set[str] = set()
    for name in tensors:
        owner, word = owner_of(name)
        if word in FOREIGN_PARTS:
            raise FileError(f"{file}: tensor {name} {FOREIGN_PARTS[word]}, which is not read here; {WAY_OUT}")
        if word == FP8_MARKER:
            markers.append(name)
        elif owner is None:
            continue
        elif owner not in tensors or word in owned.get(owner, {}):
            fault = "is there twice" if owner in tensors else f"is a companion of {owner}, which is not in the file"
            raise FileError(f"{file}: tensor {name} {fault}; {AGAIN}")
        else:
            owned.setdefault(owner, {})[word] = name
        companions.add(name)
    return owned, markers, companions


def _asks_full_precision(tensors: Tensors, marker: str, file: str) -> bool:
    count = math.prod(tensors[marker].shape)
    if count > FULL_PRECISION_MARKER:
        raise FileError(f"{file}: the marker {marker} has {count} elements, 0 to 2 are usual; {AGAIN}")
    return count == FULL_PRECISION_MARKER


def _stored(file: _File, name: str) -> Stored:
    parts = file.owned.get(name, {})
    if not BNB_PARTS.isdisjoint(parts) or bnb.QUANT_STATE in parts:
        return _bnb(_Layer(file, name, parts))
    config = _config(file, name, parts)
    return _by_dtype(_Layer(file, name, parts)) if config is None else _by_config(_Layer(file, name, parts, config))


def _by_dtype(layer: _Layer) -> Stored:
    """The format of a tensor that no JSON text speaks of."""
    scale = layer.one_of(SCALES)
    if layer.dtype == "U8" and TENSOR_SCALE in layer.parts:
        return _nvfp4(layer)
    if scale is None:
        return _plain(layer)
    if layer.dtype == "F8_E4M3" and layer.file.tensors[scale].dtype in E8M0_OR_BYTES:
        return _mxfp8(layer)
    if layer.dtype in FP8_FORMATS:
        return _fp8(layer)
    if layer.dtype == "I8":
        return _int8(layer)
    raise layer.refusal(f"is {layer} with {scale} beside it, which is no format that is known here; {WAY_OUT}")


def _by_config(layer: _Layer) -> Stored:
    """The format that the file's JSON names."""
    kind = layer.config["format"]
    if kind in FOREIGN_FORMATS:
        raise layer.refusal(f"is stored as {kind} ({FOREIGN_FORMATS[kind]}), which is not read here; {WAY_OUT}")
    if kind not in CONFIG_FORMATS:
        known = ", ".join(CONFIG_FORMATS)
        raise layer.refusal(f"is stored as {kind[:60]!r}, which is not known here (known are {known}); {WAY_OUT}")
    dtype, find = CONFIG_FORMATS[kind]
    if layer.dtype != dtype:
        raise layer.refusal(f"is {layer}, but the file's JSON says {kind}, which is {dtype}; {AGAIN}, or {WAY_OUT}")
    return find(layer)


def _plain(layer: _Layer) -> Stored:
    if layer.dtype not in PLAIN:
        raise layer.refusal(f"is stored as {layer.dtype}, which is not read here; {WAY_OUT}")
    lonely = layer.one_of((TENSOR_SCALE, PRE_QUANT_SCALE))
    if lonely is not None or (layer.dtype in ("U8", "I8") and layer.name.endswith(WEIGHT)):
        beside = f" with {lonely} beside it" if lonely else ""
        raise layer.refusal(f"is {layer}{beside}: packed numbers without their scales; {AGAIN}, or {WAY_OUT}")
    if layer.dtype in FP8_FORMATS and len(layer.shape) > 1 and _lost_its_scale(layer):
        raise layer.refusal(f"is {layer} in a file of scaled fp8, but has no scale; {AGAIN}, or {WAY_OUT}")
    return layer.stored(PLAIN[layer.dtype])


def _lost_its_scale(layer: _Layer) -> bool:
    """Whether an fp8 matrix should have a scale: its inputs do, or the file says scaled fp8 and others do."""
    return layer.one_of(INPUT_SCALES) is not None or layer.name.startswith(layer.file.scaled)


def _fp8(layer: _Layer) -> Stored:
    scale = layer.needed(*SCALES, what="scaled fp8")
    whole, per_row = FP8_FORMATS[layer.dtype]
    return layer.stored(per_row if _is_per_row(layer, scale) else whole, {scaled.SCALE: scale})


def _int8(layer: _Layer) -> Stored:
    scale = layer.needed(*SCALES, what="int8")
    row = scaled.INT8_PER_ROW if _is_per_row(layer, scale) else scaled.INT8
    group = _rotation_group(layer)
    return layer.stored(row if group is None else scaled.int8_rotated(group), {scaled.SCALE: scale})


def _is_per_row(layer: _Layer, scale: str) -> bool:
    """Whether a scale is one for each row, checked to be that or a single number."""
    rows = layer.shape[:1]
    per_row = (rows, rows + (1,) * (len(layer.shape) - 1)) if rows else ()
    layer.check(scale, SCALE_DTYPES, *SINGLE, *per_row)
    return tuple(layer.file.tensors[scale].shape) not in SINGLE


def _rotation_group(layer: _Layer) -> int | None:
    """How many int8 columns were rotated together, None where none were."""
    inner = layer.config.get("params")
    config = {**(inner if isinstance(inner, dict) else {}), **layer.config}
    turned, group = config.get("convrot", False), config.get("convrot_groupsize", 256)
    if turned is False:
        return None
    columns = layer.shape[1] if len(layer.shape) == 2 else 0
    if turned is not True or type(group) is not int or not columns or not scaled.is_rotation_group(group, columns):
        raise layer.refusal(
            f"is {layer}, rotated (convrot is {str(turned)[:20]!r}) in groups of {str(group)[:20]!r} columns by the "
            f"file's JSON, but a power of 4 that divides a matrix's columns is needed; {AGAIN}, or {WAY_OUT}"
        )
    return group


def _blocks(layer: _Layer, numbers_per_item: int, block: int, what: str) -> tuple[int, int]:
    """Rows, and blocks in a row."""
    shape = layer.shape
    if len(shape) != 2 or shape[1] * numbers_per_item % block:
        raise layer.refusal(f"is {layer}, not a matrix of whole blocks of {block}, as {what} needs; {AGAIN}")
    return shape[0], shape[1] * numbers_per_item // block


def _mxfp8(layer: _Layer) -> Stored:
    scale = layer.needed(SCALES[0], what="mxfp8")
    rows, blocks = _blocks(layer, 1, fp4.MXFP8_BLOCK, "mxfp8")
    blocked = fp4.blocked_shape(rows, blocks)
    layer.check(scale, E8M0_OR_BYTES, blocked)
    if not layer.file.is_comfyui and blocked == (rows, blocks):
        raise layer.refusal(
            "is mxfp8 without comfy_quant, so that its scales may be in the blocked layout or in rows; "
            f"save it with comfy_quant, or {WAY_OUT}"
        )
    return layer.stored(fp4.MXFP8, {fp4.BLOCK_EXPONENT: scale})


def _nvfp4(layer: _Layer) -> Stored:
    scale = layer.needed(SCALES[0], what="nvfp4")
    tensor_scale = layer.needed(TENSOR_SCALE, what="nvfp4")
    rows, blocks = _blocks(layer, 2, fp4.NVFP4_BLOCK, "nvfp4")
    columns = blocks * fp4.NVFP4_BLOCK
    shapes = {fp4.NVFP4.name: fp4.blocked_shape(rows, blocks), fp4.NVFP4_LINEAR.name: (rows, blocks)}
    layer.check(scale, E4M3_OR_BYTES, *shapes.values())
    row = NVFP4_DIALECTS[_dialect(layer)]
    layer.check(scale, E4M3_OR_BYTES, shapes[row.name])
    layer.check(tensor_scale, SCALE_DTYPES, *SINGLE)
    names = {fp4.BLOCK_SCALE: scale, fp4.TENSOR_SCALE: tensor_scale}
    smoothing = layer.parts.get(PRE_QUANT_SCALE)
    if smoothing is not None:
        layer.check(smoothing, SCALE_DTYPES, (columns,), (1, columns))
        names[fp4.PRE_QUANT_SCALE] = smoothing
    return layer.stored(row, names, (rows, columns))


def _dialect(layer: _Layer) -> str:
    """Which nvfp4 a layer is: by the caller's word, the file's JSON, its own shape, or other layers' shapes."""
    file = layer.file
    by_json = fp4.NVFP4.name if file.is_comfyui else None
    found = file.dialect or by_json or _dialect_by_shape(layer) or file.dialect_by_shapes
    if found is None:
        raise layer.refusal(
            "is nvfp4, and nothing in the file tells whether in ComfyUI's dialect (even element in a byte's high half, "
            "blocked scales) or in ModelOpt's (low half, scales in rows); put modelopt or comfyui into "
            f"the file's name, or {WAY_OUT}"
        )
    return found


def _dialect_by_shape(layer: _Layer) -> str | None:
    """The dialect where one layout alone gives the scales' shape."""
    scale = layer.parts.get(SCALES[0])
    if len(layer.shape) != 2 or scale is None:
        return None
    linear = (layer.shape[0], layer.shape[1] * 2 // fp4.NVFP4_BLOCK)
    blocked = fp4.blocked_shape(*linear)
    found: dict[Shape, str] = {linear: fp4.NVFP4_LINEAR.name, blocked: fp4.NVFP4.name}
    return None if linear == blocked else found.get(tuple(layer.file.tensors[scale].shape))


CONFIG_FORMATS: dict[str, tuple[str, Callable[[_Layer], Stored]]] = {
    "float8_e4m3fn": ("F8_E4M3", _fp8),
    "float8_e5m2": ("F8_E5M2", _fp8),
    "mxfp8": ("F8_E4M3", _mxfp8),
    "nvfp4": ("U8", _nvfp4),
    "int8_tensorwise": ("I8", _int8),
}
"""By ComfyUI's name of a format: the dtype in the header, and what finds the rest."""


def _bnb(layer: _Layer) -> Stored:
    file = layer.file
    state_name = layer.needed(f"weight.{bnb.QUANT_STATE}", bnb.QUANT_STATE, what="of bitsandbytes' four bits")
    table = file.json(state_name)
    state = bnb.parse_state(table)
    if state is None or not state_name.endswith(BNB_STATE + state.kind):
        raise file.refusal(state_name, f"is no quant_state of nf4 or fp4: {str(table)[:200]}; {AGAIN}, or {WAY_OUT}")
    nested = state.nested_block is not None
    roles = (bnb.ABSMAX, bnb.QUANT_MAP, *((bnb.NESTED_ABSMAX, bnb.NESTED_MAP) if nested else ()))
    names = {role: layer.needed(f"weight.{role}", role, what=state.kind) for role in roles}
    count = math.prod(state.shape)
    packed, blocks = -(-count // 2), -(-count // state.block)
    if layer.dtype != "U8" or math.prod(layer.shape) != packed:
        raise layer.refusal(f"is {layer}, but its quant_state says {list(state.shape)}: U8 [{packed}, 1]; {AGAIN}")
    layer.check(names[bnb.ABSMAX], ("U8",) if nested else SCALE_DTYPES, (blocks,))
    layer.check(names[bnb.QUANT_MAP], SCALE_DTYPES, (bnb.CODES,))
    if state.nested_block is not None:
        layer.check(names[bnb.NESTED_ABSMAX], SCALE_DTYPES, (-(-blocks // state.nested_block),))
        layer.check(names[bnb.NESTED_MAP], SCALE_DTYPES, (NESTED_CODES,))
    return layer.stored(state.format, names, state.shape)


def _config(file: _File, name: str, parts: Mapping[str, str]) -> Config | None:
    """What JSON the file has for a tensor, in the header or beside it."""
    from_header = file.layers.get(name.removesuffix(WEIGHT)) if name.endswith(WEIGHT) else None
    if COMFY_QUANT not in parts:
        return from_header
    beside = file.json(parts[COMFY_QUANT])
    if not names_format(beside):
        raise file.refusal(parts[COMFY_QUANT], f"names no format; {AGAIN}")
    if from_header is not None and from_header != beside:
        raise file.refusal(
            parts[COMFY_QUANT], f"says {str(beside)[:200]}, but {METADATA} {str(from_header)[:200]}; {AGAIN}"
        )
    return beside


MAX_SCALE = 1e30  # no network comes near it, and fp8's 448 times it is still within fp32
ANY_SIGN = frozenset({bnb.QUANT_MAP, bnb.NESTED_MAP, fp4.PRE_QUANT_SCALE})
E4M3_NAN, E4M3_MINUS_ZERO = 0x7F, 0x80


def check_scales(parts: Parts, tensor: str = "its weight", file: str = "this file") -> None:
    """Refuse companions that would poison the numbers; for when they are read, on the CPU.

    Args:
        parts: Tensors by role; ``DATA`` may be among them and is not looked at.
        tensor: Name of the numbers' tensor, for the message.
        file: Name of the file, for the message.

    Raises:
        FileError: A scale is not finite, negative, or beyond 1e30.
    """
    for role, part in parts.items():
        what = None if role == DATA else _fault(role, part)
        if what is not None:
            raise FileError(f"{file}: the {role} of tensor {tensor} has {what}; the file is damaged, download it again")


def _fault(role: str, part: Tensor) -> str | None:
    """What is wrong with a companion, None for nothing."""
    if role == fp4.BLOCK_EXPONENT:
        return "a value that is not a number" if bool((as_bytes(part) == fp4.E8M0_NAN).any()) else None
    if role == fp4.BLOCK_SCALE:
        codes = as_bytes(part)
        if bool(((codes & E4M3_NAN) == E4M3_NAN).any()):
            return "a value that is not a number"
        return "a negative value" if bool((codes > E4M3_MINUS_ZERO).any()) else None
    if not part.is_floating_point() or not part.numel():
        return None
    low, high = (bound.item() for bound in part.float().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"a value that is not finite ({low:g} to {high:g})"
    if low < 0 and role not in ANY_SIGN:
        return f"a negative value ({low:g})"
    return f"an absurd value ({low:g} to {high:g})" if max(-low, high) > MAX_SCALE else None
