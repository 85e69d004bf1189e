"""The fidelity of storage formats, on one picture."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import fidelity
from benchmarks.fidelity import Fidelity, measure, psnr, relative_error, table
from tests.benchmarks.figures import rows_of


def test_fewer_bits_cost_more_and_fp32_costs_nothing():
    fp32, fp8, q3 = measure(("fp32", "fp8", "gguf:Q3_K"), count=1)
    assert (fp32.weights, fp32.velocity, fp32.psnr, fp32.worst_psnr) == (0.0, 0.0, math.inf, math.inf)
    assert 0 < fp8.weights < 0.05 < q3.weights < 0.3
    assert 0 < fp8.velocity < q3.velocity < 1
    assert 15 < q3.psnr < fp8.psnr < 100
    assert [round(own.packed_bytes, 2) for own in (fp32, fp8, q3)] == [4.0, 1.0, 0.43]
    assert fp32.file_bytes > fp8.file_bytes > q3.file_bytes > q3.packed_bytes


def test_psnr_is_that_of_bytes():
    black = torch.zeros(4, 4, 3, dtype=torch.uint8)
    assert psnr(black, black) == math.inf
    assert psnr(black, black + 255) == 0.0
    assert psnr(black, black + 1) == pytest.approx(20 * math.log10(255))


def test_the_error_of_several_tensors_is_that_of_all_their_numbers():
    reference = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    ours = [torch.tensor([3.0, 0.3]), torch.tensor([[4.4]])]
    assert relative_error(ours, reference) == pytest.approx(0.5 / 5)


def test_the_table_has_a_row_for_each_format(monkeypatch):
    found = Fidelity("fp8", 1.0, 1.094, 0.0263, 0.14, 41.26, math.inf)
    monkeypatch.setattr(fidelity, "measure", lambda names, count: [found])
    report = table(("fp8",))
    row = str(report).splitlines()[-1]
    assert row == "| fp8 | fp8 e4m3fn, a scale for each tensor | 1.00 | 1.09 | 2.6 % | 14 % | 41.3 dB | equal |"
    [figures] = rows_of(report)
    assert (figures["name"], figures["file_bytes"], figures["psnr"]) == ("fp8", 1.094, 41.26)
    assert figures["worst_psnr"] is None
