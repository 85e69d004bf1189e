"""Which tables are printed, and kept."""

from __future__ import annotations

import json

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.readme import TITLES
from benchmarks.report import Report, verdict

SLOW = (
    "fidelity", "decoding", "prompts", "guided", "transformer", "batches", "streaming", "planned", "step_cache",
    "compiled",
)  # fmt: skip


@pytest.fixture(autouse=True)
def tables(monkeypatch, tmp_path):
    """Every table a word."""
    for module in ("startup", "opening", *SLOW):
        report = Report(f"table of {module}", {"rows": [module]})
        monkeypatch.setattr(getattr(benchmarks, module), "table", lambda *_, report=report: report)
    monkeypatch.setattr(benchmarks, "embedded", lambda: Report("table of embedded", {"rows": ["embedded"]}))
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


def test_the_figures_of_every_table_are_kept_for_programs_too(capsys, tables):
    for name in printed(capsys, "--write"):
        kept = json.loads((tables / f"{name}.json").read_text())
        assert kept == {"environment": benchmarks.environment(), "rows": [name]}


def test_a_bar_that_is_missed_is_told_by_the_exit_code(capsys, monkeypatch):
    monkeypatch.setattr(benchmarks.batches, "table", lambda: Report(f"| 4 | {verdict(holds=False)} |", {}))
    assert benchmarks.main(["batches", "planned"]) == 1
    assert capsys.readouterr().err == "a bar is missed in: batches\n"
