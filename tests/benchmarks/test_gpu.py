"""The runner for GPUs, on a CPU: the whole way at a tiny size, its time, and its arithmetic."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import denoising
from benchmarks.gpu.__main__ import Watch, run_sections
from benchmarks.gpu.bench import SIZES, Bench
from benchmarks.gpu.found import Bar, Found, cell, table
from benchmarks.gpu.sections import SECTIONS, Section, limit_of

CPU = torch.device("cpu")
CLOSE, FP8_ERROR = 1e-5, 0.15


def read(folder, name):
    return json.loads((folder / f"gpu-{name}.json").read_text())


def test_the_whole_way_is_taken_on_a_cpu(tmp_path, capsys):
    arguments = ["--device", "cpu", "--size", "tiny", "--repeats", "1", "--out", str(tmp_path)]
    assert runner.main(arguments) == 0
    records = {section.name: read(tmp_path, section.name) for section in SECTIONS}
    assert all(record["rows"] and record["environment"]["size"] == "tiny" for record in records.values())
    assert all(record["bars"] == [] for record in records.values()), "no bar is asked of a CPU"
    rows = {row["engine"]: row for row in records["denoising"]["rows"]}
    assert list(rows) == list(denoising.ENGINES)
    assert rows[denoising.DIFFUSERS]["difference"] <= CLOSE
    assert rows[denoising.DIFFUSERS_COMPILED]["difference"] <= CLOSE
    assert rows[denoising.FOUNDRY_COMPILED]["difference"] <= CLOSE
    assert records["denoising"]["notes"] == []
    assert 0 < rows[denoising.FOUNDRY_FP8]["difference"] <= FP8_ERROR
    streamed = [row["streamed"] for row in records["budgets"]["rows"]]
    assert streamed[:4] == sorted(streamed[:4])
    assert streamed[0] == 0 < streamed[3]
    text = (tmp_path / "gpu.md").read_text()
    assert all(section.title in text for section in SECTIONS)
    assert text.strip().splitlines()[-1] in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert runner.main(["--out", str(tmp_path / "none")]) == 0
    assert "no GPU" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_an_engine_that_fails_is_told_and_the_others_go_on(monkeypatch):
    def broken(bench):
        raise RuntimeError("no compiler")

    bench = Bench(CPU, SIZES["tiny"], repeats=1)
    ours = {denoising.FOUNDRY: denoising.ENGINES[denoising.FOUNDRY], denoising.DIFFUSERS_COMPILED: broken}
    monkeypatch.setattr(denoising, "ENGINES", ours)
    found = denoising.denoising(bench)
    assert [row["engine"] for row in found.rows] == [denoising.FOUNDRY]
    assert found.bars
    assert all(bar.value is None and not bar.holds for bar in found.bars)
    assert found.notes == ["diffusers, compiled failed: RuntimeError: no compiler"]
    assert "- diffusers, compiled failed" in table(found, is_judged=False)
    assert "not measured (≤ 0.9: MISSED)" in table(found, is_judged=True)


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_what_there_is_no_time_for_is_skipped_and_what_fails_stops_nothing(tmp_path, capsys):
    clock, seen = Clock(), []
    watch = Watch(100.0, clock)

    def takes(seconds):
        def run(bench):
            seen.append(seconds)
            clock.now += seconds
            return Found([{"taken": seconds}])

        return run

    def fails(bench):
        raise ValueError("it is broken")

    sections = (
        Section("first", "First", 50, takes(70)),
        Section("broken", "Broken", 10, fails),
        Section("long", "Long", 31, takes(31)),
        Section("short", "Short", 30, takes(30)),
    )
    failed = run_sections(Bench(CPU, SIZES["tiny"]), {"device": "a test"}, watch, tmp_path, sections)
    assert failed == ["broken"]
    assert seen == [70, 30]
    assert read(tmp_path, "long")["skipped"] == "Skipped: 30 s were left, and it may take 31."
    assert "ValueError: it is broken" in read(tmp_path, "broken")["failed"]
    assert read(tmp_path, "short")["rows"] == [{"taken": 30}]
    assert "Skipped: 30 s" in capsys.readouterr().out


def test_where_bars_are_asked_a_missed_one_and_a_skipped_section_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "is_judged", True)
    bars = [Bar("one", 0.9, 0.9), Bar("other", 0.91, 0.9), Bar("none", None, 0.9)]
    sections = (
        Section("first", "First", 1, lambda bench: Found([{"taken": 1}], bars)),
        Section("long", "Long", 1e9, lambda bench: Found([{"taken": 1}])),
    )
    wrong = run_sections(Bench(CPU, SIZES["tiny"]), {}, Watch(100.0, Clock()), tmp_path, sections)
    assert wrong == ["other", "none", "long"]


def test_every_section_fits_into_the_time_of_a_run():
    assert sum(section.needs for section in SECTIONS) <= 60 * runner.MINUTES


@pytest.mark.parametrize(("share", "limit"), [(1.0, 100), (0.5, 60), (0.0, 20)])
def test_a_share_is_of_the_blocks(share, limit):
    assert limit_of(100, 20, share) == limit


def test_bars_are_judged_where_they_are_asked():
    found = Found([{"engine": "x", "seconds": 1.5, "peak": 3 << 30, "of the bf16 roofline": 0.5}])
    found.bars += [Bar("one", 0.9, 0.9), Bar("other", 0.91, 0.9)]
    judged = table(found, is_judged=True)
    assert "| x | 1.500 s | 3.00 GiB | 50 % |" in judged
    assert "- one: **0.900** (≤ 0.9: holds)" in judged
    assert "- other: **0.910** (≤ 0.9: MISSED)" in judged
    assert "holds" not in table(found, is_judged=False)
    assert cell("difference", 0.0123) == "0.0123"
    assert cell("batch", 4) == "4"


def test_the_real_size_is_flux1_devs():
    size = SIZES["real"]
    assert (size.spec.name, size.side, size.steps) == ("flux1-dev", 1024, 28)
    assert {512, 2048} <= set(size.sides)
    assert {1, 8} <= set(size.batches)
    assert len(size.cases) >= 12
