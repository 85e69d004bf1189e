"""Which weights of a module are in memory: the one place that brings them there and lets them go.

A module is built on the meta device, where it takes no memory; ``Residency`` binds it to a file and gives its
parameters their numbers, all of them or some, for the length of a block or until they are released.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import FileError

__all__ = ["Residency", "Watch"]

Watch = Callable[[int, int], None]


class Residency:
    """The weights of one module.

    Args:
        module: Built on the meta device.
        names: For each parameter of the module, the tensor's name in the file.
        read: Gives a tensor of the file by its name, on the CPU.
        device: Where weights go.
        dtype: What floating-point weights become there.
        label: What messages call the file.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Mapping[str, str],
        read: Callable[[str], Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
        label: str,
    ) -> None:
        self.module, self.device, self.dtype, self.label = module, device, dtype, label
        self._names, self._read = dict(names), read
        module.requires_grad_(False)

    def load(self, without: Iterable[str] = (), watch: Watch | None = None) -> int:
        """Bring in every absent parameter except those below some prefixes.

        Args:
            without: The prefixes.
            watch: Called before each parameter, and at the end, with how many are there and how many will be; may
                raise to stop.

        Returns:
            The bytes brought.
        """
        apart = tuple(f"{prefix}." for prefix in without)
        wanted = [name for name in self._names if not name.startswith(apart) and self._absent(name)]
        brought = 0
        for index, name in enumerate(wanted):
            if watch is not None:
                watch(index, len(wanted))
            brought += self._bring(name)
        if watch is not None and wanted:
            watch(len(wanted), len(wanted))
        return brought

    def release(self, prefixes: Iterable[str] | None = None) -> int:
        """Let go of the parameters below ``prefixes``, or of all; returns the bytes let go."""
        below = None if prefixes is None else tuple(f"{prefix}." for prefix in prefixes)
        released = 0
        for name in self._names:
            if (below is None or name.startswith(below)) and not self._absent(name):
                parameter = self.module.get_parameter(name)
                released += parameter.nbytes
                self._set(name, torch.empty_like(parameter, device="meta"))
        return released

    @contextmanager
    def borrow(self, prefix: str) -> Iterator[None]:
        """Have the parameters below ``prefix`` inside the block; those that were absent before are absent after it."""
        borrowed = [name for name in self._names if name.startswith(f"{prefix}.") and self._absent(name)]
        try:
            for name in borrowed:
                self._bring(name)
            yield
        finally:
            for name in borrowed:
                self._set(name, torch.empty_like(self.module.get_parameter(name), device="meta"))

    @property
    def resident_bytes(self) -> int:
        """Bytes of the parameters that are in memory now."""
        return sum(self.module.get_parameter(n).nbytes for n in self._names if not self._absent(n))

    def _absent(self, name: str) -> bool:
        return self.module.get_parameter(name).is_meta

    def _bring(self, name: str) -> int:
        wanted = self.module.get_parameter(name)
        found = self._read(self._names[name])
        if found.shape != wanted.shape:
            raise FileError(
                f"{self.label}: tensor {self._names[name]} has shape {tuple(found.shape)}, "
                f"{tuple(wanted.shape)} was expected"
            )
        tensor = found.to(self.device, self.dtype)
        self._set(name, tensor)
        return tensor.nbytes

    def _set(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        setattr(self.module.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
