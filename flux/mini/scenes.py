"""Scenes that Foundry Mini is trained on: requests laid out on a canvas and drawn exactly.

All lengths are in pixels. Objects have the size they have on a 128-pixel canvas, and shrink on smaller ones, so that a
larger canvas shows the same objects with more room.

Centres lie in slots on a lattice of 8 pixels, the autoencoder's cell, letters fill whole tokens of 16 pixels, and each
size class has one radius. That keeps the number of different edge patterns small, so that a few million parameters can
draw all of them crisply. Places and sizes that a request leaves open are always the same, because a model this small
mixes the layouts between which it may choose: what the seed decides is the colours that were left open.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .language import COLOURS, LETTERS, Request, Wanted

__all__ = [
    "LATTICE", "NAMED", "PALETTE", "Item", "Scene", "Sign", "draw", "lay_out", "letter_scale", "place_of", "shape_mask",
    "word_mask",
]  # fmt: skip

Image = NDArray[np.uint8]
Mask = NDArray[np.float32]
Slot = tuple[int, int]  # across and down: -1 near the edge, 0 in the middle, 1 near the far edge
Line = tuple[tuple[float, float], ...]

NATIVE_SIDE = 128
SUPERSAMPLE = 4  # every mask is drawn this much larger and averaged down
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 44),
    "green": (38, 160, 68),
    "blue": (40, 84, 222),
    "yellow": (248, 216, 48),
    "orange": (246, 138, 28),
    "purple": (142, 60, 182),
    "black": (20, 20, 22),
    "white": (246, 246, 246),
}

LATTICE = 8
# Radii at the native side. A lone object may be bigger than one of several.
RADII = {
    True: {"small": 11.0, "large": 26.0},
    False: {"small": 11.0, "large": 18.0},
}
MARGIN = 3.0  # from an object to the canvas's edge, and between two objects
EDGE_SLOT = 24.0  # how far from the canvas's edge "left" and "top" put a centre; "center" lies in the middle
USUAL_SIZE = "large"  # of an object whose size is not named

LETTER_CELL = 16.0  # advance from letter to letter: a word's letters fill whole tokens of the transformer
LETTER_HEIGHT = 28.0
LETTER_WIDTH = 13.5
LETTER_STROKE = 4.2
LETTERS_SHRINK_BELOW = 96  # pixels of the canvas's shorter side; smaller letters could not be read

NAMED: dict[str, Slot] = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}
SIDEWAYS = ("left of", "right of")
RELATED = {"left of": (-1, 1), "right of": (1, -1), "above": (-1, 1), "below": (1, -1)}
# Where objects without a named place go, in the order in which they are named.
ARRANGEMENTS: dict[int, tuple[Slot, ...]] = {
    1: ((0, 0),),
    2: ((-1, 0), (1, 0)),
    3: ((0, -1), (-1, 1), (1, 1)),
}
FREE_SLOTS = ("center", "left", "right", "top", "bottom")  # for one among others that have a named place, in this order


@dataclass(frozen=True)
class Item:
    """One drawn object: its kind, centre and radius."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Sign:
    """A drawn word: centre of the whole and the scale of its letters."""

    word: str
    colour: str
    x: float
    y: float
    scale: float


@dataclass(frozen=True)
class Scene:
    """Everything there is on a canvas."""

    width: int
    height: int
    background: str
    items: tuple[Item, ...] = ()
    sign: Sign | None = None


def lay_out(request: Request, rng: random.Random, width: int = NATIVE_SIDE, height: int = NATIVE_SIDE) -> Scene:
    """Choose what a request leaves open, and find a place for everything.

    Args:
        request: What must be seen.
        rng: Decides the rest; equal states give equal scenes.
        width: Canvas width in pixels.
        height: Canvas height in pixels.

    Raises:
        ValueError: Two objects are wanted at one place, or the word is wider than the canvas.
    """
    scale = min(1.0, min(width, height) / NATIVE_SIDE)
    if request.word is not None:
        return _lay_out_sign(request, rng, width, height)
    background = request.background or _free_background([o.colour for o in request.objects], rng)
    wanted = [o for o in request.objects for _ in range(o.count)]
    radii = [RADII[len(wanted) == 1][o.size or USUAL_SIZE] * scale for o in wanted]
    slots = _slots(wanted, request.relation)
    centres = [_centre(slot, r, scale, width, height) for slot, r in zip(slots, radii, strict=True)]
    if not _apart(centres, radii, scale):
        raise ValueError("two objects are wanted at one place; name different places")
    items = tuple(Item(o.shape, o.colour, x, y, r) for o, (x, y), r in zip(wanted, centres, radii, strict=True))
    return Scene(width, height, background, items)


def _free_background(taken: list[str], rng: random.Random) -> str:
    """White, or black beside white things; now and then any colour that is free."""
    if rng.random() < 0.25:
        return rng.choice([c for c in COLOURS if c not in taken])
    return next(c for c in ("white", "black", "blue", "yellow", "red") if c not in taken)


def _slots(wanted: list[Wanted], relation: str | None) -> list[Slot]:
    """A slot for every object: the named one, or the one that an arrangement has for it."""
    if relation is not None:
        return [(place, 0) if relation in SIDEWAYS else (0, place) for place in RELATED[relation]]
    if all(o.position is None for o in wanted):
        return list(ARRANGEMENTS[len(wanted)])
    named = {o.position for o in wanted}
    free = iter(place for place in FREE_SLOTS if place not in named)
    return [NAMED[o.position or next(free)] for o in wanted]


def _centre(slot: Slot, radius: float, scale: float, width: int, height: int) -> tuple[float, float]:
    """A slot's centre, for an object of this radius: on the lattice where there is room."""
    slot_edge, room = EDGE_SLOT * scale, radius + MARGIN * scale
    candidates = (LATTICE * math.floor(slot_edge / LATTICE), slot_edge, LATTICE * math.ceil(room / LATTICE))
    edge = next(c for c in candidates if c >= room)
    x, y = ({-1: edge, 0: side / 2, 1: side - edge}[place] for place, side in zip(slot, (width, height), strict=True))
    return x, y


def place_of(position: str, radius: float, width: int, height: int) -> tuple[float, float]:
    """Where on a canvas the centre of an object of this radius is that stands at one of ``NAMED``."""
    return _centre(NAMED[position], radius, min(1.0, min(width, height) / NATIVE_SIDE), width, height)


def _apart(centres: list[tuple[float, float]], radii: list[float], scale: float) -> bool:
    return all(
        math.dist(centres[i], centres[j]) >= radii[i] + radii[j] + MARGIN * scale
        for i in range(len(centres))
        for j in range(i)
    )


def letter_scale(width: int, height: int) -> float:
    """How much smaller than at the native size letters are on a canvas."""
    return min(1.0, min(width, height) / LETTERS_SHRINK_BELOW)


def _lay_out_sign(request: Request, rng: random.Random, width: int, height: int) -> Scene:
    """A word across the middle, its cells on token borders where letters have their full size."""
    word = request.word or ""
    colour = request.word_colour
    if colour is None:
        colour = rng.choice([c for c in COLOURS if c != request.background])
    background = request.background or _free_background([colour], rng)
    scale = letter_scale(width, height)
    cell = LETTER_CELL * scale
    left = cell * math.floor((width / cell - len(word)) / 2)
    if left < 0:
        raise ValueError(f"a canvas of {width}x{height} pixels has no room for {len(word)} letters; use a shorter word")
    middle = cell * math.floor(height / cell / 2)
    return Scene(width, height, background, sign=Sign(word, colour, left + len(word) * cell / 2, middle, scale))


def draw(scene: Scene) -> Image:
    """Draw a scene: (H, W, 3) RGB bytes, edges anti-aliased."""
    canvas = np.empty((scene.height, scene.width, 3), np.float32)
    canvas[:] = PALETTE[scene.background]
    for item in scene.items:
        mask = shape_mask(item.shape, item.x, item.y, item.radius, scene.width, scene.height)
        _paint(canvas, mask, item.colour)
    if scene.sign is not None:
        _paint(canvas, word_mask(scene.sign, scene.width, scene.height), scene.sign.colour)
    picture: Image = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return picture


def _paint(canvas: NDArray[np.float32], mask: Mask, colour: str) -> None:
    canvas += mask[..., None] * (np.asarray(PALETTE[colour], np.float32) - canvas)


def shape_mask(shape: str, x: float, y: float, radius: float, width: int, height: int) -> Mask:
    """Coverage (H, W) in 0..1 of one shape with its centre at (x, y)."""
    big = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.uint8)
    centre = (round(x * SUPERSAMPLE), round(y * SUPERSAMPLE))
    if shape in ("circle", "ring"):
        cv2.circle(big, centre, round(radius * SUPERSAMPLE), 255, cv2.FILLED)
        if shape == "ring":
            cv2.circle(big, centre, round(radius * RING_HOLE * SUPERSAMPLE), 0, cv2.FILLED)
    else:
        corners = [((x + u * radius) * SUPERSAMPLE, (y + v * radius) * SUPERSAMPLE) for u, v in OUTLINES[shape]]
        cv2.fillPoly(big, [np.asarray(corners).round().astype(np.int32)], 255)
    return _averaged_down(big, width, height)


def _averaged_down(big: Image, width: int, height: int) -> Mask:
    """A supersampled mask of bytes to coverage in 0..1."""
    small: Mask = cv2.resize(big, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    small /= 255
    return small


def _polar(count: int, radii: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    """Corners of a regular figure whose radii alternate, first corner up."""
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    return tuple(
        (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)
    )


RING_HOLE = 0.55
_ARM = 0.33  # half the width of a cross's arms
OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)),
    "triangle": ((0.0, -1.0), (1.05, 0.82), (-1.05, 0.82)),
    "star": _polar(10, (1.12, 0.45)),
    "cross": (
        (-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM),
        (_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM),
    ),
}  # fmt: skip


def word_mask(sign: Sign, width: int, height: int) -> Mask:
    """Coverage (H, W) in 0..1 of a word's letters, each centred in its own cell."""
    big = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.uint8)
    cell = LETTER_CELL * sign.scale
    for index, letter in enumerate(sign.word):
        glyph = _glyph(letter, sign.scale)
        centre_x = sign.x + (index - (len(sign.word) - 1) / 2) * cell
        left = round(centre_x * SUPERSAMPLE - glyph.shape[1] / 2)
        top = round(sign.y * SUPERSAMPLE - glyph.shape[0] / 2)
        _stamp(big, glyph, left, top)
    return _averaged_down(big, width, height)


def _stamp(big: Image, glyph: Image, left: int, top: int) -> None:
    """Put a glyph onto a canvas, cut where it leaves it."""
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + glyph.shape[0], big.shape[0]), min(left + glyph.shape[1], big.shape[1])
    if y0 < y1 and x0 < x1:
        target = big[y0:y1, x0:x1]
        np.maximum(target, glyph[y0 - top : y1 - top, x0 - left : x1 - left], out=target)


@functools.lru_cache(maxsize=4 * len(LETTERS))
def _glyph(letter: str, scale: float) -> Image:
    """A capital at supersampled size; all have one height and one width."""
    stroke = LETTER_STROKE * scale * SUPERSAMPLE
    height, width = (round(length * scale * SUPERSAMPLE) for length in (LETTER_HEIGHT, LETTER_WIDTH))
    canvas = np.zeros((height, width), np.uint8)
    inner = np.asarray((width - 1 - stroke, height - 1 - stroke))
    for line in STROKES[letter]:
        points = (np.asarray(line) * inner + stroke / 2).round().astype(np.int32)
        cv2.polylines(canvas, [points], False, 255, max(1, round(stroke)), cv2.LINE_AA)
    return canvas


# Letters of straight strokes in the unit square, x to the right and y down; round corners are cut.
_BOWL: Line = ((0, 1), (0, 0), (0.7, 0), (1, 0.14), (1, 0.4), (0.7, 0.54), (0, 0.54))
_RING: Line = ((0.3, 0), (0.7, 0), (1, 0.2), (1, 0.8), (0.7, 1), (0.3, 1), (0, 0.8), (0, 0.2), (0.3, 0))
_HOOK: Line = ((1, 0.2), (0.7, 0), (0.3, 0), (0, 0.2), (0, 0.8), (0.3, 1), (0.7, 1), (1, 0.8))
STROKES: dict[str, tuple[Line, ...]] = {
    "A": (((0, 1), (0.5, 0), (1, 1)), ((0.18, 0.66), (0.82, 0.66))),
    "B": (((0, 0.48), (0.65, 0.48), (0.95, 0.36), (0.95, 0.12), (0.65, 0), (0, 0), (0, 1), (0.7, 1), (1, 0.87),
           (1, 0.6), (0.65, 0.48)),),
    "C": (_HOOK,),
    "D": (((0, 0), (0.55, 0), (1, 0.26), (1, 0.74), (0.55, 1), (0, 1), (0, 0)),),
    "E": (((1, 0), (0, 0), (0, 1), (1, 1)), ((0, 0.5), (0.8, 0.5))),
    "F": (((1, 0), (0, 0), (0, 1)), ((0, 0.5), (0.8, 0.5))),
    "G": ((*_HOOK, (1, 0.55), (0.55, 0.55)),),
    "H": (((0, 0), (0, 1)), ((1, 0), (1, 1)), ((0, 0.5), (1, 0.5))),
    "I": (((0.5, 0), (0.5, 1)), ((0.15, 0), (0.85, 0)), ((0.15, 1), (0.85, 1))),
    "J": (((1, 0), (1, 0.8), (0.7, 1), (0.3, 1), (0, 0.8)),),
    "K": (((0, 0), (0, 1)), ((1, 0), (0, 0.56)), ((0.35, 0.38), (1, 1))),
    "L": (((0, 0), (0, 1), (1, 1)),),
    "M": (((0, 1), (0, 0), (0.5, 0.5), (1, 0), (1, 1)),),
    "N": (((0, 1), (0, 0), (1, 1), (1, 0)),),
    "O": (_RING,),
    "P": (_BOWL,),
    "Q": (_RING, ((0.5, 0.65), (1, 1))),
    "R": (_BOWL, ((0.45, 0.54), (1, 1))),
    "S": (((1, 0.17), (0.7, 0), (0.3, 0), (0, 0.15), (0, 0.33), (0.3, 0.47), (0.7, 0.53), (1, 0.67), (1, 0.85),
           (0.7, 1), (0.3, 1), (0, 0.83)),),
    "T": (((0, 0), (1, 0)), ((0.5, 0), (0.5, 1))),
    "U": (((0, 0), (0, 0.8), (0.3, 1), (0.7, 1), (1, 0.8), (1, 0)),),
    "V": (((0, 0), (0.5, 1), (1, 0)),),
    "W": (((0, 0), (0.22, 1), (0.5, 0.4), (0.78, 1), (1, 0)),),
    "X": (((0, 0), (1, 1)), ((1, 0), (0, 1))),
    "Y": (((0, 0), (0.5, 0.5), (1, 0)), ((0.5, 0.5), (0.5, 1))),
    "Z": (((0, 0), (1, 0), (0, 1), (1, 1)),),
}  # fmt: skip
