"""Scales of blocks that are not finite are refused before numbers are made of them, wherever they stand."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch

from flux.errors import FileError
from flux.weights.formats import gguf_checks
from flux.weights.formats.gguf_blocks import BLOCKS, GGUF_FORMATS
from flux.weights.formats.gguf_checks import SCALE_PLACES, check_block_scales

BLOCK_COUNT = 5


def blocks(name, seed=0):
    """Random blocks whose scales are 1, so that nothing else in them can make a number that is not finite."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (BLOCK_COUNT, BLOCKS[name].bytes), dtype=torch.uint8, generator=generator)
    for place in SCALE_PLACES[name]:
        data[:, place : place + 2] = half(1.0)
    return data


def half(value):
    return torch.tensor([value], dtype=torch.float16).view(torch.uint8)


def by_the_package(name, data):
    return gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])


def test_every_block_format_has_its_scales_listed():
    assert set(SCALE_PLACES) == set(GGUF_FORMATS)


@pytest.mark.parametrize("name", SCALE_PLACES)
def test_the_listed_places_are_all_that_can_make_numbers_not_finite(name):
    data = blocks(name)
    check_block_scales(name, data)
    assert np.isfinite(by_the_package(name, data)).all()
    listed = {at + byte for at in SCALE_PLACES[name] for byte in range(2)}
    others = [at for at in range(BLOCKS[name].bytes) if at not in listed]
    data[:, others] = 0xFF
    assert np.isfinite(by_the_package(name, data)).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name, places in SCALE_PLACES.items() for place in places]
)
def test_a_scale_that_is_not_finite_is_refused_wherever_it_stands(name, place, value):
    data = blocks(name)
    data[3, place : place + 2] = half(value)
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(by_the_package(name, data)).all()
    with pytest.raises(FileError, match=r"a\.gguf: block 3 of tensor t \(" + name):
        check_block_scales(name, data, "t", "a.gguf")


@pytest.mark.parametrize("value", [0.0, -1.5, 65504.0, -65504.0, 6e-8])
def test_every_finite_scale_passes(value):
    data = blocks("Q4_K")
    data[2, 2:4] = half(value)
    check_block_scales("Q4_K", data)


def test_blocks_are_counted_across_runs(monkeypatch):
    monkeypatch.setattr(gguf_checks, "RUN", 2)
    data = blocks("Q8_0")
    data[4, :2] = half(math.nan)
    with pytest.raises(FileError, match="block 4 of"):
        check_block_scales("Q8_0", data)


def test_formats_without_blocks_and_tensors_without_numbers_pass():
    check_block_scales("F32", torch.full((2,), math.nan))
    check_block_scales("Q8_0", torch.empty(0, 34, dtype=torch.uint8))


def test_blocks_may_begin_at_an_odd_byte_and_in_any_shape():
    memory = torch.zeros(3 * 34 + 1, dtype=torch.uint8)
    odd = memory[1:]
    check_block_scales("Q8_0", odd)
    odd[34 + 1] = 0x7C
    with pytest.raises(FileError, match="block 1 of"):
        check_block_scales("Q8_0", odd)
