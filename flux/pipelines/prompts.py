"""Prompts to what the transformer takes of them: T5 tokens and CLIP's pooled vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..memory.metering import Meter, NoMeter
from ..memory.residency import Watch
from ..models.text.clip import ClipText
from ..models.text.t5 import T5Encoder
from ..specs.fit import Given
from ..specs.text import ClipTextSpec, T5Spec
from ..weights.readers.tokenizer import ClipTokenizer, T5Tokenizer, TokenIds, read_clip_tokenizer, read_t5_tokenizer
from .parts import Part, check_beside, open_clip, open_t5
from .prompt_cache import PromptCache, encoder_key, text_key

__all__ = ["EncodedPrompt", "TextEncoders", "cut_sentences", "open_text_encoders"]

Warn = Callable[[str], None]
PROMPT = "prompt"
CLIP_MARKS, T5_MARKS = 2, 1  # tokens that frame a text: start and end, or the end alone


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt's text conditioning: ``tokens`` (1, T, width) and ``pooled`` (1, width), both fp32 on the CPU."""

    tokens: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class TextEncoders:
    """CLIP and T5 with their tokenizers, and a cache of what they made; None encodes every prompt anew."""

    clip: Part[ClipTextSpec, ClipText]
    t5: Part[T5Spec, T5Encoder]
    clip_tokenizer: ClipTokenizer
    t5_tokenizer: T5Tokenizer
    cache: PromptCache | None = None

    def encode(
        self, prompt: str, *, clip_prompt: str | None = None, length: int | None = None, warn: Warn | None = None
    ) -> EncodedPrompt:
        """Encode one prompt; see ``encode_all``.

        Args:
            prompt: For T5, and for CLIP unless ``clip_prompt`` is given. May be empty.
            clip_prompt: For CLIP alone.
            length: T5 tokens to pad to; the spec's when None.
            warn: Told when a text is cut.
        """
        return self.encode_all([(prompt, clip_prompt)], length=length, warn=warn)[0]

    @torch.inference_mode()
    def encode_all(
        self,
        prompts: Sequence[tuple[str, str | None]],
        *,
        length: int | None = None,
        warn: Warn | None = None,
        watch: Watch | None = None,
        titles: Sequence[str] = (),
        limits: Mapping[str, int | None] | None = None,
        meter: Meter | NoMeter | None = None,
    ) -> list[EncodedPrompt]:
        """Encode several prompts one by one; each encoder is in memory once, and only while it runs.

        An encoder whose part of all prompts is in the cache is not loaded.

        Args:
            prompts: Pairs of a prompt and, if CLIP is to read another, that one.
            length: T5 tokens to pad to; the spec's when None.
            warn: Told when a text is cut.
            watch: Called before each weight on its way in; may raise to stop.
            titles: What ``warn`` hears each prompt called; "prompt" where there is none.
            limits: Bytes that the weights of "clip" and "t5" may take; what goes beyond is streamed.
            meter: Notes what each encoder takes.
        """
        limits, meter = limits or {}, meter or NoMeter()
        clip_ids = [self.clip_tokenizer(both if own is None else own) for both, own in prompts]
        t5_ids = [self.t5_tokenizer(both, length) for both, _ in prompts]
        if warn is not None:
            clip_name, t5_name = self.clip.spec.name, self.t5.spec.name
            named = [*titles, *[PROMPT] * len(prompts)]
            for (_, own), of_clip, of_t5, title in zip(prompts, clip_ids, t5_ids, named, strict=False):
                asked = [(of_clip, of_t5)] if own is None else [(of_clip, None), (None, of_t5)]
                for read in asked:
                    for sentence in cut_sentences(clip_name, read[0], t5_name, read[1], title):
                        warn(sentence)

        def passed(
            part: Part[Any, Any], stage: str, read: Sequence[TokenIds], taken: Callable[[Any], Tensor]
        ) -> list[Tensor]:
            def make(places: Sequence[int]) -> list[Tensor]:
                made = []
                resident = part.resident(watch=watch, limit=limits.get(stage), tell=warn)
                with part.metered(meter, stage), resident as encoder:
                    meter.begin()
                    going_on = part.going_on(warn)
                    for place in places:
                        ids = torch.tensor([read[place].ids], device=part.device)
                        made.append(taken(going_on(partial(encoder, ids))).float().cpu())
                        meter.tick()
                return made

            name = part.spec.name
            key = None if self.cache is None else encoder_key(name, part.stamps, part.device, part.dtype)
            if self.cache is None or key is None:
                return make(range(len(read)))
            return self.cache.filled([text_key(key, own.ids) for own in read], make, name)

        pooled = passed(self.clip, "clip", clip_ids, lambda given: given[1])
        tokens = passed(self.t5, "t5", t5_ids, lambda given: given)
        return [EncodedPrompt(*both) for both in zip(tokens, pooled, strict=True)]


def cut_sentences(
    clip: str, clip_ids: TokenIds | None, t5: str, t5_ids: TokenIds | None, title: str = PROMPT
) -> list[str]:
    """What each encoder left out of the text that it read, in sentences; none where nothing was.

    Args:
        clip: What CLIP is called.
        clip_ids: What it reads; None where that is not asked.
        t5: What T5 is called.
        t5_ids: Likewise. Where both are given, both read one prompt.
        title: What the text is called.
    """
    told = []
    if clip_ids is not None and clip_ids.cut:
        reader = f"; {t5} reads all of it" if t5_ids is not None and not t5_ids.cut else ""
        told.append(_cut_sentence(title, clip, clip_ids, CLIP_MARKS) + reader)
    if t5_ids is not None and t5_ids.cut:
        told.append(_cut_sentence(title, t5, t5_ids, T5_MARKS))
    return told


def _cut_sentence(title: str, encoder: str, ids: TokenIds, marks: int) -> str:
    room = ids.used - marks
    return f"the {title} has {room + ids.cut} tokens, {encoder} takes {room}: the last {ids.cut} were left out"


def open_text_encoders(
    clip_path: Path,
    t5_path: Path,
    clip_tokenizer: Path,
    t5_tokenizer: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    transformer: Given | None = None,
    cache: PromptCache | None = None,
) -> TextEncoders:
    """Open both encoders and read their tokenizers; ``transformer`` is what they must fit, if that is known.

    Raises:
        UserError: A file is missing, damaged, or another encoder than it should be.
    """
    clip, t5 = open_clip(clip_path, device, dtype), open_t5(t5_path, device, dtype)
    if transformer is not None:
        check_beside(transformer, (clip.given, t5.given))
    return TextEncoders(
        clip, t5, read_clip_tokenizer(clip_tokenizer, clip.spec), read_t5_tokenizer(t5_tokenizer, t5.spec), cache
    )
