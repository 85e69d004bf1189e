"""Companions are found by name and checked from the header; what does not fit is refused, file and tensor named."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from flux.errors import FileError
from flux.weights.formats import bnb, fp4, scaled
from flux.weights.formats.base import DATA
from flux.weights.formats.companions import MAX_JSON_BYTES, check_scales, comfy_quant, companion_names, storage_of
from flux.weights.readers.safetensors import SafetensorsFile

N, K = 48, 64
FILE = "model.safetensors"
LAYER = "double_blocks.0.img_mlp.0"
WEIGHT = f"{LAYER}.weight"
METADATA = "_quantization_metadata"


@dataclass(frozen=True)
class Entry:
    dtype: str
    shape: tuple[int, ...]


def text(value):
    """A JSON tensor: its entry, and its bytes."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Entry("U8", (len(raw),)), raw


def find(tensors, metadata=None, dialect=None):
    """``storage_of`` on entries; (entry, bytes) stands for a text, and nothing else may be read."""
    entries = {name: entry[0] if isinstance(entry, tuple) else entry for name, entry in tensors.items()}

    def read(name):
        return torch.tensor(list(tensors[name][1]), dtype=torch.uint8)

    return storage_of(entries, metadata or {}, read, file=FILE, nvfp4_dialect=dialect)


def layer(weight, **companions):
    return {WEIGHT: weight, **{f"{LAYER}.{word}": entry for word, entry in companions.items()}}


def refused(*words, **arguments):
    with pytest.raises(FileError) as caught:
        find(**arguments)
    message = str(caught.value)
    assert message.startswith(FILE)
    for word in words:
        assert word in message
    assert re.search("download|use the model's|choose", message), message  # what to do
    return message


FP8, SCALAR = Entry("F8_E4M3", (N, K)), Entry("F32", ())


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((dtype, dtype) for dtype in ("F32", "F16", "BF16", "F64", "I64", "I32", "BOOL")),
        ("F8_E4M3", "fp8_e4m3fn"),
        ("F8_E5M2", "fp8_e5m2"),
    ],
)
def test_numbers_without_companions_are_plain(dtype, name):
    stored = find({WEIGHT: Entry(dtype, (N, K)), "a.scale": Entry(dtype, (3,))})
    assert stored[WEIGHT].format.name == stored["a.scale"].format.name == name
    assert stored[WEIGHT].names == {DATA: WEIGHT}
    assert stored[WEIGHT].shape == (N, K)


@pytest.mark.parametrize("style", [("weight_scale", "input_scale"), ("scale_weight", "scale_input")])
@pytest.mark.parametrize(
    ("dtype", "shape", "name"),
    [
        ("F8_E4M3", (), "fp8_e4m3fn scaled"),
        ("F8_E4M3", (1,), "fp8_e4m3fn scaled"),
        ("F8_E5M2", (), "fp8_e5m2 scaled"),
        ("F8_E4M3", (N,), "fp8 per row"),
        ("F8_E4M3", (N, 1), "fp8 per row"),
        ("F8_E5M2", (N,), "fp8_e5m2 per row"),
        ("I8", (), "int8"),
        ("I8", (N, 1), "int8 per row"),
    ],
)
def test_scales_of_both_key_styles_are_found_and_are_no_numbers(style, dtype, shape, name):
    weight, inputs = style
    tensors = layer(Entry(dtype, (N, K)), **{weight: Entry("F32", shape), inputs: SCALAR, "bias": Entry("BF16", (N,))})
    stored = find(tensors)
    assert list(stored) == [WEIGHT, f"{LAYER}.bias"]
    assert stored[WEIGHT].format.name == name
    assert stored[WEIGHT].names == {DATA: WEIGHT, scaled.SCALE: f"{LAYER}.{weight}"}
    assert stored[WEIGHT].input_scale == f"{LAYER}.{inputs}"
    assert not stored[WEIGHT].full_precision_product


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("count", "full"), [(0, False), (1, False), (2, True)])
def test_the_old_marker_tells_full_precision_for_the_layers_under_its_prefix(prefix, count, full):
    stored = find({
        f"{prefix}scaled_fp8": Entry("F8_E4M3", (count,)),
        f"{prefix}a.weight": FP8,
        f"{prefix}a.scale_weight": SCALAR,
        "b.weight": FP8,
        "b.scale_weight": SCALAR,
    })  # fmt: skip
    assert set(stored) == {f"{prefix}a.weight", "b.weight"}
    assert stored[f"{prefix}a.weight"].full_precision_product is full
    assert stored["b.weight"].full_precision_product is (full and not prefix)


COMFY = [
    ("float8_e4m3fn", FP8, {"weight_scale": SCALAR}, "fp8_e4m3fn scaled", (N, K)),
    ("float8_e5m2", Entry("F8_E5M2", (N, K)), {"weight_scale": SCALAR}, "fp8_e5m2 scaled", (N, K)),
    ("mxfp8", FP8, {"weight_scale": Entry("F8_E8M0", (128, 4))}, "mxfp8", (N, K)),
    ("mxfp8", FP8, {"weight_scale": Entry("U8", (128, 4))}, "mxfp8", (N, K)),
    (
        "nvfp4",
        Entry("U8", (N, K // 2)),
        {"weight_scale": Entry("F8_E4M3", (128, 4)), "weight_scale_2": SCALAR, "input_scale": SCALAR},
        "nvfp4",
        (N, K),
    ),
    (
        "nvfp4",
        Entry("U8", (128, 32)),
        {"weight_scale": Entry("U8", (128, 4)), "weight_scale_2": Entry("F32", (1,))},
        "nvfp4",
        (128, 64),
    ),
    ("int8_tensorwise", Entry("I8", (N, K)), {"weight_scale": SCALAR}, "int8", (N, K)),
    ("int8_tensorwise", Entry("I8", (N, K)), {"weight_scale": Entry("F32", (N, 1))}, "int8 per row", (N, K)),
]


@pytest.mark.parametrize("where", ["tensor", "header", "both"])
@pytest.mark.parametrize(("kind", "weight", "companions", "name", "shape"), COMFY)
@pytest.mark.parametrize("full", [False, True])
def test_comfyui_s_json_names_the_format_beside_the_weight_or_in_the_header(
    where, kind, weight, companions, name, shape, full
):
    config = {"format": kind, "full_precision_matrix_mult": full}
    tensors, metadata = layer(weight, **companions), {}
    if where != "header":
        tensors[f"{LAYER}.comfy_quant"] = text(config)
    if where != "tensor":
        metadata = {METADATA: json.dumps({"format_version": "1.0", "layers": {LAYER: config}})}
    stored = find(tensors, metadata)
    assert list(stored) == [WEIGHT]
    assert stored[WEIGHT].format.name == name
    assert stored[WEIGHT].shape == shape
    assert stored[WEIGHT].full_precision_product is full
    assert set(stored[WEIGHT].names) == {DATA, *stored[WEIGHT].format.companions}


@pytest.mark.parametrize("nest", [lambda config: config, lambda config: {"params": config}])
def test_rotated_int8_is_found_with_its_group(nest):
    tensors = layer(Entry("I8", (N, K)), weight_scale=Entry("F32", (N, 1)))
    tensors[f"{LAYER}.comfy_quant"] = text({
        "format": "int8_tensorwise", **nest({"convrot": True, "convrot_groupsize": 16})
    })  # fmt: skip
    assert find(tensors)[WEIGHT].format is scaled.int8_rotated(16)


@pytest.mark.parametrize("group", [0, 32, 256, "16", True, None])
def test_a_rotation_that_cannot_be_is_refused(group):
    tensors = layer(Entry("I8", (N, K)), weight_scale=Entry("F32", (N, 1)))
    config = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    refused(WEIGHT, "power of 4", tensors={**tensors, f"{LAYER}.comfy_quant": text(config)})


def nvfp4(rows, columns, scale, name=LAYER):
    return {
        f"{name}.weight": Entry("U8", (rows, columns // 2)),
        f"{name}.weight_scale": Entry("F8_E4M3", scale),
        f"{name}.weight_scale_2": SCALAR,
    }


def test_nvfp4_s_dialect_is_told_by_the_shape_of_the_scales_where_one_layout_alone_gives_it():
    assert find(nvfp4(48, 64, (48, 4)))[WEIGHT].format is fp4.NVFP4_LINEAR
    assert find(nvfp4(128, 96, (128, 6)))[WEIGHT].format is fp4.NVFP4_LINEAR
    assert find(nvfp4(48, 64, (128, 4)))[WEIGHT].format is fp4.NVFP4
    assert find(nvfp4(128, 96, (128, 8)))[WEIGHT].format is fp4.NVFP4


def test_an_nvfp4_layer_whose_shape_tells_nothing_goes_with_its_fellows():
    for scale, row in (((48, 4), fp4.NVFP4_LINEAR), ((128, 4), fp4.NVFP4)):
        stored = find({**nvfp4(128, 64, (128, 4)), **nvfp4(48, 64, scale, "other")})
        assert stored[WEIGHT].format is row
    both = {**nvfp4(48, 64, (48, 4), "one"), **nvfp4(48, 64, (128, 4), "other")}
    refused("nothing in the file tells", tensors={**nvfp4(128, 64, (128, 4)), **both})


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_fp8_that_lost_its_scale_is_refused(prefix):
    marker = {f"{prefix}scaled_fp8": Entry("F8_E4M3", (1,))}
    layers = {f"{prefix}a.weight": FP8, f"{prefix}a.scale_weight": SCALAR, f"{prefix}b.weight": FP8}
    refused(f"{prefix}b.weight", "in a file of scaled fp8, but has no scale", tensors={**marker, **layers})
    refused("c.weight", "has no scale", tensors={"c.weight": FP8, "c.scale_input": SCALAR})
    assert set(find({**marker, "t5.weight": FP8})) == {"t5.weight"}  # plain fp8 beside a marker that nothing heeds


def test_an_nvfp4_file_that_tells_nothing_is_refused_with_both_dialects_unless_the_caller_chooses():
    tensors = nvfp4(128, 64, (128, 4))
    refused(WEIGHT, "ComfyUI's", "ModelOpt's", "put modelopt or comfyui into the file's name", tensors=tensors)
    assert find(tensors, dialect="nvfp4")[WEIGHT].format is fp4.NVFP4
    assert find(tensors, dialect="nvfp4 linear")[WEIGHT].format is fp4.NVFP4_LINEAR
    with pytest.raises(ValueError, match="no dialect of nvfp4; choose one of nvfp4, nvfp4 linear"):
        find(tensors, dialect="modelopt")


def test_nvfp4_s_smoothing_scales_are_a_role():
    stored = find({**nvfp4(48, 64, (48, 4)), f"{LAYER}.pre_quant_scale": Entry("BF16", (64,))})
    assert stored[WEIGHT].names[fp4.PRE_QUANT_SCALE] == f"{LAYER}.pre_quant_scale"


def four_bits(nested=False, kind="nf4", shape=(N, K), **changes):
    count = N * K
    blocks = count // 64
    state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    tensors = {
        WEIGHT: Entry("U8", (count // 2, 1)),
        f"{WEIGHT}.absmax": Entry("U8" if nested else "F32", (blocks,)),
        f"{WEIGHT}.quant_map": Entry("F32", (16,)),
    }
    if nested:
        state.update(nested_blocksize=256, nested_offset=0.5, nested_dtype="float32")
        tensors[f"{WEIGHT}.nested_absmax"] = Entry("F32", (-(-blocks // 256),))
        tensors[f"{WEIGHT}.nested_quant_map"] = Entry("F32", (256,))
    tensors[f"{WEIGHT}.quant_state.bitsandbytes__{kind}"] = text({**state, **changes})
    return tensors


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_companions_are_found_and_the_shape_comes_of_the_json(kind, nested):
    stored = find({**four_bits(nested, kind), "norm.weight": Entry("BF16", (K,))})
    assert list(stored) == [WEIGHT, "norm.weight"]
    assert stored[WEIGHT].format.name == kind
    assert stored[WEIGHT].shape == (N, K)
    roles = {DATA, bnb.ABSMAX, bnb.QUANT_MAP} | ({bnb.NESTED_ABSMAX, bnb.NESTED_MAP} if nested else set())
    assert set(stored[WEIGHT].names) == roles == {DATA, *stored[WEIGHT].format.companions}


E, F = Entry, f"{LAYER}."
WRONG = [
    pytest.param(layer(FP8, weight_scale=E("F32", (K,))), ["weight_scale", f"[{K}]"], id="a scale for each column"),
    pytest.param(layer(FP8, weight_scale=E("F32", (1, 1))), ["weight_scale"], id="a scale of rank 2"),
    pytest.param(layer(FP8, weight_scale=E("I32", ())), ["I32", "F32"], id="a whole number for a scale"),
    pytest.param(layer(FP8, weight_scale=SCALAR, input_scale=E("F32", (N,))), ["input_scale"], id="many input scales"),
    pytest.param(layer(E("BF16", (N, K)), weight_scale=SCALAR), ["BF16", "no format"], id="a scale of a bf16 tensor"),
    pytest.param({F + "scale_weight": SCALAR}, [WEIGHT, "not in the file"], id="a scale without its weight"),
    pytest.param({"scaled_fp8": E("F8_E4M3", (3,))}, ["scaled_fp8", "3 elements"], id="a marker of three"),
    pytest.param(layer(E("I8", (N, K))), ["without their scales"], id="int8 without a scale"),
    pytest.param(layer(E("U8", (N, K))), ["without their scales"], id="bytes without a scale"),
    pytest.param(layer(E("I8", (N, K)), weight_scale_2=SCALAR), ["weight_scale_2"], id="half of nvfp4's scales"),
    pytest.param(layer(E("U8", (N, 32)), weight_scale_2=SCALAR), ["weight_scale is not in"], id="nvfp4 lacks a scale"),
    pytest.param(nvfp4(48, 64, (48, 5)), ["[48, 5]", "[128, 4] or [48, 4]"], id="nvfp4's scales of no shape"),
    pytest.param(
        {**nvfp4(48, 64, (128, 5)), F + "comfy_quant": text({"format": "nvfp4"})},
        ["[128, 5]", "[128, 4]"],
        id="comfyui's nvfp4 with scales of no shape",
    ),
    pytest.param(
        {**nvfp4(48, 64, (48, 4)), F + "weight_scale_2": E("F32", (48,))}, ["weight_scale_2"], id="many tensor scales"
    ),
    pytest.param(
        {**nvfp4(48, 64, (48, 4)), F + "pre_quant_scale": E("F32", (48,))}, ["pre_quant"], id="smoothing of rows"
    ),
    pytest.param(nvfp4(48, 40, (48, 2)), ["whole blocks of 16"], id="nvfp4 in half a block"),
    pytest.param(layer(E("U8", (9,)), weight_scale=SCALAR, weight_scale_2=SCALAR), ["whole blocks"], id="nvfp4 vector"),
    pytest.param(layer(E("F8_E4M3", (128, 128)), weight_scale=E("U8", (128, 4))), ["mxfp8 without"], id="mxfp8 untold"),
    pytest.param(layer(FP8, weight_scale=E("F8_E8M0", (N, 2))), ["[128, 4]"], id="mxfp8 with scales in rows"),
    pytest.param(layer(E("F4", (N, K))), ["F4"], id="a dtype that is not read"),
    pytest.param(layer(E("F8_E4M3FNUZ", (N, K)), weight_scale=SCALAR), ["F8_E4M3FNUZ"], id="amd's fp8"),
    *(
        pytest.param(layer(E("I8", (N, K)), **{word: SCALAR}), [word, "not read here"], id=word)
        for word in ("weight_scale_inv", "SCB", "qweight", "weight_s_rel", "weight_codebook", "weight_zero_point")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "words"), WRONG)
def test_what_does_not_fit_is_refused_from_the_header(tensors, words):
    refused(*words, tensors=tensors)


@pytest.mark.parametrize("kind", ["convrot_w4a4", "asym_w4a8_int8", "awq_w4a16", "int3_of_tomorrow"])
def test_formats_that_are_not_read_are_refused_by_name_with_the_way_out(kind):
    tensors = layer(E("I8", (N, K // 2)), weight_scale=E("F32", (N, 1)), comfy_quant=text({"format": kind}))
    refused(WEIGHT, kind, "bf16, fp8 or GGUF", tensors=tensors)


@pytest.mark.parametrize(
    ("kind", "weight"), [("float8_e4m3fn", E("F8_E5M2", (N, K))), ("int8_tensorwise", FP8), ("nvfp4", FP8)]
)
def test_a_weight_of_another_dtype_than_its_json_says_is_refused(kind, weight):
    refused(WEIGHT, kind, tensors=layer(weight, weight_scale=SCALAR, comfy_quant=text({"format": kind})))


@pytest.mark.parametrize(("kind", "weight", "companions", "name", "shape"), COMFY)
def test_a_companion_that_is_missing_is_named(kind, weight, companions, name, shape):
    for word in companions:
        if word != "input_scale":
            rest = {other: entry for other, entry in companions.items() if other != word}
            tensors = layer(weight, **rest, comfy_quant=text({"format": kind}))
            refused(WEIGHT, f"{LAYER}.{word} is not in the file", tensors=tensors)


BAD_JSON = [
    pytest.param(b"", id="empty"),
    pytest.param(b"\xff\xfe\x00", id="no text"),
    pytest.param(b"{", id="cut"),
    pytest.param(b"[" * 60_000, id="nested too deep"),
    pytest.param(b'{"format": "mxfp8", "format": "nvfp4"}', id="a name twice"),
    pytest.param(b'{"format": NaN}', id="not a number"),
    pytest.param(b"[1]", id="a list"),
    pytest.param(b'{"format": 7}', id="a number for a format"),
    pytest.param(b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": 1}', id="1 for true"),
    pytest.param(b'{"format": ' + b"9" * 5000 + b"}", id="a huge number"),
]


@pytest.mark.parametrize("raw", BAD_JSON)
def test_a_damaged_json_text_is_refused(raw):
    refused(LAYER, tensors=layer(FP8, weight_scale=SCALAR, comfy_quant=text(raw)))
    metadata = {METADATA: '{"layers": {"' + LAYER + '": ' + raw.decode("latin-1") + "}}"}
    refused(tensors=layer(FP8, weight_scale=SCALAR), metadata=metadata)
    tensors = four_bits()
    refused("quant_state", tensors={**tensors, f"{WEIGHT}.quant_state.bitsandbytes__nf4": text(raw)})


@pytest.mark.parametrize("entry", [E("U8", (MAX_JSON_BYTES + 1,)), E("U8", (2, 8)), E("F32", (16,))])
@pytest.mark.parametrize("word", ["comfy_quant", "weight.quant_state.bitsandbytes__nf4"])
def test_a_json_text_that_is_none_by_its_header_is_never_read(word, entry):
    refused(word, "not a JSON text", tensors={**layer(FP8, weight_scale=SCALAR), F + word: entry})


@pytest.mark.parametrize(
    "text_of_metadata", ["", "[]", '{"layers": []}', '{"layers": {"a": 1}}', "x" * (1 << 24) + "x"]
)
def test_absurd_metadata_is_refused(text_of_metadata):
    refused(METADATA, tensors=layer(FP8), metadata={METADATA: text_of_metadata})


def test_json_texts_that_contradict_each_other_are_refused():
    tensors = layer(FP8, weight_scale=SCALAR, comfy_quant=text({"format": "float8_e4m3fn"}))
    metadata = {METADATA: json.dumps({"layers": {LAYER: {"format": "mxfp8"}}})}
    refused("float8_e4m3fn", "mxfp8", tensors=tensors, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({f"{WEIGHT}.absmax": E("F32", (47,))}, ["absmax", "[48]"], id="absmax too short"),
        pytest.param({f"{WEIGHT}.absmax": E("U8", (48,))}, ["absmax"], id="absmax in bytes without nesting"),
        pytest.param({f"{WEIGHT}.quant_map": E("F32", (15,))}, ["quant_map"], id="a map of 15"),
        pytest.param({f"{WEIGHT}.quant_map": None}, ["weight.quant_map is not in"], id="no map"),
        pytest.param({f"{WEIGHT}.absmax": None}, ["weight.absmax is not in"], id="no absmax"),
        pytest.param({f"{WEIGHT}.quant_state.bitsandbytes__nf4": None}, ["quant_state is not in"], id="no state"),
        pytest.param({WEIGHT: E("U8", (N * K, 1))}, ["quant_state says"], id="too many codes"),
        pytest.param({WEIGHT: E("BF16", (N * K // 4, 1))}, ["BF16"], id="codes in another type"),
        pytest.param(four_bits(shape=(N, K + 1)), ["quant_state says"], id="another shape"),
        pytest.param(four_bits(quant_type="fp4"), ["no quant_state"], id="another type in the json"),
        pytest.param(four_bits(blocksize=7), ["no quant_state"], id="a block of 7"),
        pytest.param(four_bits(nested_blocksize=256, nested_offset=0.1), ["nested"], id="nested by the json alone"),
    ],
)
def test_four_bits_that_do_not_fit_are_refused(change, words):
    tensors = {name: entry for name, entry in {**four_bits(), **change}.items() if entry is not None}
    refused(WEIGHT, *words, tensors=tensors)


NESTED_MISFITS = {f"{WEIGHT}.nested_absmax": E("F32", (2,)), f"{WEIGHT}.nested_quant_map": E("F32", (16,))}


@pytest.mark.parametrize(("name", "entry"), NESTED_MISFITS.items())
def test_nested_companions_that_do_not_fit_are_refused(name, entry):
    refused(name, tensors={**four_bits(nested=True), name: entry})


@pytest.mark.parametrize(
    ("role", "good", "bad"),
    [
        (scaled.SCALE, [0.0, 0.5], [[torch.nan, 1], [torch.inf, 1], [-1.0, 1], [1e31, 1]]),
        (fp4.TENSOR_SCALE, [0.5], [[torch.nan], [-torch.inf], [-1e-9]]),
        (bnb.ABSMAX, [0.0, 0.5], [[torch.nan, 1], [-0.5, 1]]),
        (bnb.NESTED_ABSMAX, [0.5], [[torch.inf]]),
        (bnb.QUANT_MAP, [-1.0, 1.0], [[torch.nan, 1], [-1e31, 1]]),
        (fp4.PRE_QUANT_SCALE, [-1.0, 1.0], [[torch.inf, 1]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_that_would_poison_the_numbers_are_refused_when_read(role, good, bad, dtype):
    check_scales({DATA: torch.tensor([torch.nan]), role: torch.tensor(good, dtype=dtype)}, WEIGHT, FILE)
    for values in bad:
        with pytest.raises(FileError, match=rf"^{FILE}: the {role} of tensor {WEIGHT} has .* download it again$"):
            check_scales({role: torch.tensor(values, dtype=dtype)}, WEIGHT, FILE)


@pytest.mark.parametrize("view", [torch.uint8, None])
def test_small_floats_that_are_no_scales_are_refused_when_read(view):
    for kind, role, good, bad in (
        (torch.float8_e4m3fn, fp4.BLOCK_SCALE, [0x00, 0x80, 0x7E], [0x7F, 0xFF, 0x81, 0xFE]),
        (torch.float8_e8m0fnu, fp4.BLOCK_EXPONENT, [0, 127, 254], [255]),
    ):
        check_scales({role: torch.tensor(good, dtype=torch.uint8).view(view or kind)})
        for code in bad:
            with pytest.raises(FileError, match=role):
                check_scales({role: torch.tensor([1, code], dtype=torch.uint8).view(view or kind)})


def test_absmax_in_bytes_is_checked_by_its_nested_scales_alone():
    check_scales({bnb.ABSMAX: torch.tensor([0, 255], dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("row", "encode"),
    [
        (scaled.FP8_E4M3FN_SCALED, lambda numbers: scaled.encode_fp8(numbers, per_row=False)),
        (scaled.FP8_PER_ROW, lambda numbers: scaled.encode_fp8(numbers, per_row=True)),
        (scaled.INT8, lambda numbers: scaled.encode_int8(numbers, per_row=False)),
        (scaled.INT8_PER_ROW, lambda numbers: scaled.encode_int8(numbers, per_row=True)),
        (bnb.NF4, bnb.encode_nf4),
        (fp4.NVFP4, fp4.encode_nvfp4),
    ],
)
def test_what_encoders_make_is_found_again_in_a_file_and_decodes(tmp_path, row, encode):
    numbers = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    parts = encode(numbers)
    names = companion_names(WEIGHT, row, parts)
    tensors = {names[role]: part for role, part in parts.items()}
    marker = comfy_quant(row)
    if marker is not None:
        tensors[f"{LAYER}.comfy_quant"] = marker
    save_file(tensors, tmp_path / FILE)
    file = SafetensorsFile(tmp_path / FILE)
    stored = storage_of(file, file.metadata, file.read, file=FILE)
    assert list(stored) == [WEIGHT]
    assert stored[WEIGHT].format.name == row.name
    found = {role: file.read(name) for role, name in stored[WEIGHT].names.items()}
    check_scales(found, WEIGHT, FILE)
    decoded = stored[WEIGHT].format.decode(found, stored[WEIGHT].shape, torch.float32)
    assert (decoded - numbers).norm() / numbers.norm() < 0.12  # four bits lose a tenth


def test_the_rows_of_an_encoder_without_a_place_in_comfyui_have_no_marker():
    assert comfy_quant(bnb.NF4) is None
    assert json.loads(bytes(comfy_quant(fp4.MXFP8).tolist())) == {"format": "mxfp8"}
