"""Foundry Mini's tokenizer: its language in whole words, all else in characters."""

from __future__ import annotations

import json
import random

import pytest

from flux.mini.files import FOLDER
from flux.mini.language import COLOURS, LETTERS, POSITIONS, SHAPES, SIZES, phrase, random_request, text_of
from flux.mini.tokenizer import build_tokenizer, words_of_the_language
from flux.specs.text import CLIP_MINI, T5_MINI
from flux.weights.readers.tokenizer import read_clip_tokenizer, read_t5_tokenizer

SHIPPED = FOLDER / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer():
    return read_t5_tokenizer(SHIPPED, T5_MINI)


def tokens(tokenizer, text):
    return [tokenizer.token(i) for i in tokenizer.pieces(text)]


def spelled(word):
    return ['▁"', *word, '"']


def test_the_shipped_file_is_what_the_builder_writes(tmp_path):
    build_tokenizer(tmp_path / "new" / "tokenizer.json")
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == SHIPPED.read_bytes()


def test_the_words_do_not_depend_on_which_requests_were_drawn():
    """Twenty thousand prompts reach every word, whatever the seed."""
    assert words_of_the_language(seed=1) == words_of_the_language()


def test_every_word_of_the_language_is_one_token(tokenizer):
    plurals = [f"{shape}{'es' if shape == 'cross' else 's'}" for shape in SHAPES]
    words = [*SHAPES, *plurals, *COLOURS, *POSITIONS, *SIZES, "one", "two", "three", "a", "an", "and", "above", "below"]
    words += ["on", "in", "at", "of", "to", "the", "word", "letter", "sign", "says", "that", "with", "background"]
    for word in words:
        assert tokens(tokenizer, word) == [f"▁{word}"]
        assert tokens(tokenizer, word.capitalize()) == [f"▁{word.capitalize()}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a large red circle on the left", "▁a ▁large ▁red ▁circle ▁on ▁the ▁left".split()),
        ("Red circle, left; blue ring.", "▁Red ▁circle , ▁left ; ▁blue ▁ring .".split()),
        ('the word "OPEN" in red', ["▁the", "▁word", *spelled("OPEN"), "▁in", "▁red"]),
        ('"RED", red', [*spelled("RED"), ",", "▁red"]),
        ('"A"', spelled("A")),
        ('"open"', spelled("open")),
        ("  a star ", ["▁a", "▁star"]),
        ("", []),
    ],
)
def test_prompts_become_words_and_letters(text, expected, tokenizer):
    assert tokens(tokenizer, text) == expected


def test_curly_quotes_are_straight_ones(tokenizer):
    assert tokenizer.pieces("the word “OPEN” in red") == tokenizer.pieces('the word "OPEN" in red')


def test_compatibility_characters_are_plain_ones(tokenizer):
    assert tokenizer.pieces("ａ red\u00a0ring") == tokenizer.pieces("a red ring")


@pytest.mark.parametrize("text", ["a  red   circle", "a red\ncircle", "a\tred \r\n circle"])
def test_white_space_of_any_kind_is_one_space(text, tokenizer):
    assert tokens(tokenizer, text) == ["▁a", "▁red", "▁circle"]


@pytest.mark.parametrize("text", ["photo", "RED", "redcircle", "42", "x-y", "50%_{a}<b>"])
def test_other_words_fall_to_characters(text, tokenizer):
    assert "".join(tokens(tokenizer, text)) == f"▁{text}"
    assert set(map(len, tokens(tokenizer, text)[2:])) == {1}
    assert "<unk>" not in tokens(tokenizer, text)


@pytest.mark.parametrize("text", ["é", "漢", "🙂", "ß"])
def test_characters_of_other_scripts_are_unknown(text, tokenizer):
    assert tokens(tokenizer, f"a {text} star") == ["▁a", "▁", "<unk>", "▁star"]


def test_every_prompt_fits_and_has_no_unknown_token(tokenizer):
    """Training stacks prompts to one length: none may be longer than the frame."""
    clip = read_clip_tokenizer(SHIPPED, CLIP_MINI)
    unknown = tokenizer.pieces("é")[-1]
    rng = random.Random(0)
    for _ in range(3000):
        text = text_of(phrase(random_request(rng), rng))
        framed = tokenizer(text)
        assert unknown not in framed.ids
        assert len(framed.ids) == T5_MINI.length
        assert len(clip(text).ids) == CLIP_MINI.positions
        assert framed.cut == clip(text).cut == 0


def test_the_longest_prompt_fits(tokenizer):
    parts = ("at the bottom a large purple triangle", "on the left one small orange circle", "in the center a red ring")
    assert len(tokenizer(f"{' , '.join(parts)} on an orange background.").ids) == T5_MINI.length


def test_letters_are_one_id_each(tokenizer):
    ids = tokenizer.pieces(f'"{LETTERS}"')
    assert len(ids) == len(set(ids[:-1])) + 1 == 28


def test_ids_stay_below_those_of_the_clip_frame():
    vocabulary = json.loads(SHIPPED.read_text(encoding="utf-8"))["model"]["vocab"]
    assert [piece for piece, _ in vocabulary[:3]] == ["<pad>", "</s>", "<unk>"]
    assert (T5_MINI.pad, T5_MINI.eos) == (0, 1)
    assert len(vocabulary) <= min(CLIP_MINI.bos, CLIP_MINI.eos, CLIP_MINI.pad)
    assert max(CLIP_MINI.bos, CLIP_MINI.eos) < CLIP_MINI.vocabulary
    assert len(vocabulary) <= T5_MINI.vocabulary


def test_offsets_lead_back_to_the_text(tokenizer):
    text = 'a sign that says "SUN", blue'
    assert [text[start:end].strip() for start, end in tokenizer.offsets(text)] == [
        "a", "sign", "that", "says", '"', "S", "U", "N", '"', ",", "blue",
    ]  # fmt: skip
