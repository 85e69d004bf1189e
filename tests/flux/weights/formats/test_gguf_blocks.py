"""Every GGUF block format decodes as the ``gguf`` package decodes it, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES

from flux.weights.formats import gguf_blocks
from flux.weights.formats.base import DATA
from flux.weights.formats.gguf_blocks import BLOCKS, GGUF_FORMATS
from flux.weights.formats.gguf_k import Scratch, bits_to_bytes

ROWS = 9
# Where the fp16 scales stand in a block, in bytes.
HALVES = {
    "Q8_0": (0,), "Q5_1": (0, 2), "Q5_0": (0,), "Q4_1": (0, 2), "Q4_0": (0,), "IQ4_NL": (0,),
    "Q6_K": (208,), "Q5_K": (0, 2), "Q4_K": (0, 2), "Q3_K": (108,), "Q2_K": (80, 82), "IQ4_XS": (0,),
}  # fmt: skip


def random_blocks(name, count=ROWS * 6, seed=0, any_scales=False):
    """Blocks of random bytes, with ordinary numbers as scales or whatever the bytes mean, NaN and infinities too."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, BLOCKS[name].bytes), dtype=np.uint8)
    for start in () if any_scales else HALVES[name]:
        blocks[:, start : start + 2] = rng.standard_normal((count, 1)).astype(np.float16).view(np.uint8)
    return torch.from_numpy(blocks)


def decode(name, blocks, dtype=torch.float32):
    return GGUF_FORMATS[name].decode({DATA: blocks}, (ROWS, blocks.shape[0] * BLOCKS[name].values // ROWS), dtype)


def theirs(name, blocks):
    with np.errstate(all="ignore"):
        numbers = gguf.quants.dequantize(blocks.numpy().reshape(ROWS, -1), gguf.GGMLQuantizationType[name])
    return torch.from_numpy(numbers)


def bits(numbers):
    return numbers.view(torch.int32)


def test_the_table_of_types_is_ggmls():
    sizes = {kind.name: (kind.value, *GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {name: (block.code, block.values, block.bytes) for name, block in BLOCKS.items()} == sizes


def test_every_format_that_people_have_is_decoded_and_knows_its_bits_per_weight():
    names = "Q8_0 Q6_K Q5_K Q5_1 Q5_0 Q4_K Q4_1 Q4_0 Q3_K Q2_K IQ4_NL IQ4_XS".split()
    assert set(GGUF_FORMATS) == set(names)
    known = {"Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q5_0": 5.5, "Q4_K": 4.5, "Q4_0": 4.5, "Q3_K": 3.4375}
    assert {name: GGUF_FORMATS[name].bits for name in known} == known


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_numbers_are_the_packages_bit_for_bit(name):
    blocks = random_blocks(name)
    before = blocks.clone()
    numbers, expected = decode(name, blocks), theirs(name, blocks)
    assert expected.isfinite().all()
    assert numbers.shape == expected.shape
    assert torch.equal(bits(numbers), bits(expected))
    assert torch.equal(blocks, before)


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_any_bytes_give_what_the_package_gives(name):
    blocks = random_blocks(name, any_scales=True)
    numbers, expected = decode(name, blocks), theirs(name, blocks)
    assert torch.equal(numbers.isnan(), expected.isnan())
    assert torch.equal(bits(numbers)[~numbers.isnan()], bits(expected)[~expected.isnan()])


@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_neither_threads_nor_the_length_of_a_run_make_a_difference(name, together, monkeypatch, as_run):
    blocks = random_blocks(name)
    whole = decode(name, blocks)
    monkeypatch.setattr(gguf_blocks._pace, "together", lambda: together)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(gguf_blocks, "CPU_RUN", 7 * BLOCKS[name].values)
    assert torch.equal(bits(decode(name, blocks)), bits(whole))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_type_is_rounded_to_once(name, dtype):
    blocks = random_blocks(name)
    assert torch.equal(decode(name, blocks, dtype), theirs(name, blocks).to(dtype))


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_blocks_at_any_place_in_memory_are_decoded(name):
    blocks = random_blocks(name)
    for offset in (1, 2, 3):
        memory = torch.zeros(blocks.numel() + offset, dtype=torch.uint8)
        memory[offset:] = blocks.view(-1)
        assert torch.equal(bits(decode(name, memory[offset:].view(blocks.shape))), bits(theirs(name, blocks)))


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_a_tensor_of_no_blocks_is_empty(name):
    empty = torch.empty(0, BLOCKS[name].bytes, dtype=torch.uint8)
    assert GGUF_FORMATS[name].decode({DATA: empty}, (0, BLOCKS[name].values), torch.float32).shape[0] == 0


@pytest.mark.parametrize("value", [1, 4, 16, 64])
def test_bits_become_bytes_of_a_value(value):
    every = torch.arange(256, dtype=torch.uint8).view(64, 4)
    expected = np.unpackbits(every.numpy(), axis=-1, bitorder="little") * np.uint8(value)
    assert np.array_equal(bits_to_bytes(every, value, Scratch(every.device)).numpy(), expected)
