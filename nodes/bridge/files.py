"""What model files are, told from their headers and remembered as long as a file does not change."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

from ...flux.errors import UserError
from ...flux.pipelines.modules import parameter_shapes
from ...flux.weights.checkpoints import FilePart, formats_of, read_parts
from ...flux.weights.sources import Checkpoint, open_checkpoint

__all__ = ["describe_file", "inspect_file", "kinds_in", "stamp"]

REMEMBERED = 4096
UNKNOWN = "of no kind that is known here"
NAMES_SHOWN = 5  # of tensors in a file that is not known
GIGA, MEGA = 1e9, 1e6
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
        checkpoint = open_checkpoint(path)
        parts = read_parts(checkpoint, expected=parameter_shapes)
    except (UserError, OSError) as error:
        return _bad(path, str(error))
    told = [(bare(part.recognised.title), _format(checkpoint, part)) for part in parts]
    formats = {kept for _, kept in told}
    if len(formats) == 1:
        short = f"{' and '.join(title for title, _ in told)}, {formats.pop()}"
    else:
        short = " and ".join(f"{title}, {kept}" for title, kept in told)
    lines = [path.name, f"what: {short or UNKNOWN}", *_facts(checkpoint, parts)]
    return Seen(frozenset(part.kind for part in parts), short or UNKNOWN, "\n".join(map(printable, lines)))


def _bad(path: Path, sentence: str) -> Seen:
    return Seen(frozenset(), printable(sentence), f"{printable(path.name)}\n{printable(sentence)}")


def _format(checkpoint: Checkpoint, part: FilePart) -> str:
    """How most of a part's numbers are stored."""
    own = part if part.plan is not None else None
    return _format_title(next(iter(formats_of(checkpoint, own)), "empty"), checkpoint)


def _format_title(name: str, checkpoint: Checkpoint) -> str:
    return f"GGUF {name}" if checkpoint.is_gguf else name


def _facts(checkpoint: Checkpoint, parts: list[FilePart]) -> list[str]:
    lines = []
    for part in parts:
        if len(parts) > 1:
            lines.append(f"part: {bare(part.recognised.title)}, {_format(checkpoint, part)}")
        if part.layout is not None:
            lines.append(
                f"layout: {part.layout.layout.name}" + (f" below {part.layout.prefix}" * bool(part.layout.prefix))
            )
        lines += [f"note: {note}" for note in part.recognised.notes]
        if part.fault is not None:
            lines.append(f"amiss: {part.fault}")
    numbers = sum(math.prod(source.shape) for source in checkpoint.values())
    formats = ", ".join(
        f"{_format_title(name, checkpoint)} {count / max(numbers, 1):.1%}"
        for name, count in formats_of(checkpoint).items()
    )
    lines += [
        f"formats: {formats}",
        f"numbers: {numbers:,} in {len(checkpoint)} tensors",
        f"bytes: {size_of(checkpoint)}",
    ]
    if len(checkpoint.files) > 1:
        lines.append(f"files: {len(checkpoint.files)}")
    if checkpoint.metadata:
        lines.append(f"metadata: {', '.join(sorted(checkpoint.metadata))}")
    if not parts:
        lines.append(f"holds: {', '.join(sorted(checkpoint)[:NAMES_SHOWN]) or 'no tensor'}")
    return lines


def size_of(checkpoint: Checkpoint) -> str:
    """Bytes in GB, or in MB where they are few."""
    size = checkpoint.nbytes
    return f"{size / GIGA:.1f} GB" if size >= GIGA else f"{size / MEGA:.1f} MB"


def bare(title: str) -> str:
    """A title without its article."""
    return next((title.removeprefix(article) for article in ARTICLES if title.startswith(article)), title)


def printable(text: str) -> str:
    """Text without characters that would steer a terminal; names in a file are anybody's."""
    return "".join(c if c.isprintable() else "?" for c in text)
