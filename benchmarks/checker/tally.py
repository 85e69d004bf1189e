"""What of a request a picture shows, and many of such verdicts added up."""

from __future__ import annotations

from dataclasses import dataclass, field

from flux.mini.language import Request

__all__ = ["Pair", "Tally", "Verdict"]

Pair = tuple[int, int]
TALLIED = ("colour", "shape", "position", "size", "background", "count")
SHORT_WORDS = (3, 4)  # letters of the words that the project's goal names


@dataclass(frozen=True)
class Verdict:
    """What of a request a picture shows, as pairs (right, asked).

    Attributes:
        colour: Objects in the asked colour; for a sign, its letters as one.
        shape: Objects of the asked shape.
        position: Named positions and relations that hold.
        size: Objects of the asked size.
        background: Whether the background has the asked colour.
        count: Whether there are as many objects as asked, and nothing else; for a sign, nothing beside the word.
        word_right: Whether the word can be read as asked; None without a sign.
        read: The word that was read, ``?`` for what is no letter; empty without a sign.
        all_right: Whether the picture shows everything that was asked and no more objects.
        faults: What is wrong, in words.
    """

    colour: Pair = (0, 0)
    shape: Pair = (0, 0)
    position: Pair = (0, 0)
    size: Pair = (0, 0)
    background: Pair = (0, 0)
    count: Pair = (0, 0)
    word_right: bool | None = None
    read: str = ""
    all_right: bool = False
    faults: tuple[str, ...] = ()


@dataclass
class Tally:
    """Verdicts added up, for a benchmark's table.

    Attributes:
        marks: Right and asked, for each line of the table.
    """

    marks: dict[str, list[int]] = field(default_factory=dict)

    def add(self, verdict: Verdict, request: Request) -> None:
        """Count a verdict on a picture of a request."""
        kind = "objects" if request.word is None else "signs"
        for name in TALLIED:
            right, asked = getattr(verdict, name)
            of_sign = name == "colour" and request.word is not None
            self._mark("colour of words" if of_sign else name, right, asked)
        self._mark("all", verdict.all_right)
        self._mark(f"all of {kind}", verdict.all_right)
        if request.word is not None:
            short = SHORT_WORDS[0] <= len(request.word) <= SHORT_WORDS[1]
            self._mark("words of 3-4 letters", bool(verdict.word_right), int(short))
            self._mark("words", bool(verdict.word_right))
            letters = sum(a == b for a, b in zip(verdict.read, request.word, strict=False))
            self._mark("letters", letters, len(request.word))

    def _mark(self, name: str, right: int, asked: int = 1) -> None:
        mark = self.marks.setdefault(name, [0, 0])
        mark[0] += int(right) if asked else 0
        mark[1] += asked

    def rates(self) -> dict[str, float]:
        """The share that is right, 0..1, and under the same name with `` asked`` how often it was asked.

        What was never asked is left out.
        """
        shares = {name: right / asked for name, (right, asked) in self.marks.items() if asked}
        return shares | {f"{name} asked": float(self.marks[name][1]) for name in shares}

    def table(self) -> str:
        """The rates as text, a line each."""
        return "\n".join(
            f"{name:22}{right / asked:8.2%}{right:8d} of {asked}"
            for name, (right, asked) in self.marks.items()
            if asked
        )
