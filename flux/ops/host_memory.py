"""Memory on the host in large pages; that of unpacked weights is lent again when it comes back.

A weight's numbers are needed for one product and let go. To be given 150 MB anew, zeroed page by page, takes the system
as long as decoding them, so that the last block that came back is kept for the next taker until it is dropped.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "Lender", "drop_spare", "empty", "in_large_pages", "into"]

Block = npt.NDArray[np.uint8]

HUGE_PAGES = 1 << 22  # bytes from which NumPy asks Linux for huge pages; smaller memory is torch's own
ALIGNMENT = 64  # bytes; where torch puts its own tensors
MOST_WASTE = 8  # times as large as asked for that a block may be: as FLUX.1's largest matrix to one of its smaller ones
LARGEST_SPARE = 1 << 30  # bytes that are kept at most; all matrices of a double block of FLUX.1 take 0.9 GB in fp32


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for numbers, with whatever stands in it.

    Args:
        shape: Of the numbers.
        dtype: Their type.
        device: Where; only on a CPU is it lent.
    """
    place: Tensor | None = getattr(_wanted, "place", None)
    if place is not None and (place.numel(), place.dtype, place.device) == (math.prod(shape), dtype, device):
        _wanted.place = None
        return place.view(shape)
    return _lender.empty(shape, dtype, device)


@contextmanager
def into(place: Tensor) -> Iterator[None]:
    """Have the next ``empty`` of this thread that asks for as much of the same type give ``place`` inside the block.

    Args:
        place: Memory of any shape.
    """
    _wanted.place = place
    try:
        yield
    finally:
        _wanted.place = None


def in_large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory on the CPU, new and never lent again, that the system need not bring page by small page."""
    return _tensor_in(np.empty(math.prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8), shape, dtype)


def _tensor_in(block: Block, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    skip = -block.ctypes.data % ALIGNMENT
    # Cut by torch: a cut by NumPy would refer to the block and not to a loan.
    return torch.from_numpy(block)[skip : skip + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def drop_spare() -> None:
    """Let go of the memory that is kept for the next taker of weights."""
    _lender.drop()


class Lender:
    """Lends memory, and keeps the largest block that came back for the next taker.

    Blocks come back when objects are destroyed, which may be in the middle of any line of this class: whoever has the
    lock then takes in what came back meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: Block | None = None
        self._back: deque[Block] = deque()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for numbers, with whatever stands in it. What is small or not on a CPU is torch's own."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < HUGE_PAGES:
            return torch.empty(shape, dtype=dtype, device=device)
        return _tensor_in(_Lent.of(self.take(size + ALIGNMENT), self), shape, dtype)

    @property
    def nbytes(self) -> int:
        """Of what is kept."""
        with self._lock:
            self._settle()
            return 0 if self._block is None else self._block.nbytes

    def take(self, size: int) -> Block:
        """The spare block if it is large enough and not far too large, else a new one."""
        with self._lock:
            self._settle()
            block = self._block
            if block is not None and size <= block.nbytes <= MOST_WASTE * size:
                self._block = None
                return block
            if block is not None and block.nbytes < size:
                self._block = None  # the new one takes its place when it comes back, and not beside it until then
        return np.empty(size, np.uint8)

    def give(self, block: Block) -> None:
        """Take a block back. Never waits, for it may be called while this very thread holds the lock."""
        if block.nbytes > LARGEST_SPARE:
            return
        self._back.append(block)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def drop(self) -> None:
        """Let go of what is kept."""
        with self._lock:
            self._back.clear()
            self._block = None

    def _settle(self) -> None:
        """Keep the larger of a block that came back and the spare one."""
        while self._back:
            block = self._back.popleft()
            if self._block is None or self._block.nbytes < block.nbytes:
                self._block = block


_lender = Lender()
_wanted = threading.local()


class _Lent(np.ndarray[Any, np.dtype[np.uint8]]):
    """A block on loan, which goes back when the tensor that was made of it is gone, and all views of it."""

    _of: tuple[Lender, Block] | None = None

    @classmethod
    def of(cls, block: Block, lender: Lender) -> _Lent:
        lent = block.view(cls)
        lent._of = lender, block
        return lent

    def __del__(self) -> None:
        if self._of is not None:
            lender, block = self._of
            lender.give(block)
