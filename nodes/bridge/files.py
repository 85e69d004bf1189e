"""What model files are, told from their headers and remembered as long as a file does not change."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...flux.errors import UserError
from ...flux.pipelines.describe import describe, human_bytes, printable

__all__ = ["describe_file", "inspect_file", "kinds_in", "stamp"]

REMEMBERED = 4096
ARTICLES = ("the ", "a ", "an ")


@dataclass(frozen=True)
class Seen:
    """What was found in a file.

    Attributes:
        kinds: Of its parts; empty where it could not be read.
        short: What it is, in a few words.
        report: All that its header tells, in lines.
    """

    kinds: frozenset[str]
    short: str
    report: str


def describe_file(path: Path) -> str:
    """What a file is, in a few words ("FLUX.1 [dev] diffusion model, GGUF Q4_K"), or what is wrong with it."""
    return look_at(path).short


def inspect_file(path: Path) -> str:
    """All that a file's header tells, in lines."""
    return look_at(path).report


def kinds_in(path: Path) -> frozenset[str]:
    """The kinds of the parts that a file holds; empty where it cannot be read."""
    return look_at(path).kinds


def stamp(path: Path) -> tuple[int, int]:
    """What changes when the file does: its size, and when it was written in nanoseconds; zeros where it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def look_at(path: Path) -> Seen:
    """The file as it is now; its header is read where it changed since the last time."""
    try:
        stat = path.stat()
    except OSError as error:
        return _bad(path, f"{path.name} cannot be read: {error.strerror}")
    return _look(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(REMEMBERED)
def _look(path: Path, size: int, changed: int) -> Seen:
    del size, changed  # only keys
    try:
        facts = describe(path)
    except (UserError, OSError) as error:
        return _bad(path, str(error))
    told = [(bare(part["title"]), _main_format(part["formats"], facts)) for part in facts["parts"]]
    formats = {kept for _, kept in told}
    if len(formats) == 1:
        short = f"{' and '.join(title for title, _ in told)}, {formats.pop()}"
    else:
        short = " and ".join(f"{title}, {kept}" for title, kept in told)
    lines = [path.name, f"what: {short or facts['what']}", *_lines(facts)]
    kinds = frozenset(part["kind"] for part in facts["parts"])
    return Seen(kinds, short or facts["what"], "\n".join(map(printable, lines)))


def _bad(path: Path, sentence: str) -> Seen:
    return Seen(frozenset(), printable(sentence), f"{printable(path.name)}\n{printable(sentence)}")


def _main_format(formats: dict[str, int], facts: dict[str, Any]) -> str:
    """How most of a part's numbers are stored."""
    return _format_title(next(iter(formats), "empty"), facts)


def _format_title(name: str, facts: dict[str, Any]) -> str:
    return f"GGUF {name}" if facts["container"] == "GGUF" else name


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    for part in facts["parts"]:
        if len(facts["parts"]) > 1:
            lines.append(f"part: {bare(part['title'])}, {_main_format(part['formats'], facts)}")
        if part["layout"] is not None:
            lines.append(f"layout: {part['layout']}" + (f" below {part['prefix']}" if part["prefix"] else ""))
        lines += [f"note: {note}" for note in part["notes"]]
        if part["fault"] is not None:
            lines.append(f"amiss: {part['fault']}")
    shares = (
        f"{_format_title(name, facts)} {count / max(facts['parameters'], 1):.1%}"
        for name, count in facts["formats"].items()
    )
    lines += [
        f"formats: {', '.join(shares)}",
        f"numbers: {facts['parameters']:,} in {facts['tensors']} tensors",
        f"bytes: {human_bytes(facts['bytes'])}",
    ]
    if len(facts["files"]) > 1:
        lines.append(f"files: {len(facts['files'])}")
    if facts["metadata"]:
        lines.append(f"metadata: {', '.join(facts['metadata'])}")
    if "first_tensors" in facts:
        lines.append(f"holds: {', '.join(facts['first_tensors']) or 'no tensor'}")
    return lines


def bare(title: str) -> str:
    """A title without its article."""
    return next((title.removeprefix(article) for article in ARTICLES if title.startswith(article)), title)
