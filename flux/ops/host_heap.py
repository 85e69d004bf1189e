"""The C library's heap on the host: while a model runs, what its layers let go is kept for the next ones.

glibc gives a large block back to the system as soon as it is freed, and the system zeroes it anew, page by page, for
the next layer, which asks for the same size, in every step. Other libraries, and other systems, have ways of their own
and are left alone, as is a heap that the user has set up.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["keeping_freed_memory"]

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of settings in glibc's malloc.h
KEPT = 1 << 30  # bytes; a block of less is from the heap, and so much may be free at the heap's end
USUAL_MMAP, USUAL_TRIM = 32 << 20, 64 << 20  # bytes; where glibc's own thresholds come to stand by themselves
SET_BY_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@dataclass(frozen=True)
class Heap:
    """glibc's ``mallopt`` and ``malloc_trim``."""

    set_option: Callable[[int, int], int]
    trim: Callable[[int], int]

    def keep(self) -> None:
        """Give nothing back from now on, but for very large blocks."""
        self.set_option(MMAP_THRESHOLD, KEPT)
        self.set_option(TRIM_THRESHOLD, KEPT)

    def give_back(self) -> None:
        """Do as usual again, and give back what is free."""
        self.set_option(MMAP_THRESHOLD, USUAL_MMAP)
        self.set_option(TRIM_THRESHOLD, USUAL_TRIM)
        self.trim(0)


@functools.cache
def _heap() -> Heap | None:
    """The heap of glibc; None with another library, or where a user has settings of their own."""
    if any(name in os.environ for name in SET_BY_USERS):
        return None
    try:
        library = ctypes.CDLL(None)
        if not library.gnu_get_libc_version:
            return None
        return Heap(library.mallopt, library.malloc_trim)
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library without a name
        return None


class _Keeping:
    """How many want freed memory kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    @contextmanager
    def one_more(self, heap: Heap) -> Iterator[None]:
        with self._lock:
            self._count += 1
            if self._count == 1:
                heap.keep()
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if self._count == 0:
                    heap.give_back()


_keeping = _Keeping()


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Keep freed memory for further use inside the block; at the end of the last of such blocks it goes back."""
    heap = _heap()
    if heap is None:
        yield
        return
    with _keeping.one_more(heap):
        yield
