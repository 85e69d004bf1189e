"""Which tables are printed, and kept."""

from __future__ import annotations

import json

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.readme import TITLES
from benchmarks.report import Report

SLOW = (
    "fidelity", "decoding", "prompts", "guided", "transformer", "batches", "streaming", "planned", "step_cache",
    "compiled",
)  # fmt: skip


@pytest.fixture(autouse=True)
def tables(monkeypatch, tmp_path):
    """Every table a word."""
    for module in ("startup", "opening", *SLOW):
        monkeypatch.setattr(getattr(benchmarks, module), "table", lambda *_, module=module: f"table of {module}")
    monkeypatch.setattr(benchmarks, "embedded", lambda: "table of embedded")
    monkeypatch.setattr(benchmarks, "TABLES", tmp_path / "tables")
    return tmp_path / "tables"


def printed(capsys, *arguments):
    assert benchmarks.main(list(arguments)) == 0
    return [line.removeprefix("## ") for line in capsys.readouterr().out.splitlines() if line.startswith("## ")]


def test_every_table_is_printed_and_the_slow_ones_are_not_when_it_is_to_be_quick(capsys):
    quick = ["environment", "embedded", "startup", "opening"]
    assert printed(capsys, "--quick") == quick
    assert printed(capsys) == [*quick, *SLOW]


def test_fidelity_is_printed_alone(capsys):
    assert printed(capsys, "--fidelity") == ["fidelity"]


def test_tables_that_are_kept_have_a_title_in_the_readme(capsys, tables):
    printed(capsys, "--write")
    kept = {path.stem for path in tables.iterdir()}
    assert kept - {"environment"} <= set(TITLES)
    assert (tables / "fidelity.md").read_text() == "table of fidelity\n"


def test_figures_are_kept_for_programs_too(capsys, tables, monkeypatch):
    monkeypatch.setattr(benchmarks.transformer, "table", lambda *_: Report("some text", {"rows": [1]}))
    printed(capsys, "--write")
    assert (tables / "transformer.md").read_text() == "some text\n"
    kept = json.loads((tables / "transformer.json").read_text())
    assert kept["rows"] == [1]
    assert "torch" in kept["environment"]
    assert not (tables / "fidelity.json").exists()
