"""JSON texts with a few things changed, that stay JSON mostly: so what is behind the parser is reached."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["ODD_VALUES", "Raw", "Table", "dump", "mutated_json", "parse"]


class Table(list):
    """A JSON object as a list of [name, value], in which a name may stand twice."""


class Raw(str):
    """Text that stands in the JSON as it is."""

    __slots__ = ()


COUNTS = (1, 1, 2, 4)  # of changes, of which each is drawn equally often
LONG, DEEP = 3_000, 100_000  # items, and levels beyond what any parser follows
ODD_VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 7, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(1.0, 1e300, float("nan"), float("inf"), True, False, None),
    *("", "4", "words", "a\nb", "x" * LONG),
    *(Table(), [], [[]], [1] * 9, [2**20] * 4, [0, 2**40], [0, 2**70]),
    Raw('"\\ud800"'),  # half of a pair, which is no text
    Raw("1" * 5_000),
    Raw("-0"),
    Raw("1e999"),
    Raw("[" * DEEP),
    Raw("[" * LONG + "]" * LONG),
    Raw('{"a":' * 400 + "1" + "}" * 400),
    Raw("[" + "{}," * LONG + "{}]"),
)
ODD_NAMES = ("", "x" * LONG, "a\nb", Raw('"\\ud800"'), "__metadata__", "a" * 1_025, "\x1b[2J")
SIDES = (0, 1, 1, 2, 2**40)


def parse(text: str | bytes) -> Any:
    """A text as lists, ``Table``s and values."""
    return json.loads(text, object_pairs_hook=lambda pairs: Table([list(pair) for pair in pairs]))


def dump(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, Table):
        return "{" + ",".join(f"{dump(name)}:{dump(item)}" for name, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value)


def mutated_json(text: str | bytes, rng: random.Random) -> str:
    """The text with some values or names changed, doubled, taken out or exchanged."""
    tree = [parse(text)]
    for _ in range(rng.choice(COUNTS)):
        rng.choice(CHANGES)(list(_places(tree)), rng)
    return dump(tree[0])


Place = tuple[list, int]  # a list and a place in it, where a value stands; in a Table's pair that is the second


def _places(value: list) -> Iterator[Place]:
    """Every value within ``value``."""
    slots = [(pair, 1) for pair in value] if isinstance(value, Table) else [(value, at) for at in range(len(value))]
    for owner, at in slots:
        yield owner, at
        if isinstance(owner[at], list):
            yield from _places(owner[at])


def _pick(places: list[Place], rng: random.Random, fits: Callable[[Any], bool]) -> Place | None:
    fitting = [(owner, at) for owner, at in places if fits(owner[at])]
    return rng.choice(fitting) if fitting else None


def _table(places: list[Place], rng: random.Random) -> Table | None:
    place = _pick(places, rng, lambda value: isinstance(value, Table) and bool(value))
    return None if place is None else place[0][place[1]]


def put_an_odd_value(places: list[Place], rng: random.Random) -> None:
    owner, at = rng.choice(places)
    owner[at] = copy.deepcopy(rng.choice(ODD_VALUES))


def nudge_a_number(places: list[Place], rng: random.Random) -> None:
    place = _pick(places, rng, lambda value: type(value) is int)
    if place is not None:
        owner, at = place
        owner[at] = rng.choice((owner[at] + 1, owner[at] - 1, owner[at] * 2, owner[at] // 2, -owner[at]))


def exchange_values(places: list[Place], rng: random.Random) -> None:
    one, other = (_pick(places, rng, lambda value: not isinstance(value, list)) for _ in range(2))
    if one is not None and other is not None:
        one[0][one[1]], other[0][other[1]] = other[0][other[1]], one[0][one[1]]


def double_a_name(places: list[Place], rng: random.Random) -> None:
    table = _table(places, rng)
    if table is not None:
        table.insert(rng.randrange(len(table) + 1), copy.deepcopy(rng.choice(table)))


def take_out_a_name(places: list[Place], rng: random.Random) -> None:
    table = _table(places, rng)
    if table is not None:
        del table[rng.randrange(len(table))]


def change_a_name(places: list[Place], rng: random.Random) -> None:
    table = _table(places, rng)
    if table is not None:
        pair = rng.choice(table)
        pair[0] = rng.choice((*ODD_NAMES, pair[0] if isinstance(pair[0], Raw) else pair[0][:-1]))


def exchange_names(places: list[Place], rng: random.Random) -> None:
    table = _table(places, rng)
    if table is not None:
        one, other = rng.choice(table), rng.choice(table)
        one[0], other[0] = other[0], one[0]


def lengthen_or_shorten(places: list[Place], rng: random.Random) -> None:
    place = _pick(places, rng, lambda value: type(value) is list)
    if place is not None:
        array = place[0][place[1]]
        if array and rng.random() < 0.5:
            del array[rng.randrange(len(array))]
        else:
            array.insert(rng.randrange(len(array) + 1), rng.choice(SIDES))


CHANGES = (
    put_an_odd_value,
    put_an_odd_value,
    nudge_a_number,
    nudge_a_number,
    exchange_values,
    double_a_name,
    take_out_a_name,
    change_a_name,
    exchange_names,
    lengthen_or_shorten,
)
