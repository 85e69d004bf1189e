"""The layers that models are built from, as an argument.

A model takes a ``Layers`` and never names ``torch.nn`` for a layer with weights, so that a host (or a quantised format)
can supply layers that bring their weights when they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .packed import Embedding, Linear

__all__ = ["TORCH_LAYERS", "Layers", "on_meta"]


class Layers(Protocol):
    """Constructors with ``torch.nn``'s signatures."""

    @property
    def Linear(self) -> Callable[..., nn.Module]: ...  # noqa: D102, N802
    @property
    def Embedding(self) -> Callable[..., nn.Module]: ...  # noqa: D102, N802
    @property
    def LayerNorm(self) -> Callable[..., nn.Module]: ...  # noqa: D102, N802


INIT = nn.init.__name__
TORCH_LAYERS = cast(Layers, SimpleNamespace(Linear=Linear, Embedding=Embedding, LayerNorm=nn.LayerNorm))


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules on the meta device inside the block, without initialising what gets its numbers from a file.

    On the meta device torch's own normal initialisation costs seconds: it brings in the compiler.
    """
    with torch.device("meta"), _WithoutInit():
        yield


class _WithoutInit(TorchFunctionMode):
    """Turns every function of ``torch.nn.init`` into one that gives its tensor back."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == INIT:
            return args[0] if args else given["tensor"]
        return func(*args, **given)
