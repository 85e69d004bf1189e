"""Foundry Mini's tokenizer: whole words of its language, and single characters for all else.

A Unigram model with T5's word mark, written as an ordinary ``tokenizer.json``. Letters in quotes are one token each, so
that a sign can be spelled.
"""

from __future__ import annotations

import random
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from ..specs.text import CLIP_MINI
from .language import phrase, random_request, text_of

__all__ = ["build_tokenizer", "words_of_the_language"]

MARK = "▁"  # SentencePiece's: stands for the space before a word
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
WORD_SCORE, CHARACTER_SCORE = -1.0, -10.0
SAMPLED_PROMPTS = 20_000


def words_of_the_language(seed: int = 0) -> list[str]:
    """Every lower-case word that phrasing uses, sorted; found by phrasing many requests."""
    rng = random.Random(seed)
    words: set[str] = set()
    for _ in range(SAMPLED_PROMPTS):
        text = text_of(phrase(random_request(rng), rng)).lower()
        outside_quotes = " ".join(text.split('"')[::2])
        words.update(w.strip(",.;") for w in outside_quotes.split())
    return sorted(word for word in words if word)


def build_tokenizer(path: Path) -> Tokenizer:
    """Build the tokenizer and write it to ``path``; ids leave the two that CLIP's frame needs free at the end."""
    words = words_of_the_language()
    pieces = [(PAD, 0.0), (EOS, 0.0), (UNKNOWN, -20.0)]
    pieces += [(MARK + form, WORD_SCORE) for word in words for form in (word, word[0].upper() + word[1:])]
    pieces += [(MARK, CHARACTER_SCORE), (MARK + '"', WORD_SCORE)]
    characters = [c for c in string.printable if c.isprintable() and c != " "]
    pieces += [(character, CHARACTER_SCORE) for character in characters]
    assert len(dict(pieces)) <= min(CLIP_MINI.bos, CLIP_MINI.eos), len(dict(pieces))
    tokenizer = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace("“", '"'),
            normalizers.Replace("”", '"'),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always")
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer
