"""Which number format is chosen, with the probe's clock replaced."""

from __future__ import annotations

import functools

import pytest
import torch

from flux.ops import dtypes
from flux.ops.dtypes import compute_dtype, fast_dtype, mixed_precision

BF16, FP32 = torch.bfloat16, torch.float32


class Probe:
    """Stands for the timing: seconds of a whole probe by format, in proportion for a smaller one."""

    def __init__(self, full, half):
        self.seconds = {FP32: full, BF16: half}
        self.calls = []

    def __call__(self, dtype, rows=dtypes.PROBE_ROWS, repeats=dtypes.PROBE_REPEATS):
        self.calls.append((dtype, rows))
        return self.seconds[dtype] * rows / dtypes.PROBE_ROWS


@pytest.fixture
def probe(monkeypatch):
    """Installs a probe and an empty memory of earlier measurements."""

    def install(full, half):
        fake = Probe(full, half)
        monkeypatch.setattr(dtypes, "_probe_seconds", fake)
        monkeypatch.setattr(dtypes, "_fast_dtype", functools.cache(dtypes._fast_dtype.__wrapped__))
        return fake

    return install


@pytest.mark.parametrize(("full", "half", "expected"), [(4, 1, BF16), (1, 4, FP32), (1, 1, FP32), (1, 0.99, BF16)])
def test_a_cpu_takes_the_faster_format(full, half, expected, probe):
    probe(full, half)
    assert fast_dtype("cpu") == expected
    assert fast_dtype(torch.device("cpu")) == expected


def test_a_cpu_is_measured_once(probe):
    fake = probe(4, 1)
    for _ in range(3):
        fast_dtype("cpu")
    assert [dtype for dtype, _ in fake.calls].count(FP32) == 1


def test_a_cpu_that_emulates_bf16_is_spared_the_whole_probe(probe):
    fake = probe(1, 100)
    assert fast_dtype("cpu") == FP32
    assert (BF16, dtypes.PROBE_ROWS) not in fake.calls


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "xpu"])
def test_accelerators_take_bf16_unmeasured(device, probe):
    fake = probe(1, 100)
    assert fast_dtype(device) == BF16
    assert compute_dtype(device, 1) == compute_dtype(device, 12_000_000_000) == BF16
    assert fake.calls == []


@pytest.mark.parametrize(("half", "large"), [(100, FP32), (0.1, BF16)])
def test_small_models_run_in_fp32_on_a_cpu_and_large_ones_in_the_fast_format(half, large, probe):
    probe(1, half)
    assert compute_dtype("cpu", 1) == compute_dtype("cpu", 100_000_000) == FP32
    assert compute_dtype("cpu", 100_000_001) == large


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_probe_gives_seconds(dtype):
    assert 0 < dtypes._probe_seconds(dtype, rows=4, repeats=2) < 60


def test_the_probe_runs_in_one_thread_and_gives_the_others_back(monkeypatch):
    before, product, seen = torch.get_num_threads(), dtypes.F.linear, []
    monkeypatch.setattr(dtypes.F, "linear", lambda *given: (seen.append(torch.get_num_threads()), product(*given)))
    torch.set_num_threads(3)
    try:
        dtypes._probe_seconds(FP32, rows=4, repeats=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [1] * 3


@pytest.mark.parametrize("dtype", [torch.float16, BF16, FP32])
def test_only_fp16_is_clamped_and_nan_stays(dtype):
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0], dtype=dtype)
    clamped = dtypes.clamp_to_range(x)
    expected = [65504.0, -65504.0] if dtype == torch.float16 else [float("inf"), -float("inf")]
    assert clamped[:2].tolist() == expected
    assert clamped[2].isnan()
    assert clamped[3] == 1


def test_cards_without_bf16_take_fp16(monkeypatch, probe):
    probe(1, 100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert fast_dtype("cuda") == torch.float16


def test_this_machine_has_an_answer():
    assert fast_dtype("cpu") in (BF16, FP32)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu", 0)])
def test_training_multiplies_in_the_faster_type(monkeypatch, dtype, device):
    monkeypatch.setattr(dtypes, "_fast_dtype", lambda kind: dtype)
    with mixed_precision(device):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == FP32
