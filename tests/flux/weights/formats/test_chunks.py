"""Look-ups give what indexing a table gives: in one chunk or many, one thread or two, and as other devices do them."""

from __future__ import annotations

import pytest
import torch

from flux.weights.formats import chunks
from flux.weights.formats.chunks import cast, look_up, scale_runs


def expected(codes, table, scales, run):
    numbers = table[codes.long()].reshape(-1)
    if scales is not None:
        each = scales.expand(1) if scales.numel() == 1 else scales
        numbers = numbers * (each if each.numel() == 1 else each.repeat_interleave(run)[: len(numbers)])
    return numbers


def case(width, count, run, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    table = torch.randn(256, width, generator=generator)
    scales = None if run is None else torch.rand(-(-count * width // run), generator=generator)
    return codes, table, scales


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("width", "run"), [(1, None), (1, 6), (1, 7), (1, 10_000), (2, None), (2, 16), (2, 64)])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 999, 1000, 5000])
def test_look_ups_are_the_table_s_numbers_times_their_run_s_scale(monkeypatch, size, threads, width, run, count):
    if size == "large":
        monkeypatch.setattr(chunks, "LARGE", 64)
        monkeypatch.setattr(chunks, "CHUNK", 256)
        monkeypatch.setattr(chunks, "SERIAL", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    codes, table, scales = case(width, count, run)
    for dtype in (torch.float32, torch.bfloat16):
        numbers = look_up(codes, table, dtype, scales, run)
        assert numbers.dtype == dtype
        assert torch.equal(numbers, expected(codes, table, scales, run).to(dtype))


@pytest.mark.parametrize(("width", "run"), [(1, None), (1, 7), (2, 16)])
def test_the_way_of_other_devices_gives_the_same(monkeypatch, width, run):
    monkeypatch.setattr(chunks, "DEVICE_CHUNK", 128)
    codes, table, scales = case(width, 1000, run)
    out = torch.empty(1000 * width)
    chunks._fill_on_device(codes, table, out, scales, run or out.numel())
    assert torch.equal(out, look_up(codes, table, torch.float32, scales, run))


def test_one_scale_for_all_is_a_product_in_fp32():
    codes, table, _ = case(1, 1000, None)
    scale = torch.tensor(0.3)
    assert torch.equal(look_up(codes, table, torch.float32, scale), expected(codes, table, scale, 1))
    assert torch.equal(scale_runs(table.view(-1).clone(), scale, 1), table.view(-1) * scale)


def test_codes_of_any_shape_and_stride_are_read_in_order():
    codes, table, _ = case(2, 600, None)
    turned = codes.view(20, 30).T
    assert torch.equal(look_up(turned, table, torch.float32), look_up(turned.contiguous(), table, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [False, True])
def test_large_tensors_are_looked_up_in_threads_in_and_out_of_inference_mode(monkeypatch, dtype, inside):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    codes, table, scales = case(2, chunks.LARGE, 64)
    with torch.inference_mode(inside):
        numbers = look_up(codes, table, dtype, scales, 64)
    assert numbers.is_inference() == inside
    assert torch.equal(numbers, expected(codes, table, scales, 64).to(dtype))


def test_a_cast_to_the_same_type_is_no_copy():
    numbers = torch.randn(3, 4)
    assert cast(numbers, torch.float32).data_ptr() == numbers.data_ptr()
    assert torch.equal(cast(numbers, torch.bfloat16), numbers.bfloat16())
