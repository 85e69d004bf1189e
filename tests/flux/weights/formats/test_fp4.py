"""nvfp4 and mxfp8: against per-element loops with ml_dtypes' numbers, and comfy-kitchen where it is installed."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from flux.errors import UserError
from flux.weights.formats import scaled
from flux.weights.formats.base import DATA
from flux.weights.formats.fp4 import (
    BLOCK_EXPONENT,
    BLOCK_SCALE,
    MXFP8,
    NVFP4,
    NVFP4_LINEAR,
    PRE_QUANT_SCALE,
    TENSOR_SCALE,
    blocked_shape,
    encode_mxfp8,
    encode_nvfp4,
    from_blocked,
    to_blocked,
)

SHAPES = [(1, 1), (32, 4), (128, 4), (129, 5), (200, 12), (256, 8), (300, 3)]


def place(row, column, columns):
    """Where cuBLAS has the scale of (row, column), in bytes from the beginning."""
    tiles_in_a_row = -(-columns // 4)
    tile = row // 128 * tiles_in_a_row + column // 4
    inner = row % 128
    return tile * 512 + (inner % 32) * 16 + inner // 32 * 4 + column % 4


def blocked_by_loop(scales):
    rows, columns = scales.shape
    out = np.zeros(blocked_shape(rows, columns), np.uint8).reshape(-1)
    for row in range(rows):
        for column in range(columns):
            out[place(row, column, columns)] = scales[row, column]
    return out.reshape(blocked_shape(rows, columns))


def random_bytes(*shape, seed=0, high=256):
    return torch.randint(0, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def e2m1(code):
    return float(np.array([code], np.uint8).view(ml_dtypes.float4_e2m1fn)[0])


def nvfp4_by_loop(data, scales, tensor_scale, high_first):
    """Element by element in fp64; scales (N, K / 16) as bytes."""
    rows, columns = data.shape[0], 2 * data.shape[1]
    small = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    out = np.empty((rows, columns))
    for row in range(rows):
        for column in range(columns):
            byte = int(data[row, column // 2])
            high = (column % 2 == 0) == high_first
            out[row, column] = e2m1(byte >> 4 if high else byte & 15) * small[row, column // 16] * tensor_scale
    return out


def random_numbers(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_blocked_layout_is_cublas_formula_and_its_inverse_undoes_it(shape):
    scales = random_bytes(*shape)
    blocked = to_blocked(scales)
    assert np.array_equal(blocked.numpy(), blocked_by_loop(scales.numpy()))
    assert torch.equal(from_blocked(blocked, *shape), scales)


def test_the_blocked_layout_is_comfy_kitchen_s():
    kitchen = pytest.importorskip("comfy_kitchen.float_utils")
    for shape in SHAPES:
        scales = random_bytes(*shape)
        assert torch.equal(to_blocked(scales), kitchen.to_blocked(scales, flatten=False))


@pytest.mark.parametrize("row", [NVFP4, NVFP4_LINEAR], ids=lambda row: row.name)
@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("shape", [(4, 16), (33, 96), (130, 80)])
def test_nvfp4_is_what_a_loop_over_elements_gives(row, as_bytes, shape):
    rows, columns = shape
    data, scales = random_bytes(rows, columns // 2), random_bytes(rows, columns // 16, seed=1, high=0x7F)
    stored = to_blocked(scales) if row is NVFP4 else scales
    parts = {
        DATA: data,
        BLOCK_SCALE: stored if as_bytes else stored.view(torch.float8_e4m3fn),
        TENSOR_SCALE: torch.tensor(0.00371),
    }
    exact = nvfp4_by_loop(data.numpy(), scales.numpy(), float(parts[TENSOR_SCALE]), high_first=row is NVFP4)
    decoded = row.decode(parts, shape, torch.float32)
    assert np.allclose(decoded.numpy(), exact, rtol=2e-7, atol=0)  # two products in fp32
    assert torch.equal(row.decode(parts, shape, torch.bfloat16), decoded.bfloat16())


@pytest.mark.parametrize("row", [NVFP4, NVFP4_LINEAR], ids=lambda row: row.name)
def test_smoothing_scales_multiply_the_columns(row):
    rows, columns = 16, 64
    scales = random_bytes(rows, columns // 16, seed=1, high=0x7F)
    parts = {DATA: random_bytes(rows, columns // 2), TENSOR_SCALE: torch.tensor([0.01])}
    parts[BLOCK_SCALE] = to_blocked(scales) if row is NVFP4 else scales
    plain = row.decode(parts, (rows, columns), torch.float32)
    smoothing = torch.rand(columns, generator=torch.Generator().manual_seed(2))
    x = random_numbers(3, columns)
    smooth = row.decode({**parts, PRE_QUANT_SCALE: smoothing}, (rows, columns), torch.float32)
    assert torch.allclose(x @ smooth.T, (x * smoothing) @ plain.T, rtol=1e-5, atol=1e-4)
    assert smooth.dtype == torch.float32
    assert row.decode({**parts, PRE_QUANT_SCALE: smoothing}, (rows, columns), torch.float16).dtype == torch.float16


@pytest.mark.parametrize("numbers", [random_numbers(40, 96), random_numbers(16, 32) * 1e-3, torch.zeros(16, 32)])
def test_encoded_nvfp4_has_the_nearest_of_the_numbers_that_its_scales_allow(numbers):
    rows, columns = numbers.shape
    parts = encode_nvfp4(numbers)
    stored = (-(-rows // 16) * 16, columns)
    assert parts[DATA].shape == (stored[0], columns // 2)
    assert parts[BLOCK_SCALE].shape == blocked_shape(stored[0], columns // 16)
    decoded = NVFP4.decode(parts, (rows, columns), torch.float32)
    small = from_blocked(parts[BLOCK_SCALE], rows, columns // 16).view(torch.float8_e4m3fn).float()
    scales = (small * parts[TENSOR_SCALE]).repeat_interleave(16, 1)
    candidates = torch.tensor([e2m1(code) for code in range(16)]).view(-1, 1, 1) * scales
    nearest = (candidates - numbers).abs().amin(0)
    assert torch.allclose((decoded - numbers).abs(), nearest, rtol=1e-5, atol=1e-12)


def test_numbers_midway_go_to_the_even_code():
    # The block's largest number is 6 and the tensor's scale a power of two, so that every scale is exact.
    midway = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    block = torch.tensor([[6.0, *midway, *(-m for m in midway), 0.0]] * 16)
    parts = encode_nvfp4(block)
    decoded = NVFP4.decode(parts, (16, 16), torch.float32)[0]
    expected = np.array([6.0, *midway, *(-m for m in midway), 0.0], np.float32).astype(ml_dtypes.float4_e2m1fn)
    assert np.allclose(decoded.numpy(), expected.astype(np.float32), rtol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (144, 192)])
def test_encoded_nvfp4_is_comfy_kitchen_s(rows, columns):
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    numbers = random_numbers(rows, columns)
    parts = encode_nvfp4(numbers)
    data, scales = kitchen.quantize_nvfp4(numbers, parts[TENSOR_SCALE])
    assert torch.equal(parts[BLOCK_SCALE].view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(parts[DATA], data)
    expected = kitchen.dequantize_nvfp4(data, parts[TENSOR_SCALE], scales, torch.float32)
    assert torch.equal(NVFP4.decode(parts, (rows, columns), torch.float32), expected)


def mxfp8_by_loop(data, exponents):
    small = exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    numbers = data.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    out = np.empty_like(numbers)
    for row in range(numbers.shape[0]):
        for column in range(numbers.shape[1]):
            out[row, column] = numbers[row, column] * small[row, column // 32]
    return out


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("shape", [(32, 32), (160, 192)])
def test_mxfp8_is_what_a_loop_over_elements_gives(as_bytes, shape):
    rows, columns = shape
    data, exponents = random_bytes(rows, columns, high=0x7F), random_bytes(rows, columns // 32, seed=1, high=240)
    exponents[0, 0] = 0
    stored = to_blocked(exponents)
    parts = {
        DATA: data if as_bytes else data.view(torch.float8_e4m3fn),
        BLOCK_EXPONENT: stored if as_bytes else stored.view(torch.float8_e8m0fnu),
    }
    exact = mxfp8_by_loop(data.numpy(), exponents.numpy())
    decoded = MXFP8.decode(parts, shape, torch.float32)
    assert np.array_equal(decoded.numpy(), exact.astype(np.float32))
    assert torch.equal(MXFP8.decode(parts, shape, torch.bfloat16), decoded.bfloat16())


def test_encoded_mxfp8_keeps_each_block_within_range_by_the_smallest_power_of_two():
    numbers = random_numbers(32, 64) * torch.logspace(-6, 6, 32).view(-1, 1)
    numbers[3, :32] = 0
    numbers[4, :32] = 448.0  # needs no scale: 448 is e4m3's largest
    parts = encode_mxfp8(numbers)
    exponents = from_blocked(parts[BLOCK_EXPONENT], 32, 2).int() - 127
    for row in range(32):
        for block in range(2):
            amax = numbers[row, 32 * block : 32 * block + 32].abs().max().item()
            exponent = exponents[row, block].item()
            assert amax <= 448 * 2.0**exponent
            assert amax == 0 or amax > 448 * 2.0 ** (exponent - 1)
    decoded = MXFP8.decode(parts, (32, 64), torch.float32)
    assert ((decoded - numbers).abs() <= numbers.abs() / 16 + 2.0 ** (exponents - 10).repeat_interleave(32, 1)).all()
    assert torch.equal(MXFP8.decode(encode_mxfp8(decoded), (32, 64), torch.float32), decoded)


def test_encoded_mxfp8_is_comfy_kitchen_s():
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    numbers = random_numbers(64, 96)
    parts = encode_mxfp8(numbers)
    data, exponents = kitchen.quantize_mxfp8(numbers)
    assert torch.equal(parts[BLOCK_EXPONENT], exponents.view(torch.uint8))
    assert torch.equal(parts[DATA].view(torch.uint8), data.view(torch.uint8))
    expected = kitchen.dequantize_mxfp8(data, exponents, torch.float32)
    assert torch.equal(MXFP8.decode(parts, (64, 96), torch.float32), expected)


@pytest.mark.parametrize(("encode", "row"), [(encode_nvfp4, NVFP4), (encode_mxfp8, MXFP8)])
def test_padding_is_added_and_left_away(encode, row):
    numbers = random_numbers(19, 50)
    padded = torch.nn.functional.pad(numbers, (0, 14, 0, 13))
    parts = encode(numbers)
    decoded = row.decode(parts, (19, 50), torch.float32)
    assert decoded.is_contiguous()
    assert torch.equal(decoded, row.decode(encode(padded), (32, 64), torch.float32)[:19, :50])


@pytest.mark.parametrize("encode", [encode_nvfp4, encode_mxfp8])
def test_encoders_work_in_slabs_and_refuse_what_is_not_finite(monkeypatch, encode):
    numbers = random_numbers(48, 64).bfloat16()
    whole = encode(numbers)
    monkeypatch.setattr(scaled, "SLAB", 5 * 64)
    assert torch.equal(encode(numbers)[DATA].view(torch.uint8), whole[DATA].view(torch.uint8))
    with pytest.raises(UserError, match="not finite"):
        encode(torch.full((32, 32), torch.inf))
