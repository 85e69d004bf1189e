"""Products in the stored format are what the widened numbers give, within what fp8 inputs cost."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from flux.weights.formats import products
from flux.weights.formats.fp4 import MXFP8, NVFP4, encode_mxfp8, encode_nvfp4
from flux.weights.formats.products import fp8_product, fp8_units, mxfp8_product, nvfp4_product
from flux.weights.formats.scaled import FP8_E4M3FN_SCALED, FP8_PER_ROW, encode_fp8

FP8_ERROR = 0.04  # of the norm: e4m3 keeps three bits, and inputs are rounded to it
FP4_ERROR = 0.12

ROWS, COLUMNS, TOKENS = 64, 128, 7
WEIGHT = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.1
X = torch.randn(TOKENS, COLUMNS, generator=torch.Generator().manual_seed(2)).bfloat16()
BIAS = torch.randn(ROWS, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.fixture
def units(monkeypatch):
    """Torch's CPU multiplies fp8 too, slowly: the same code runs there."""
    monkeypatch.setattr(products, "fp8_units", lambda device, per_row=False: True)
    monkeypatch.setattr(products, "fp4_units", lambda device: True)


def error(found, row, parts, bias=None):
    exact = X.float() @ row.decode(parts, (ROWS, COLUMNS), torch.float32).T
    exact = exact if bias is None else exact + bias.float()
    return ((found.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "bias"])
@pytest.mark.parametrize(("row", "per_row"), [(FP8_E4M3FN_SCALED, False), (FP8_PER_ROW, True)])
def test_fp8(units, row, per_row, bias):
    parts = encode_fp8(WEIGHT, per_row)
    found = fp8_product(parts, X, bias)
    assert found.shape == (TOKENS, ROWS)
    assert found.dtype == X.dtype
    assert 0 < error(found, row, parts, bias) < FP8_ERROR


@pytest.mark.parametrize("per_row", [False, True])
def test_inputs_are_narrowed_some_rows_at_a_time_to_the_same_bits(units, monkeypatch, per_row):
    whole = fp8_product(encode_fp8(WEIGHT, per_row), X, BIAS)
    monkeypatch.setattr(products, "AT_A_TIME", 3 * COLUMNS)
    assert torch.equal(fp8_product(encode_fp8(WEIGHT, per_row), X, BIAS), whole)


def test_large_inputs_do_not_overflow(units):
    found = fp8_product(encode_fp8(WEIGHT, False), X * 1e4, None)
    plain = fp8_product(encode_fp8(WEIGHT, False), X, None)
    assert torch.allclose(found.float() / 1e4, plain.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("x", "shape"), [(X.float(), (64, 128)), (X[:, :120], (64, 120)), (X, (60, 128))], ids=["fp32", "columns", "rows"]
)
def test_what_units_do_not_take_is_left_to_widening(units, x, shape):
    assert fp8_product(encode_fp8(WEIGHT[: shape[0], : shape[1]], False), x, None) is None


def test_a_cpu_has_no_units():
    assert not fp8_units(torch.device("cpu"))
    assert fp8_product(encode_fp8(WEIGHT, False), X, None) is None


@pytest.fixture
def emulated(units, monkeypatch):
    """comfy-kitchen, with its two products, which CPUs do not have, done on what it unpacks; arguments by its names."""
    kernels = pytest.importorskip("comfy_kitchen")

    def product(name, unpack):
        signature = inspect.signature(getattr(kernels, name))

        def multiply(*args):
            given = signature.bind(*args).arguments
            return (unpack(given, "a") @ unpack(given, "b").T).to(given["out_dtype"])

        return multiply

    def nvfp4(given, side):
        parts = (given[side], given[f"tensor_scale_{side}"], given[f"block_scale_{side}"])
        return kernels.dequantize_nvfp4(*parts, torch.float32)

    def mxfp8(given, side):
        return kernels.dequantize_mxfp8(given[side], given[f"block_scale_{side}"], torch.float32)

    whole = SimpleNamespace(
        quantize_nvfp4=kernels.quantize_nvfp4,
        quantize_mxfp8=kernels.quantize_mxfp8,
        scaled_mm_nvfp4=product("scaled_mm_nvfp4", nvfp4),
        scaled_mm_mxfp8=product("scaled_mm_mxfp8", mxfp8),
    )
    monkeypatch.setattr(products, "kitchen", lambda: whole)


@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("row", "encode", "multiply", "most"),
    [(NVFP4, encode_nvfp4, nvfp4_product, FP4_ERROR), (MXFP8, encode_mxfp8, mxfp8_product, FP8_ERROR)],
    ids=["nvfp4", "mxfp8"],
)
def test_blocks_by_comfy_kitchen(emulated, row, encode, multiply, most, bias):
    parts = encode(WEIGHT)
    found = multiply(parts, X, bias)
    assert found.shape == (TOKENS, ROWS)
    assert found.dtype == X.dtype
    assert 0 < error(found, row, parts, bias) < most


def test_without_comfy_kitchen_fp4_is_widened(units, monkeypatch):
    monkeypatch.setattr(products, "kitchen", lambda: None)
    assert nvfp4_product(encode_nvfp4(WEIGHT), X, None) is None
    assert mxfp8_product(encode_mxfp8(WEIGHT), X, None) is None


def test_a_kitchen_that_cannot_be_imported_is_none(monkeypatch):
    def fail(name):
        raise OSError("no CUDA runtime")

    products.kitchen.cache_clear()
    monkeypatch.setattr(products, "importlib", SimpleNamespace(import_module=fail))
    assert products.kitchen() is None
    products.kitchen.cache_clear()


def test_comfy_kitchens_decoders_give_our_numbers():
    """They take over on CUDA; their plain torch code is compared here."""
    kernels = pytest.importorskip("comfy_kitchen")
    from flux.weights.formats import fp4

    for row, parts, by_kernel in (
        (NVFP4, encode_nvfp4(WEIGHT), fp4._kernel_nvfp4),
        (MXFP8, encode_mxfp8(WEIGHT), fp4._kernel_mxfp8),
    ):
        ours = row.decode(parts, (ROWS, COLUMNS), torch.float32)
        theirs = by_kernel(kernels, parts, torch.float32)[:ROWS, :COLUMNS]
        assert torch.allclose(theirs, ours, rtol=1e-6, atol=0)
