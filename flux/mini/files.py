"""Where the embedded models' files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.control_lora import ControlLora, read_control_lora
from ..pipelines.parts import open_autoencoder, open_transformer
from ..pipelines.prompts import open_text_encoders
from ..pipelines.redux import ReduxEncoder, open_redux_encoder
from ..pipelines.text_to_image import FluxModel

__all__ = [
    "CONTROL_LORAS", "FOLDER", "GUIDED", "GUIDED_FILES", "MINI", "MINI_CANNY", "MINI_DEPTH", "MINI_FILL",
    "MINI_KONTEXT", "MINI_REDUX", "MINI_SCHNELL", "REDUX_MINI_FILE", "SIGLIP_MINI_FILE", "MiniFiles",
    "open_control_lora", "open_mini", "open_redux_mini",
]  # fmt: skip

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
MINI_FILL = MiniFiles(FOLDER / "flux1-fill-mini.gguf")
MINI_CANNY = MiniFiles(FOLDER / "flux1-canny-mini.gguf")
MINI_DEPTH = MiniFiles(FOLDER / "flux1-depth-mini.gguf")
MINI_KONTEXT = MiniFiles(FOLDER / "flux1-kontext-mini.gguf")
MINI_REDUX = MiniFiles(FOLDER / "flux1-mini-redux.gguf")  # which heeds what the Redux adapter gives
REDUX_MINI_FILE = FOLDER / "flux1-redux-mini.safetensors"
SIGLIP_MINI_FILE = FOLDER / "siglip-mini.safetensors"
CONTROL_LORAS = {  # by what they make ``MINI`` follow
    "canny": FOLDER / "flux1-canny-mini-lora.safetensors",
    "depth": FOLDER / "flux1-depth-mini-lora.safetensors",
}
GUIDED = {  # by what guides them
    "fill": MINI_FILL, "canny": MINI_CANNY, "depth": MINI_DEPTH, "kontext": MINI_KONTEXT, "redux": MINI_REDUX,
}  # fmt: skip
GUIDED_FILES = (
    *(files.transformer for files in GUIDED.values()),
    *CONTROL_LORAS.values(),
    REDUX_MINI_FILE,
    SIGLIP_MINI_FILE,
)


def open_mini(files: MiniFiles = MINI, device: str = "cpu", dtype: torch.dtype | None = None) -> FluxModel:
    """Open an embedded model."""
    place = torch.device(device)
    return FluxModel(
        open_transformer(files.transformer, place, dtype),
        open_text_encoders(files.clip, files.t5, files.tokenizer, files.tokenizer, place, dtype),
        open_autoencoder(files.autoencoder, place, dtype),
    )


def open_redux_mini(device: str = "cpu", dtype: torch.dtype | None = None) -> ReduxEncoder:
    """Open the embedded Redux adapter with its vision tower."""
    return open_redux_encoder(SIGLIP_MINI_FILE, REDUX_MINI_FILE, torch.device(device), dtype)


def open_control_lora(kind: str) -> ControlLora:
    """Open an embedded control LoRA, which goes onto ``MINI``; ``kind`` is a key of ``CONTROL_LORAS``."""
    return read_control_lora(CONTROL_LORAS[kind])
