"""fp8 and int8 with scales: against the formula in fp64 with ml_dtypes' fp8, and comfy-kitchen where there is one."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import pytest
import torch

from flux.errors import UserError
from flux.weights.formats import scaled
from flux.weights.formats.base import DATA
from flux.weights.formats.scaled import SCALE, encode_fp8, encode_int8, int8_rotated, is_rotation_group

N, K = 24, 96
FP8 = [
    pytest.param(scaled.FP8_E4M3FN_SCALED, ml_dtypes.float8_e4m3fn, False, id="e4m3fn"),
    pytest.param(scaled.FP8_E5M2_SCALED, ml_dtypes.float8_e5m2, False, id="e5m2"),
    pytest.param(scaled.FP8_PER_ROW, ml_dtypes.float8_e4m3fn, True, id="e4m3fn per row"),
    pytest.param(scaled.FP8_E5M2_PER_ROW, ml_dtypes.float8_e5m2, True, id="e5m2 per row"),
]


def random_numbers(rows=N, columns=K, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hadamard(group):
    """The rotation from its definition: the Kronecker power of the regular matrix of order 4."""
    four = np.ones((4, 4)) - 2 * np.fliplr(np.eye(4))
    powers = [four] * round(np.log2(group) / 2)
    return functools.reduce(np.kron, powers) / group**0.5


@pytest.mark.parametrize(("row", "oracle", "per_row"), FP8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_fp8_is_the_number_times_the_scale_rounded_once(row, oracle, per_row, dtype):
    scales = torch.rand(N if per_row else 1, generator=torch.Generator().manual_seed(1)) * 0.01
    codes = (random_numbers().numpy() * 20).astype(oracle)
    exact = codes.astype(np.float64) * scales.double().numpy().reshape(-1, 1)
    data = torch.from_numpy(codes.view(np.uint8))
    for shape in ((N,), (N, 1)) if per_row else ((), (1,)):
        numbers = row.decode({DATA: data, SCALE: scales.view(shape)}, (N, K), dtype)
        assert np.array_equal(numbers.float().numpy(), torch.from_numpy(exact.astype(np.float32)).to(dtype).float())


def test_fp8_of_a_convolution_has_a_scale_for_each_output_channel():
    data = random_numbers(8, 36).to(torch.float8_e4m3fn).view(8, 4, 3, 3)
    scale = torch.arange(1.0, 9.0)
    numbers = scaled.FP8_PER_ROW.decode({DATA: data, SCALE: scale}, (8, 4, 3, 3), torch.float32)
    assert torch.equal(numbers, data.float() * scale.view(8, 1, 1, 1))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_the_number_times_the_scale_rounded_once(per_row, dtype):
    data = torch.arange(-128, 128).to(torch.int8).repeat(9).view(N, K)
    scales = torch.rand(N if per_row else 1, 1, generator=torch.Generator().manual_seed(1))
    exact = (data.double() * scales.double()).float().to(dtype)
    row = scaled.INT8_PER_ROW if per_row else scaled.INT8
    assert torch.equal(row.decode({DATA: data, SCALE: scales if per_row else scales.view(())}, (N, K), dtype), exact)


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_rotated_int8_is_turned_back_by_the_hadamard_matrix(group):
    numbers = random_numbers(8, 512)
    turned = numbers.double().numpy().reshape(-1, group) @ hadamard(group)
    parts = encode_int8(torch.from_numpy(turned.reshape(8, 512)).float(), per_row=True)
    exact = (parts[DATA].double() * parts[SCALE].double()).numpy().reshape(-1, group) @ hadamard(group)
    decoded = int8_rotated(group).decode(parts, (8, 512), torch.float32)
    assert np.allclose(decoded.numpy(), exact.reshape(8, 512), rtol=0, atol=3e-6)
    assert (decoded - numbers).norm() / numbers.norm() < 0.01  # what int8 loses


@pytest.mark.parametrize("group", [16, 256])
def test_rotated_int8_is_what_comfy_kitchen_makes_of_it(group):
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    numbers = random_numbers(16, 512)
    data, scale = kitchen.quantize_int8_convrot_weight(numbers, group)
    decoded = int8_rotated(group).decode({DATA: data, SCALE: scale}, (16, 512), torch.float32)
    assert torch.allclose(decoded, kitchen.dequantize_int8_convrot_weight(data, scale, group), rtol=0, atol=3e-6)


def test_scaled_fp8_and_int8_are_what_comfy_kitchen_makes_of_them():
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    numbers = random_numbers()
    scale = torch.tensor(0.013)
    data = kitchen.quantize_per_tensor_fp8(numbers, scale)
    expected = kitchen.dequantize_per_tensor_fp8(data, scale, torch.float32)
    parts = {DATA: data, SCALE: scale}
    assert torch.equal(scaled.FP8_E4M3FN_SCALED.decode(parts, (N, K), torch.float32), expected)
    data, scale = kitchen.quantize_int8_rowwise(numbers)
    expected = kitchen.dequantize_int8_simple(data, scale)
    parts = {DATA: data, SCALE: scale}
    assert torch.equal(scaled.INT8_PER_ROW.decode(parts, (N, K), torch.float32), expected)


def test_rotations_are_of_powers_of_four_that_divide_the_columns():
    assert [group for group in range(-4, 5000) if is_rotation_group(group, 12288)] == [4, 16, 64, 256, 1024, 4096]
    assert not is_rotation_group(256, 384)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_fp8_errs_by_half_a_step_at_most_and_uses_the_whole_range(per_row, dtype):
    numbers = random_numbers().to(dtype)
    parts = encode_fp8(numbers, per_row)
    assert parts[DATA].dtype == torch.float8_e4m3fn
    assert parts[SCALE].shape == ((N,) if per_row else ())
    assert torch.equal(parts[DATA].float().abs().amax(1 if per_row else (0, 1)), torch.full_like(parts[SCALE], 448.0))
    decoded = scaled.FP8_PER_ROW.decode(parts, (N, K), torch.float32)
    smallest = parts[SCALE].view(-1, 1) * 2.0**-9  # the step among e4m3's smallest numbers
    step = torch.maximum(numbers.float().abs() / 8, smallest)
    assert ((decoded - numbers.float()).abs() <= step / 2 * 1.001).all()
    again = encode_fp8(decoded, per_row)
    assert torch.equal(again[DATA].view(torch.uint8), parts[DATA].view(torch.uint8))


@pytest.mark.parametrize("per_row", [False, True])
def test_encoding_int8_errs_by_half_a_step_at_most(per_row):
    numbers = random_numbers()
    parts = encode_int8(numbers, per_row)
    assert parts[SCALE].shape == ((N, 1) if per_row else ())
    decoded = scaled.INT8_PER_ROW.decode(parts, (N, K), torch.float32)
    assert ((decoded - numbers).abs() <= parts[SCALE].view(-1, 1) / 2 * 1.001).all()
    assert torch.equal(encode_int8(decoded, per_row)[DATA], parts[DATA])


@pytest.mark.parametrize("encode", [encode_fp8, encode_int8])
@pytest.mark.parametrize("per_row", [False, True])
def test_encoders_take_zeros_vectors_and_slabs_and_refuse_what_is_not_finite(monkeypatch, encode, per_row):
    whole = encode(random_numbers(), per_row)
    monkeypatch.setattr(scaled, "SLAB", 5 * K)
    assert torch.equal(encode(random_numbers(), per_row)[DATA].view(torch.uint8), whole[DATA].view(torch.uint8))
    zeros = encode(torch.zeros(3, 4), per_row)
    assert not zeros[DATA].float().any()
    assert torch.equal(zeros[SCALE], torch.ones_like(zeros[SCALE]))
    assert encode(torch.ones(7), per_row)[DATA].shape == (7,)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(UserError, match="not finite"):
            encode(torch.tensor([[1.0, bad]]), per_row)
