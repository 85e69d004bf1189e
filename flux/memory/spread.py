"""Which blocks stay and which are streamed: arithmetic in bytes, without a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SLOTS", "Footprint", "Spread", "evenly", "shares", "spread_over"]

SLOTS = 2  # buffers of the ring: one block runs from the one while the next comes into the other


@dataclass(frozen=True)
class Spread:
    """Blocks in the order in which they run, some streamed.

    Attributes:
        kept: Bytes of every block's weights where they stay.
        stored: Bytes of every block's weights where they are streamed, as they are stored.
        streamed: The places of those that are streamed, rising.
    """

    kept: tuple[int, ...]
    stored: tuple[int, ...]
    streamed: tuple[int, ...]

    @property
    def resident_bytes(self) -> int:
        """Of the blocks that stay."""
        return sum(self.kept) - sum(self.kept[place] for place in self.streamed)

    @property
    def streamed_bytes(self) -> int:
        """That come for each pass."""
        return sum(self.stored[place] for place in self.streamed)

    @property
    def slots(self) -> int:
        """Buffers of the ring."""
        return min(SLOTS, len(self.streamed))

    @property
    def ring_bytes(self) -> int:
        """Of all buffers, each as large as the largest block that goes through it."""
        return self.slots * max((self.stored[place] for place in self.streamed), default=0)

    @property
    def device_bytes(self) -> int:
        """What is in memory all the time."""
        return self.resident_bytes + self.ring_bytes


@dataclass(frozen=True)
class Footprint:
    """What a module's weights take while it runs.

    Attributes:
        others: Bytes of what is in no block, or cannot be streamed.
        blocks: What is in blocks.
        fetched: Tables that stay in the file, of which rows are fetched; they take nothing.
    """

    others: int
    blocks: Spread
    fetched: tuple[str, ...] = ()

    @property
    def device_bytes(self) -> int:
        """In memory all the time."""
        return self.others + self.blocks.device_bytes


def shares(limit: int | None, needs: Sequence[tuple[int, int]]) -> Sequence[int | None]:
    """A limit dealt out to several modules: to each the least that it can do with, and of the rest by what it lacks.

    Args:
        limit: Bytes for all together, which a single one has to itself; None for no limit.
        needs: For each the least, and what it takes where all stays.
    """
    if limit is None or len(needs) == 1:
        return [limit] * len(needs)
    least, lacking = sum(one for one, _ in needs), sum(whole - one for one, whole in needs)
    rest = max(0, limit - least)
    return [one + (rest * (whole - one) // lacking if lacking else 0) for one, whole in needs]


def evenly(count: int, among: int) -> tuple[int, ...]:
    """``count`` places of ``among``, as far from one another as they can be.

    A block between two streamed ones gives the second one time to come.
    """
    return tuple((2 * index + 1) * among // (2 * count) for index in range(count))


def spread_over(kept: Sequence[int], stored: Sequence[int], budget: int | None) -> Spread:
    """As few blocks streamed as the budget asks for; where even all of them are too many, the least that there is.

    Args:
        kept: Bytes of every block's weights where they stay, in the order in which blocks run.
        stored: The same where they are streamed.
        budget: Bytes for those that stay and the ring together; None for no limit.
    """
    ways = [Spread(tuple(kept), tuple(stored), evenly(count, len(kept))) for count in range(len(kept) + 1)]
    fitting = (way for way in ways if budget is None or way.device_bytes <= budget)
    return next(fitting, min(ways, key=lambda way: way.device_bytes))
