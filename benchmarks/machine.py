"""On what machine figures are taken, and what a process takes of it."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["UNLIKE_USERS", "peak_resident", "processor"]

KIB = 1024
UNLIKE_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # set by ``make``; users have glibc's own


def processor() -> str:
    """The processor's name, as the system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_resident() -> int:
    """Bytes of this process's peak resident set (Linux: a child's ``ru_maxrss`` would begin at its parent's)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * KIB
