"""Work on the CPU in threads of our own, in each of which torch runs alone.

Unpacking is many short operations on what lies in the cache. Torch's own threads meet after each of them and spin
meanwhile: where another process holds a core, that takes ten to fifty times as long. Threads that each take a whole
piece of the work meet once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import get_num_threads, set_num_threads

__all__ = ["Pace", "Span", "share_out", "spans_of"]

Span = tuple[int, int]
Work = Callable[[Iterator[Span]], None]


def spans_of(total: int, step: int) -> list[Span]:
    """Where pieces of ``step`` begin and end; the last may be shorter."""
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def share_out(work: Work, spans: list[Span], threads: int) -> None:
    """Every span done once: each thread takes the next one that is left.

    Args:
        work: Takes spans until none is left; called once in each thread.
        spans: The pieces.
        threads: How many at most; with fewer than two the caller does it all.
    """
    shared = _Shared(spans)
    if threads < 2:
        work(shared)
        return
    is_inference = torch.is_inference_mode_enabled()  # which threads do not inherit, and tensors made in it need

    def run() -> None:
        with torch.inference_mode(is_inference):
            work(shared)

    pool = _pool()
    futures = [pool.submit(run) for _ in range(threads)]
    wait(futures)
    for future in futures:
        future.result()


class _Shared(Iterator[Span]):
    """An iterator that several threads may ask."""

    def __init__(self, spans: list[Span]) -> None:
        self._left, self._lock = iter(spans), threading.Lock()

    def __next__(self) -> Span:
        with self._lock:
            return next(self._left)


_lock = threading.Lock()
_pools: list[ThreadPoolExecutor] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # a child has none of its parent's threads


def _pool() -> ThreadPoolExecutor:
    """As many threads as there are cores, made once."""
    with _lock:
        if not _pools:
            _pools.append(_make_pool(os.cpu_count() or 1))
        return _pools[0]


def _make_pool(count: int) -> ThreadPoolExecutor:
    """Threads in which torch runs alone.

    Torch's setting is each thread's own from the first time that the thread asks for it, and what was set last is what
    further threads begin with: so every thread asks before it sets, and the caller sets its own again at the end.
    """
    before, begun = get_num_threads(), threading.Barrier(count + 1)

    def begin() -> None:
        get_num_threads()
        set_num_threads(1)
        begun.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="unpack", initializer=begin)
    for _ in range(count):
        pool.submit(int)
    begun.wait()
    set_num_threads(before)
    return pool


class Pace:
    """Whether torch's threads are worth having for short operations, by how they did.

    On an idle machine they are a third faster than threads of our own, on a busy one ten times slower and more. So they
    are taken until they were slow, and tried again after a while, a longer one each time that they still are.

    Args:
        slow: Numbers a second below which they count as slow.
    """

    def __init__(self, slow: float) -> None:
        self._slow = slow
        self._wait, self._left = SHORTEST_WAIT, 0

    def together(self) -> bool:
        """Whether to take torch's threads this time."""
        self._left = max(0, self._left - 1)
        return self._left == 0

    def told(self, numbers: int, seconds: float) -> None:
        """Hear how torch's threads did; little work tells nothing."""
        if numbers < TELLING:
            return
        if numbers > self._slow * seconds:
            self._wait = SHORTEST_WAIT
        else:
            self._left, self._wait = self._wait, min(2 * self._wait, LONGEST_WAIT)


TELLING = 1 << 21  # numbers
SHORTEST_WAIT, LONGEST_WAIT = 16, 1024  # times that torch's threads are left alone
