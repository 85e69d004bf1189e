"""How much memory a device has left."""

from __future__ import annotations

import psutil
import torch

__all__ = ["available_bytes"]


def available_bytes(device: torch.device) -> int:
    """Bytes that a new allocation on ``device`` may count on, as the driver or the system says."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for the next taker
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return int(psutil.virtual_memory().available)
