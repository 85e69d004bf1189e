"""The run of real size, on the smallest models: the same files, stages and sentences."""

from __future__ import annotations

import mmap
import time

import pytest
import torch

from benchmarks.random_files import write_random
from benchmarks.real_size import SAMPLE_SECONDS, Meter, Sizes, main, memory_now, plan
from flux.models.flux1 import Flux1
from flux.pipelines.parts import bind_part, open_transformer
from flux.specs.autoencoder import AUTOENCODERS
from flux.specs.flux1 import FLUX1
from flux.specs.text import CLIP_MINI, T5_MINI

MINI = FLUX1["flux1-mini"]
SMALL = Sizes(transformer=MINI, t5=T5_MINI, clip=CLIP_MINI, autoencoder=AUTOENCODERS["flux1-mini-ae"])
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["fp8", "gguf:Q4_K"])
def test_the_whole_chain_runs_and_tells_times_and_bytes(tmp_path, kind, capsys):
    assert main(["--folder", str(tmp_path), "--format", kind, "--size", "64", "--steps", "2"], SMALL) == 0
    told = capsys.readouterr().out
    for words in ("inspect", "open the transformer", "encode a prompt, 32 tokens", "2 of 2 steps at 64x64", "decode"):
        assert f"| {words}" in told
    assert "GB resident, packed" in told
    assert "of 5 blocks each" in told
    assert "all finite" in told
    assert not list(tmp_path.iterdir())


def test_files_that_are_kept_are_used_again(tmp_path, capsys):
    arguments = ["--folder", str(tmp_path), "--size", "32", "--keep"]
    main(arguments, SMALL)
    assert "| write" in capsys.readouterr().out
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 4
    main(arguments, SMALL)
    assert "| write" not in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_what_is_planned_is_what_is_resident(tmp_path):
    path = tmp_path / "mini.safetensors"
    write_random(path, lambda: Flux1(MINI), "flux1-bfl", "fp8", MINI.title)
    planned = plan(bind_part(path, "transformer"), torch.float32)
    part = open_transformer(path, CPU, torch.float32, keep="packed")
    with part.resident(without=tuple(part.module.modulation_layers())):
        assert planned.resident == part.residency.resident_bytes
    assert planned.file == path.stat().st_size
    assert planned.largest == 4 * 256 * 1792  # linear1 of a single block
    assert planned.modulations == 4 * 256 * 6 * 256
    assert planned.unpacked == 4 * sum(parameter.numel() for parameter in part.module.parameters())


def test_a_stage_sees_memory_that_was_there_for_a_moment():
    meter, size, page = Meter(CPU), 64 << 20, 4096
    before = memory_now()["RssAnon"]
    with meter.stage("holding"):
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
            for place in range(0, size, page):
                held[place] = 1
            until = time.perf_counter() + 5 * SAMPLE_SECONDS
            while time.perf_counter() < until:
                pass
        assert memory_now()["RssAnon"] < before + size // 2
    assert meter.stages[0].anonymous >= before + size // 2
    assert meter.stages[0].seconds > 5 * SAMPLE_SECONDS
