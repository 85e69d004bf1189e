"""Blocks that are run by something else than their own ``forward``, as long as it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["Forward", "run_by"]

Forward = Callable[..., Any]


@contextmanager
def run_by(blocks: Iterable[nn.Module], runner: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Have blocks run by something else inside the block.

    Args:
        blocks: The modules.
        runner: Of a module, and of what ran it before: what is called in its place. Hooks run around it.
    """
    before = [(block, vars(block).get("forward")) for block in blocks]
    for block, own in before:
        block.forward = runner(block, own or block.forward)
    try:
        yield
    finally:
        for block, own in before:
            if own is None:
                del block.forward
            else:
                block.forward = own
