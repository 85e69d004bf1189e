"""Bytes that several threads bring into memory of the host, each a piece of its own.

One thread reads a cached file as fast as it copies memory, which is a fraction of what a GPU's link carries. Beside
work on the CPU more threads would be in its way, so that whoever wants them says so.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import numpy as np
from torch import Tensor

__all__ = ["READERS", "by_several", "copy_bytes", "in_pieces"]

SMALLEST = 4 << 20  # bytes of a piece, for which a thread of its own is worth while
PAGE = 4096  # what pieces begin at
READERS = max(1, min(4, (os.cpu_count() or 1) // 2))  # threads; more of them do not read faster, by far


class _Own(threading.local):
    """How many threads work for this one."""

    count = 1


_own = _Own()


@contextmanager
def by_several(count: int = READERS) -> Iterator[None]:
    """Have what this thread does ``in_pieces`` inside the block done by ``count`` threads."""
    before, _own.count = _own.count, count
    try:
        yield
    finally:
        _own.count = before


def in_pieces(length: int, work: Callable[[int, int], None]) -> None:
    """Do some work on bytes: at once, or piece by piece in several threads, all of which are done at the end.

    Args:
        length: Bytes.
        work: Called with where a piece begins and ends.
    """
    count = min(_own.count, length // SMALLEST)
    if count < 2:
        work(0, length)
        return
    step = -(-length // count // PAGE) * PAGE
    others = [_threads().submit(work, first, min(length, first + step)) for first in range(step, length, step)]
    try:
        work(0, step)
    finally:
        wait(others)
    for other in others:
        other.result()


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """Copy bytes (n,) on the CPU: as reading them from a cached file does, and at its speed."""
    to, of = target.numpy(), source.numpy()
    in_pieces(len(of), lambda first, last: np.copyto(to[first:last], of[first:last]))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, "pieces")
