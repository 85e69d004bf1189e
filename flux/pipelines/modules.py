"""Which module a spec is built as, and what parameters it has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..models.autoencoder import Autoencoder
from ..models.flux1 import Flux1
from ..models.redux import Redux
from ..models.text.clip import ClipText
from ..models.text.t5 import T5Encoder
from ..models.vision.siglip import SiglipVision
from ..ops.layers import on_meta
from ..specs.autoencoder import AUTOENCODERS, AutoencoderSpec
from ..specs.flux1 import Flux1Spec
from ..specs.text import ClipTextSpec, T5Spec
from ..specs.vision import ReduxSpec, SiglipSpec

__all__ = ["block_names", "build_of", "parameter_shapes"]

Shapes = Mapping[str, tuple[int, ...]]

BUILDS: dict[type, Callable[[Any], nn.Module]] = {
    Flux1Spec: Flux1, AutoencoderSpec: Autoencoder, ClipTextSpec: ClipText, T5Spec: T5Encoder,
    SiglipSpec: SiglipVision, ReduxSpec: Redux,
}  # fmt: skip
REMEMBERED = 64


def build_of(spec: object) -> Callable[[Any], nn.Module] | None:
    """What makes the module of a spec; None for what the engine recognises and does not run."""
    if isinstance(spec, AutoencoderSpec) and spec.name not in AUTOENCODERS:
        return None
    return BUILDS.get(type(spec))


def block_names(module: nn.Module) -> list[str]:
    """The prefixes of what runs one after the other and can be streamed; none where there is no such row."""
    tell: Callable[[], list[str]] | None = getattr(module, "block_names", None)
    return [] if tell is None else tell()


@functools.lru_cache(REMEMBERED)
def parameter_shapes(spec: object) -> Shapes | None:
    """The shape of every parameter by name, without any memory for them; None for what has no module here."""
    build = build_of(spec)
    if build is None:
        return None
    with on_meta():
        return {name: tuple(parameter.shape) for name, parameter in build(spec).named_parameters()}
