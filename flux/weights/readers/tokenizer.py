"""Tokenizer files to token ids, by the ``tokenizers`` library.

Two layouts are read: T5's ``tokenizer.json``, and CLIP's pair of ``vocab.json`` and ``merges.txt``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ...errors import FileError, MismatchError, MissingFileError
from ...specs.text import ClipTextSpec, T5Spec

__all__ = ["ClipTokenizer", "T5Tokenizer", "TokenIds", "read_clip_tokenizer", "read_t5_tokenizer"]

# OpenAI's pattern without its special tokens: contractions, letters, single digits, and runs of anything else.
CLIP_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
CLIP_FILES = ("vocab.json", "merges.txt")


@dataclass(frozen=True)
class TokenIds:
    """A tokenized text.

    Attributes:
        ids: Token ids, special tokens and padding included.
        used: How many of them are not padding.
        cut: How many of the text's tokens did not fit and were left out.
    """

    ids: tuple[int, ...]
    used: int
    cut: int


class ClipTokenizer:
    """Texts to ``spec.positions`` ids: start, text, end, padding."""

    def __init__(self, tokenizer: Tokenizer, spec: ClipTextSpec) -> None:
        self._tokenizer = tokenizer
        self.spec = spec

    def pieces(self, text: str) -> list[int]:
        """Ids of the bare text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def frame(self, ids: Sequence[int]) -> TokenIds:
        """Put start, end and padding around bare ids, and cut what does not fit."""
        room = self.spec.positions - 2
        kept = [self.spec.bos, *ids[:room], self.spec.eos]
        padding = [self.spec.pad] * (self.spec.positions - len(kept))
        return TokenIds((*kept, *padding), len(kept), max(0, len(ids) - room))

    def __call__(self, text: str) -> TokenIds:
        return self.frame(self.pieces(text))


class T5Tokenizer:
    """Texts to ids: text, end, padding."""

    def __init__(self, tokenizer: Tokenizer, spec: T5Spec) -> None:
        self._tokenizer = tokenizer
        self.spec = spec

    def pieces(self, text: str) -> list[int]:
        """Ids of the bare text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def token(self, token_id: int) -> str:
        """The piece of text that an id stands for, as the vocabulary writes it."""
        return str(self._tokenizer.id_to_token(token_id))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where in the text, in characters, each bare token begins and ends."""
        return [(int(start), int(end)) for start, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]

    def frame(self, ids: Sequence[int], length: int | None = None) -> TokenIds:
        """Put the end token and padding behind bare ids.

        Args:
            ids: Of the bare text.
            length: Length to pad to; the spec's when None. A longer text gets up to ``spec.longest``.
        """
        target = self.spec.length if length is None else length
        room = max(target, self.spec.longest) - 1
        kept = [*ids[:room], self.spec.eos]
        padding = [self.spec.pad] * (target - len(kept))
        return TokenIds((*kept, *padding), len(kept), max(0, len(ids) - room))

    def __call__(self, text: str, length: int | None = None) -> TokenIds:
        return self.frame(self.pieces(text), length)


def read_t5_tokenizer(path: Path, spec: T5Spec) -> T5Tokenizer:
    """Read ``tokenizer.json``, given itself or as its folder.

    Raises:
        MissingFileError: It is not there.
        FileError: It cannot be read.
        MismatchError: It is another model's.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    return T5Tokenizer(_fitting(_read_json(file, "T5"), spec, file), spec)


def read_clip_tokenizer(path: Path, spec: ClipTextSpec) -> ClipTokenizer:
    """Read CLIP's tokenizer: a folder with ``vocab.json`` and ``merges.txt``, or one ``tokenizer.json``.

    Raises:
        MissingFileError: One of the files is not there.
        FileError: They cannot be read.
        MismatchError: They are another model's.
    """
    if path.is_dir() and all((path / name).is_file() for name in CLIP_FILES):
        return ClipTokenizer(_fitting(_clip_bpe(path), spec, path), spec)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise MissingFileError(
            f"CLIP's tokenizer was looked for in {path}: neither {' and '.join(CLIP_FILES)} nor tokenizer.json is "
            "there. Put the two files from the model's tokenizer folder there, or name the folder that has them."
        )
    return ClipTokenizer(_fitting(_read_json(file, "CLIP"), spec, file), spec)


def _fitting(tokenizer: Tokenizer, spec: ClipTextSpec | T5Spec, path: Path) -> Tokenizer:
    """The tokenizer, unless it has ids that the encoder has no embedding for, or not all that it should have."""
    size = tokenizer.get_vocab_size()
    if not spec.tokens <= size <= spec.vocabulary:
        raise MismatchError(
            f"{path} is another model's tokenizer: it has {size} tokens, {spec.name} knows {spec.vocabulary}; choose "
            "the one that belongs to it"
        )
    return tokenizer


def _read_json(file: Path, kind: str) -> Tokenizer:
    if not file.is_file():
        raise MissingFileError(
            f"{kind}'s tokenizer was looked for at {file} and is not there. Put the model's tokenizer.json there, "
            "or name the folder that has it."
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise FileError(f"{file} is not a tokenizer that can be read ({error}); download it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _clip_bpe(folder: Path) -> Tokenizer:
    try:
        vocabulary, merges = models.BPE.read_file(*(str(folder / name) for name in CLIP_FILES))
        model = models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token="<|endoftext|>",
        )
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise FileError(
            f"{' and '.join(CLIP_FILES)} in {folder} are not a tokenizer that can be read ({error}); "
            "download them again"
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
