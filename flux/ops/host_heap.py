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
from typing import NamedTuple

__all__ = ["giving_back_freed_memory", "keeping_freed_memory"]

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of settings in glibc's malloc.h
SET_BY_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


class Way(NamedTuple):
    """What becomes of freed memory.

    Attributes:
        mapped_from: Bytes of a block from which it is the system's own, and goes back at once.
        kept_at_end: Bytes that may be free at the heap's end.
    """

    mapped_from: int
    kept_at_end: int


KEEP = Way(16 << 20, 1 << 30)  # of larger ones hardly two are alike, and what they leave free fits nothing else
USUAL = Way(32 << 20, 64 << 20)  # where glibc's own thresholds come to stand by themselves
GIVE_BACK = Way(8 << 20, 8 << 20)  # half of a strip of an autoencoder


@dataclass(frozen=True)
class Heap:
    """glibc's ``mallopt`` and ``malloc_trim``."""

    set_option: Callable[[int, int], int]
    trim: Callable[[int], int]

    def change(self, way: Way) -> None:
        """Do otherwise from now on; what is free is given back first, unless it is to be kept."""
        self.set_option(MMAP_THRESHOLD, way.mapped_from)
        self.set_option(TRIM_THRESHOLD, way.kept_at_end)
        if way is not KEEP:
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
    """How many want freed memory kept, and how many want it given back, who come first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = {GIVE_BACK: 0, KEEP: 0}
        self._way = USUAL

    @contextmanager
    def one_more(self, heap: Heap, way: Way) -> Iterator[None]:
        self._change(heap, way, 1)
        try:
            yield
        finally:
            self._change(heap, way, -1)

    def _change(self, heap: Heap, way: Way, by: int) -> None:
        with self._lock:
            self._wanted[way] += by
            now = next((way for way, count in self._wanted.items() if count), USUAL)
            if now != self._way:
                self._way = now
                heap.change(now)


_keeping = _Keeping()


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Keep freed memory for further use inside the block; at the end of the last of such blocks it goes back."""
    with _wanted(KEEP):
        yield


@contextmanager
def giving_back_freed_memory() -> Iterator[None]:
    """Give freed memory back inside the block, whoever keeps it around: for what makes ever larger tensors.

    None of them fits where a smaller one was, so that kept memory doubled what FLUX.1's decoder takes.
    """
    with _wanted(GIVE_BACK):
        yield


@contextmanager
def _wanted(way: Way) -> Iterator[None]:
    heap = _heap()
    if heap is None:
        yield
        return
    with _keeping.one_more(heap, way):
        yield
