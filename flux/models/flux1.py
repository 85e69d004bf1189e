"""The FLUX.1 transformer (Black Forest Labs 2024): text and image tokens to a velocity for every image token.

Parameter names are those of Black Forest Labs' files. ``Flux1.forward`` is the whole; the blocks follow it.

Shapes: B batch, L tokens (I image, T text, L = T + I), h hidden width, H heads, D head dimension, C latent channels.
The joint sequence is text first, then image, then references: further pictures' tokens, that the model may look at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.attention import Kernel, attention
from ..ops.dtypes import clamp_to_range
from ..ops.layers import TORCH_LAYERS, Layers
from ..specs.flux1 import Flux1Spec
from .positions import apply_rope, rope, rope_in_place

__all__ = [
    "Attend", "Conditions", "DoubleBlock", "Flux1", "HeadNorm", "Modulations", "RotaryAttention", "Shortcut",
    "SingleBlock", "head_norm", "timestep_embedding",
]  # fmt: skip

NORM_EPS = 1e-6
TIME_WIDTH = 256
TIME_FACTOR = 1000.0  # flow time and guidance enter the sinusoid multiplied by this
TIME_PERIOD = 10_000.0

Observer = Callable[[int], None]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RotaryAttention:
    """Attention (B, H, L, D) whose queries and keys are rotated by their positions, and used up where they can be.

    Attributes:
        bias: Added to its logits; None for nothing.
        kernel: What computes it.
    """

    bias: Tensor | None = None
    kernel: Kernel = attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rotation: Tensor) -> Tensor:
        turn = apply_rope if _copies() else rope_in_place
        return self.kernel(turn(q, rotation), turn(k, rotation), v, self.bias)


PLAIN = RotaryAttention()


class Modulations(NamedTuple):
    """Shift, scale and gate of every block for one moment: what the blocks need of time, guidance and pooled text.

    Attributes:
        image: For each double block (B, 6h): shift, scale, gate of attention, then of the feed-forward.
        text: The same for the text stream.
        single: For each single block (B, 3h): shift, scale, gate.
        final: (B, 2h): shift, scale.
    """

    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    final: Tensor


class Conditions(NamedTuple):
    """What stays the same over a whole run: the text, where every token is, and how much it is looked at.

    Attributes:
        text: T5 tokens (B, T, context width), and what stands behind them as text.
        text_ids: Their positions (T, 3).
        image_ids: Positions of the image tokens (I, 3), those of references last.
        bias: Added to the attention's logits, broadcastable to (B, H, L, L); None for nothing.
    """

    text: Tensor
    text_ids: Tensor
    image_ids: Tensor
    bias: Tensor | None = None


class Shortcut(Protocol):
    """What may stand in for all blocks but the first."""

    def recall(self, before: Tensor, after: Tensor) -> Tensor | None:
        """The image tokens (B, I, h) behind the last block, or None where the blocks have to run.

        Args:
            before: Image tokens as the first block took them.
            after: As it gave them.
        """

    def remember(self, last: Tensor) -> None:
        """Note the image tokens (B, I, h) behind the last block, which did run."""


class Flux1(nn.Module):
    """The transformer of any FLUX.1 variant."""

    def __init__(self, spec: Flux1Spec, layers: Layers = TORCH_LAYERS) -> None:
        super().__init__()
        self.spec = spec
        h = spec.hidden
        self.img_in = layers.Linear(spec.in_channels, h)
        self.txt_in = layers.Linear(spec.context_width, h)
        self.time_in = Embedder(TIME_WIDTH, h, layers)
        self.vector_in = Embedder(spec.pooled_width, h, layers)
        self.guidance_in = Embedder(TIME_WIDTH, h, layers) if spec.guidance_embedding else None
        self.double_blocks = nn.ModuleList(DoubleBlock(spec, layers) for _ in range(spec.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(spec, layers) for _ in range(spec.single_blocks))
        self.final_layer = FinalLayer(spec, layers)

    def forward(
        self,
        image: Tensor,
        conditions: Conditions,
        modulations: Modulations,
        observe: Observer | None = None,
        kernel: Kernel = attention,
        shortcut: Shortcut | None = None,
    ) -> Tensor:
        """Predict the velocity ``noise - data``.

        Args:
            image: Image tokens (B, I, input channels), those of references last.
            conditions: Text tokens, positions and bias.
            modulations: From ``modulate``, or from a table made ahead of the run.
            observe: Called with each block's index before it runs; may raise to stop.
            kernel: What computes attention.
            shortcut: Asked behind the first block for what the last one would give.

        Returns:
            Velocity tokens (B, I, output channels).
        """
        img: Tensor = self.img_in(image)
        txt: Tensor = self.txt_in(conditions.text)
        ids = torch.cat((conditions.text_ids, conditions.image_ids))
        rotation = rope(ids, self.spec.axes, self.spec.theta)
        bias = conditions.bias
        attend = RotaryAttention(None if bias is None else bias.to(img.dtype), kernel)
        for index, double in enumerate(self.double_blocks):
            if observe is not None:
                observe(index)
            before = img if shortcut is not None and index == 0 else None
            img, txt = double(img, txt, rotation, modulations.image[index], modulations.text[index], attend)
            img, txt = clamp_to_range(img), clamp_to_range(txt)
            if shortcut is not None and before is not None:
                last, before = shortcut.recall(before, img), None
                if last is not None:
                    velocity: Tensor = self.final_layer(last, modulations.final)
                    return velocity
        x = torch.cat((txt, img), dim=1)
        text_length = txt.shape[1]
        del img, txt
        for index, single in enumerate(self.single_blocks):
            if observe is not None:
                observe(len(self.double_blocks) + index)
            x = clamp_to_range(single(x, rotation, modulations.single[index], attend))
        if shortcut is not None:
            shortcut.remember(x[:, text_length:])
        out: Tensor = self.final_layer(x[:, text_length:], modulations.final)
        return out

    def block_names(self) -> list[str]:
        """Every block's parameter prefix, in the order in which they run."""
        doubles = (f"double_blocks.{index}" for index in range(len(self.double_blocks)))
        return [*doubles, *(f"single_blocks.{index}" for index in range(len(self.single_blocks)))]

    def embed(self, times: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """The vector (B, h) that every modulation is made from.

        Args:
            times: Flow times (B,) in 0..1, 1 is pure noise.
            pooled: CLIP's pooled vectors (B, pooled width).
            guidance: Guidance strengths (B,); None leaves the guidance embedding out altogether.
        """
        vec: Tensor = self.time_in(timestep_embedding(times, TIME_WIDTH).to(pooled.dtype))
        if guidance is not None and self.guidance_in is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance, TIME_WIDTH).to(pooled.dtype))
        vec = vec + self.vector_in(pooled)
        return vec  # noqa: RET504 - named for its type

    def modulate(self, vec: Tensor) -> Modulations:
        """Run every modulation layer on ``vec`` (B, h), one moment for each row."""
        outputs = [layer(F.silu(vec)) for layer in self.modulation_layers().values()]
        return self.gather_modulations(outputs)

    def modulation_layers(self) -> dict[str, nn.Module]:
        """Every modulation layer by its parameter prefix, in the order that ``gather_modulations`` takes."""
        doubles = {
            f"double_blocks.{i}.{stream}_mod.lin": block.get_submodule(f"{stream}_mod.lin")
            for stream in ("img", "txt")
            for i, block in enumerate(self.double_blocks)
        }
        singles = {
            f"single_blocks.{i}.modulation.lin": block.get_submodule("modulation.lin")
            for i, block in enumerate(self.single_blocks)
        }
        final = {"final_layer.adaLN_modulation.1": self.final_layer.get_submodule("adaLN_modulation.1")}
        return doubles | singles | final

    def gather_modulations(self, outputs: list[Tensor]) -> Modulations:
        """Name the outputs of ``modulation_layers``, given in its order."""
        n = len(self.double_blocks)
        return Modulations(
            image=tuple(outputs[:n]),
            text=tuple(outputs[n : 2 * n]),
            single=tuple(outputs[2 * n : -1]),
            final=outputs[-1],
        )


def timestep_embedding(times: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B, width) in fp32 of ``1000 * times``: cosines first, then sines."""
    half = width // 2
    # Multiplied, then divided, as the reference does: angles reach thousands, where the last bit of a frequency shows.
    exponents = -math.log(TIME_PERIOD) * torch.arange(half, dtype=torch.float32, device=times.device) / half
    frequencies = torch.exp(exponents)
    angles = TIME_FACTOR * times.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Embedder(nn.Module):
    """Two layers with SiLU between."""

    def __init__(self, in_width: int, hidden: int, layers: Layers) -> None:
        super().__init__()
        self.in_layer = layers.Linear(in_width, hidden)
        self.out_layer = layers.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out


class HeadNorm(nn.Module):
    """RMS norm over the head dimension with fp32 statistics and a learned scale.

    Attributes:
        replacements: Other scales (D,), each with how far it takes the place of the own one; the scale that is used is
            ``scale + sum of share * (other - scale)``. Gradients flow to them.
    """

    replacements: tuple[tuple[float, Tensor], ...] = ()

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return head_norm(x, self.scale_for(x))

    def scale_for(self, x: Tensor) -> Tensor:
        """The scale (D,) that is used, where and as inputs are."""
        return (self._replaced() if self.replacements else self.scale).to(x)

    def _replaced(self) -> Tensor:
        """Computed at use, for the own scale may come and go. A share of 1 gives the other scale to the bit."""
        scale = self.scale * (1.0 - sum(share for share, _ in self.replacements))
        for share, other in self.replacements:
            scale = scale + share * other
        return scale


def head_norm(x: Tensor, scale: Tensor) -> Tensor:
    """RMS norm of x (..., D) with fp32 statistics, times ``scale`` (D,)."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and not _copies():  # torch has no kernel of its own there
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        # Not in x, which lies between others: attention takes longer over what is not close together.
        return (x * length.square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()).mul_(scale)
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), scale, eps=NORM_EPS)
    return F.rms_norm(x.float(), (x.shape[-1],), eps=NORM_EPS).to(x.dtype) * scale


class QueryKeyNorm(nn.Module):
    """The norms of queries and of keys."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = HeadNorm(dim)
        self.key_norm = HeadNorm(dim)


class StreamAttention(nn.Module):
    """One stream's projections into and out of the joint attention."""

    def __init__(self, spec: Flux1Spec, layers: Layers) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = layers.Linear(spec.hidden, 3 * spec.hidden)
        self.norm = QueryKeyNorm(spec.hidden // spec.heads)
        self.proj = layers.Linear(spec.hidden, spec.hidden)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed queries and keys, and values, (B, H, L, D) each."""
        return split_heads(self.qkv(x), self.norm, self.heads)


class DoubleBlock(nn.Module):
    """Text and image each with weights of their own, joined in attention."""

    def __init__(self, spec: Flux1Spec, layers: Layers) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = (ModulationLayer(spec.hidden, 6, layers) for _ in range(2))
        self.img_attn, self.txt_attn = (StreamAttention(spec, layers) for _ in range(2))
        self.img_mlp, self.txt_mlp = (feed_forward(spec, layers) for _ in range(2))

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        rotation: Tensor,
        img_mod: Tensor,
        txt_mod: Tensor,
        attend: Attend = PLAIN,
    ) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = per_token(img_mod, 6)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = per_token(txt_mod, 6)
        img_q, img_k, img_v = self.img_attn.project(modulated_norm(img, img_shift1, img_scale1))
        txt_q, txt_k, txt_v = self.txt_attn.project(modulated_norm(txt, txt_shift1, txt_scale1))
        q, k, v = (torch.cat(pair, dim=2) for pair in ((txt_q, img_q), (txt_k, img_k), (txt_v, img_v)))
        mixed = merge_heads(attend(q, k, v, rotation))
        txt_mixed, img_mixed = mixed[:, : txt.shape[1]], mixed[:, txt.shape[1] :]
        img = gated(img, img_gate1, self.img_attn.proj(img_mixed))
        txt = gated(txt, txt_gate1, self.txt_attn.proj(txt_mixed))
        img = gated(img, img_gate2, self.img_mlp(modulated_norm(img, img_shift2, img_scale2)))
        txt = gated(txt, txt_gate2, self.txt_mlp(modulated_norm(txt, txt_shift2, txt_scale2)))
        return img, txt


def feed_forward(spec: Flux1Spec, layers: Layers) -> nn.Sequential:
    """Two layers with tanh-GELU between, named 0 and 2 as in the checkpoints."""
    return nn.Sequential(
        layers.Linear(spec.hidden, spec.mlp_width),
        TanhGelu(),
        layers.Linear(spec.mlp_width, spec.hidden),
    )


class TanhGelu(nn.Module):
    """GELU in its tanh form, which uses up its input where it can."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh") if _copies() else gelu_in_place(x)


def gelu_in_place(x: Tensor) -> Tensor:
    """Tanh-GELU of x, in x."""
    out: Tensor = torch.ops.aten.gelu_(x, approximate="tanh")
    return out


def _copies() -> bool:
    """Whether what was computed has to stay as it is: for a gradient, or for a compiler, which sees to that itself."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side on the joint sequence."""

    def __init__(self, spec: Flux1Spec, layers: Layers) -> None:
        super().__init__()
        self.heads = spec.heads
        self.hidden = spec.hidden
        self.modulation = ModulationLayer(spec.hidden, 3, layers)
        self.linear1 = layers.Linear(spec.hidden, 3 * spec.hidden + spec.mlp_width)
        self.linear2 = layers.Linear(spec.hidden + spec.mlp_width, spec.hidden)
        self.norm = QueryKeyNorm(spec.hidden // spec.heads)

    def forward(self, x: Tensor, rotation: Tensor, modulation: Tensor, attend: Attend = PLAIN) -> Tensor:
        shift, scale, gate = per_token(modulation, 3)
        fused = self.linear1(modulated_norm(x, shift, scale))
        q, k, v = split_heads(fused[..., : 3 * self.hidden], self.norm, self.heads)
        mixed = attend(q, k, v, rotation)
        joined = self._join(mixed, fused) if _copies() else self._join_in_place(mixed, fused)
        return gated(x, gate, self.linear2(joined))

    def _join(self, mixed: Tensor, fused: Tensor) -> Tensor:
        """Input (B, L, h + 4h) of the second layer: attention's result beside the activated feed-forward."""
        return torch.cat((merge_heads(mixed), F.gelu(fused[..., 3 * self.hidden :], approximate="tanh")), dim=-1)

    def _join_in_place(self, mixed: Tensor, fused: Tensor) -> Tensor:
        """The same without a copy: in ``fused`` the values lie just before the feed-forward, and are used up."""
        joined = fused[..., 2 * self.hidden :]
        joined[..., : self.hidden].unflatten(-1, (self.heads, -1)).copy_(mixed.transpose(1, 2))  # type: ignore[no-untyped-call]
        gelu_in_place(joined[..., self.hidden :])
        return joined


class FinalLayer(nn.Module):
    """Norm, modulation, and the projection back to patches."""

    def __init__(self, spec: Flux1Spec, layers: Layers) -> None:
        super().__init__()
        self.linear = layers.Linear(spec.hidden, spec.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), layers.Linear(spec.hidden, 2 * spec.hidden))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = per_token(modulation, 2)
        out: Tensor = self.linear(modulated_norm(x, shift, scale))
        return out


class ModulationLayer(nn.Module):
    """Holds the linear that makes a block's shift, scale and gate; run by ``Flux1.modulate`` or a table."""

    def __init__(self, hidden: int, parts: int, layers: Layers) -> None:
        super().__init__()
        self.lin = layers.Linear(hidden, parts * hidden)


def per_token(modulation: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Cut (B, parts * h) into ``parts`` tensors (B, 1, h) that broadcast over tokens."""
    return modulation.unsqueeze(1).chunk(parts, dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift``, the norm without learned parameters."""
    normed = F.layer_norm(x, (x.shape[-1],), eps=NORM_EPS)
    return torch.addcmul(shift, normed, 1 + scale, out=None if _copies() else normed)


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """``x + gate * update``, which takes the place of the update where it can."""
    return torch.addcmul(x, gate, update, out=None if _copies() else update)


def split_heads(qkv: Tensor, norm: QueryKeyNorm, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fused (B, L, 3h) to normed queries, normed keys and values (B, H, L, D)."""
    batch, length, _ = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return norm.query_norm(q), norm.key_norm(k), v


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, L, D) to (B, L, h)."""
    return x.transpose(1, 2).flatten(2)
