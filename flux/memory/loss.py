"""A device that stops working: how that is told from other faults, and what is said of it."""

from __future__ import annotations

import torch

from ..errors import DeviceLostError
from .exhaustion import is_exhausted

__all__ = ["is_lost", "lost"]

DRIVER_WORDS = (
    "CUDA error",
    "HIP error",
    "XPU error",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_EXECUTION_FAILED",
)

# Of errors that tell of what was asked for, and not of the device.
OTHERWISE = ("no kernel image", "NOT_SUPPORTED", "invalid argument", "invalid configuration", "invalid device ordinal")


def is_lost(error: BaseException) -> bool:
    """Whether an error says that a device, or its driver, failed in what it was given to do."""
    if is_exhausted(error) or not isinstance(error, RuntimeError):
        return False
    if any(word in str(error) for word in OTHERWISE):
        return False
    return isinstance(error, torch.AcceleratorError) or any(word in str(error) for word in DRIVER_WORDS)


def lost(device: torch.device, error: BaseException) -> DeviceLostError:
    """What to raise in place of an error for which ``is_lost``."""
    said = str(error).strip().partition("\n")[0]
    return DeviceLostError(
        f"the device {device} stopped working ({said}): what was on it is gone, and this process may not be able to "
        "use it again; start the program anew, and where that does not help look at the driver's log, at the card's "
        "heat and power, or run on the CPU"
    )
