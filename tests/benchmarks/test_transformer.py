"""Our engine beside the others: all run on one file, each in its process, and give the same."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import engines, transformer
from benchmarks.engines import SCHEDULE, from_tokens, to_tokens
from benchmarks.transformer import Comparison, Measured, Runner, compare, difference, measure, runners, write_files
from flux.sampling.packing import pack
from tests.benchmarks.figures import rows_of

CLOSE = 1e-5
SMALL = replace(transformer.MIDDLE, hidden=256, heads=2, double_blocks=1, single_blocks=1)


@pytest.fixture
def path(monkeypatch, tmp_path):
    for name, value in {"ROWS": 4, "COLUMNS": 6, "TEXT_TOKENS": 8}.items():
        monkeypatch.setattr(transformer, name, value)
    return write_files(SMALL, tmp_path)


def test_both_engines_give_the_same_and_everything_is_measured(path):
    ours, theirs = Runner("fluxfoundry"), Runner("diffusers")
    found = measure(path, (ours, theirs), rounds=2, repeats=3)
    assert difference(found[ours], found[theirs]) <= CLOSE
    for own in found.values():
        assert (len(own.starts), len(own.grown), len(own.steps)) == (2, 2, 3)
        assert min(own.starts) > 0
        assert min(own.grown) > 0
        assert min(own.steps) > 0
        assert own.torch == torch.__version__
    assert found[ours].tables[0] > 0 == found[theirs].tables[0]
    assert found[ours].step < found[ours].start
    assert len(compare(found[ours], found[theirs])) == 3


def test_a_process_that_ends_says_why(path):
    with pytest.raises(RuntimeError, match="invalid choice"):
        measure(path, [Runner("fluxfoundry", arguments=("--dtype", "int3"))], rounds=1, repeats=0)


@pytest.mark.parametrize("dtype", engines.DTYPES)
def test_all_compute_in_the_type_that_is_asked_for(path, dtype):
    options = argparse.Namespace(dtype=dtype, keep="auto", policy="auto")
    opened = engines.our_engine(options)(path, torch.load(path.parent / engines.INPUTS))
    assert opened.step(1.0).shape == (1, 16, 8, 12)
    opened.held.close()


def test_a_step_includes_its_share_of_what_is_made_once():
    own = Measured(starts=[3.0, 1.0, 2.0], grown=[5, 9, 7], tables=[28.0, 56.0, 56.0], steps=[1.0, 2.0, 9.0])
    assert len(SCHEDULE) - 1 == 28
    assert (own.start, own.memory, own.step) == (2.0, 7, 2.0 + 56.0 / 28)


def test_a_bar_that_is_missed_says_so():
    turns = Comparison("step", 3.0, 2.0, 0.98, turns=(0.5, 0.9, 7.0))
    assert turns.ratio == 0.9
    held, missed = Comparison("step", 0.98, 1.0, 0.98), Comparison("step", 0.99, 1.0, 0.98)
    assert held.row("diffusers") == "| diffusers | step | 0.98 s | 1.00 s | **0.980** | ≤ 0.98 | holds |"
    assert missed.row("comfyui").endswith("| **0.990** | ≤ 0.98 | MISSED |")


def test_comfyui_is_there_when_it_is_named(monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    assert list(runners()) == ["diffusers"]
    monkeypatch.setenv("COMFYUI_PATH", "/somewhere")
    monkeypatch.setenv("COMFYUI_PYTHON", "/other/python")
    assert runners()["comfyui"] == (Runner("fluxfoundry", "/other/python"), Runner("comfyui", "/other/python"))
    assert runners()["diffusers"][0].python == sys.executable


def test_tokens_are_those_of_the_engine_and_come_back():
    latents = torch.randn(2, 16, 8, 12)
    assert torch.equal(to_tokens(latents), pack(latents))
    assert torch.equal(from_tokens(to_tokens(latents), 8, 12), latents)


def test_the_table_has_every_bar(monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    for name, value in {"MIDDLE": SMALL, "ROWS": 4, "COLUMNS": 4, "TEXT_TOKENS": 8}.items():
        monkeypatch.setattr(transformer, name, value)
    report = transformer.table(rounds=1, repeats=1)
    rows = rows_of(report)
    assert [row["bar"] for row in rows] == [0.98, 0.5, 0.7]
    assert all(row["ratio"] == row["ours"] / row["theirs"] for row in rows)
    assert report.text.count("| diffusers |") == 3
