"""Prompts' embeddings, kept, so that an encoder need not be loaded for what it has read before.

An entry is what one encoder made of one text. Its key tells everything that the numbers depend on: the encoder's file,
the tokens that it read (which text, tokenizer and length make), the type of the numbers, and what computed them. The
number of threads, which can move a last bit, is left out.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..version import VERSION
from ..weights.readers.stamps import FileStamp, fingerprint
from .prompt_folder import Cleared

__all__ = ["Entry", "MemoryStore", "PromptCache", "Store", "computed_on", "encoder_key", "text_key"]

MEMORY_BYTES = 256 << 20  # 32 prompts of T5-XXL
ONLY = "embedding"  # the name of an entry's tensor where there is one

Entry = Mapping[str, Tensor]


class Store(Protocol):
    """Where entries are kept."""

    def get(self, key: str) -> dict[str, Tensor] | None:
        """An entry of the caller's own."""

    def put(self, key: str, tensors: Entry, about: str = "") -> None:
        """Keep a copy of an entry."""


class MemoryStore:
    """Entries in memory; those that were not used for longest make room.

    Args:
        most_bytes: Of all entries.
    """

    def __init__(self, most_bytes: int = MEMORY_BYTES) -> None:
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Of all entries."""
        with self._lock:
            return self._total()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """An entry, copied, so that whoever gets it may change it."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                return None
            self._entries.move_to_end(key)
        return _copied(found)

    def put(self, key: str, tensors: Entry, about: str = "") -> None:
        """Keep a copy of an entry, unless it is larger than all may be."""
        del about
        if _size(tensors) > self.most_bytes:
            return
        own = _copied(tensors)
        with self._lock:
            self._entries[key] = own
            self._entries.move_to_end(key)
            while self._total() > self.most_bytes:
                self._entries.popitem(last=False)

    def clear(self) -> Cleared:
        """Let go of all."""
        with self._lock:
            gone = Cleared(len(self._entries), self._total())
            self._entries.clear()
        return gone

    def _total(self) -> int:
        return sum(map(_size, self._entries.values()))


class PromptCache:
    """Stores, of which the first that has an entry is asked, and a count of what was found.

    Attributes:
        found: Texts, each counted for each encoder, whose embedding was there.
        made: Those that were encoded.

    Args:
        stores: The fastest first.
    """

    def __init__(self, *stores: Store) -> None:
        self._stores = stores
        self.found = self.made = 0

    def get(self, key: str) -> dict[str, Tensor] | None:
        """An entry of the caller's own; None where no store has it."""
        for place, store in enumerate(self._stores):
            entry = store.get(key)
            if entry is not None:
                for faster in self._stores[:place]:
                    faster.put(key, entry)
                self.found += 1
                return entry
        return None

    def put(self, key: str, tensors: Entry, about: str = "") -> None:
        """Keep an entry in every store, unless it has numbers that are not finite."""
        self.made += 1
        if all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            for store in self._stores:
                store.put(key, tensors, about)

    def filled(
        self, keys: Sequence[str], make: Callable[[Sequence[int]], Sequence[Tensor]], about: str = ""
    ) -> list[Tensor]:
        """A tensor for each key: as it was kept, or as it is made now.

        Args:
            keys: Of one tensor each.
            make: Called with the places of those that are not there, each key once; not at all where all are.
            about: What makes them.
        """
        tensors: dict[str, Tensor] = {}
        for key in dict.fromkeys(keys):
            entry = self.get(key)
            if entry is not None and ONLY in entry:
                tensors[key] = entry[ONLY]
        missing = [keys.index(key) for key in dict.fromkeys(keys) if key not in tensors]
        if missing:
            for place, tensor in zip(missing, make(missing), strict=True):
                tensors[keys[place]] = tensor
                self.put(keys[place], {ONLY: tensor}, about)
        return [tensors[key] for key in keys]


def encoder_key(name: str, files: Mapping[Path, FileStamp], device: torch.device, dtype: torch.dtype) -> str | None:
    """What all keys of one encoder begin with; None where a file is no longer the one that was opened.

    Args:
        name: What it is.
        files: Its own, with the stamps that they had when they were opened.
        device: That it runs on.
        dtype: Of its numbers.
    """
    prints = [fingerprint(path, stamp) for path, stamp in files.items()]
    known = [found for found in prints if found is not None]
    if len(known) < len(prints):
        return None
    return " ".join((VERSION, name, *known, computed_on(device), str(dtype)))


@functools.cache
def computed_on(device: torch.device) -> str:
    """What computes: another kind of processor, or another torch, may give other last bits."""
    if device.type == "cuda":
        return f"torch {torch.__version__} {torch.cuda.get_device_name(device)}"
    return f"torch {torch.__version__} {device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def text_key(encoder: str, read: Sequence[object]) -> str:
    """The key of what an encoder makes of a text; ``read`` is what it gets of that: tokens, and weights if it has."""
    return hashlib.sha256(f"{encoder} {list(read)}".encode()).hexdigest()


def _copied(tensors: Entry) -> dict[str, Tensor]:
    with torch.inference_mode(False):  # so that a kept tensor is like any other, whoever made it
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _size(tensors: Entry) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
