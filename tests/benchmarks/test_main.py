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
    quick = ["embedded", "startup", "opening"]
    assert printed(capsys, "--quick") == quick
    assert printed(capsys) == [*quick, *SLOW]


def test_tables_that_are_named_are_printed_alone(capsys):
    assert printed(capsys, "planned", "fidelity") == ["planned", "fidelity"]


def test_a_table_that_is_not_there_is_answered_with_those_that_are(capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["speed"])
    assert "no table speed; there are embedded, startup" in capsys.readouterr().err


def test_tables_that_are_kept_have_a_title_in_the_readme_and_tell_what_they_were_taken_with(capsys, tables):
    printed(capsys, "--write")
    assert {path.stem for path in tables.iterdir()} <= set(TITLES)
    assert (tables / "fidelity.md").read_text() == f"table of fidelity\n\n<sub>{benchmarks.environment()}</sub>\n"


def test_figures_are_kept_for_programs_too(capsys, tables, monkeypatch):
    monkeypatch.setattr(benchmarks.transformer, "table", lambda *_: Report("some text", {"rows": [1]}))
    printed(capsys, "--write")
    assert (tables / "transformer.md").read_text().startswith("some text\n")
    kept = json.loads((tables / "transformer.json").read_text())
    assert kept["rows"] == [1]
    assert "torch" in kept["environment"]
    assert not (tables / "fidelity.json").exists()
