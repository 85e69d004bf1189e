"""nf4 and fp4: against a loop over elements with the published tables, and bitsandbytes where it is installed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from flux.errors import UserError
from flux.weights.formats import bnb
from flux.weights.formats.base import DATA
from flux.weights.formats.bnb import (
    ABSMAX,
    NESTED_ABSMAX,
    NESTED_MAP,
    NF4_VALUES,
    QUANT_MAP,
    QUANT_STATE,
    bnb_format,
    encode_nf4,
    parse_state,
)

# In the order of their codes, over the largest (bitsandbytes, create_fp8_map with 2 exponent bits, 1 of precision).
FP4_VALUES = [sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
TABLES = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}
SHAPES = [(1, 1), (3, 5), (1, 63), (8, 64), (37, 129), (4, 4096)]


def packed(kind, count, block, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        DATA: torch.randint(0, 256, (-(-count // 2), 1), dtype=torch.uint8, generator=generator),
        ABSMAX: torch.rand(-(-count // block), generator=generator),
        QUANT_MAP: torch.tensor(TABLES[kind]),
    }


def by_loop(kind, data, absmax, count, block):
    out = np.empty(count)
    for i in range(count):
        byte = int(data[i // 2])
        code = byte >> 4 if i % 2 == 0 else byte & 15
        out[i] = np.float32(TABLES[kind][code]).astype(np.float64) * absmax[i // block]
    return out


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bit_codes_are_table_entries_times_their_block_s_absmax(kind, block, shape):
    count = int(np.prod(shape))
    parts = packed(kind, count, block)
    exact = by_loop(kind, parts[DATA].view(-1).numpy(), parts[ABSMAX].double().numpy(), count, block)
    row = bnb_format(kind, block)
    assert np.array_equal(row.decode(parts, shape, torch.float32).numpy().ravel(), exact.astype(np.float32))
    rounded = torch.from_numpy(exact.astype(np.float32)).bfloat16().view(shape)
    assert torch.equal(row.decode(parts, shape, torch.bfloat16), rounded)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(3, 5), (300, 129)])
def test_nested_absmax_is_looked_up_scaled_and_shifted(kind, shape):
    count = int(np.prod(shape))
    blocks, offset = -(-count // 64), 0.125
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    nested_map = torch.rand(256, generator=generator)
    nested = torch.rand(-(-blocks // 256), generator=generator)
    parts = {**packed(kind, count, 64), ABSMAX: codes, NESTED_ABSMAX: nested, NESTED_MAP: nested_map}
    absmax = np.array([np.float32(nested_map[int(c)]) * np.float32(nested[i // 256]) for i, c in enumerate(codes)])
    exact = by_loop(kind, parts[DATA].view(-1).numpy(), (absmax + np.float32(offset)).astype(np.float64), count, 64)
    decoded = bnb_format(kind, 64, True, 256, offset).decode(parts, shape, torch.float32)
    assert np.array_equal(decoded.numpy().ravel(), exact.astype(np.float32))


def parts_of(data, state):
    """bitsandbytes' own packing, as a file has it."""
    table = state.as_dict(packed=True)
    return {DATA: data, **{key: part for key, part in table.items() if "." not in key}}, json.loads(
        bytes(next(part for key, part in table.items() if "." in key).tolist())
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 256])
def test_what_bitsandbytes_packs_is_what_it_unpacks(kind, nested, block):
    oracle = pytest.importorskip("bitsandbytes.functional")
    # Rows of whole blocks: with others its kernel for CPUs (0.50.2) mistakes blocks and is far from what it packed.
    numbers = torch.randn(96, 512, generator=torch.Generator().manual_seed(0))
    data, state = oracle.quantize_4bit(numbers, blocksize=block, compress_statistics=nested, quant_type=kind)
    expected = oracle.dequantize_4bit(data, state)
    parts, text = parts_of(data, state)
    found = parse_state(text)
    assert found is not None
    assert (found.kind, found.shape, found.block) == (kind, (96, 512), block)
    decoded = found.format.decode(parts, found.shape, torch.float32)
    assert torch.allclose(decoded, expected, rtol=2e-7, atol=0)
    assert set(found.format.companions) == set(parts) - {DATA}


def test_encoded_nf4_is_what_bitsandbytes_makes_of_it():
    oracle = pytest.importorskip("bitsandbytes.functional")
    numbers = torch.randn(50, 129, generator=torch.Generator().manual_seed(0))
    parts = encode_nf4(numbers)
    data, state = oracle.quantize_4bit(numbers, blocksize=64, quant_type="nf4")
    assert torch.equal(parts[ABSMAX], state.absmax)
    differing = (parts[DATA] != data).float().mean()
    assert differing < 1e-3  # it multiplies by a reciprocal, which may tip a number that lies midway


@pytest.mark.parametrize("shape", SHAPES)
def test_encoded_nf4_has_the_nearest_table_entries(shape):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = encode_nf4(numbers)
    decoded = bnb.NF4.decode(parts, shape, torch.float32)
    absmax = parts[ABSMAX].repeat_interleave(64)[: numbers.numel()].view(shape)
    nearest = (torch.tensor(NF4_VALUES).view(-1, 1, 1) * absmax - numbers).abs().amin(0)
    assert torch.allclose((decoded - numbers).abs(), nearest, rtol=1e-5, atol=1e-7)
    assert torch.equal(bnb.NF4.decode(encode_nf4(decoded), shape, torch.float32), decoded)


def test_encoded_nf4_says_what_it_is_and_comes_out_the_same_in_slabs(monkeypatch):
    numbers = torch.randn(50, 129, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = encode_nf4(numbers)
    found = parse_state(json.loads(bytes(parts[QUANT_STATE].tolist())))
    assert found == bnb.QuantState(kind="nf4", shape=(50, 129), block=64)
    assert torch.equal(
        found.format.decode(parts, (50, 129), torch.float32), bnb.NF4.decode(parts, (50, 129), torch.float32)
    )
    monkeypatch.setattr(bnb, "SLAB", 192)
    again = encode_nf4(numbers)
    assert all(torch.equal(again[role], parts[role]) for role in (DATA, ABSMAX))


def test_encoding_keeps_zeros_and_refuses_what_is_not_finite():
    assert not bnb.NF4.decode(encode_nf4(torch.zeros(3, 50)), (3, 50), torch.float32).any()
    with pytest.raises(UserError, match="not finite"):
        encode_nf4(torch.tensor([[1.0, torch.nan]]))


def test_bits_count_the_scales():
    assert bnb.NF4.bits == 4.5
    assert bnb_format("nf4", 64, nested=True).bits == 4 + 8 / 64 + 32 / (64 * 256)


GOOD = {"quant_type": "nf4", "blocksize": 64, "shape": [4, 8], "dtype": "bfloat16"}
NESTED = {**GOOD, "nested_blocksize": 256, "nested_offset": 0.5}


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({}, id="nothing"),
        pytest.param({**GOOD, "quant_type": "int4"}, id="another type"),
        pytest.param({**GOOD, "quant_type": ["nf4"]}, id="a list of types"),
        pytest.param({**GOOD, "blocksize": 0}, id="no block"),
        pytest.param({**GOOD, "blocksize": 48}, id="a block of 48"),
        pytest.param({**GOOD, "blocksize": True}, id="a true block"),
        pytest.param({**GOOD, "blocksize": 64.0}, id="a block that is not whole"),
        pytest.param({**GOOD, "shape": None}, id="no shape"),
        pytest.param({**GOOD, "shape": [4, -8]}, id="a negative side"),
        pytest.param({**GOOD, "shape": [4, 2.0]}, id="a side that is not whole"),
        pytest.param({**GOOD, "shape": [1] * 9}, id="too many sides"),
        pytest.param({**NESTED, "nested_blocksize": 3}, id="a nested block of 3"),
        pytest.param({**NESTED, "nested_offset": None}, id="no offset"),
        pytest.param({**NESTED, "nested_offset": float("nan")}, id="an offset that is not a number"),
        pytest.param({**NESTED, "nested_offset": 10**400}, id="an absurd offset"),
    ],
)
def test_a_quant_state_that_cannot_be_is_none(state):
    assert parse_state(GOOD) is not None
    assert parse_state(NESTED) is not None
    assert parse_state(state) is None
