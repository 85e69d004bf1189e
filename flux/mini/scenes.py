"""Scenes that Foundry Mini is trained on: requests laid out on a canvas and drawn exactly.

All lengths are in pixels. Objects have the size they have on a 128-pixel canvas, and shrink on smaller ones, so that a
larger canvas shows the same objects with more room.

Centres and letter cells lie on a lattice of 8 pixels, the autoencoder's cell, and each size class has one radius. Both
keep the number of different edge patterns small, so that a few million parameters can draw all of them crisply.
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

__all__ = ["PALETTE", "Item", "Scene", "Sign", "draw", "lay_out", "shape_mask", "word_mask"]

Image = NDArray[np.uint8]
Mask = NDArray[np.float32]

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
# Radii at the native side. A lone object is bigger than one of several.
RADII = {
    True: {"small": 12.0, "large": 26.0},
    False: {"small": 10.0, "large": 18.0},
}
MARGIN = 3.0  # from an object to the canvas's edge, and between two objects
SIDE = (0.16, 0.26)  # where "left" and "top" put a centre, as a fraction of the side
MIDDLE = (0.43, 0.57)
RELATED_GAP = 0.24  # least distance of related objects along their axis, as a fraction of the side
RELATED_SLOPE = 0.5  # most distance across it, as a fraction of the one along it

LETTER_CELL = 24.0  # advance from letter to letter
LETTER_HEIGHT = 28.0
LETTER_WIDTH = 19.0
LETTER_STROKE = 4.5
SIGN_JITTER = 12.0
SIGN_MARGIN = 2.0
PLACING_TRIES = 60
CROWDED_SHRINK = 0.85  # for canvases that have no room for the full size


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
        ValueError: The canvas is too small for the objects.
    """
    scale = min(1.0, min(width, height) / NATIVE_SIDE)
    if request.word is not None:
        return _lay_out_sign(request, rng, width, height, scale)
    background = request.background or _free_background([o.colour for o in request.objects], rng)
    wanted = [o for o in request.objects for _ in range(o.count)]
    sizes = {o: o.size or rng.choice(("small", "large")) for o in request.objects}
    for attempt in range(PLACING_TRIES):
        shrink = 1.0 if attempt < PLACING_TRIES // 2 else CROWDED_SHRINK
        radii = [RADII[len(wanted) == 1][sizes[o]] * scale * shrink for o in wanted]
        centres = _place(wanted, radii, request.relation, rng, width, height)
        if centres is not None:
            items = tuple(Item(o.shape, o.colour, x, y, r) for o, (x, y), r in zip(wanted, centres, radii, strict=True))
            return Scene(width, height, background, items)
    raise ValueError(f"a canvas of {width}x{height} pixels has no room for {len(wanted)} objects; use a larger one")


def _free_background(taken: list[str], rng: random.Random) -> str:
    """White, or black beside white things; now and then any colour that is free."""
    if rng.random() < 0.25:
        return rng.choice([c for c in COLOURS if c not in taken])
    return next(c for c in ("white", "black", "blue", "yellow", "red") if c not in taken)


def _place(
    wanted: list[Wanted], radii: list[float], relation: str | None, rng: random.Random, width: int, height: int
) -> list[tuple[float, float]] | None:
    """Centres that satisfy positions and relation without overlap, or None."""
    for _ in range(PLACING_TRIES):
        centres = [_centre(o.position, r, rng, width, height) for o, r in zip(wanted, radii, strict=True)]
        if _apart(centres, radii) and (relation is None or _related(centres, relation, width, height)):
            return centres
    return None


def _centre(position: str | None, radius: float, rng: random.Random, width: int, height: int) -> tuple[float, float]:
    edge = radius + MARGIN
    along = {
        None: ((0.0, 1.0), (0.0, 1.0)),
        "left": (SIDE, MIDDLE),
        "right": ((1 - SIDE[1], 1 - SIDE[0]), MIDDLE),
        "top": (MIDDLE, SIDE),
        "bottom": (MIDDLE, (1 - SIDE[1], 1 - SIDE[0])),
        "center": (MIDDLE, MIDDLE),
    }[position]
    x, y = (
        _on_lattice(rng.uniform(low * side, high * side), edge, side - edge)
        for (low, high), side in zip(along, (width, height), strict=True)
    )
    return x, y


def _on_lattice(value: float, lowest: float, highest: float) -> float:
    """The lattice point nearest to ``value`` between two bounds; midway between them if there is none."""
    first, last = math.ceil(lowest / LATTICE), math.floor(highest / LATTICE)
    if first > last:
        return (lowest + highest) / 2
    return float(LATTICE * min(max(math.floor(value / LATTICE + 0.5), first), last))


def _apart(centres: list[tuple[float, float]], radii: list[float]) -> bool:
    return all(
        math.dist(centres[i], centres[j]) >= radii[i] + radii[j] + MARGIN for i in range(len(centres)) for j in range(i)
    )


def _related(centres: list[tuple[float, float]], relation: str, width: int, height: int) -> bool:
    (ax, ay), (bx, by) = centres
    dx, dy = ax - bx, ay - by
    along, across, side = {
        "left of": (-dx, dy, width),
        "right of": (dx, dy, width),
        "above": (-dy, dx, height),
        "below": (dy, dx, height),
    }[relation]
    return along >= RELATED_GAP * side and abs(across) <= RELATED_SLOPE * along


def _lay_out_sign(request: Request, rng: random.Random, width: int, height: int, scale: float) -> Scene:
    word = request.word or ""
    colour = request.word_colour
    if colour is None:
        colour = rng.choice([c for c in COLOURS if c != request.background])
    background = request.background or _free_background([colour], rng)
    half_width = len(word) * LETTER_CELL * scale / 2
    middle = width / 2 - half_width + rng.uniform(-SIGN_JITTER, SIGN_JITTER)
    x = half_width + _on_lattice(middle, SIGN_MARGIN, width - 2 * half_width - SIGN_MARGIN)
    y = _on_lattice(height / 2 + rng.uniform(-SIGN_JITTER, SIGN_JITTER), 0, height)
    return Scene(width, height, background, sign=Sign(word, colour, x, y, scale))


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
    """A capital in OpenCV's Hershey strokes at supersampled size, its height fixed, its width at most a cell's."""
    font, thickness = cv2.FONT_HERSHEY_SIMPLEX, round(LETTER_STROKE * SUPERSAMPLE)
    size = LETTER_HEIGHT * SUPERSAMPLE
    font_scale = (size - thickness) / 21.0  # Hershey capitals are 21 units tall
    canvas = np.zeros((int(2 * size), int(3 * size)), np.uint8)
    cv2.putText(canvas, letter, (int(size), int(1.5 * size)), font, font_scale, 255, thickness, cv2.LINE_AA)
    ys, xs = np.nonzero(canvas > 127)
    tight = canvas[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    width = min(tight.shape[1], round(LETTER_WIDTH * SUPERSAMPLE))
    target = (max(1, round(width * scale)), max(1, round(size * scale)))
    return np.asarray(cv2.resize(tight, target, interpolation=cv2.INTER_AREA), np.uint8)
