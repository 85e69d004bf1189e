"""Our step beside diffusers': both run on one file, and give the same."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import transformer

CLOSE = 1e-5


def test_both_steps_give_the_same_and_take_some_time(monkeypatch, tmp_path):
    small = replace(transformer.MIDDLE, hidden=256, heads=2, double_blocks=1, single_blocks=1)
    for name, value in {"MIDDLE": small, "ROWS": 4, "COLUMNS": 4, "TEXT_TOKENS": 8, "REPEATS": 1}.items():
        monkeypatch.setattr(transformer, name, value)
    path = transformer.write_random_weights(small, tmp_path, torch.float32)
    found = transformer.compare_times(path, torch.float32)
    assert found["difference"] <= CLOSE
    assert min(found["fluxfoundry"], found["diffusers"], found["share"]) > 0
