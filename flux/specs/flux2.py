"""The FLUX.2 transformers, one row each.

Sizes and defaults are those of Black Forest Labs' releases; ``replace`` shows what sets a variant apart. The same
weights make pictures from text and edit with any number of references.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["FLUX2", "Flux2Spec"]


@dataclass(frozen=True, kw_only=True)
class Flux2Spec:
    """One transformer of the FLUX.2 architecture. It has no biases, and modulations that all blocks of a kind share.

    Attributes:
        title: What people call it.
        in_channels: Channels of an input token: a 2x2 patch of the latent.
        out_channels: Channels of an output token, likewise.
        context_width: Of the text tokens: three layers of the language model, side by side.
        hidden: Width of the token stream.
        heads: Attention heads; ``hidden / heads`` is the sum of ``axes``.
        double_blocks: Blocks with separate text and image streams.
        single_blocks: Blocks on the joint stream.
        axes: Head dimensions that encode (reference, row, column, text position).
        theta: Base of the rotary frequencies.
        mlp_ratio: Feed-forward width as a multiple of ``hidden``; a layer's first half is its second half's gate.
        guidance_embedding: Whether the guidance strength is an input (guidance-distilled models).
        needs_negative: Whether guidance is a second pass with an empty prompt (undistilled models).
        caches_references: Whether references see nothing but themselves, at time 0, so that their keys and values are
            computed once for all steps.
        steps: Default number of steps.
        guidance: Default guidance; None where it has no meaning.
        text_length: Tokens that a prompt is padded to.
        native_side: Pixels along each side of a picture by default.
        autoencoder: Name of the autoencoder it works with.
        text_encoder: Name of its language model.
        licence: Of the weights.
        files: Names that the release's file goes by.
    """

    name: str
    title: str
    in_channels: int = 128
    out_channels: int = 128
    context_width: int = 15360
    hidden: int = 6144
    heads: int = 48
    double_blocks: int = 8
    single_blocks: int = 48
    axes: tuple[int, ...] = (32, 32, 32, 32)
    theta: float = 2_000.0
    mlp_ratio: float = 3.0
    guidance_embedding: bool = True
    needs_negative: bool = False
    caches_references: bool = False
    steps: int = 50
    guidance: float | None = 4.0
    text_length: int = 512
    native_side: int = 1024
    autoencoder: str = "flux2-vae"
    text_encoder: str = "mistral-small-24b"
    licence: str = "FLUX Non-Commercial License"
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"{self.name}: hidden size {self.hidden} does not divide into {self.heads} heads")
        if sum(self.axes) != self.hidden // self.heads:
            raise ValueError(f"{self.name}: rope axes {self.axes} do not add up to {self.hidden // self.heads}")

    @property
    def mlp_width(self) -> int:
        return int(self.hidden * self.mlp_ratio)

    @property
    def latent_channels(self) -> int:
        """Channels of the latent before it is cut into 2x2 patches."""
        return self.out_channels // 4


DEV = Flux2Spec(name="flux2-dev", title="FLUX.2 [dev]", files=("flux2-dev.safetensors",))
KLEIN_4B = replace(
    DEV,
    name="flux2-klein-4b",
    title="FLUX.2 [klein] 4B",
    context_width=7680,
    hidden=3072,
    heads=24,
    double_blocks=5,
    single_blocks=20,
    guidance_embedding=False,
    steps=4,
    guidance=None,
    text_encoder="qwen3-4b",
    licence="Apache-2.0",
    files=("flux-2-klein-4b.safetensors",),
)
KLEIN_9B = replace(
    KLEIN_4B,
    name="flux2-klein-9b",
    title="FLUX.2 [klein] 9B",
    context_width=12288,
    hidden=4096,
    heads=32,
    double_blocks=8,
    single_blocks=24,
    text_encoder="qwen3-8b",
    licence="FLUX Non-Commercial License",
    files=("flux-2-klein-9b.safetensors",),
)
KLEIN_BASE_4B = replace(
    KLEIN_4B,
    name="flux2-klein-base-4b",
    title="FLUX.2 [klein] base 4B",
    needs_negative=True,
    steps=50,
    guidance=4.0,
    files=("flux-2-klein-base-4b.safetensors",),
)
KLEIN_BASE_9B = replace(
    KLEIN_9B,
    name="flux2-klein-base-9b",
    title="FLUX.2 [klein] base 9B",
    needs_negative=True,
    steps=50,
    guidance=4.0,
    files=("flux-2-klein-base-9b.safetensors",),
)
KLEIN_9B_KV = replace(
    KLEIN_9B,
    name="flux2-klein-9b-kv",
    title="FLUX.2 [klein] 9B-KV",
    caches_references=True,
    files=("flux-2-klein-9b-kv.safetensors",),
)

FLUX2: dict[str, Flux2Spec] = {
    spec.name: spec for spec in (DEV, KLEIN_4B, KLEIN_9B, KLEIN_BASE_4B, KLEIN_BASE_9B, KLEIN_9B_KV)
}
