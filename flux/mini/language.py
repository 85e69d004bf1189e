"""What Foundry Mini can be asked for: the vocabulary, requests, and the sentences that say them.

A ``Request`` is the meaning of a prompt: it says what must be seen, and leaves open what it does not name. ``phrase``
turns it into one of many sentences, as a list of ``Span`` so that each word's owner is known by construction.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = [
    "COLOURS", "COUNTS", "LETTERS", "POSITIONS", "RELATIONS", "SHAPES", "SIZES", "Request", "Span", "Wanted",
    "is_held_out", "mirrored", "phrase", "random_request", "text_of",
]  # fmt: skip

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
SIZES = ("small", "large")
POSITIONS = ("left", "right", "top", "bottom", "center")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = ("", "one", "two", "three")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_OBJECTS = 3
MAX_LETTERS = 5

HELD_OUT_OF = 16  # one request in this many is kept for evaluation
WORDS = (  # of signs that people would ask for
    "OPEN SHOP SALE STOP EXIT FREE CAFE HELP FLUX PAUSE PLAY STAR MOON SUN SKY RED BLUE LOVE HELLO WORLD FIRE WATER "
    "EARTH WIND GO NO YES UP ON OFF IN OUT HOT COLD NEW OLD BIG TEA BAR BUS TAXI HOTEL PIZZA BREAD MILK WINE BEER FISH "
    "CAKE BOOK NEWS ZOO PARK ROAD CITY HOME ROOM DOOR KEY BOX BAG HAT CAT DOG FOX OWL BEE ANT JAZZ ROCK KING QUEEN"
).split()

POSITION_PHRASES = {
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "center": ("in the center",),
}
RELATION_PHRASES = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}


@dataclass(frozen=True)
class Wanted:
    """One kind of object that a request names; ``None`` where it leaves the choice open."""

    shape: str
    colour: str
    size: str | None = None
    position: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Request:
    """The meaning of a prompt: objects or a sign, and perhaps a background.

    Attributes:
        objects: What is to be seen, at most three things in all; empty for a sign.
        relation: How the first of two objects lies to the second, one of ``RELATIONS``.
        background: A colour, or None where any will do.
        word: One to five capital letters, for a sign.
        word_colour: The letters' colour, or None where any will do.
    """

    objects: tuple[Wanted, ...] = ()
    relation: str | None = None
    background: str | None = None
    word: str | None = None
    word_colour: str | None = None


@dataclass(frozen=True)
class Span:
    """A piece of a sentence and the index of the object that it speaks of (None: of none in particular)."""

    text: str
    owner: int | None = None


def is_held_out(request: Request) -> bool:
    """Whether a request belongs to evaluation: training never draws it, in any phrasing.

    Decided by what is asked for, not by its wording: the word of a sign of three or more letters; for objects, their
    kinds and the background together.
    """
    if request.word is not None:
        key = request.word if len(request.word) > 2 else f"{request.word}{request.word_colour}{request.background}"
    else:
        kinds = sorted(f"{o.count}{o.colour}{o.shape}{o.size}{o.position}" for o in request.objects)
        key = f"{kinds}{request.relation}{request.background}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % HELD_OUT_OF == 0


def mirrored(request: Request) -> Request:
    """The request that means the same the other way round: "a to the left of b" for "b to the right of a"."""
    if request.relation is None:
        return request
    return replace(request, objects=request.objects[::-1], relation=OPPOSITE[request.relation])


def random_request(rng: random.Random, *, sign_share: float = 0.35, held_out: bool = False) -> Request:
    """Draw a request, from the training share or from the one that is held out."""
    while True:
        request = _random_sign(rng) if rng.random() < sign_share else _random_objects(rng)
        if is_held_out(request) == held_out:
            return request


def _random_sign(rng: random.Random) -> Request:
    if rng.random() < 0.25:
        word = rng.choice(WORDS)
    else:
        length = rng.choice((1, 2, 3, 3, 4, 4, 4, 5, 5))
        word = "".join(rng.choice(LETTERS) for _ in range(length))
    colour = rng.choice(COLOURS) if rng.random() < 0.85 else None
    background = rng.choice([c for c in COLOURS if c != colour]) if rng.random() < 0.7 else None
    return Request(word=word, word_colour=colour, background=background)


def _random_objects(rng: random.Random) -> Request:
    layout = rng.choice(("one", "one", "two", "two", "three", "related", "counted", "counted with another"))

    def size() -> str | None:
        return rng.choice((None, None, *SIZES))

    background = rng.choice(COLOURS) if rng.random() < 0.45 else None
    colours = [c for c in COLOURS if c != background]
    relation = None
    if layout == "counted":
        objects = [Wanted(rng.choice(SHAPES), rng.choice(colours), size(), None, rng.choice((2, 3)))]
    elif layout == "counted with another":
        kinds = _distinct_kinds(rng, colours, 2)
        counts = rng.choice(((2, 1), (1, 2)))
        objects = [Wanted(s, c, size(), None, n) for (s, c), n in zip(kinds, counts, strict=True)]
    else:
        number = {"one": 1, "two": 2, "three": 3, "related": 2}[layout]
        kinds = _distinct_kinds(rng, colours, number)
        if layout == "related":
            relation = rng.choice(RELATIONS)
            places: list[str | None] = [None, None]
        elif rng.random() < 0.7:
            places = list(rng.sample(POSITIONS, number))
            if number > 1 and rng.random() < 0.15:
                places[rng.randrange(number)] = None
        else:
            places = [None] * number
        objects = [Wanted(s, c, size(), p) for (s, c), p in zip(kinds, places, strict=True)]
    return Request(objects=tuple(objects), relation=relation, background=background)


def _distinct_kinds(rng: random.Random, colours: Sequence[str], number: int) -> list[tuple[str, str]]:
    """Pairs of shape and colour, no two alike; colours differ nearly always, as people ask for it."""
    while True:
        kinds = [(rng.choice(SHAPES), rng.choice(list(colours))) for _ in range(number)]
        if len(set(kinds)) == number and (len({c for _, c in kinds}) == number or rng.random() < 0.2):
            return kinds


def phrase(request: Request, rng: random.Random) -> list[Span]:
    """One of the many ways to say a request, as spans with their owners."""
    spans = _phrase_sign(request, rng) if request.word is not None else _phrase_objects(request, rng)
    if rng.random() < 0.15:
        first = spans[0]
        spans[0] = Span(first.text[0].upper() + first.text[1:], first.owner)
    if rng.random() < 0.1:
        spans.append(Span("."))
    return spans


def text_of(spans: Sequence[Span]) -> str:
    """The sentence that spans make."""
    return "".join(span.text for span in spans)


def _background(request: Request, rng: random.Random) -> list[Span]:
    if request.background is None:
        return []
    colour = request.background
    on = f" on {_article(colour)} {colour} background"
    return [Span(rng.choice((on, on, f", {colour} background")))]


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _phrase_sign(request: Request, rng: random.Random) -> list[Span]:
    colour = f" in {request.word_colour}" if request.word_colour else ""
    word = f'"{request.word}"'
    lead = rng.choice(("the word ", "the word ", "the word ", "", "a sign with the word ", "a sign that says "))
    if request.word is not None and len(request.word) == 1 and rng.random() < 0.5:
        lead = "the letter "
    if request.word_colour and rng.random() < 0.15:
        spans = [Span(f"{lead.strip()} " if lead else ""), Span(f"{word}, {request.word_colour}", 0)]
    else:
        spans = [Span(lead), Span(f"{word}{colour}", 0)]
    return [span for span in spans if span.text] + _background(request, rng)


def _phrase_objects(request: Request, rng: random.Random) -> list[Span]:
    if request.relation is not None:
        joint = f" {RELATION_PHRASES[request.relation]} "
        first, second = (_phrase_object(o, rng, terse=False) for o in request.objects)
        spans = [Span(first, 0), Span(joint), Span(second, 1)]
    else:
        terse = rng.random() < 0.2
        spans = []
        for index, wanted in enumerate(request.objects):
            if index:
                last = index == len(request.objects) - 1
                spans.append(Span("; " if terse else rng.choice((" and ", " and ", ", ")) if last else ", "))
            spans.append(Span(_phrase_object(wanted, rng, terse=terse), index))
    return spans + _background(request, rng)


def _phrase_object(wanted: Wanted, rng: random.Random, *, terse: bool) -> str:
    noun = f"{wanted.colour} {wanted.shape}"
    if wanted.count > 1:
        plural = noun + ("es" if wanted.shape == "cross" else "s")
        return " ".join(filter(None, (COUNTS[wanted.count], wanted.size, plural)))
    if terse:
        parts = [part for part in (wanted.position, wanted.size) if part]
        rng.shuffle(parts)
        return ", ".join([noun, *parts])
    words = " ".join(filter(None, (wanted.size, noun)))
    article = rng.choice((_article(words), _article(words), _article(words), "one", ""))
    place = rng.choice(POSITION_PHRASES[wanted.position]) if wanted.position else ""
    if place and rng.random() < 0.1:
        return f"{place} " + " ".join(filter(None, (article, words)))
    return " ".join(filter(None, (article, words, place)))
