"""Training state on disk: safetensors only, written whole or not at all.

A checkpoint is a flat dict of tensors plus a JSON dict of plain values in the file's metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["load_checkpoint", "pack_optimizer", "save_checkpoint", "unpack_optimizer"]

META_KEY = "fluxfoundry"


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
    """Write tensors and plain values to ``path``, through a temporary name beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(ready, temporary, metadata={META_KEY: json.dumps(dict(meta or {}))})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_checkpoint`` wrote: the tensors, and the plain values.

    Raises:
        FileNotFoundError: It is not there.
        safetensors.SafetensorError: It is cut off, or something else.
    """
    with safe_open(path, "pt") as file:
        meta = json.loads((file.metadata() or {}).get(META_KEY, "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118


def pack_optimizer(optimizer: Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimizer's tensors under flat names: ``<prefix><parameter index>.<state name>``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}{index}.{name}": torch.as_tensor(value)
        for index, entry in state.items()
        for name, value in entry.items()
    }


def unpack_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Give an optimizer back what ``pack_optimizer`` took; its groups keep their present settings."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            index, name = key[len(prefix) :].split(".", 1)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
