"""Which file a path led to and whether it is as it was, told without reading it; and what is in it, by samples."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FileStamp", "fingerprint", "stamp_of"]

HEAD_BYTES = 1 << 20  # which hold the names and shapes of every model's tensors, or most of them
SAMPLES, SAMPLE_BYTES = 256, 4096  # of T5-XXL in bf16 one in 37 MB, the size of its smaller matrices
REMEMBERED = 64  # files


@dataclass(frozen=True)
class FileStamp:
    """What the system says of an open file: another file, or one that was written to, has another stamp.

    Attributes:
        device: Where it is.
        inode: Its number there.
        size: In bytes.
        written: When it was written to last, in nanoseconds.
    """

    device: int
    inode: int
    size: int
    written: int


def stamp_of(descriptor: int) -> FileStamp:
    """The stamp of an open file."""
    found = os.fstat(descriptor)
    return FileStamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@functools.lru_cache(REMEMBERED)
def fingerprint(path: Path, stamp: FileStamp) -> str | None:
    """A hash by which a file is known again, also by another process; None where the path leads elsewhere by now.

    Hashing all of T5-XXL takes as long as running it, so the hash is of the size, the time of writing, the first
    megabyte and samples of the rest. Samples tell apart files whose times were set alike, as archives and package
    stores do; the time tells of what is changed in place between samples, as rows of a table of words are. A copy that
    has a time of its own counts as another file, which costs an encoding and never gives a wrong one.

    Args:
        path: Of the file.
        stamp: That it had when it was opened.
    """
    digest = hashlib.sha256(f"{stamp.size} {stamp.written}".encode())
    try:
        with path.open("rb", buffering=0) as file:
            if stamp_of(file.fileno()) != stamp:
                return None
            digest.update(file.read(HEAD_BYTES))
            for sample in range(SAMPLES):
                file.seek(sample * stamp.size // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    except OSError:
        return None
    return digest.hexdigest()
