"""How fast a machine computes and brings weights, measured in a fraction of a second."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from .exhaustion import is_exhausted
from .plan import Rates

__all__ = ["measure_rates"]

SIDE = {"cpu": 1024}  # of the matrices that are multiplied, by device type
LARGE_SIDE = 8192  # where it is not there: large enough to fill a GPU
COPIED = 64 << 20  # bytes
REPEATS = 3


@functools.lru_cache(8)
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """Measure once what a device does in a second: products in a dtype, and bytes that come from memory of the host.

    None where a device has no memory left for that.
    """
    try:
        return _measured(device, dtype)
    except RuntimeError as error:
        if not is_exhausted(error):
            raise
        return None


def _measured(device: torch.device, dtype: torch.dtype) -> Rates:
    side = SIDE.get(device.type, LARGE_SIDE)
    x = torch.ones(side, side, dtype=dtype, device=device)
    source = torch.ones(COPIED, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(COPIED, dtype=torch.uint8, device=device)
    product = _best(device, lambda: x @ x)
    copy = _best(device, lambda: target.copy_(source, non_blocking=True))
    return Rates(bytes=COPIED / copy, operations=2 * side**3 / product)


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
