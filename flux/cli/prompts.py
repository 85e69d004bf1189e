"""``python -m flux prompts``: what ``--prompt-cache`` keeps in a folder, and how it goes again."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from ..errors import MissingFileError
from ..pipelines.describe import human_bytes
from ..pipelines.layout import table
from ..pipelines.prompt_folder import KeptFile, clear_folder, kept_files
from .console import say

__all__ = ["run"]

HEAD = ("ENCODER", "PROMPTS", "SIZE", "LAST USED")
NANOSECONDS = 1e9


def run(arguments: argparse.Namespace) -> int:
    """Tell of a folder's entries, or remove them; returns the exit code."""
    folder: Path = arguments.folder
    if not folder.is_dir():
        raise MissingFileError(f"there is no folder {folder}; give the one that --prompt-cache named")
    if arguments.clear:
        gone = clear_folder(folder)
        facts: dict[str, object] = {"removed": gone.entries, "bytes": gone.nbytes}
        text = f"{gone.entries} kept embeddings were removed, {human_bytes(gone.nbytes)}"
    else:
        entries = list(kept_files(folder))
        facts = {"entries": len(entries), "bytes": sum(entry.nbytes for entry in entries), "encoders": _counts(entries)}
        text = _as_text(entries) if entries else f"nothing is kept in {folder}"
    say(json.dumps(facts, indent=2) if arguments.json else text)
    return 0


def _counts(entries: list[KeptFile]) -> dict[str, int]:
    return dict(sorted(Counter(entry.about for entry in entries).items()))


def _as_text(entries: list[KeptFile]) -> str:
    by_encoder: dict[str, list[KeptFile]] = {}
    for entry in entries:
        by_encoder.setdefault(entry.about, []).append(entry)
    return "\n".join(table(HEAD, [_row(name, own) for name, own in sorted(by_encoder.items())]))


def _row(encoder: str, entries: list[KeptFile]) -> tuple[str, ...]:
    used = time.localtime(max(entry.used for entry in entries) / NANOSECONDS)
    size = human_bytes(sum(entry.nbytes for entry in entries))
    return encoder, str(len(entries)), size, time.strftime("%Y-%m-%d %H:%M", used)
