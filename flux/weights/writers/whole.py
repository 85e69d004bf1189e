"""A file that stands at its name whole or not at all, however its writing ends."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from ...errors import MismatchError, UserError
from ..readers.header import MAX_NAME, is_name

__all__ = ["WholeFile", "tensor_bytes"]

PART_BYTES = 8  # of chance in the name of a file that is not whole yet
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
MOST_OF_NAME = 100  # characters of the target's that the temporary name repeats
SHOWN = 60  # characters of a text that a message repeats

Writer = TypeVar("Writer", bound="WholeFile")


class WholeFile(ABC):
    """A context manager that writes under a temporary name in the target's folder and renames at the end.

    On any error the temporary file is removed and the target stays as it was.

    Args:
        path: The target.
        replace: Whether an older file of that name may be replaced.

    Raises:
        UserError: The target is a folder, in no folder, or there already; here or, if it came to be meanwhile, at the
            end.
    """

    def __init__(self, path: Path, *, replace: bool) -> None:
        self.path = path
        self._replace = replace
        self._part = path.parent / f".{path.name[:MOST_OF_NAME]}.{secrets.token_hex(PART_BYTES)}.part"
        self._file: BinaryIO | None = None
        self._check_target()

    def __enter__(self: Writer) -> Writer:
        try:
            with self._told():
                self._file = self._part.open("xb")
            self._begin()
        except BaseException:
            self._drop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
                with self._told():
                    self._open_file().close()
                    self._check_target()
                    os.replace(self._part, self.path)
        finally:
            self._drop()

    @abstractmethod
    def _begin(self) -> None:
        """Write what comes before all tensors."""

    @abstractmethod
    def _finish(self) -> None:
        """Write what is left, or refuse a file that is not complete."""

    def _write(self, data: bytes | memoryview) -> None:
        """Write on from where the file is; after an error nothing more can be written."""
        file = self._open_file()
        try:
            with self._told():
                file.write(data)
        except BaseException:
            self._drop()
            raise

    def _write_at(self, position: int, data: bytes) -> None:
        with self._told():
            self._open_file().seek(position)
        self._write(data)

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            raise ValueError(f"the writer of {self.path.name} is not open; use it within its with statement")
        return self._file

    def _check_name(self, name: str) -> None:
        """Refuse what our readers would not take for a name."""
        if not is_name(name):
            raise MismatchError(
                f"{self.path.name}: the name {name[:SHOWN]!r} is longer than {MAX_NAME} characters or cannot be "
                "printed; choose another"
            )

    def _utf8(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise MismatchError(
                f"{self.path.name}: the text {text[:SHOWN]!r} has characters that UTF-8 does not know; change it"
            ) from error

    def _check_target(self) -> None:
        with self._told():
            folder = self.path.parent
            if self.path.is_dir():
                raise UserError(f"{self.path} is a folder; name a file in it")
            if not folder.is_dir():
                raise UserError(f"{self.path} cannot be written, because there is no folder {folder}; make it first")
            if not self._replace and os.path.lexists(self.path):
                raise UserError(f"{self.path} is there already; choose another name, or have it replaced (--replace)")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Make one sentence of what the system refuses."""
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise UserError(
                    f"{self.path} cannot be written, because its disk is full; make room there, or choose another place"
                ) from error
            raise UserError(f"{self.path} cannot be written: {error.strerror}; choose another place") from error

    def _drop(self) -> None:
        """Remove the temporary file where there still is one."""
        with contextlib.suppress(OSError):  # what it says has been said, or the file is not wanted
            if self._file is not None:
                self._file.close()
        self._file = None
        with contextlib.suppress(OSError):
            self._part.unlink()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order; without a copy where it is contiguous and on the CPU."""
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    flat = plain.as_strided((plain.numel(),), (1,))  # a single number may have any stride, which bytes cannot
    return flat.view(torch.uint8).numpy().data
