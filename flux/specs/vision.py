"""What each vision tower is, and the adapter that turns its tokens into text tokens."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["REDUX", "REDUXES", "REDUX_MINI", "SIGLIP_MINI", "SIGLIP_SO400M", "VISION_TOWERS", "ReduxSpec", "SiglipSpec"]


@dataclass(frozen=True, kw_only=True)
class SiglipSpec:
    """A SigLIP vision tower, of which FLUX uses every patch's hidden state.

    Attributes:
        width: Of the hidden states.
        mlp_width: Of the feed-forward layers.
        patch: Pixels along each side of a patch.
        side: Pixels along each side of the picture that it takes.
    """

    name: str
    width: int
    layers: int
    heads: int
    mlp_width: int
    patch: int
    side: int

    @property
    def grid(self) -> int:
        """Patches along each side."""
        return self.side // self.patch


@dataclass(frozen=True, kw_only=True)
class ReduxSpec:
    """FLUX.1 Redux: a vision tower's tokens to text tokens of a transformer.

    Attributes:
        vision_width: Of the tower's hidden states.
        text_width: Of the transformer's text tokens; the layer between is three times as wide.
        tower: Name of the tower that it works with.
    """

    name: str
    vision_width: int
    text_width: int
    tower: str


SIGLIP_SO400M = SiglipSpec(
    name="siglip-so400m-384", width=1152, layers=27, heads=16, mlp_width=4304, patch=14, side=384
)
REDUX = ReduxSpec(name="flux1-redux-dev", vision_width=1152, text_width=4096, tower="siglip-so400m-384")
SIGLIP_MINI = SiglipSpec(name="siglip-mini", width=128, layers=4, heads=2, mlp_width=384, patch=14, side=126)
REDUX_MINI = ReduxSpec(name="flux1-redux-mini", vision_width=128, text_width=192, tower="siglip-mini")
VISION_TOWERS: dict[str, SiglipSpec] = {spec.name: spec for spec in (SIGLIP_SO400M, SIGLIP_MINI)}
REDUXES: dict[str, ReduxSpec] = {spec.name: spec for spec in (REDUX, REDUX_MINI)}
