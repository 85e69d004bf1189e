"""Memory on the host for what is large and soon let go: in large pages, and lent again when it comes back.

A weight's numbers are needed for one product, a layer's widest result for one block. To be given 150 MB anew, zeroed
page by page, takes the system as long as decoding them, so that the largest blocks that came back are kept for the next
takers until they are dropped: two, for a weight and the result that is made with it.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["drop_spare", "empty"]

Block = npt.NDArray[np.uint8]

HUGE_PAGES = 1 << 22  # bytes from which NumPy asks Linux for huge pages; smaller memory is torch's own
ALIGNMENT = 64  # bytes; where torch puts its own tensors
MOST_WASTE = 2  # times as large as asked for that a block may be, for the taker may keep it
MOST_SPARE = 2  # blocks that are kept
LARGEST_SPARE = 1 << 29  # bytes that are kept at most; FLUX.1's largest matrix takes half of it in fp32


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for numbers, with whatever stands in it.

    Args:
        shape: Of the numbers.
        dtype: Their type.
        device: Where; only on a CPU is it lent.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGES:
        return torch.empty(shape, dtype=dtype, device=device)
    lent = _Lent.of(_spare.take(size + ALIGNMENT))
    skip = -lent.ctypes.data % ALIGNMENT
    # Cut by torch: a cut by NumPy would refer to the block and not to the loan.
    return torch.from_numpy(lent)[skip : skip + size].view(dtype).view(shape)


def drop_spare() -> None:
    """Let go of the memory that is kept for the next takers."""
    _spare.drop()


class _Spare:
    """The blocks that are not lent, the smallest first.

    Blocks come back when objects are destroyed, which may be in the middle of any line of this class: whoever has the
    lock then takes in what came back meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[Block] = []
        self._back: deque[Block] = deque()

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        with self._lock:
            self._settle()
            return sum(block.nbytes for block in self._blocks)

    def take(self, size: int) -> Block:
        """The smallest spare block that is large enough and not far too large, else a new one."""
        with self._lock:
            self._settle()
            for place, block in enumerate(self._blocks):
                if size <= block.nbytes <= MOST_WASTE * size:
                    return self._blocks.pop(place)
        return np.empty(size, np.uint8)

    def give(self, block: Block) -> None:
        """Take a block back. Never waits, for it may be called while this very thread holds the lock."""
        self._back.append(block)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def drop(self) -> None:
        with self._lock:
            self._back.clear()
            self._blocks = []

    def _settle(self) -> None:
        """Keep the largest of the blocks that came back and the spare ones, as far as they may be kept."""
        while self._back:
            left = LARGEST_SPARE
            kept: list[Block] = []
            for own in sorted((self._back.popleft(), *self._blocks), key=len, reverse=True):
                if len(kept) < MOST_SPARE and own.nbytes <= left:
                    left -= own.nbytes
                    kept.append(own)
            self._blocks = kept[::-1]


_spare = _Spare()


class _Lent(np.ndarray[Any, np.dtype[np.uint8]]):
    """A block on loan, which goes back when the tensor that was made of it is gone, and all views of it."""

    _block: Block | None = None

    @classmethod
    def of(cls, block: Block) -> _Lent:
        lent = block.view(cls)
        lent._block = block
        return lent

    def __del__(self) -> None:
        if self._block is not None:
            _spare.give(self._block)
