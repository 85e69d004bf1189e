"""A whole FLUX.1 model small enough for unit tests, with random weights in files of the real layout.

The transformer is one double and one single block of width 128, "another size" of Foundry Mini to ``recognise``; the
encoders and the autoencoder have the embedded model's sizes. ``write_header_only`` makes files of any names and shapes,
sparse, for what reads headers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from flux.models.autoencoder import Autoencoder
from flux.models.flux1 import Flux1
from flux.models.text.clip import ClipText
from flux.models.text.t5 import T5Encoder
from flux.pipelines.parts import open_autoencoder, open_transformer
from flux.pipelines.prompts import open_text_encoders
from flux.pipelines.text_to_image import FluxModel
from flux.specs.autoencoder import AUTOENCODERS
from flux.specs.flux1 import FLUX1, Flux1Spec
from flux.specs.text import CLIP_MINI, T5_MINI

__all__ = [
    "TINY",
    "TINY_SCHNELL",
    "TOKENIZER",
    "TinyFiles",
    "open_tiny",
    "write_header_only",
    "write_module",
    "write_tiny",
]

TOKENIZER = Path(__file__).resolve().parent.parent / "flux" / "mini" / "weights" / "tokenizer.json"
TINY = replace(FLUX1["flux1-mini"], name="tiny", hidden=128, heads=1, double_blocks=1, single_blocks=1)
TINY_SCHNELL = replace(FLUX1["flux1-mini-schnell"], name="tiny-schnell", hidden=128, heads=1, single_blocks=1)
BITS = {"F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8}


@dataclass(frozen=True)
class TinyFiles:
    """Where ``write_tiny`` put each part."""

    transformer: Path
    clip: Path
    t5: Path
    autoencoder: Path
    tokenizer: Path = TOKENIZER


def write_module(path: Path, module: nn.Module, seed: int = 0, change: Callable[[dict], None] | None = None) -> Path:
    """Fill a module with random numbers that keep its signal's size, and save it as safetensors.

    Args:
        path: The file.
        module: Its parameters give names and shapes.
        seed: Of the numbers.
        change: Called with the tensors by name before they are saved.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            tensors[name] = values * parameter[0].numel() ** -0.5
        else:
            tensors[name] = 0.1 * values + (0.0 if name.endswith("bias") else 1.0)
    if change is not None:
        change(tensors)
    save_file(tensors, path)
    return path


def write_tiny(folder: Path, spec: Flux1Spec = TINY, change: Callable[[dict], None] | None = None) -> TinyFiles:
    """Write every part; ``change`` is applied to the transformer's tensors."""
    return TinyFiles(
        transformer=write_module(folder / "tiny.safetensors", Flux1(spec), 1, change),
        clip=write_module(folder / "clip.safetensors", ClipText(CLIP_MINI), 2),
        t5=write_module(folder / "t5.safetensors", T5Encoder(T5_MINI), 3),
        autoencoder=write_module(folder / "ae.safetensors", Autoencoder(AUTOENCODERS["flux1-mini-ae"]), 4),
    )


def open_tiny(files: TinyFiles, dtype: torch.dtype | None = None) -> FluxModel:
    """Open what ``write_tiny`` wrote."""
    cpu = torch.device("cpu")
    return FluxModel(
        open_transformer(files.transformer, cpu, dtype),
        open_text_encoders(files.clip, files.t5, files.tokenizer, files.tokenizer, cpu, dtype),
        open_autoencoder(files.autoencoder, cpu, dtype),
    )


def write_header_only(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16", metadata: Mapping[str, str] | None = None
) -> Path:
    """A whole safetensors file with these tensors, all zero; sparse, so that it takes no room on the disk."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    return path
