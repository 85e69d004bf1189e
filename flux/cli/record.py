"""The record of a run: what made its pictures, to the byte, and how long each stage took."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..images import write_whole
from ..memory.report import RunReport
from ..pipelines.text_to_image import FluxModel, Picture
from ..version import VERSION
from .files import ModelFiles

__all__ = ["Clock", "Record"]

PACKAGES = ("torch", "numpy", "pillow", "tokenizers", "einops")
DIGITS = 3  # of seconds
BLOCK_BYTES = 1 << 20
TOKENIZER_SUFFIXES = (".json", ".txt")


class Clock:
    """Seconds by stage: what passes between two calls belongs to the stage that the second one names.

    Args:
        began: ``time.monotonic()`` at the start.
    """

    def __init__(self, began: float) -> None:
        self.seconds: dict[str, float] = {}
        self._mark = began

    def lap(self, stage: str) -> None:
        """Count the time since the last call to ``stage``."""
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._mark
        self._mark = now


class Record:
    """Collects a run's pictures, and writes them down with all that made them.

    Args:
        files: Of the model.
        model: Opened from them.
        given: What else the run read, by role: pictures, adapters.
        notes: What was done otherwise than asked; may grow until the record is written.
        attention: What the transformer's attention began with, and why.

    Attributes:
        memory: What the stages took beside what was planned; None where that was not asked for.
    """

    def __init__(
        self,
        files: ModelFiles,
        model: FluxModel,
        given: Mapping[str, Path],
        notes: Sequence[str] = (),
        attention: str = "",
    ) -> None:
        self.files, self.model, self.given, self.notes = files, model, dict(given), notes
        self.attention = attention
        self.pictures: list[tuple[Path, Picture]] = []
        self.memory: RunReport | None = None

    def add(self, path: Path, picture: Picture) -> None:
        """Note a picture that was written to ``path``."""
        self.pictures.append((path, picture))

    def write(self, path: Path, seconds: dict[str, float]) -> Path:
        """Write the record as JSON; returns its path.

        Raises:
            UserError: The path cannot be written to.
        """
        text = json.dumps(self._facts(seconds), indent=2, ensure_ascii=False)
        write_whole(path, lambda file: file.write(f"{text}\n".encode()))
        return path

    def _facts(self, seconds: dict[str, float]) -> dict[str, Any]:
        model, cache = self.model, self.model.text.cache
        dtypes = {
            "transformer": model.transformer.dtype,
            "clip": model.text.clip.dtype,
            "t5": model.text.t5.dtype,
            "autoencoder": model.autoencoder.dtype,
        }
        return {
            "versions": _versions(),
            "device": _device_facts(self.model.transformer.device),
            "dtypes": {role: str(dtype).removeprefix("torch.") for role, dtype in dtypes.items()},
            "attention": self.attention,
            "files": _file_facts({**_present(self.files), **self.given}),
            "pictures": [
                {"file": path.name, "sha256": _sha256(path), "seed": picture.seed, "settings": picture.settings}
                for path, picture in self.pictures
            ],
            "seconds": {stage: round(value, DIGITS) for stage, value in seconds.items()},
            **({} if self.memory is None else {"memory": self.memory.as_json()}),
            **({} if cache is None else {"prompt_cache": {"found": cache.found, "encoded": cache.made}}),
            "notes": [*model.transformer.notes, *self.notes],
        }


def _present(files: ModelFiles) -> dict[str, Path]:
    return {role: path for role, path in vars(files).items() if path is not None}


def _versions() -> dict[str, str]:
    return {
        "fluxfoundry": VERSION,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in PACKAGES},
    }


def _device_facts(device: torch.device) -> dict[str, object]:
    if device.type == "cuda":
        return {"device": str(device), "name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {
        "device": str(device),
        "name": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _file_facts(files: Mapping[str, Path]) -> list[dict[str, object]]:
    """Name, size and hash of every file that the run read, by role."""
    roles: dict[str, list[Path]] = {role: _expand(path) for role, path in files.items()}
    return [
        {"role": role, "name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}
        for role, paths in roles.items()
        for path in paths
    ]


def _expand(path: Path) -> list[Path]:
    """A tokenizer's folder as the files in it."""
    return sorted(p for p in path.iterdir() if p.suffix in TOKENIZER_SUFFIXES) if path.is_dir() else [path]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
