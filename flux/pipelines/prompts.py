"""Prompts to what the transformer takes of them: T5 tokens and CLIP's pooled vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..models.text.clip import ClipText
from ..models.text.t5 import T5Encoder
from ..specs.text import ClipTextSpec, T5Spec
from ..weights.readers.tokenizer import ClipTokenizer, T5Tokenizer, TokenIds, read_clip_tokenizer, read_t5_tokenizer
from .parts import Part, open_clip, open_t5

__all__ = ["EncodedPrompt", "TextEncoders", "open_text_encoders"]

Warn = Callable[[str], None]


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt's text conditioning: ``tokens`` (1, T, width) and ``pooled`` (1, width), both fp32 on the CPU."""

    tokens: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class TextEncoders:
    """CLIP and T5 with their tokenizers."""

    clip: Part[ClipTextSpec, ClipText]
    t5: Part[T5Spec, T5Encoder]
    clip_tokenizer: ClipTokenizer
    t5_tokenizer: T5Tokenizer

    @torch.inference_mode()
    def encode(
        self, prompt: str, *, clip_prompt: str | None = None, length: int | None = None, warn: Warn | None = None
    ) -> EncodedPrompt:
        """Encode one prompt; each encoder is in memory only while it runs.

        Args:
            prompt: For T5, and for CLIP unless ``clip_prompt`` is given. May be empty.
            clip_prompt: For CLIP alone.
            length: T5 tokens to pad to; the spec's when None.
            warn: Told when a text is cut.
        """
        clip_ids = self.clip_tokenizer(prompt if clip_prompt is None else clip_prompt)
        t5_ids = self.t5_tokenizer(prompt, length)
        if warn is not None:
            _warn_if_cut(warn, t5_ids, self.t5.spec.name, special=1)
            if clip_prompt is not None:
                _warn_if_cut(warn, clip_ids, self.clip.spec.name, special=2)
        with self.clip.resident() as clip:
            _, pooled = clip(torch.tensor([clip_ids.ids], device=self.clip.device))
        with self.t5.resident() as t5:
            tokens = t5(torch.tensor([t5_ids.ids], device=self.t5.device))
        return EncodedPrompt(tokens.float().cpu(), pooled.float().cpu())


def _warn_if_cut(warn: Warn, ids: TokenIds, encoder: str, special: int) -> None:
    """Say what was left out; ``special`` counts the tokens that frame a text."""
    if ids.cut:
        room = ids.used - special
        warn(f"the prompt has {room + ids.cut} tokens, {encoder} takes {room}: the last {ids.cut} were left out")


def open_text_encoders(
    clip_path: Path,
    t5_path: Path,
    clip_tokenizer: Path,
    t5_tokenizer: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> TextEncoders:
    """Open both encoders and read their tokenizers.

    Raises:
        UserError: A file is missing, damaged, or another encoder than it should be.
    """
    clip, t5 = open_clip(clip_path, device, dtype), open_t5(t5_path, device, dtype)
    return TextEncoders(
        clip, t5, read_clip_tokenizer(clip_tokenizer, clip.spec), read_t5_tokenizer(t5_tokenizer, t5.spec)
    )
