"""What a model file is, in facts: for the command line and for the node that shows them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..specs.recognition import titles_of
from ..weights.checkpoints import FilePart, formats_of, read_parts
from ..weights.sources import Checkpoint, open_checkpoint
from .modules import parameter_shapes

__all__ = ["describe", "human_bytes", "printable", "stored_as", "summary"]

NAMES_SHOWN = 5  # of tensors in a file that is not known
KILO = 1000
MINOR_SHARE = 0.05  # of the numbers, from which on a format is named in a summary


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
        "what": titles_of(part.recognised for part in parts),
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
    return f"{facts['what']}, {stored_as(facts)}, {human_bytes(facts['bytes'])}"


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


def stored_as(facts: dict[str, Any]) -> str:
    """The formats that most of a file's numbers are stored in."""
    formats, total = facts["formats"], max(1, facts["parameters"])
    major = [name for name, count in formats.items() if count >= MINOR_SHARE * total] or list(formats)[:1]
    text = " + ".join(major) or "nothing"
    return f"{facts['container']} {text}" if facts["container"] == "GGUF" else text


def human_bytes(count: float) -> str:
    """Bytes in the unit that gives one to three digits before the point, in steps of 1000."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= KILO and len(units) > 1:
        count /= KILO
        del units[0]
    return f"{count:.0f} bytes" if units[0] == "bytes" else f"{count:.1f} {units[0]}"


def printable(text: str) -> str:
    """The text without characters that would steer a terminal; names in a file are anybody's."""
    return "".join(c if c.isprintable() else "?" for c in text)
