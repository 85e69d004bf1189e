"""What a device is able to do."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["capability", "standing_for", "type_of"]

META = "meta"


class _Own(threading.local):
    """What the meta device stands for in this thread."""

    device = META


_own = _Own()


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Have the meta device be able to do what another one is inside the block: what runs there is to be foreseen."""
    before, _own.device = _own.device, device
    try:
        yield
    finally:
        _own.device = before


def type_of(device: torch.device) -> str:
    """A device's type; of the meta device that of the one which it stands for."""
    return torch.device(_own.device).type if device.type == META else device.type


def capability(device: str) -> tuple[int, int]:
    """NVIDIA's number of a GPU's generation, as (8, 9) for Ada Lovelace; (0, 0) of any other device."""
    return _capability(_own.device if device == META else device)


@functools.cache
def _capability(device: str) -> tuple[int, int]:
    place = torch.device(device)
    if place.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.get_device_capability(place)
