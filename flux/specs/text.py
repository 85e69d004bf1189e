"""What each text encoder is."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CLIP_L", "CLIP_MINI", "CLIP_TEXT", "T5_ENCODERS", "T5_MINI", "T5_XXL", "ClipTextSpec", "T5Spec"]


@dataclass(frozen=True, kw_only=True)
class ClipTextSpec:
    """A CLIP text tower, of which FLUX.1 uses the pooled vector.

    Attributes:
        width: Of the hidden states and of the pooled vector.
        mlp_width: Of the feed-forward layers.
        positions: Length that every text is padded or cut to.
        bos: Token id before the text.
        eos: Token id after it; the pooled vector is read at its first place.
        pad: Token id that fills the rest.
        tokens: Fewest that its own tokenizer has.
    """

    name: str
    width: int
    layers: int
    heads: int
    mlp_width: int
    vocabulary: int
    tokens: int
    positions: int
    bos: int
    eos: int
    pad: int


@dataclass(frozen=True, kw_only=True)
class T5Spec:
    """A T5 v1.1 encoder.

    Attributes:
        width: Of the hidden states (d_model).
        head_width: Of one attention head (d_kv); heads times this need not be ``width``.
        mlp_width: Of the gated feed-forward layers (d_ff).
        length: Tokens, end token included, that a text is padded to.
        longest: Most tokens, end token included, that a text may have; what is beyond is cut. A model that was trained
            on fewer (schnell on 256) takes them too, as in other engines.
        tokens: Fewest that its own tokenizer has: T5's without the extra ones, which some files leave out.
    """

    name: str
    width: int
    layers: int
    heads: int
    head_width: int
    mlp_width: int
    vocabulary: int
    length: int
    longest: int
    tokens: int
    eos: int = 1
    pad: int = 0
    buckets: int = 32
    max_distance: int = 128


MINI_TOKENS = 195  # of the one tokenizer that both small encoders read
CLIP_L = ClipTextSpec(
    name="clip-l",
    width=768,
    layers=12,
    heads=12,
    mlp_width=3072,
    vocabulary=49408,
    tokens=49408,
    positions=77,
    bos=49406,
    eos=49407,
    pad=49407,
)
CLIP_MINI = ClipTextSpec(
    name="clip-mini",
    width=128,
    layers=2,
    heads=2,
    mlp_width=512,
    vocabulary=256,
    tokens=MINI_TOKENS,
    positions=40,
    bos=254,
    eos=255,
    pad=255,
)
T5_XXL = T5Spec(
    name="t5xxl",
    width=4096,
    layers=24,
    heads=64,
    head_width=64,
    mlp_width=10240,
    vocabulary=32128,
    length=512,
    longest=512,
    tokens=32000,
)
T5_MINI = T5Spec(
    name="t5-mini",
    width=192,
    layers=2,
    heads=4,
    head_width=48,
    mlp_width=384,
    vocabulary=256,
    length=32,
    longest=64,
    tokens=MINI_TOKENS,
)
CLIP_TEXT: dict[str, ClipTextSpec] = {spec.name: spec for spec in (CLIP_L, CLIP_MINI)}
T5_ENCODERS: dict[str, T5Spec] = {spec.name: spec for spec in (T5_XXL, T5_MINI)}
