"""ComfyUI's own FLUX, as the benchmarks run it beside ours: on one file both give the same."""

from __future__ import annotations

from dataclasses import replace

from client import find_comfyui

from benchmarks import transformer
from benchmarks.transformer import COMFYUI, difference, measure, runners, write_files

CLOSE = 1e-5
SMALL = replace(transformer.MIDDLE, hidden=512, heads=4, double_blocks=1, single_blocks=2)


def test_the_hosts_own_model_gives_what_ours_gives(monkeypatch, tmp_path):
    for name, value in {"ROWS": 4, "COLUMNS": 4, "TEXT_TOKENS": 8}.items():
        monkeypatch.setattr(transformer, name, value)
    monkeypatch.setenv("COMFYUI_PATH", str(find_comfyui()))
    ours, theirs = runners()[COMFYUI]
    found = measure(write_files(SMALL, tmp_path), (ours, theirs), rounds=1, repeats=1)
    assert difference(found[ours], found[theirs]) <= CLOSE
    assert min(found[ours].step, found[theirs].step, found[ours].start, found[theirs].start) > 0
    assert found[ours].torch == found[theirs].torch
