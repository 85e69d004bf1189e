"""Plain numbers come out as ml_dtypes, NumPy and torch's own casts have them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from flux.errors import UserError
from flux.weights.formats import floats
from flux.weights.formats.base import DATA
from flux.weights.formats.floats import FLOATS, PLAIN, encode_bf16, encode_fp16, for_device, widen_fp8

FP8 = [
    pytest.param("F8_E4M3", torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn, id="e4m3fn"),
    pytest.param("F8_E5M2", torch.float8_e5m2, ml_dtypes.float8_e5m2, id="e5m2"),
]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


@pytest.mark.parametrize(("name", "kind", "oracle"), FP8)
def test_every_fp8_byte_is_the_number_that_ml_dtypes_has(name, kind, oracle):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = torch.from_numpy(codes.numpy().view(oracle).astype(np.float32))
    for data in (codes, codes.view(kind)):  # as Apple's GPUs have them, and as torch does
        assert same(FLOATS[name].decode({DATA: data}, (16, 16), torch.float32), expected.view(16, 16))


@pytest.mark.parametrize(("name", "kind", "oracle"), FP8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_fp8_tensors_are_those_of_torch_s_own_cast(name, kind, oracle, dtype):
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (1025, 1031), dtype=torch.uint8, generator=generator).view(kind)
    assert same(FLOATS[name].decode({DATA: data}, (1025, 1031), dtype), data.float().to(dtype))


@pytest.mark.parametrize(("name", "kind", "oracle"), FP8)
def test_devices_that_cast_fp8_themselves_give_what_the_table_gives(monkeypatch, name, kind, oracle):
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (40, 24), dtype=torch.uint8, generator=generator)
    scales = torch.rand(40, generator=generator)
    by_table = widen_fp8(data, kind, torch.float32, scales, 24)
    monkeypatch.setattr(floats, "BY_TABLE", frozenset())
    assert same(widen_fp8(data, kind, torch.float32, scales, 24), by_table)


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_floats_are_rounded_once(stored, dtype):
    generator = torch.Generator().manual_seed(0)
    numpy_types = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
    targets = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}
    exact = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    torch_type = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[stored]
    data = exact.to(torch_type)
    # NumPy and ml_dtypes round on their own; fp64 goes through fp32, as every format here does.
    array = data.double().numpy().astype(numpy_types[stored]).astype(np.float32).astype(targets[dtype])
    numbers = FLOATS[stored].decode({DATA: data}, (7, 50), dtype)
    assert numbers.dtype == dtype
    assert np.array_equal(numbers.float().numpy(), array.astype(np.float32).reshape(7, 50))


@pytest.mark.parametrize("name", ["I64", "I32", "I16", "I8", "U8", "BOOL"])
def test_whole_numbers_become_floats(name):
    data = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(
        {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}.get(
            name, torch.bool
        )
    )
    assert PLAIN[name].decode({DATA: data}, (2, 3), torch.bfloat16).tolist() == [[0, 1, 1], [1, 0, 1]]


def test_what_apple_s_gpus_lack_travels_as_bytes_or_fp32():
    mps, cuda = torch.device("mps"), torch.device("cuda")
    numbers = torch.tensor([1.5, -0.25, 3.0])
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
        data = numbers.abs().to(kind)
        assert for_device(data, mps).dtype == torch.uint8
        assert for_device(data, mps).tolist() == data.view(torch.uint8).tolist()
        assert for_device(data, cuda) is data
    assert for_device(numbers.double(), mps).dtype == torch.float32
    assert for_device(numbers.double(), cuda).dtype == torch.float64
    assert for_device(numbers.half(), mps).dtype == torch.float16


def test_encoders_round_to_nearest_and_refuse_what_does_not_fit():
    numbers = torch.randn(100, generator=torch.Generator().manual_seed(0))
    bf16 = numbers.numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(encode_bf16(numbers)[DATA].float().numpy(), bf16)
    assert np.array_equal(encode_fp16(numbers)[DATA].numpy(), numbers.numpy().astype(np.float16))
    assert encode_fp16(torch.tensor([65504.0]))[DATA].item() == 65504.0
    with pytest.raises(UserError, match=r"float16 ends at 65504, but the tensor has 70000; choose"):
        encode_fp16(torch.tensor([1.0, -70000.0]))
    for encode in (encode_bf16, encode_fp16):
        with pytest.raises(UserError, match="not finite"):
            encode(torch.tensor([1.0, torch.nan]))
