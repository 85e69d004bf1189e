"""``python -m flux inspect``: what model files are, from their headers alone."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..pipelines.library import given_files, model_files_in
from ..pipelines.modules import parameter_shapes
from ..specs.fit import faults_between
from ..weights.checkpoints import FilePart, formats_of, read_parts
from ..weights.readers.sharded import index_in
from ..weights.sources import Checkpoint, open_checkpoint
from .console import fault, say, table

__all__ = ["describe", "human_bytes", "run", "summary"]

UNKNOWN = "of no kind that is known here"
NAMES_SHOWN = 5  # of tensors in a file that is not known
LABEL_WIDTH = 12
KILO = 1000
HEAD = ("FILE", "WHAT", "STORED AS", "NAMES", "SIZE")
MINOR_SHARE = 0.05  # of the numbers, from which on a format is named in the table


def run(arguments: argparse.Namespace) -> int:
    """Describe every file, and which do not fit the transformer among them; 2 if one of them cannot be read."""
    paths = list(_expanded(arguments.files))
    described = [_described(path) for path in paths]
    good = [facts for facts in described if "error" not in facts]
    misfits = _misfits(paths)
    if arguments.json:
        said = [{**facts, "does_not_fit": misfits.get(facts["file"], [])} for facts in described]
        say(json.dumps(said, indent=2))
    elif len(good) == 1:
        say(_as_text(good[0]))
    elif good:
        remarks = [sentence for sentences in misfits.values() for sentence in sentences]
        say("\n".join((*_as_table(good), *(("", *map(_printable, remarks)) if remarks else ()))))
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


def _misfits(paths: Sequence[Path]) -> dict[str, list[str]]:
    """Why files do not fit the transformer among them, by its path; empty unless there is exactly one."""
    given = given_files(paths)
    transformers = [own for own in given if own.found.kind == "transformer"]
    if len(transformers) != 1:
        return {}
    return {str(transformers[0].path): faults_between(transformers[0], [o for o in given if o is not transformers[0]])}


def describe(path: Path) -> dict[str, Any]:
    """Everything that a file's header tells.

    Raises:
        UserError: It is not a whole model file.
    """
    checkpoint = open_checkpoint(path)
    parts = read_parts(checkpoint, expected=parameter_shapes)
    return {
        "file": str(path),
        "container": "GGUF" if checkpoint.is_gguf else "safetensors",
        "files": [str(own) for own in checkpoint.files],
        "what": " and ".join(part.recognised.title for part in parts) or UNKNOWN,
        "parts": [_part_facts(checkpoint, part) for part in parts],
        "tensors": len(checkpoint),
        "parameters": sum(math.prod(source.shape) for source in checkpoint.values()),
        "bytes": checkpoint.nbytes,
        "dtypes": dict(Counter(source.format.name for source in checkpoint.values()).most_common()),
        "formats": formats_of(checkpoint),
        "metadata": sorted(checkpoint.metadata),
        **({} if parts else {"first_tensors": sorted(checkpoint)[:NAMES_SHOWN]}),
    }


def summary(facts: dict[str, Any]) -> str:
    """One line of what ``describe`` found."""
    return f"{facts['what']}, {_stored_as(facts)}, {human_bytes(facts['bytes'])}"


def _described(path: Path) -> dict[str, Any]:
    try:
        return describe(path)
    except UserError as error:
        return {"file": str(path), "error": str(error)}
    except OSError as error:  # of a name that no file can have
        return {"file": str(path), "error": f"{path}: {error.strerror}; check the name"}


def _part_facts(checkpoint: Checkpoint, part: FilePart) -> dict[str, Any]:
    found = part.recognised
    return {
        "kind": part.kind,
        "title": found.title,
        "variant": None if found.spec is None else found.spec.name,
        "runs": found.runs and part.fault is None,
        "layout": None if part.layout is None else part.layout.layout.name,
        "prefix": "" if part.layout is None else part.layout.prefix,
        "formats": formats_of(checkpoint, part),
        "spec": None if found.spec is None else asdict(found.spec),
        "notes": list(found.notes),
        "fault": part.fault,
    }


def _as_table(described: Sequence[dict[str, Any]]) -> list[str]:
    names = _short_names([facts["file"] for facts in described])
    rows = [
        (
            _printable(name),
            _printable(facts["what"]),
            _stored_as(facts),
            ", ".join(dict.fromkeys(part["layout"] for part in facts["parts"] if part["layout"])) or "-",
            human_bytes(facts["bytes"]),
        )
        for name, facts in zip(names, described, strict=True)
    ]
    remarks = [
        f"{_printable(name)}: {_printable(remark)}"
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


def _stored_as(facts: dict[str, Any]) -> str:
    """The formats that most of a file's numbers are stored in."""
    formats, total = facts["formats"], max(1, facts["parameters"])
    major = [name for name, count in formats.items() if count >= MINOR_SHARE * total] or list(formats)[:1]
    text = " + ".join(major) or "nothing"
    return f"{facts['container']} {text}" if facts["container"] == "GGUF" else text


def _as_text(facts: dict[str, Any]) -> str:
    lines = [facts["file"]]

    def row(label: str, value: object) -> None:
        lines.append(f"  {label:<{LABEL_WIDTH}}{_printable(str(value))}")

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
    row("stored as", _stored_as(facts))
    row("parameters", f"{facts['parameters']:,}")
    row("bytes", f"{facts['bytes']:,} ({human_bytes(facts['bytes'])})")
    row("metadata", ", ".join(facts["metadata"]) or "none")
    if "first_tensors" in facts:
        row("holds", ", ".join(facts["first_tensors"]) or "no tensor")
    return "\n".join(lines)


def human_bytes(count: float) -> str:
    """Bytes in the unit that gives one to three digits before the point, in steps of 1000."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= KILO and len(units) > 1:
        count /= KILO
        del units[0]
    return f"{count:.0f} bytes" if units[0] == "bytes" else f"{count:.1f} {units[0]}"


def _plain(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _printable(text: str) -> str:
    """The text without characters that would steer a terminal; names in a file are anybody's."""
    return "".join(c if c.isprintable() else "?" for c in text)
