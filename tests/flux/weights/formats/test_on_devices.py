"""What decoders take on an accelerator beside the numbers, counted on the meta device, which stands for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from flux.memory.tracing import Tracer
from flux.ops.devices import standing_for
from flux.weights.formats import chunks, gguf_blocks, scaled
from flux.weights.formats.base import DATA
from flux.weights.formats.floats import FP8_E4M3FN, fp8_table
from flux.weights.formats.scaled import encode_int8, int8_rotated
from flux.weights.formats.written import WRITTEN

CHUNK = 1 << 12  # numbers; a hundredth of the matrix
SHAPE = 512, 1024
OF_A_CHUNK = 16  # bytes for each of its numbers, at most: indices, codes and planes of them, fp32
OF_SCALES = 1 / 8  # of the numbers' own bytes, in fp32


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(chunks, "DEVICE_CHUNK", CHUNK)
    monkeypatch.setattr(gguf_blocks, "DEVICE_RUN", CHUNK)


def decoded(row, stored):
    """Numbers, and bytes that were there at most."""
    parts = {role: tensor.to("meta") for role, tensor in stored.items()}
    with Tracer() as tracer:
        numbers = row.decode(parts, SHAPE, torch.bfloat16)
    assert (numbers.device.type, numbers.shape, numbers.dtype) == ("meta", SHAPE, torch.bfloat16)
    return numbers, tracer.peak


@pytest.mark.parametrize("name", WRITTEN)
def test_beside_the_numbers_a_chunk_of_them_is_made_and_their_scales(name):
    row = WRITTEN[name]
    numbers, peak = decoded(row.row, row.encode(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))))
    assert peak <= (1 + OF_SCALES) * numbers.nbytes + OF_A_CHUNK * CHUNK


@pytest.mark.parametrize("per_row", [False, True])
def test_rotated_numbers_are_turned_back_chunk_by_chunk(per_row):
    stored = encode_int8(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), per_row)
    numbers, peak = decoded(int8_rotated(256), stored)
    assert peak <= numbers.nbytes + OF_A_CHUNK * CHUNK


@pytest.mark.parametrize("per_row", [False, True])
def test_the_way_of_devices_gives_the_numbers_of_the_cpu(monkeypatch, per_row):
    """On the CPU, which is made to take it."""
    stored = encode_int8(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), per_row)
    for group in (16, 256):
        expected = int8_rotated(group).decode(stored, SHAPE, torch.bfloat16)
        found = scaled._on_device(stored, SHAPE, torch.bfloat16, partial(scaled._rotate, group=group))
        assert torch.equal(found, expected)
    row = scaled.INT8_PER_ROW if per_row else scaled.INT8
    assert torch.equal(scaled._on_device(stored, SHAPE, torch.bfloat16), row.decode(stored, SHAPE, torch.bfloat16))


def test_apple_s_gpus_look_fp8_up():
    """Their indices are more than what a card's cast makes."""
    stored = {DATA: torch.zeros(SHAPE, dtype=torch.uint8)}
    fp8_table(torch.float8_e4m3fn, torch.device("meta"))  # which is kept
    _, by_cast = decoded(FP8_E4M3FN, stored)
    with standing_for("mps"):
        numbers, by_table = decoded(FP8_E4M3FN, stored)
    assert by_cast == numbers.nbytes
    assert by_table == numbers.nbytes + 2 * 4 * CHUNK
