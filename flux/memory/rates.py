"""How fast a machine computes and brings weights, measured in a fraction of a second."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from ..ops.pieces import READERS, by_several, copy_bytes
from .exhaustion import is_exhausted
from .plan import Rates

__all__ = ["measure_rates"]

SIDE = {"cpu": 1024}  # of the matrices that are multiplied, by device type
LARGE_SIDE = 8192  # where it is not there: large enough to fill a GPU
COPIED = 256 << 20  # bytes; less stays in a large processor's cache
REPEATS = 3


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """What a device does in a second, measured once: products in a dtype, and bytes that come from a cached file.

    None where a device has no memory left for that, for now.
    """
    try:
        return _measured(device, dtype)
    except RuntimeError as error:
        if not is_exhausted(error):
            raise
        return None


@functools.lru_cache(8)  # of what could be measured
def _measured(device: torch.device, dtype: torch.dtype) -> Rates:
    side = SIDE.get(device.type, LARGE_SIDE)
    x = torch.randn(side, side, generator=torch.Generator(device).manual_seed(0), device=device)
    x = x.to(dtype)  # not of ones, of which a GPU makes more, for it needs less power
    product = _best(device, lambda: x @ x)
    return Rates(bytes=COPIED / _seconds_to_bring(device), operations=2 * side**3 / product)


def _seconds_to_bring(device: torch.device) -> float:
    """Of what takes longer: to read what the system has in its memory, or to bring it from there to the device."""
    is_cuda, is_host = device.type == "cuda", device.type == "cpu"
    cached, stage = (torch.ones(COPIED, dtype=torch.uint8, pin_memory=pin) for pin in (False, is_cuda))
    with by_several(READERS if is_cuda else 1):  # as ``lanes`` do
        read = _best(device, lambda: copy_bytes(stage, cached))
    if is_host:
        return read
    target = torch.empty(COPIED, dtype=torch.uint8, device=device)
    return max(read, _best(device, lambda: target.copy_(stage, non_blocking=True)))


def _best(device: torch.device, work: Callable[[], object]) -> float:
    work()
    best = float("inf")
    for _ in range(REPEATS):
        _settle(device)
        start = time.perf_counter()
        work()
        _settle(device)
        best = min(best, time.perf_counter() - start)
    return best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
