"""``python -m flux inspect``: what model files are, from their headers alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..pipelines.describe import describe, human_bytes, printable, stored_as
from ..pipelines.layout import table
from ..pipelines.library import given_files, model_files_in
from ..specs.fit import faults_between
from ..weights.readers.sharded import index_in
from .console import fault, say

__all__ = ["run"]

LABEL_WIDTH = 12
HEAD = ("FILE", "WHAT", "STORED AS", "NAMES", "SIZE")


def run(arguments: argparse.Namespace) -> int:
    """Describe every file, and which do not fit the transformer among them; 2 if one of them cannot be read."""
    paths = list(_expanded(arguments.files))
    described = [_described(path) for path in paths]
    good = [facts for facts in described if "error" not in facts]
    misfits = _misfits(good)
    if arguments.json:
        said = [{**facts, "does_not_fit": misfits.get(facts["file"], [])} for facts in described]
        say(json.dumps(said, indent=2))
    elif len(good) == 1:
        say(_as_text(good[0]))
    elif good:
        remarks = [sentence for sentences in misfits.values() for sentence in sentences]
        say("\n".join((*_as_table(good), *(("", *map(printable, remarks)) if remarks else ()))))
    faults = [facts["error"] for facts in described if "error" in facts]
    for sentence in faults:
        fault(sentence)
    return 2 if faults else 0


def _expanded(paths: Sequence[Path]) -> Iterator[Path]:
    """Every file that is named, and all models of a folder that is not a single model."""
    for path in paths:
        try:
            is_one = not path.is_dir() or index_in(path) is not None
        except (UserError, OSError):
            is_one = False
        if is_one:
            yield path
        else:
            yield from model_files_in(path, deep=True) or [path]


def _misfits(described: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Why files do not fit the transformer among several, by its path; empty unless there is exactly one."""
    kinds = [part["kind"] for facts in described for part in facts["parts"]]
    if kinds.count("transformer") != 1 or len(kinds) == 1:
        return {}
    given = given_files(Path(facts["file"]) for facts in described)
    transformer = next((own for own in given if own.found.kind == "transformer"), None)
    if transformer is None:  # one that is not whole
        return {}
    return {str(transformer.path): faults_between(transformer, [own for own in given if own is not transformer])}


def _described(path: Path) -> dict[str, Any]:
    try:
        return describe(path)
    except UserError as error:
        return {"file": str(path), "error": str(error)}
    except OSError as error:  # of a name that no file can have
        return {"file": str(path), "error": f"{path}: {error.strerror}; check the name"}


def _as_table(described: Sequence[dict[str, Any]]) -> list[str]:
    names = _short_names([facts["file"] for facts in described])
    rows = [
        (
            printable(name),
            printable(facts["what"]),
            stored_as(facts),
            ", ".join(dict.fromkeys(part["layout"] for part in facts["parts"] if part["layout"])) or "-",
            human_bytes(facts["bytes"]),
        )
        for name, facts in zip(names, described, strict=True)
    ]
    remarks = [
        f"{printable(name)}: {printable(remark)}"
        for name, facts in zip(names, described, strict=True)
        for remark in _remarks(facts)
    ]
    return [*table(HEAD, rows), *(("", *remarks) if remarks else ())]


def _short_names(paths: Sequence[str]) -> list[str]:
    """File names; whole paths where two are alike."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def _remarks(facts: dict[str, Any]) -> list[str]:
    return [remark for part in facts["parts"] for remark in (*part["notes"], part["fault"]) if remark]


def _as_text(facts: dict[str, Any]) -> str:
    lines = [facts["file"]]

    def row(label: str, value: object) -> None:
        lines.append(f"  {label:<{LABEL_WIDTH}}{printable(str(value))}")

    row("what", facts["what"])
    for part in facts["parts"]:
        row("kind", part["kind"])
        if part["variant"] is not None:
            row("variant", part["variant"])
            row("spec", ", ".join(f"{key} {_plain(value)}" for key, value in part["spec"].items() if key != "name"))
        if part["layout"]:
            row("names", part["layout"] + (f", behind {part['prefix']}" if part["prefix"] else ""))
        for remark in part["notes"]:
            row("note", remark)
        if part["fault"]:
            row("fault", part["fault"])
    if len(facts["files"]) > 1:
        row("files", len(facts["files"]))
    row("tensors", f"{facts['tensors']} ({', '.join(f'{n} {dtype}' for dtype, n in facts['dtypes'].items())})")
    row("stored as", stored_as(facts))
    row("parameters", f"{facts['parameters']:,}")
    row("bytes", f"{facts['bytes']:,} ({human_bytes(facts['bytes'])})")
    row("metadata", ", ".join(facts["metadata"]) or "none")
    if "first_tensors" in facts:
        row("holds", ", ".join(facts["first_tensors"]) or "no tensor")
    return "\n".join(lines)


def _plain(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
