"""``python -m flux inspect``: what model files are, from their headers alone."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..specs.recognise import Recognised, recognise
from ..weights.readers.header import SafetensorsHeader
from .console import fault, say

__all__ = ["describe", "run"]

UNKNOWN = "of no kind that is known here"
NAMES_SHOWN = 5  # of tensors in a file that is not known
LABEL_WIDTH = 12
KILO = 1000


def run(arguments: argparse.Namespace) -> int:
    """Describe every file; the exit code is 2 if one of them cannot be read."""
    described = [_described(path) for path in arguments.files]
    if arguments.json:
        say(json.dumps(described, indent=2))
    else:
        texts = [_as_text(facts) for facts in described if "error" not in facts]
        if texts:
            say("\n\n".join(texts))
    faults = [facts["error"] for facts in described if "error" in facts]
    for sentence in faults:
        fault(sentence)
    return 2 if faults else 0


def describe(path: Path) -> dict[str, Any]:
    """Everything that a file's header tells.

    Raises:
        UserError: It is not a whole safetensors file.
    """
    header = SafetensorsHeader(path)
    parts = recognise(header, path.name, header.metadata)
    return {
        "file": str(path),
        "what": " and ".join(part.title for part in parts) or UNKNOWN,
        "parts": [_part_facts(part) for part in parts],
        "tensors": len(header),
        "parameters": sum(math.prod(entry.shape) for entry in header.values()),
        "bytes": header.nbytes,
        "dtypes": dict(Counter(entry.dtype for entry in header.values()).most_common()),
        "metadata": sorted(header.metadata),
        **({} if parts else {"first_tensors": sorted(header)[:NAMES_SHOWN]}),
    }


def _described(path: Path) -> dict[str, Any]:
    try:
        return describe(path)
    except UserError as error:
        return {"file": str(path), "error": str(error)}
    except OSError as error:  # of a name that no file can have
        return {"file": str(path), "error": f"{path}: {error.strerror}; check the name"}


def _part_facts(part: Recognised) -> dict[str, Any]:
    return {
        "kind": part.kind,
        "title": part.title,
        "variant": None if part.spec is None else part.spec.name,
        "prefix": part.prefix,
        "spec": None if part.spec is None else asdict(part.spec),
        "notes": list(part.notes),
    }


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
        if part["prefix"]:
            row("prefix", part["prefix"])
        for remark in part["notes"]:
            row("note", remark)
    row("tensors", f"{facts['tensors']} ({', '.join(f'{n} {dtype}' for dtype, n in facts['dtypes'].items())})")
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
