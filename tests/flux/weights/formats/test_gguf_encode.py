"""What is encoded is decoded by the ``gguf`` package, and is nearer to the numbers than llama.cpp's own rounding."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from flux.errors import MismatchError, NumericError
from flux.weights.formats import gguf_encode
from flux.weights.formats.base import DATA
from flux.weights.formats.gguf_blocks import BLOCKS, GGUF_FORMATS
from flux.weights.formats.gguf_encode import ENCODERS, encode

PACKAGE_WRITES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
# Relative errors of ggml_quantize_chunk (ggml, August 2026, no importance matrix) on the numbers of ``weights``.
LLAMA_CPP = {
    "Q8_0": 0.00534, "Q6_K": 0.01773, "Q5_K": 0.03608, "Q5_1": 0.03786, "Q5_0": 0.04269, "Q4_K": 0.07151,
    "IQ4_NL": 0.07605, "Q4_1": 0.07845, "Q4_0": 0.08599, "Q3_K": 0.15045, "Q2_K": 0.29742,
}  # fmt: skip


def weights(rows=128, columns=1024):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def decoded(name, numbers):
    return GGUF_FORMATS[name].decode({DATA: encode(name, numbers)}, tuple(numbers.shape), torch.float32)


def relative_error(numbers, exact):
    return ((numbers - exact).norm() / exact.norm()).item()


def package(name, numbers):
    return gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("name", ENCODERS)
def test_the_package_decodes_what_is_encoded_as_we_do(name):
    numbers = weights(8, 512)
    stored = encode(name, numbers)
    assert stored.shape == (numbers.numel() // BLOCKS[name].values, BLOCKS[name].bytes)
    theirs = gguf.quants.dequantize(stored.numpy().reshape(8, -1), gguf.GGMLQuantizationType[name])
    assert np.array_equal(decoded(name, numbers).numpy(), theirs)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_error_is_not_above_llama_cpps(name):
    numbers = weights()
    error = relative_error(decoded(name, numbers), numbers)
    assert 0.8 * LLAMA_CPP[name] < error < LLAMA_CPP[name] + 1e-5


@pytest.mark.parametrize("name", PACKAGE_WRITES)
@pytest.mark.parametrize("shift", [0.0, 0.03])
def test_the_error_is_not_above_the_packages(name, shift):
    numbers = weights() + shift
    theirs = gguf.quants.dequantize(package(name, numbers), gguf.GGMLQuantizationType[name])
    assert relative_error(decoded(name, numbers), numbers) <= relative_error(torch.from_numpy(theirs), numbers)


def test_q8_0_is_the_packages_byte_for_byte():
    halves = torch.arange(-64, 64).view(4, 32) / 2  # scales of 1/4 and less: codes that lie between two
    numbers = torch.cat([weights(4, 512).view(-1, 32), halves, torch.zeros(1, 32), 127.0 * torch.eye(32)])
    assert np.array_equal(encode("Q8_0", numbers).numpy(), package("Q8_0", numbers))


def test_more_bits_leave_less_error():
    numbers = weights(32)
    errors = {name: relative_error(decoded(name, numbers), numbers) for name in ENCODERS}
    ladder = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"]
    assert sorted(ladder, key=errors.__getitem__) == ladder
    assert errors["Q5_1"] < errors["Q5_0"] < errors["Q4_1"] < errors["Q4_0"]


@pytest.mark.parametrize("name", ENCODERS)
def test_a_few_large_numbers_do_not_spoil_the_others_blocks(name):
    numbers = weights(4)
    plain = decoded(name, numbers)
    numbers[0, 0] = 30.0
    assert torch.equal(decoded(name, numbers)[1:], plain[1:])
    assert relative_error(decoded(name, numbers), numbers) < 0.05  # IQ4_NL has no zero


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("value", [0.0, -0.5, 0.5, 1e-9, 1e-38])
def test_a_constant_stays_one(name, value):
    numbers = torch.full((2, 256), value)
    back = decoded(name, numbers)
    assert back.isfinite().all()
    assert (back - numbers).abs().max() <= abs(value) * 0.05 + 3e-8  # half of the least fp16 scale


@pytest.mark.parametrize("name", ENCODERS)
def test_the_length_of_a_run_makes_no_difference(name, monkeypatch):
    numbers = weights(4)
    whole = encode(name, numbers)
    monkeypatch.setattr(gguf_encode, "RUN", 768)
    same = (encode(name, numbers) == whole).all(1).float().mean()
    assert same > 0.8  # sums over groups may end in another last bit, and of two equal scales the other be taken


def test_other_types_and_layouts_of_numbers_are_encoded_by_value():
    numbers = weights(256, 32).to(torch.bfloat16)
    assert torch.equal(encode("Q4_K", numbers.t()), encode("Q4_K", numbers.t().float().contiguous()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K", "Q4_1"])
def test_numbers_that_no_scale_can_hold_are_refused(name, value):
    numbers = weights(2)
    numbers[1, 7] = value
    with pytest.raises(NumericError, match=f"{name} cannot hold"):
        encode(name, numbers)


def test_rows_that_do_not_divide_into_blocks_are_refused():
    with pytest.raises(MismatchError, match=r"\[4, 64\] do not divide into Q4_K's blocks of 256"):
        encode("Q4_K", torch.zeros(4, 64))
    assert encode("Q4_K", torch.zeros(0, 256)).shape == (0, 144)
    with pytest.raises(MismatchError, match="do not divide"):
        encode("Q8_0", torch.tensor(1.0))


def test_a_format_that_cannot_be_written_is_refused_with_those_that_can():
    with pytest.raises(MismatchError, match="IQ4_XS is not a format that can be written; choose one of Q8_0"):
        encode("IQ4_XS", torch.zeros(256))
