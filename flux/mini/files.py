"""Where the embedded model's files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..pipelines.parts import open_autoencoder, open_transformer
from ..pipelines.prompts import open_text_encoders
from ..pipelines.text_to_image import FluxModel

__all__ = ["FOLDER", "MINI", "MINI_SCHNELL", "MiniFiles", "open_mini"]

FOLDER = Path(__file__).resolve().parent / "weights"


@dataclass(frozen=True)
class MiniFiles:
    """The files of one embedded model; all but the transformer are shared."""

    transformer: Path
    autoencoder: Path = FOLDER / "ae.safetensors"
    clip: Path = FOLDER / "clip.safetensors"
    t5: Path = FOLDER / "t5.safetensors"
    tokenizer: Path = FOLDER / "tokenizer.json"


MINI = MiniFiles(FOLDER / "flux1-mini.safetensors")
MINI_SCHNELL = MiniFiles(FOLDER / "flux1-mini-schnell.safetensors")


def open_mini(files: MiniFiles = MINI, device: str = "cpu", dtype: torch.dtype | None = None) -> FluxModel:
    """Open an embedded model."""
    place = torch.device(device)
    return FluxModel(
        open_transformer(files.transformer, place, dtype),
        open_text_encoders(files.clip, files.t5, files.tokenizer, files.tokenizer, place, dtype),
        open_autoencoder(files.autoencoder, place, dtype),
    )
