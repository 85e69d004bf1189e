"""The word on a sign: read by comparing each cell with the letters that signs are drawn with."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import cv2
import numpy as np

from flux.mini import scenes
from flux.mini.language import LETTERS, Request

from .picture import (
    HALF,
    NAMES,
    OPENING,
    TINY,
    VISIBLE,
    Floats,
    Image,
    Picture,
    components,
    coverage_of,
    ink_counts,
    measure,
    name_ink,
    paint_of,
)
from .tally import Pair, Verdict

__all__ = ["check_sign", "read_word"]

MIN_LETTER = 0.5  # correlation below which a cell holds no letter
UNREADABLE = "?"
LETTER_REACH = 3  # pixels that a letter may lie off its cell's centre
LETTER_BLUR = 0.8  # of the templates; sharp ones lose the corners that tell D from O once a picture is soft
FAINT = 1.0  # a cell whose coverage varies less than this in all is empty
CELL_MARGIN = 2  # empty rows above and below a letter that are part of its template


@dataclass(frozen=True)
class _Ink:
    """Everything notable on a background, taken for letters: its coverage (H, W) and the colours of its parts."""

    coverage: Floats
    colours: tuple[str | None, ...]


def read_word(image: Image) -> str:
    """The word on a sign, ``?`` for each letter that cannot be read; nothing is known of what it should be."""
    picture = measure(image)
    return _read(_ink(picture).coverage, picture.letter_scale)


def check_sign(picture: Picture, request: Request, background: Pair, faults: list[str]) -> Verdict:
    ink = _ink(picture)
    word, surplus = _read(ink.coverage, picture.letter_scale), _is_surplus(ink.coverage, picture)
    if word != request.word:
        faults.append(f'reads "{word}", not "{request.word}"')
    if surplus:
        faults.append("something lies beside the word")
    colour: Pair = (0, 0)
    if request.word_colour is not None:
        colour = (int(set(ink.colours) == {request.word_colour}), 1)
        if not colour[0]:
            faults.append(f"letters are {', '.join(map(str, ink.colours))}, not {request.word_colour}")
    return Verdict(
        colour=colour,
        background=background,
        count=(int(not surplus), 1),
        word_right=word == request.word,
        read=word,
        all_right=not faults,
        faults=tuple(faults),
    )


def _ink(picture: Picture) -> _Ink:
    visible = picture.contrast > VISIBLE
    parts = list(components(visible, picture.notable))
    if not parts:
        return _Ink(np.zeros(visible.shape, np.float32), ())
    main = int(ink_counts(picture, visible).argmax())
    coverage = coverage_of(picture, paint_of(picture, visible, main))
    kept = cv2.dilate(np.any(parts, axis=0).astype(np.uint8), OPENING)  # with the edges, without specks
    colours = [name_ink(picture, part, int(ink_counts(picture, part).argmax())) for part in parts]
    return _Ink(coverage * kept, tuple(colours))


def _line(coverage: Floats, scale: float) -> tuple[int, int]:
    """The rows, first and behind the last, that hold most ink within the height of a letter."""
    height = min(math.ceil(scenes.LETTER_HEIGHT * scale), len(coverage))
    sums = np.concatenate([[0.0], np.cumsum(coverage.sum(1))])
    inside = sums[height:] - sums[:-height]
    best = np.nonzero(inside >= inside.max() - TINY)[0]
    top = int(round(float(best.mean())))
    return top, top + height


def _is_surplus(coverage: Floats, picture: Picture) -> bool:
    """Whether there is a notable thing out of the word's line."""
    top, bottom = _line(coverage, picture.letter_scale)
    outside = coverage > HALF
    outside[max(top - LETTER_REACH, 0) : bottom + LETTER_REACH] = False
    return any(True for _ in components(outside, picture.notable))


def _read(coverage: Floats, scale: float) -> str:
    """Cut a line of ink into cells and read a letter in each."""
    cell = scenes.LETTER_CELL * scale
    top, bottom = _line(coverage, scale)
    columns = np.nonzero((coverage[top:bottom] > HALF).any(0))[0]
    if not len(columns):
        return ""
    first, last = float(columns[0]), float(columns[-1] + 1)
    narrow, wide = scenes.LETTER_STROKE * scale, scenes.LETTER_WIDTH * scale
    # Ink reaches over the distance of the outer letters' centres and half of either letter. That leaves one number of
    # cells where letters are evenly set, and at most two where they are not.
    cells = (last - first - (narrow + wide) / 2) / cell
    counts = {max(1, math.floor(cells) + 1), max(1, math.ceil(cells) + 1)}
    scores = _letter_scores(coverage, (top + bottom) / 2, scale)
    best: Floats = np.full((1, len(LETTERS)), -np.inf, np.float32)
    for count in sorted(counts):
        span = (count - 1) * cell
        low, high = max(first + narrow / 2, last - span - wide / 2), min(first + wide / 2, last - span - narrow / 2)
        low, high = (low, high) if low <= high else ((low + high) / 2,) * 2  # uneven letters: the middle is nearest
        starts = np.arange(round(low), round(high) + 1)
        centres = np.clip(np.round(starts[:, None] + np.arange(count) * cell).astype(int), 0, len(scores) - 1)
        cut = scores[centres]  # (start, cell, letter)
        candidate = cut[cut.max(2).sum(1).argmax()]
        if candidate.max(1).mean() > best.max(1).mean():
            best = candidate
    return "".join(LETTERS[row.argmax()] if row.max() >= MIN_LETTER else UNREADABLE for row in best)


def _letter_scores(coverage: Floats, middle: float, scale: float) -> Floats:
    """(W + 1, 26) correlation of each letter with the ink around each column's left edge, at the best offset."""
    templates, height, width = _templates(scale)
    up = LETTER_REACH + height // 2 + 1  # so that windows around every pixel lie inside
    left = LETTER_REACH + width // 2
    padded = np.pad(coverage, ((up, up), (left, left)))
    row = round(middle) - LETTER_REACH - height // 2 + up
    strip = padded[row : row + height + 2 * LETTER_REACH]
    windows = np.lib.stride_tricks.sliding_window_view(strip, (height, width))
    vectors = windows.reshape(-1, height * width)
    variances = np.einsum("vp,vp->v", vectors, vectors) - vectors.sum(1) ** 2 / vectors.shape[1]
    scores = (vectors @ templates.T) / np.sqrt(np.maximum(variances, FAINT))[:, None]
    scores = scores.reshape(*windows.shape[:2], len(LETTERS)).max(0)
    reach = 2 * LETTER_REACH + 1
    return np.asarray(np.lib.stride_tricks.sliding_window_view(scores, reach, axis=0).max(2), np.float32)


@functools.lru_cache(maxsize=8)
def _templates(scale: float) -> tuple[Floats, int, int]:
    """The 26 letters in the middle of a cell, (26, height * width), each of mean 0 and norm 1; height and width."""
    width = 2 * round(scenes.LETTER_CELL * scale / 2)
    height = 2 * (math.ceil(scenes.LETTER_HEIGHT * scale / 2) + CELL_MARGIN)
    signs = [scenes.Sign(letter, NAMES[0], width / 2, height / 2, scale) for letter in LETTERS]
    masks = [cv2.GaussianBlur(scenes.word_mask(sign, width, height), (0, 0), LETTER_BLUR) for sign in signs]
    flat = np.stack([mask.ravel() for mask in masks])
    flat = flat - flat.mean(1, keepdims=True)
    return np.asarray(flat / np.linalg.norm(flat, axis=1, keepdims=True), np.float32), height, width
