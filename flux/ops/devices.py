"""What a device is able to do."""

from __future__ import annotations

import functools

import torch

__all__ = ["capability"]


@functools.cache
def capability(device: str) -> tuple[int, int]:
    """NVIDIA's number of a GPU's generation, as (8, 9) for Ada Lovelace; (0, 0) of any other device."""
    place = torch.device(device)
    if place.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.get_device_capability(place)
