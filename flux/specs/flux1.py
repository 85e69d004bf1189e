"""The FLUX.1 transformers, one row each.

Sizes and defaults are those of Black Forest Labs' releases; ``replace`` shows what sets a variant apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import MismatchError

__all__ = ["FLUX1", "TASKS", "Flux1Spec", "check_draws", "full_model"]

TASKS = ("draw", "fill", "canny", "depth", "edit")


@dataclass(frozen=True, kw_only=True)
class Flux1Spec:
    """One transformer of the FLUX.1 architecture.

    Attributes:
        title: What people call it.
        task: What it was trained to do, one of ``TASKS``.
        in_channels: Channels of an input token: 64 for the noisy latent, more for Fill and control models.
        out_channels: Channels of an output token, a 2x2 patch of the latent.
        context_width: Of the T5 tokens.
        pooled_width: Of CLIP's pooled vector.
        hidden: Width of the token stream.
        heads: Attention heads; ``hidden / heads`` is the sum of ``axes``.
        double_blocks: Blocks with separate text and image streams.
        single_blocks: Blocks on the joint stream.
        axes: Head dimensions that encode (reference, row, column).
        theta: Base of the rotary frequencies.
        mlp_ratio: Feed-forward width as a multiple of ``hidden``.
        guidance_embedding: Whether the guidance strength is an input (guidance-distilled models).
        shifted_schedule: Whether sigmas are shifted by the image's size (all but schnell).
        steps: Default number of steps.
        guidance: Default guidance; None where it has no meaning.
        heeds_redux: Whether Redux's tokens mean something to it; without, it draws as if there were none.
        t5_length: Tokens that a prompt is padded to.
        native_side: Pixels along each side of a picture by default, as it was trained.
        autoencoder: Name of the autoencoder it works with.
        text_encoders: Names of its CLIP and T5 encoders.
        licence: Of the weights.
        files: Names that the release's file goes by.
    """

    name: str
    title: str
    task: str = "draw"
    in_channels: int = 64
    out_channels: int = 64
    context_width: int = 4096
    pooled_width: int = 768
    hidden: int = 3072
    heads: int = 24
    double_blocks: int = 19
    single_blocks: int = 38
    axes: tuple[int, ...] = (16, 56, 56)
    theta: float = 10_000.0
    mlp_ratio: float = 4.0
    guidance_embedding: bool = True
    shifted_schedule: bool = True
    steps: int = 28
    guidance: float | None = 3.5
    heeds_redux: bool = True
    t5_length: int = 512
    native_side: int = 1024
    autoencoder: str = "flux1-ae"
    text_encoders: tuple[str, str] = ("clip-l", "t5xxl")
    licence: str = "FLUX.1 [dev] Non-Commercial License"
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
        """Channels of the latent that is denoised; a token is a 2x2 patch of it."""
        return self.out_channels // 4


DEV = Flux1Spec(name="flux1-dev", title="FLUX.1 [dev]", files=("flux1-dev.safetensors",))
SCHNELL = replace(
    DEV,
    name="flux1-schnell",
    title="FLUX.1 [schnell]",
    guidance_embedding=False,
    shifted_schedule=False,
    steps=4,
    guidance=None,
    t5_length=256,
    licence="Apache-2.0",
    files=("flux1-schnell.safetensors",),
)
KREA = replace(DEV, name="flux1-krea-dev", title="FLUX.1 Krea [dev]", files=("flux1-krea-dev.safetensors",))
KONTEXT = replace(
    DEV,
    name="flux1-kontext-dev",
    title="FLUX.1 Kontext [dev]",
    task="edit",
    guidance=2.5,
    files=("flux1-kontext-dev.safetensors",),
)
FILL = replace(
    DEV,
    name="flux1-fill-dev",
    title="FLUX.1 Fill [dev]",
    task="fill",
    in_channels=384,
    steps=50,
    guidance=30.0,
    files=("flux1-fill-dev.safetensors",),
)
CANNY = replace(
    DEV,
    name="flux1-canny-dev",
    title="FLUX.1 Canny [dev]",
    task="canny",
    in_channels=128,
    steps=50,
    guidance=30.0,
    files=("flux1-canny-dev.safetensors",),
)
DEPTH = replace(
    CANNY,
    name="flux1-depth-dev",
    title="FLUX.1 Depth [dev]",
    task="depth",
    guidance=10.0,
    files=("flux1-depth-dev.safetensors",),
)
MINI = replace(
    DEV,
    name="flux1-mini",
    title="Foundry Mini",
    context_width=192,
    pooled_width=128,
    hidden=256,
    heads=2,
    double_blocks=1,
    single_blocks=4,
    steps=16,
    guidance=3.0,
    heeds_redux=False,
    t5_length=32,
    native_side=128,
    autoencoder="flux1-mini-ae",
    text_encoders=("clip-mini", "t5-mini"),
    licence="Apache-2.0",
    files=("flux1-mini.safetensors",),
)
MINI_SCHNELL = replace(
    MINI,
    name="flux1-mini-schnell",
    title="Foundry Mini schnell",
    guidance_embedding=False,
    shifted_schedule=False,
    steps=4,
    guidance=None,
    files=("flux1-mini-schnell.safetensors",),
)
MINI_REDUX = replace(
    MINI,
    name="flux1-mini-redux",
    title="Foundry Mini Redux",
    guidance=2.0,
    heeds_redux=True,
    files=("flux1-mini-redux.gguf",),
)
FILL_MINI = replace(
    MINI,
    name="flux1-fill-mini",
    title="Foundry Mini Fill",
    task="fill",
    in_channels=384,
    files=("flux1-fill-mini.gguf",),
)
CANNY_MINI = replace(
    MINI,
    name="flux1-canny-mini",
    title="Foundry Mini Canny",
    task="canny",
    in_channels=128,
    files=("flux1-canny-mini.gguf",),
)
DEPTH_MINI = replace(
    CANNY_MINI,
    name="flux1-depth-mini",
    title="Foundry Mini Depth",
    task="depth",
    files=("flux1-depth-mini.gguf",),
)
KONTEXT_MINI = replace(
    MINI,
    name="flux1-kontext-mini",
    title="Foundry Mini Kontext",
    task="edit",
    files=("flux1-kontext-mini.gguf",),
)


def full_model(spec: Flux1Spec, task: str) -> Flux1Spec | None:
    """The model of a text-to-image model's size that has a task by itself, without a LoRA; None where there is none."""
    return next((row for row in FLUX1.values() if row.task == task and row.hidden == spec.hidden), None)


def check_draws(spec: Flux1Spec) -> None:
    """Refuse a variant that needs more than a prompt.

    Raises:
        MismatchError: It takes another picture besides.
    """
    if spec.in_channels != spec.out_channels:
        raise MismatchError(
            f"{spec.title} takes {spec.in_channels} input channels, of which {spec.out_channels} are the picture: it "
            "edits or follows another picture and cannot draw from a prompt alone; choose a text-to-image model"
        )


FLUX1: dict[str, Flux1Spec] = {
    spec.name: spec
    for spec in (
        SCHNELL, DEV, KREA, FILL, DEPTH, CANNY, KONTEXT,
        MINI, MINI_SCHNELL, FILL_MINI, CANNY_MINI, DEPTH_MINI, KONTEXT_MINI, MINI_REDUX,
    )
}  # fmt: skip
