"""What a module's weights take where they stay and where they are streamed: arithmetic over names, without a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ..ops.packed import Linear, takes_packed
from .spread import Footprint, spread_over

__all__ = ["ALIGNMENT", "Accounts", "Size", "Sized", "aligned", "below", "buffer_bytes"]

HALF = 2  # bytes of a number in 16 bits
ALIGNMENT = 256  # bytes; where tensors begin in a buffer, as in memory of their own


class Sized(Protocol):
    """What is known of a weight by a file's header, or by a shape."""

    @property
    def nbytes(self) -> int:
        """Bytes as it is stored."""

    @property
    def parameters(self) -> int:
        """How many numbers."""

    @property
    def pieces(self) -> tuple[int, ...]:
        """Bytes of every stored tensor."""


@dataclass(frozen=True)
class Size:
    """A weight of which only the size is known; see ``Sized``."""

    parameters: int
    pieces: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of all pieces."""
        return sum(self.pieces)


class Accounts:
    """Bytes of a module's weights.

    Attributes:
        blocks: The prefixes of what can be streamed, in the order in which it runs.
        packable: The parameters that stay packed.
        movable: Those of linear layers, which unpack them at use.
        tables: Those of embeddings, of which rows can be fetched from the file.

    Args:
        module: May be on the meta device.
        weights: For each parameter what it takes in its file.
        item: Bytes of a number where it is unpacked.
        keeps_packed: Whether layers that can unpack at use get their weights packed, where that takes less.
        blocks: The prefixes of what can be streamed, in the order in which it runs.
    """

    def __init__(
        self, module: nn.Module, weights: Mapping[str, Sized], *, item: int, keeps_packed: bool, blocks: Sequence[str]
    ) -> None:
        # Numbers only: accounts outlive the files that they are of.
        self._weights: dict[str, Size] = {
            name: Size(weight.parameters, weight.pieces) for name, weight in weights.items()
        }
        self._item, self.blocks = item, tuple(blocks)
        self._own: dict[str, list[str]] = {}  # what can be streamed below a prefix, once it was asked for
        layers = {f"{path}.weight": layer for path, layer in module.named_modules() if takes_packed(layer)}
        linear = frozenset(name for name, layer in layers.items() if isinstance(layer, Linear))
        self.movable = linear & frozenset(weights)
        self.tables = frozenset(name for name in layers if name not in linear and name in weights)
        self.packable = frozenset(name for name in layers if keeps_packed and self._gains(name))

    @property
    def decodes(self) -> bool:
        """Whether weights of layers that unpack at use are stored in fewer than 16 bits."""
        owns = (self._weights[name] for name in self.movable)
        return any(weight.nbytes < HALF * weight.parameters for weight in owns)

    def kept_bytes(self, name: str) -> int:
        """What a parameter takes where it stays."""
        weight = self._weights[name]
        return weight.nbytes if name in self.packable else weight.parameters * self._item

    def names_in(self, block: str, without: Iterable[str] = ()) -> list[str]:
        """The parameters of a block that can be streamed, except those below some prefixes."""
        if block not in self._own:
            own = below((block,))
            self._own[block] = [name for name in self._weights if name in self.movable and name.startswith(own)]
        apart = below(without)
        return [name for name in self._own[block] if not name.startswith(apart)]

    def unpacked_bytes(self, names: Iterable[str]) -> int:
        """The most that one of some parameters takes while a layer unpacks it at use."""
        return max((self._unpacked(name) for name in names if name in self.movable), default=0)

    def unpacked_together(self, names: Iterable[str]) -> int:
        """What some parameters take that are unpacked at once."""
        return sum(self._unpacked(name) for name in names if name in self.movable)

    def stored_bytes(self, without: Iterable[str] = ()) -> int:
        """What the parameters take in the file, except those below some prefixes."""
        apart = below(without)
        return sum(weight.nbytes for name, weight in self._weights.items() if not name.startswith(apart))

    def footprint(self, without: Iterable[str] = (), limit: int | None = None) -> Footprint:
        """What takes how much of ``limit`` bytes.

        Where all is too much, tables go first, which are used once a run and row by row; then blocks are streamed.

        Args:
            without: Prefixes of what is not there at all.
            limit: For all together; what cannot be streamed stays in any case. None for no limit.
        """
        apart = below(without)
        blocks = [self.names_in(block, without) for block in self.blocks]
        inside = {name for names in blocks for name in names}
        outside = [name for name in self._weights if name not in inside and not name.startswith(apart)]
        kept = [sum(map(self.kept_bytes, names)) for names in blocks]
        stored = [buffer_bytes(self._weights[name] for name in names) for names in blocks]
        others = sum(map(self.kept_bytes, outside))
        if limit is None or others + sum(kept) <= limit:
            return Footprint(others, spread_over(kept, stored, None))
        fetched = tuple(name for name in outside if name in self.tables)
        others -= sum(map(self.kept_bytes, fetched))
        return Footprint(others, spread_over(kept, stored, limit - others), fetched)

    def _gains(self, name: str) -> bool:
        weight = self._weights.get(name)
        return weight is not None and weight.nbytes < weight.parameters * self._item

    def _unpacked(self, name: str) -> int:
        """Numbers that stand as they are used are not copied."""
        weight = self._weights[name]
        size = weight.parameters * self._item
        return 0 if weight.nbytes == size else size


def buffer_bytes(weights: Iterable[Sized]) -> int:
    """What some weights take in a buffer, one behind the other."""
    return sum(aligned(size) for weight in weights for size in weight.pieces)


def below(prefixes: Iterable[str]) -> tuple[str, ...]:
    """What the names of parameters below some prefixes begin with."""
    return tuple(f"{prefix}." for prefix in prefixes)


def aligned(size: int) -> int:
    """Bytes that a tensor takes in a buffer."""
    return -(-size // ALIGNMENT) * ALIGNMENT
