"""How much memory a device has left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil
import torch

__all__ = ["available_bytes"]

CGROUPS = Path("/sys/fs/cgroup")  # where Linux shows what containers and services are confined to
OWN_GROUPS = Path("/proc/self/cgroup")
UNIFIED = ("memory.max", "memory.current", "inactive_file")  # limit, use, and what of the use is files that may go
SPLIT = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")  # the same before version 2


def available_bytes(device: torch.device) -> int:
    """Bytes that a new allocation on ``device`` may count on, as the driver or the system says."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for the next taker
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return min([int(psutil.virtual_memory().available), *_left_to_containers()])


def _left_to_containers() -> Iterator[int]:
    """What the limits leave that this process is under: a container has not all of the machine's memory."""
    for group, names in _groups():
        limit, use, files = names
        try:
            most, taken = (int((group / name).read_text(encoding="ascii")) for name in (limit, use))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):  # no such group seen from here, or "max", for no limit
            continue
        yield max(0, most - taken + int(stat.get(files, 0)))


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The groups that this process is in, each with all above it: a limit of any of them holds."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (CGROUPS / "memory", SPLIT) if controllers else (CGROUPS, UNIFIED)
        own = PurePosixPath(path.lstrip("/"))
        for above in (own, *own.parents):
            yield root / above, names
