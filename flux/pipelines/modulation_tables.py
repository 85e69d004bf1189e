"""Modulation tables: every block's shift, scale and gate for a whole schedule, computed ahead.

In FLUX.1 the modulation layers are 27 % of the weights and depend on time, guidance and the pooled text only. With the
schedule known, each layer is brought in once, run for every step, and let go, so that its weights are never resident
together. Each step is a product of its own with the direct path's shapes, so both paths give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from ..models.flux1 import Flux1, Modulations

__all__ = ["Borrower", "tabulate"]


class Borrower(Protocol):
    """Gives a context in which the weights below a prefix are in memory.

    The context may give what to run in the layer's place, where weights are brought without the layer holding them.
    """

    def __call__(self, prefix: str, /) -> AbstractContextManager[Callable[[Tensor], Tensor] | None]: ...


def tabulate(model: Flux1, vectors: Sequence[Tensor], borrow: Borrower) -> list[Modulations]:
    """Modulations for each of ``vectors``.

    Args:
        model: Its modulation layers may be absent.
        vectors: For each moment the vector (B, h) from ``Flux1.embed``.
        borrow: Brings a layer's weights for the length of a block.

    Returns:
        One ``Modulations`` a moment, equal to ``model.modulate(vector)`` to the bit.
    """
    activated = [F.silu(vector) for vector in vectors]
    rows: list[list[Tensor]] = [[] for _ in vectors]
    for prefix, layer in model.modulation_layers().items():
        with borrow(prefix) as lent:
            run = lent or layer
            for row, vector in zip(rows, activated, strict=True):
                row.append(run(vector))
    return [model.gather_modulations(row) for row in rows]
