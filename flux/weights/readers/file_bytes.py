"""A file's bytes as tensors: mapped into memory, or read where mapping is slow.

A mapped tensor is a view of the file: it takes no memory of its own, and pages come in as they are used. On network
disks and with some drivers that is many times slower than reading, so the first large tensor of a file is timed both
ways. Tensors of a mapped file must not be written to.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ...errors import FileError, UserError
from ...ops.pieces import in_pieces
from .header import TensorEntry
from .leases import Lease
from .stamps import FileStamp, stamp_of

__all__ = ["ENVIRONMENT", "WAYS", "FileBytes", "MappedTensors"]

logger = logging.getLogger(__name__)

WAYS = ("auto", "map", "read")
ENVIRONMENT = "FLUXFOUNDRY_FILES"  # the one switch: a word of ``WAYS``
PROBE_BYTES = 4 << 20  # of each way, when both are timed
PROBES = 3  # places where they are, all of which must agree that mapping is slow
SLOWER = 8.0  # times; a local disk that has to be waited for is up to four times slower page by page
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
PRIVATE: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE | NO_RESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
    if hasattr(mmap, "MAP_PRIVATE")
    else {"access": mmap.ACCESS_READ}
)
_seeking = threading.Lock()  # where a place in a file is shared
MEASURABLE = 5e-3  # seconds below which a probe says nothing: the file lies in memory already


class FileBytes:
    """The bytes of one file, which is held open from their first use on.

    Args:
        path: The file.
        way: A word of ``WAYS``; the environment's when None, "auto" without one.
        stamp: That the file had when its header was read; what it has at its first use when None.

    Raises:
        UserError: There is no such way.
    """

    def __init__(self, path: Path, way: str | None = None, stamp: FileStamp | None = None) -> None:
        self.path = path
        self.way = way or os.environ.get(ENVIRONMENT) or WAYS[0]
        if self.way not in WAYS:
            raise UserError(f"files can be brought by {', '.join(WAYS)}, but {ENVIRONMENT} is {self.way!r}; set one")
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._map: mmap.mmap | None = None
        self._stamp = stamp
        self._lease: Lease | None = None
        self._holders = 0

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            os.close(self._fd)  # type: ignore[arg-type]

    def tensor(self, start: int, length: int, dtype: torch.dtype, what: str) -> Tensor:
        """Numbers (n,) of ``dtype``, not to be written to.

        Args:
            start: Where the first begins, in bytes.
            length: Of all, in bytes.
            dtype: Their type.
            what: They are, for messages.

        Raises:
            FileError: The file changed since it was opened, or cannot be read any more.
        """
        if length == 0:
            return torch.empty(0, dtype=dtype)
        with self._lock:
            fd = self._open(start + length, what)
            if self.way == "auto" and length >= PROBES * 2 * PROBE_BYTES:
                self.way = self._faster_way(fd, start, length)
            if self.way == "read" or start % dtype.itemsize:
                return self._read(fd, start, length, what).view(dtype)
            if self._map is None:
                self._map = _map(fd)
            if self._map is None:  # a file system without mapping
                self.way = "read"
                return self._read(fd, start, length, what).view(dtype)
            return _view(self._map, start, length, dtype)

    def read_into(self, target: Tensor, start: int, what: str) -> None:
        """Read bytes into memory of the caller's: nothing is mapped, and no page stays.

        Args:
            target: Bytes (n,) on the CPU, side by side, as many as are read.
            start: Where the first is.
            what: They are, for messages.

        Raises:
            FileError: The file changed since it was opened, or cannot be read any more.
        """
        if target.numel():
            with self._lock:
                fd = self._open(start + target.numel(), what)
            self._fill(target, fd, start, what)

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Have others leave the file as it is inside the block, where the system sees to that (``leases``).

        Yields:
            What has to be called from time to time, and before what is mapped is used.

        Raises:
            FileError: The file was changed since it was opened, or is about to be; also from what is yielded.
        """
        with self._lock:
            if self._lease is None:
                self._lease = Lease(self._open(0, "it"), self.path.name)
            self._holders += 1
        try:
            self.check()
            yield self.check
        finally:
            with self._lock:
                self._holders -= 1
                lease = self._lease
                if lease is not None and not self._holders:
                    self._lease = None
                    lease.close()

    def check(self) -> None:
        """Refuse a file that was changed since it was opened, or is about to be.

        Raises:
            FileError: It is.
        """
        self._open(0, "it")

    def want(self, start: int, length: int) -> None:
        """Have a mapped part's pages brought in together, ahead of their use."""
        page = mmap.PAGESIZE
        first = start // page * page
        if self._map is not None and hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED, first, start + length - first)

    def forget(self, start: int, length: int) -> None:
        """Let go of a mapped part's pages; they come in again when they are used. Nothing where nothing is mapped."""
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, (start + length) // page * page
        if self._map is not None and first < last and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _open(self, end: int, what: str) -> int:
        """The open file, checked to be as it was: a map of one that was cut would end the process."""
        try:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            now = stamp_of(self._fd)
        except OSError as error:
            raise FileError(f"{self.path} cannot be read any more: {error.strerror}; is it still there?") from error
        lease = self._lease
        if lease is not None and lease.is_wanted:
            raise FileError(
                f"{self.path.name} is about to be changed by another program, so that it is not used any further; run "
                "again when that is done"
            )
        before = self._stamp = self._stamp or now
        if now.size < max(end, before.size):
            raise FileError(f"{self.path.name} ended while {what} was read; was it replaced meanwhile?")
        if now != before:
            raise FileError(
                f"{self.path.name} was changed after it was opened, before {what} was read; wait until it is whole, "
                "and open it again"
            )
        return self._fd

    def _read(self, fd: int, start: int, length: int, what: str) -> Tensor:
        buffer = torch.empty(length, dtype=torch.uint8)
        self._fill(buffer, fd, start, what)
        return buffer

    def _fill(self, target: Tensor, fd: int, start: int, what: str) -> None:
        view = target.numpy().data
        in_pieces(len(view), lambda first, last: self._fill_piece(view[first:last], fd, start + first, what))

    def _fill_piece(self, view: memoryview, fd: int, start: int, what: str) -> None:
        done = 0
        try:
            while done < len(view):
                count = _read_at(fd, view[done:], start + done)
                if not count:
                    raise FileError(f"{self.path.name} ended while {what} was read; was it replaced meanwhile?")
                done += count
        except OSError as error:
            raise FileError(f"{self.path} cannot be read any more: {error.strerror}; is it still there?") from error

    def _faster_way(self, fd: int, start: int, length: int) -> str:
        """Time both ways side by side in several places of a tensor, each first in turn."""
        probe = _map(fd)
        if probe is None:
            return "read"
        with probe:
            for place in range(PROBES):
                first = start + place * (length // PROBES)
                ways = [lambda at: self._time_map(probe, at), lambda at: self._time_read(fd, at)]
                order = (0, 1) if place % 2 == 0 else (1, 0)
                seconds = {way: ways[way](first + turn * PROBE_BYTES) for turn, way in enumerate(order)}
                if faster_way(mapping=seconds[0], reading=seconds[1]) == "map":
                    return "map"
        logger.info("FLUX Foundry: %s is read, not mapped, for mapping is slow there", self.path.name)
        return "read"

    def _time_map(self, probe: mmap.mmap, start: int) -> float:
        began = time.perf_counter()
        len(probe[start : start + PROBE_BYTES])
        return time.perf_counter() - began

    def _time_read(self, fd: int, start: int) -> float:
        began = time.perf_counter()
        self._read(fd, start, PROBE_BYTES, "a probe")
        return time.perf_counter() - began


class MappedTensors:
    """What files of tensors share: where each tensor's bytes are, and how they come and go.

    Attributes:
        path: The file.
        data_start: Where in it the tensors begin, in bytes.
        stamp: That it had when its header was read.
    """

    path: Path
    data_start: int
    stamp: FileStamp
    _bytes: FileBytes

    def __getitem__(self, name: str) -> TensorEntry:
        raise NotImplementedError

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    @property
    def stamps(self) -> dict[Path, FileStamp]:
        return {self.path: self.stamp}

    def held(self) -> AbstractContextManager[Callable[[], None]]:
        """See ``FileBytes.held``."""
        return self._bytes.held()

    def want(self, name: str) -> None:
        """Have a mapped tensor's pages brought in together, ahead of their use."""
        self._bytes.want(*self._span(name))

    def forget(self, name: str) -> None:
        """Let go of a mapped tensor's pages."""
        self._bytes.forget(*self._span(name))

    def read_into(self, name: str, target: Tensor) -> None:
        """Read a tensor's bytes into memory (n,) of the caller's; see ``FileBytes.read_into``."""
        self._bytes.read_into(target, self._span(name)[0], f"tensor {name}")

    def _flat(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor's bytes as ``dtype``, flat; mostly a view of the mapped file."""
        return self._bytes.tensor(*self._span(name), dtype, f"tensor {name}")

    def _span(self, name: str) -> tuple[int, int]:
        """Where in the file a tensor begins, and its length, in bytes."""
        entry = self[name]
        return self.data_start + entry.start, entry.end - entry.start


def faster_way(mapping: float, reading: float) -> str:
    """What to do by the seconds that both ways took: mapping, unless it is noticeably slower."""
    return "read" if mapping > max(MEASURABLE, SLOWER * reading) else "map"


def _read_at(fd: int, view: memoryview, start: int) -> int:
    """Read some bytes; where the system can, without moving the place that other threads read from."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], start)
    with _seeking, open(fd, "rb", buffering=0, closefd=False) as file:
        file.seek(start)
        return file.readinto(view) or 0


def _map(fd: int) -> mmap.mmap | None:
    """The whole file mapped; None where the system cannot.

    Where there is such a thing the map is private: who writes to a tensor in spite of all has a page of his own then,
    and not the end of the process.
    """
    # Where memory is never overcommitted, a private map of a large file is refused.
    return _try_map(fd, PRIVATE) or _try_map(fd, {"access": mmap.ACCESS_READ})


def _try_map(fd: int, how: dict[str, int]) -> mmap.mmap | None:
    try:
        return mmap.mmap(fd, 0, **how)
    except (OSError, ValueError):
        return None


def _view(buffer: mmap.mmap, start: int, length: int, dtype: torch.dtype) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=dtype, count=length // dtype.itemsize, offset=start)
