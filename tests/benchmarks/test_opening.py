"""The opening of the largest file, on a small one."""

from __future__ import annotations

import pytest

from benchmarks import opening
from benchmarks.opening import Opened, measure, measure_apart, table, write_sparse
from flux.models.flux1 import Flux1
from flux.ops.layers import on_meta
from flux.weights.sources import open_checkpoint
from tests.benchmarks.figures import rows_of
from tests.fixtures.listings import flux1_bfl
from tests.tiny import TINY

SUFFIXES = (".safetensors", ".gguf")
BLOCK = 512  # bytes in which systems count what a file takes


def tiny_shapes():
    with on_meta():
        return {name: tuple(parameter.shape) for name, parameter in Flux1(TINY).named_parameters()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_sparse_file_has_every_tensor_of_the_release_and_takes_no_room(tmp_path, suffix):
    path = write_sparse(tmp_path / f"flux1-dev{suffix}", flux1_bfl())
    checkpoint = open_checkpoint(path)
    assert {name: source.shape for name, source in checkpoint.items()} == flux1_bfl()
    assert checkpoint["double_blocks.0.img_mlp.0.weight"].format.name == "BF16"
    assert path.stat().st_size > 23.8e9
    assert path.stat().st_blocks * BLOCK < 1e6


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_opening_and_inspecting_are_timed_and_cost_little_memory(tmp_path, suffix):
    found = measure(write_sparse(tmp_path / f"tiny{suffix}", tiny_shapes()), repeats=2)
    assert 0 < found.again < 1
    assert 0 < found.inspect_again < 1
    assert 0 <= found.memory < 50e6


def test_a_process_of_its_own_tells_what_it_measured(tmp_path):
    found = measure_apart(write_sparse(tmp_path / "tiny.gguf", tiny_shapes()), repeats=1)
    assert isinstance(found, Opened)
    assert found.first > 0


def test_the_table_has_a_row_for_each_container(monkeypatch):
    monkeypatch.setattr(opening, "measure_apart", lambda path, repeats: Opened(0.1, 0.04, 0.02, 0.01, 11_000_000))
    report = table(tiny_shapes())
    rows = str(report).splitlines()[-2:]
    assert [row.split(",")[0] for row in rows] == ["| safetensors", "| gguf"]
    assert all("| 100 ms | **40 ms** | ≤ 50 ms | **11.0 MB** | ≤ 50 MB | 20 ms | 10 ms |" in row for row in rows)
    figures = rows_of(report)
    assert [row["container"] for row in figures] == ["safetensors", "gguf"]
    for row in figures:
        assert (row["open_cold_seconds"], row["open_seconds"], row["open_bar"]) == (0.1, 0.04, 0.05)
        assert (row["inspect_cold_seconds"], row["inspect_seconds"]) == (0.02, 0.01)
        assert (row["memory_bytes"], row["memory_bar"]) == (11_000_000, 50e6)
