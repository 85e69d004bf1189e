"""Names of tensors as tables: what a file calls a tensor, and what the engine calls it.

A row pairs a name of ours with one or several foreign ones; ``{}`` stands for an open number (a block's), and ``{-}``
for one that counts from the other end. Tables work both ways. What comes out is a plan (``plans``).

Names are those of whole tensors: what a storage format keeps beside one (scales, markers) is not among them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from ...errors import FileError
from .plans import Piece, Plan, Recipe, Reshape

__all__ = ["Change", "Layout", "Row", "Table", "alternatives", "left_out", "native", "pairs"]

SHOWN = 3  # names that a message lists
ANYTHING = "*"  # at the end of a foreign name: whatever follows
OPEN = re.compile(r"\{-?\}")
FORWARD, BACKWARD = "{}", "{-}"
NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # a whole word between dots
MOST_DIGITS = 4  # of a number, far more blocks than any model has


class Change(Enum):
    """How a foreign tensor differs from ours beyond its name."""

    NONE = "not at all"
    SWAPPED = "the lower half of the rows comes first"
    LINEAR = "(N, K) in place of our (N, K, 1, 1)"


@dataclass(frozen=True, eq=False)  # found by itself, many times for each file
class Row:
    """A name of ours and what it is called elsewhere.

    Attributes:
        ours: With ``{}`` for open numbers; None for tensors that are left out on purpose.
        foreign: The tensors that ours is cut into, top to bottom; mostly one. As the only name of a row that is left
            out, it may end in ``*``.
        shares: Rows of each, in proportion; equal ones when empty.
        change: What else is different; only for a single foreign tensor.
        is_duplicate: Whether it may stand in a file beside another row's tensor for the same name of ours, and is then
            left out.
    """

    ours: str | None
    foreign: tuple[str, ...]
    shares: tuple[int, ...] = ()
    change: Change = Change.NONE
    is_duplicate: bool = False

    def __post_init__(self) -> None:
        assert self.foreign
        assert len(self.shares) in (0, len(self.foreign))
        assert len(self.foreign) == 1 or (self.ours is not None and self.change is Change.NONE)
        assert self.ours is None or not any(name.endswith(ANYTHING) for name in self.foreign)

    @functools.cached_property
    def backward(self) -> int | None:
        """Which of the open numbers counts from the other end."""
        marks = OPEN.findall(self.foreign[0])
        return marks.index(BACKWARD) if BACKWARD in marks else None

    def join(self, names: tuple[str, ...]) -> Recipe:
        """Ours, of stored foreign tensors with these names, one for each of ``foreign``."""
        if self.change is Change.SWAPPED:
            return _swapped(names[0])
        reshape = Reshape.TO_CONV if self.change is Change.LINEAR else Reshape.KEEP
        return Recipe(tuple(map(Piece, names)), self._shares(), reshape)

    def cut(self, name: str) -> tuple[Recipe, ...]:
        """Each of ``foreign``, of our stored tensor with this name."""
        if self.change is Change.SWAPPED:
            return (_swapped(name),)
        reshape = Reshape.TO_LINEAR if self.change is Change.LINEAR else Reshape.KEEP
        shares = self._shares()
        ends = [sum(shares[:n]) for n in range(len(shares) + 1)]
        pieces = [Piece(name, start, stop, ends[-1]) for start, stop in zip(ends, ends[1:], strict=False)]
        return tuple(Recipe((piece,), reshape=reshape) for piece in pieces)

    def _shares(self) -> tuple[int, ...]:
        return self.shares or (1,) * len(self.foreign)


def _swapped(name: str) -> Recipe:
    """The two halves of a tensor's rows, the lower one first."""
    return Recipe((Piece(name, 1, 2, 2), Piece(name, 0, 1, 2)), (1, 1))


def pairs(names: Mapping[str, str], endings: Iterable[str], change: Change = Change.NONE) -> tuple[Row, ...]:
    """A row for every pair of a layer's names, ours and theirs, with each ending."""
    return tuple(
        Row(f"{ours}.{ending}", (f"{theirs}.{ending}",), change=change)
        for ours, theirs in names.items()
        for ending in endings
    )


def native(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of the layout that has our own names, from those of another that knows them all."""
    return tuple(Row(ours, (ours,)) for ours in dict.fromkeys(row.ours for row in rows) if ours is not None)


def left_out(names: Iterable[str]) -> tuple[Row, ...]:
    """Rows for tensors that are left out on purpose."""
    return tuple(Row(None, (name,)) for name in names)


def alternatives(rows: Iterable[Row], endings: Mapping[str, str]) -> tuple[Row, ...]:
    """Further rows for other ways to write a name: those that end in a key may end in its value instead."""
    return tuple(
        Row(row.ours, (name.removesuffix(ending) + other,), change=row.change)
        for row in rows
        for name in row.foreign
        for ending, other in endings.items()
        if name.endswith(ending)
    )


Place = tuple[Row, int]  # a row, and which of its foreign names
Numbers = tuple[int, ...]  # the open ones of a name, in its order
Match = tuple[Row, Numbers]


class _Names:
    """Names with open numbers, found by what they look like.

    Args:
        names: Each with what it stands for.
    """

    def __init__(self, names: Iterable[tuple[str, Place]]) -> None:
        self._known: dict[str, list[tuple[list[str], Place]]] = {}
        self._starts: list[tuple[str, Place]] = []
        for name, place in names:
            if name.endswith(ANYTHING):
                self._starts.append((name.removesuffix(ANYTHING), place))
            else:
                self._known.setdefault(_outline(OPEN.sub("0", name)), []).append((name.split("."), place))

    def find(self, name: str) -> tuple[Place, Numbers] | None:
        """What a name stands for and its open numbers; None for one that is not known."""
        words = name.split(".")
        for pattern, place in self._known.get(_outline(name), ()):
            numbers = _open_numbers(pattern, words)
            if numbers is not None:
                return place, numbers
        return next(((place, ()) for start, place in self._starts if name.startswith(start)), None)


def _outline(name: str) -> str:
    """The name with every number, open or not, made 0."""
    return NUMBER.sub("0", name)


def _open_numbers(pattern: list[str], words: list[str]) -> Numbers | None:
    """The words in place of a pattern's open numbers; None where the rest differs or one is not written as a number."""
    numbers = []
    for known, word in zip(pattern, words, strict=True):
        if known in (FORWARD, BACKWARD):
            if len(word) > MOST_DIGITS or (word[0] == "0" and word != "0"):
                return None
            numbers.append(int(word))
        elif known != word:
            return None
    return tuple(numbers)


class Table:
    """Rows that together know every tensor of a layout.

    Args:
        title: Of the layout, for messages.
        rows: Where several have the same name of ours, the first says what it is called when ours is written; a file
            may have any one of them.
    """

    def __init__(self, title: str, rows: Iterable[Row]) -> None:
        self.title, self.rows = title, tuple(rows)
        foreign = [name for row in self.rows for name in row.foreign]
        assert len(set(foreign)) == len(foreign), "a foreign name stands in two rows"
        self._foreign = _Names((name, (row, index)) for row in self.rows for index, name in enumerate(row.foreign))
        first = {row.ours: row for row in reversed(self.rows) if row.ours is not None}
        self._ours = _Names((ours, (row, 0)) for ours, row in first.items())

    def to_ours(self, names: Iterable[str], where: str = "the file") -> Plan:
        """A plan for our tensors, of stored foreign ones.

        Args:
            names: The stored tensors, without prefix.
            where: They are, for messages.

        Raises:
            FileError: A name is not known, one of several that belong together is missing, or two stand for the same.
        """
        groups: dict[Match, dict[int, str]] = {}
        dropped: list[str] = []
        for name, (row, index), numbers in self._matched(self._foreign, names, where):
            if row.ours is None:
                dropped.append(name)
            else:
                groups.setdefault((row, numbers), {})[index] = name
        _check_complete(groups, where)
        counts = _counts((row.foreign[0], row, numbers) for row, numbers in groups)
        chosen: dict[str, tuple[Row, tuple[str, ...]]] = {}
        for (row, numbers), group in groups.items():
            assert row.ours is not None
            target = _filled(row.ours, _turned(row.foreign[0], row, numbers, counts))
            sources = tuple(group[index] for index in range(len(row.foreign)))
            if target not in chosen:
                chosen[target] = row, sources
                continue
            chosen[target], left_out = _keep_one(chosen[target], (row, sources), where)
            dropped += left_out
        return Plan({target: row.join(sources) for target, (row, sources) in chosen.items()}, tuple(dropped))

    def knows(self, name: str) -> bool:
        """Whether a stored tensor's name is one of the layout's."""
        return self._foreign.find(name) is not None

    def to_foreign(self, names: Iterable[str], where: str = "the model") -> Plan:
        """A plan for foreign tensors, of our stored ones; see ``to_ours``.

        Raises:
            FileError: A name is not known.
        """
        matched = list(self._matched(self._ours, names, where))
        counts = _counts((row.ours or "", row, numbers) for _, (row, _), numbers in matched)
        recipes: dict[str, Recipe] = {}
        for name, (row, _), numbers in matched:
            turned = _turned(row.ours or "", row, numbers, counts)
            targets = [_filled(theirs, turned) for theirs in row.foreign]
            recipes |= dict(zip(targets, row.cut(name), strict=True))
        return Plan(recipes)

    def _matched(self, known: _Names, names: Iterable[str], where: str) -> Iterator[tuple[str, Place, Numbers]]:
        unknown: list[str] = []
        for name in names:
            found = known.find(name)
            if found is None:
                unknown.append(name)
            else:
                yield name, *found
        if unknown:
            raise FileError(
                f"{where} has tensors that {self.title} does not have: {_listed(unknown)}; use a whole file of "
                "this model"
            )


def _filled(pattern: str, numbers: Numbers) -> str:
    """The name with its open numbers put in."""
    return pattern.replace(BACKWARD, FORWARD).format(*numbers)


def _lead(pattern: str, index: int) -> str:
    """What stands before an open number."""
    return pattern[: list(OPEN.finditer(pattern))[index].start()]


def _counts(matches: Iterable[tuple[str, Row, Numbers]]) -> dict[str, int]:
    """How far each number that is turned round goes, by what stands before it in the stored names."""
    counts: dict[str, int] = {}
    for pattern, row, numbers in matches:
        index = row.backward
        if index is not None:
            lead = _lead(pattern, index)
            counts[lead] = max(counts.get(lead, 0), numbers[index] + 1)
    return counts


def _turned(pattern: str, row: Row, numbers: Numbers, counts: Mapping[str, int]) -> Numbers:
    """The numbers as the other side counts them."""
    index = row.backward
    if index is None:
        return numbers
    last = counts[_lead(pattern, index)] - 1
    return (*numbers[:index], last - numbers[index], *numbers[index + 1 :])


def _check_complete(groups: Mapping[Match, Mapping[int, str]], where: str) -> None:
    faults = [
        f"{next(iter(group.values()))} without {_filled(theirs, numbers)}"
        for (row, numbers), group in groups.items()
        for index, theirs in enumerate(row.foreign)
        if index not in group
    ]
    if faults:
        raise FileError(f"{where} is not whole: it has {_listed(faults)}; download it again")


def _keep_one(
    one: tuple[Row, tuple[str, ...]], other: tuple[Row, tuple[str, ...]], where: str
) -> tuple[tuple[Row, tuple[str, ...]], tuple[str, ...]]:
    """Of two for the same name of ours the one to keep, and the names that are left out."""
    if one[0].is_duplicate:
        one, other = other, one
    if not other[0].is_duplicate:
        raise FileError(
            f"{where} has both {one[1][0]} and {other[1][0]}, which stand for the same tensor; use another file"
        )
    return one, other[1]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way that files name the tensors of one part.

    Attributes:
        name: For the command line.
        part: "transformer", "autoencoder", "clip", "t5", "vision" or "redux".
        family: "flux1", "flux2", or "" for encoders.
        table: Its rows.
        marks: Names that tell it from all others; the first is where its prefix is looked for.
        absent: Names that such a file does not have.
        prefixes: That may stand before its names; any when None.
    """

    name: str
    part: str
    family: str
    table: Table
    marks: tuple[str, ...]
    absent: tuple[str, ...] = ()
    prefixes: tuple[str, ...] | None = None

    @property
    def title(self) -> str:
        return self.table.title

    def find_prefix(self, names: frozenset[str]) -> str | None:
        """The longest prefix below which the marks stand; None where they do not."""
        first = self.marks[0]
        found = {name.removesuffix(first) for name in names if name.endswith(first)}
        fitting = [
            prefix
            for prefix in found
            if (prefix.endswith(".") or not prefix) and (self.prefixes is None or prefix in self.prefixes)
            if all(prefix + mark in names for mark in self.marks)
            and not any(prefix + name in names for name in self.absent)
        ]
        return max(fitting, key=len, default=None)
