"""The parts of a run, bound to their files: transformer, text encoders, autoencoder.

Opening a part reads headers only; its weights come when a stage needs them and go when it is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from ..errors import FileError
from ..memory.residency import Residency, Watch
from ..models.autoencoder import Autoencoder
from ..models.flux1 import Flux1
from ..models.text.clip import ClipText
from ..models.text.t5 import T5Encoder
from ..ops.dtypes import compute_dtype, fast_dtype
from ..ops.layers import on_meta
from ..specs.autoencoder import AutoencoderSpec
from ..specs.flux1 import Flux1Spec
from ..specs.recognise import Recognised, recognise_kind
from ..specs.text import ClipTextSpec, T5Spec
from ..weights.readers.safetensors import DTYPES, SafetensorsFile, TensorEntry

__all__ = [
    "Part", "open_autoencoder", "open_clip", "open_t5", "open_transformer",
]  # fmt: skip

Spec = TypeVar("Spec")
Module = TypeVar("Module", bound=nn.Module)

ALIASES = ((".scale", ".weight"), ("shared.weight", "encoder.embed_tokens.weight"))  # ours, and another name for it
IGNORED_ENDINGS = (".position_ids", "text_projection.weight", "encoder.embed_tokens.weight", "logit_scale")
SCALE_ENDINGS = ("scaled_fp8", ".scale_weight", ".scale_input", ".weight_scale", ".input_scale", ".comfy_quant")
SHOWN = 3  # names that a message lists


class Part(Generic[Spec, Module]):
    """A spec, its module on the meta device, and the weights' residency."""

    def __init__(self, spec: Spec, module: Module, residency: Residency, path: Path, notes: tuple[str, ...]) -> None:
        self.spec, self.module, self.residency, self.path, self.notes = spec, module, residency, path, notes

    @property
    def device(self) -> torch.device:
        return self.residency.device

    @property
    def dtype(self) -> torch.dtype:
        return self.residency.dtype

    @contextmanager
    def resident(self, without: tuple[str, ...] = (), watch: Watch | None = None) -> Iterator[Module]:
        """Have the weights in memory inside the block, except those below the prefixes ``without``.

        ``watch`` hears of each weight on its way in, and may raise to stop.
        """
        try:
            self.residency.load(without, watch)
            yield self.module
        finally:
            self.residency.release()


def open_transformer(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> Part[Flux1Spec, Flux1]:
    """Open a FLUX.1 transformer file.

    Args:
        path: A safetensors file in Black Forest Labs' names, with or without a prefix.
        device: Where it will run.
        dtype: Of its weights there; chosen by the device when None.

    Raises:
        UserError: The file is missing, damaged, or something else.
    """
    file, found = _recognised(path, "transformer")
    assert isinstance(found.spec, Flux1Spec)
    return _bind(found.spec, Flux1, file, found, device, dtype)


def open_autoencoder(
    path: Path, device: torch.device, dtype: torch.dtype | None = None
) -> Part[AutoencoderSpec, Autoencoder]:
    """Open a FLUX.1 autoencoder file; see ``open_transformer``. It runs in fp32 where others run in fp16."""
    if dtype is None and fast_dtype(device) == torch.float16:
        dtype = torch.float32  # FLUX.1's activations leave fp16's range
    file, found = _recognised(path, "autoencoder")
    assert isinstance(found.spec, AutoencoderSpec)
    return _bind(found.spec, Autoencoder, file, found, device, dtype)


def open_clip(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> Part[ClipTextSpec, ClipText]:
    """Open a CLIP text encoder file; see ``open_transformer``."""
    file, found = _recognised(path, "clip")
    assert isinstance(found.spec, ClipTextSpec)
    return _bind(found.spec, ClipText, file, found, device, dtype)


def open_t5(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> Part[T5Spec, T5Encoder]:
    """Open a T5 encoder file; see ``open_transformer``."""
    file, found = _recognised(path, "t5")
    assert isinstance(found.spec, T5Spec)
    return _bind(found.spec, T5Encoder, file, found, device, dtype)


def _recognised(path: Path, kind: str) -> tuple[SafetensorsFile, Recognised]:
    file = SafetensorsFile(path)
    return file, recognise_kind(kind, file, path.name, file.metadata)


def _bind(
    spec: Spec,
    build: Callable[[Spec], Module],
    file: SafetensorsFile,
    found: Recognised,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Part[Spec, Module]:
    with on_meta():
        module = build(spec)
    module.eval()
    names = match_names(module, file, found.prefix, file.path.name)
    chosen = dtype or compute_dtype(device, sum(p.numel() for p in module.parameters()))
    residency = Residency(module, names, file.read, device=device, dtype=chosen, label=file.path.name)
    return Part(spec, module, residency, file.path, found.notes)


def match_names(module: nn.Module, file: Mapping[str, TensorEntry], prefix: str, label: str) -> dict[str, str]:
    """For each parameter of ``module`` the name of its tensor in ``file``.

    Raises:
        FileError: A parameter has no tensor, or one of another shape or of whole numbers, or a tensor below the prefix
            belongs to none.
    """
    names: dict[str, str] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    packed: list[str] = []
    for name, parameter in module.named_parameters():
        choices = [name, *(name.removesuffix(ours) + theirs for ours, theirs in ALIASES if name.endswith(ours))]
        found = next((prefix + c for c in choices if prefix + c in file), None)
        if found is None:
            missing.append(name)
            continue
        names[name] = found
        if file[found].dtype in DTYPES and not DTYPES[file[found].dtype].is_floating_point:
            packed.append(f"{found} as {file[found].dtype}")
        if tuple(file[found].shape) != tuple(parameter.shape):
            misshapen.append(f"{found} {list(file[found].shape)} in place of {list(parameter.shape)}")
    taken = set(names.values())
    unknown = [n for n in file if n.startswith(prefix) and n not in taken and not n.endswith(IGNORED_ENDINGS)]
    scales = [n for n in unknown if n.endswith(SCALE_ENDINGS)]
    whole, plain = "use a whole file of this model in its own layout", "use the model's bf16 release"
    for fault, listed, way_out in (
        ("stores numbers with scales (scaled fp8 or fp4), which this version does not unpack", scales, plain),
        ("lacks tensors", missing, whole),
        ("has unknown tensors", unknown, whole),
        ("has tensors of another shape", misshapen, whole),
        ("stores whole numbers, which this version does not unpack", packed, plain),
    ):
        if listed:
            shown = ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")
            raise FileError(f"{label} {fault}: {shown}; {way_out}")
    return names
