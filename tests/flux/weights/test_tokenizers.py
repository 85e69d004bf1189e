"""Tokenizers against transformers', and against a byte-pair encoder written out here."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from dataclasses import replace
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTokenizer as TheirClipTokenizer
from transformers import T5Tokenizer as TheirT5Tokenizer

from flux.errors import FileError, MismatchError, MissingFileError
from flux.specs.text import CLIP_L, CLIP_MINI, T5_MINI, T5_XXL
from flux.weights.readers.tokenizer import read_clip_tokenizer, read_t5_tokenizer
from tests.tiny import TOKENIZER as MINI_TOKENIZER

# The real rows, for tokenizers of a few dozen tokens.
SHORT_T5, SHORT_CLIP = replace(T5_XXL, tokens=1), replace(CLIP_L, tokens=1)

TEXTS = [
    "",
    " ",
    "a photo of a cat",
    "A Photo Of A CAT",
    "It's a dog's day, they're here, we've I'm you'll he'd DON'T o'clock",
    "''s 's' 'tis",
    "1234 56.78 2x4 v1.5 ½ ² ٣",
    "hello,world!!! ... (x) [y] {z} <b> $%^&* a_b #tag @me",
    "Café naïve Ångström fiancée",
    "e\u0301 a\u030a",  # composed by NFC
    "İstanbul Straße ǅ ΑΒΓ",
    "🙂🙃 👩‍👩‍👧 🇫🇷",
    "日本語 漢字かな 한국어",
    "tabs\tand\nnewlines \r\n  and   spaces",
    "\u00a0no\u00a0break\u3000wide ",
    "zero\u200bwidth",
    "“curly” ‘quotes’ — dash … ellipsis",
    "a" * 300,
    "the quick brown fox jumps over the lazy dog " * 20,
    "!" * 200,
]


def byte_letters():
    """GPT-2's names for the 256 bytes: printable ones stand for themselves, the others come after them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


LETTERS = byte_letters()
# Pairs to merge, in order of rank: some make whole words, some stop inside, some compete for the same letter.
MERGES = (
    """
t h|th e</w>|i n|a n|an d</w>|c a|ca t</w>|o f</w>|p h|o t|ph ot|phot o</w>|q u|qu i|c k</w>|qui ck</w>|h e|l l|he ll
hell o</w>|' s</w>|r e</w>|' re</w>|' l|'l l</w>|. .|. .</w>|.. .</w>|! !|! !</w>|!! !!|!!!! !!!!|a a|aa aa|aaaa aaaa
d o|do g</w>
b r|br o|bro w|brow n</w>|f o|fo x</w>|ov e|o v|ov er</w>|e r</w>|Ã ©|c af|ca f|caf Ã©</w>|Ã ©</w>|1 2</w>|s t|ð Ł|ðŁ Ļ
""".replace("\n", "|")
    .strip("|")
    .split("|")
)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small CLIP tokenizer in the layout of OpenAI's: letters, word-final letters, merged pieces, the two marks."""
    folder = tmp_path_factory.mktemp("clip")
    pieces = [*LETTERS.values(), *(letter + "</w>" for letter in LETTERS.values())]
    pieces += [pair.replace(" ", "") for pair in MERGES]
    known = set(pieces)
    ready = [pair for pair in MERGES if set(pair.split(" ")) <= known]
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *ready, ""]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    size = len(json.loads((clip_folder / "vocab.json").read_text(encoding="utf-8")))
    spec = replace(CLIP_L, vocabulary=size, tokens=size, bos=size - 2, eos=size - 1, pad=size - 1)
    return read_clip_tokenizer(clip_folder, spec)


def random_texts(count, seed):
    rng = random.Random(seed)
    alphabet = "aaabcdeeefghhilmnooprstttuvwx    \t\n..,!!?'''\"0129-_/()[]{}<>|ABCDÉéßñ漢かЖ🙂\u0301’“”—½\u00a0"
    return ["".join(rng.choice(alphabet) for _ in range(rng.randrange(80))) for _ in range(count)]


@pytest.mark.parametrize("text", TEXTS)
def test_clip_ids_equal_those_of_transformers(text, clip, clip_folder):
    theirs = TheirClipTokenizer.from_pretrained(str(clip_folder))
    expected = theirs(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert list(clip(text).ids) == expected


def test_clip_ids_of_random_texts_equal_those_of_transformers(clip, clip_folder):
    theirs = TheirClipTokenizer.from_pretrained(str(clip_folder))
    for text in random_texts(400, seed=0):
        expected = theirs(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
        assert list(clip(text).ids) == expected, text


def split_words(text):
    """OpenAI's words: contractions, runs of letters, single digits, runs of the rest."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).lower()
    words = []
    while text:
        contraction = re.match("'s|'t|'re|'ve|'m|'ll|'d", text)
        if contraction:
            end = contraction.end()
        elif text[0].isspace():
            text = text[1:]
            continue
        else:
            end = 1
            while kind(text[0]) != "N" and end < len(text) and kind(text[end]) == kind(text[0]):
                end += 1
        words.append(text[:end])
        text = text[end:]
    return words


def kind(character):
    """L for letters, N for numbers, blank for space, P for all else."""
    if character.isspace():
        return " "
    return {"L": "L", "N": "N"}.get(unicodedata.category(character)[0], "P")


def merge(word, ranks):
    """Byte-pair encoding as it is defined: merge the pair of the lowest rank until none is left."""
    letters = [LETTERS[byte] for byte in word.encode()]
    letters[-1] += "</w>"
    while pairs := [pair for pair in pairwise(letters) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        merged, index = [], 0
        while index < len(letters):
            if tuple(letters[index : index + 2]) == best:
                merged.append("".join(best))
                index += 2
            else:
                merged.append(letters[index])
                index += 1
        letters = merged
    return letters


def test_clip_pieces_equal_byte_pair_encoding_as_defined(clip, clip_folder):
    vocabulary = json.loads((clip_folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (clip_folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines)}
    merged = 0
    for text in [*TEXTS, *random_texts(200, seed=1)]:
        pieces = [piece for word in split_words(text) for piece in merge(word, ranks)]
        assert clip.pieces(text) == [vocabulary[piece] for piece in pieces], text
        merged += sum(len(piece.removesuffix("</w>")) > 1 for piece in pieces)
    assert merged > 300  # else the merges were not tested


def test_clip_frame_has_start_end_and_padding(clip):
    framed = clip.frame([5, 6, 7])
    spec = clip.spec
    assert framed.ids == (spec.bos, 5, 6, 7, spec.eos, *[spec.pad] * 72)
    assert (framed.used, framed.cut) == (5, 0)


def test_clip_pads_with_the_specs_token(clip_folder):
    """SDXL's second tower pads with 0, the first with the end token."""
    framed = read_clip_tokenizer(clip_folder, replace(SHORT_CLIP, pad=0)).frame([5])
    assert framed.ids == (CLIP_L.bos, 5, CLIP_L.eos, *[0] * 74)


@pytest.mark.parametrize(("count", "cut"), [(0, 0), (74, 0), (75, 0), (76, 1), (300, 225)])
def test_clip_keeps_the_end_token_and_counts_what_it_cuts(count, cut, clip):
    framed = clip.frame([9] * count)
    assert len(framed.ids) == 77
    assert framed.ids[0] == clip.spec.bos
    assert framed.ids[framed.used - 1] == clip.spec.eos
    assert framed.ids.count(9) == count - cut
    assert framed.cut == cut
    assert framed.used == min(count, 75) + 2


PIECES = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁cat", "▁photo", "▁of", "s", "t", "a", "r", "▁star", "in", "g"]
PIECES += ["▁the", ",", ".", "'", "é", "▁caf", "e", "d", "1", "2", "▁20", "!", "c", "o", "p", "h", "f"]
VOCABULARY = [(piece, 0.0 if i < 3 else -2.0 - 0.37 * i / max(1, len(piece))) for i, piece in enumerate(PIECES)]
T5_TEXTS = ["", "a red cat", "A red cat", "a photo of the red stars, starring cats.", "café 2012!", "  a   red\tcat\n"]
T5_TEXTS += ["the🙂cat 日本", "redred", "don't", "a " * 600]


@pytest.fixture(scope="module")
def t5_file(tmp_path_factory):
    """A small tokenizer.json in T5's layout, its post-processor, truncation and padding included."""
    tokenizer = Tokenizer(models.Unigram(VOCABULARY, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    path = tmp_path_factory.mktemp("t5") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("text", T5_TEXTS)
def test_t5_ids_equal_those_of_transformers(text, t5_file):
    theirs = TheirT5Tokenizer(vocab=VOCABULARY, extra_ids=0)
    theirs.backend_tokenizer.normalizer = normalizers.NFKC()
    expected = theirs(text, padding="max_length", truncation=True, max_length=512)["input_ids"]
    framed = read_t5_tokenizer(t5_file, SHORT_T5)(text)
    assert list(framed.ids) == expected
    assert framed.used == len(expected) - expected.count(0)


def test_t5_ignores_the_limits_that_the_file_sets(t5_file):
    """tokenizer.json may come with truncation and padding; the frame is the spec's alone."""
    framed = read_t5_tokenizer(t5_file, SHORT_T5)("a " * 100)
    assert (framed.used, framed.cut, len(framed.ids)) == (101, 0, 512)


def test_t5_frame_has_end_and_padding(t5_file):
    tokenizer = read_t5_tokenizer(t5_file, replace(SHORT_T5, length=8, longest=8))
    assert tokenizer.frame([5, 6]).ids == (5, 6, 1, 0, 0, 0, 0, 0)
    assert (tokenizer.frame([5, 6]).used, tokenizer.frame([5, 6]).cut) == (3, 0)
    assert tokenizer.frame([5] * 7).ids == (*[5] * 7, 1)
    assert tokenizer.frame([5] * 10).ids == (*[5] * 7, 1)
    assert (tokenizer.frame([5] * 10).used, tokenizer.frame([5] * 10).cut) == (8, 3)


def test_t5_lets_longer_texts_through_up_to_the_longest(t5_file):
    tokenizer = read_t5_tokenizer(t5_file, replace(SHORT_T5, length=4, longest=8))
    assert tokenizer.frame([5] * 6).ids == (*[5] * 6, 1)
    assert tokenizer.frame([5] * 9).ids == (*[5] * 7, 1)
    assert tokenizer.frame([5] * 9).cut == 2
    assert tokenizer.frame([5], length=6).ids == (5, 1, 0, 0, 0, 0)
    assert len(tokenizer.frame([5] * 20, length=12).ids) == 12


def test_t5_tells_pieces_and_where_they_stand(t5_file):
    tokenizer = read_t5_tokenizer(t5_file, SHORT_T5)
    text = "a red star"
    assert [tokenizer.token(i) for i in tokenizer.pieces(text)] == ["▁a", "▁red", "▁star"]
    assert [text[start:end].strip() for start, end in tokenizer.offsets(text)] == ["a", "red", "star"]


def test_a_folder_stands_for_the_file_in_it(t5_file):
    by_file, by_folder = read_t5_tokenizer(t5_file, SHORT_T5), read_t5_tokenizer(t5_file.parent, SHORT_T5)
    assert by_file("a red cat") == by_folder("a red cat")


@pytest.mark.parametrize("given", ["file", "folder"])
def test_clip_is_read_from_a_tokenizer_json_too(given, t5_file):
    spec = replace(SHORT_CLIP, positions=6, bos=100, eos=101, pad=102)
    tokenizer = read_clip_tokenizer(t5_file if given == "file" else t5_file.parent, spec)
    assert tokenizer("a red cat").ids == (100, 4, 5, 6, 101, 102)


def test_clips_own_files_come_before_a_tokenizer_json(clip_folder, t5_file, tmp_path):
    for source in (*clip_folder.iterdir(), t5_file):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    both, own = read_clip_tokenizer(tmp_path, SHORT_CLIP), read_clip_tokenizer(clip_folder, SHORT_CLIP)
    assert both("a red cat") == own("a red cat")


@pytest.mark.parametrize("name", ["tokenizer.json", "nowhere/tokenizer.json"])
def test_a_missing_t5_tokenizer_is_named(name, tmp_path):
    with pytest.raises(MissingFileError) as caught:
        read_t5_tokenizer(tmp_path / name, T5_XXL)
    assert str(tmp_path / name) in str(caught.value)


def test_a_folder_without_a_t5_tokenizer_names_the_file(tmp_path):
    with pytest.raises(MissingFileError, match="T5's tokenizer") as caught:
        read_t5_tokenizer(tmp_path, T5_XXL)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize("present", [(), ("vocab.json",), ("merges.txt",)])
def test_a_folder_without_a_clip_tokenizer_names_the_files(present, tmp_path, clip_folder):
    for name in present:
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(MissingFileError) as caught:
        read_clip_tokenizer(tmp_path, CLIP_L)
    for part in (str(tmp_path), "vocab.json", "merges.txt", "tokenizer.json"):
        assert part in str(caught.value)


def test_a_missing_clip_path_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="CLIP's tokenizer") as caught:
        read_clip_tokenizer(tmp_path / "nowhere", CLIP_L)
    assert str(tmp_path / "nowhere") in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(clip_folder, t5_file):
    with pytest.raises(MismatchError, match=f"it has {len(PIECES)} tokens, t5xxl knows 9;") as caught:
        read_t5_tokenizer(t5_file, replace(SHORT_T5, vocabulary=9))
    assert str(t5_file) in str(caught.value)
    with pytest.raises(MismatchError, match="clip-l knows 9;") as caught:
        read_clip_tokenizer(clip_folder, replace(SHORT_CLIP, vocabulary=9))
    assert str(clip_folder) in str(caught.value)


def test_a_tokenizer_that_is_too_small_for_the_encoder_is_refused(clip_folder, t5_file):
    """As the embedded model's is for T5-XXL: its ids would all be words of another language."""
    with pytest.raises(MismatchError, match="t5xxl knows 32128;"):
        read_t5_tokenizer(t5_file, T5_XXL)
    with pytest.raises(MismatchError, match="clip-l knows 49408;"):
        read_clip_tokenizer(clip_folder, CLIP_L)
    with pytest.raises(MismatchError, match="it has 195 tokens, t5xxl knows 32128;"):
        read_t5_tokenizer(MINI_TOKENIZER, T5_XXL)
    read_t5_tokenizer(MINI_TOKENIZER, T5_MINI)
    read_clip_tokenizer(MINI_TOKENIZER, CLIP_MINI)


def test_a_damaged_tokenizer_json_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mod', encoding="utf-8")
    for read, spec in ((read_t5_tokenizer, T5_XXL), (read_clip_tokenizer, CLIP_L)):
        with pytest.raises(FileError) as caught:
            read(tmp_path, spec)
        assert str(tmp_path / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize("damage", ["vocab.json", "merges.txt"])
def test_damaged_clip_files_are_named(damage, tmp_path, clip_folder):
    """Cut off, or the merges of another vocabulary."""
    for source in clip_folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    text = {"vocab.json": '{"a": 0, "b', "merges.txt": "#version: 0.2\nzebra crossing\n"}[damage]
    (tmp_path / damage).write_text(text, encoding="utf-8")
    with pytest.raises(FileError) as caught:
        read_clip_tokenizer(tmp_path, CLIP_L)
    assert str(tmp_path) in str(caught.value)
