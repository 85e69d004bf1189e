"""The objects of a picture: found, named by their shape, and matched with what was asked for."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from flux.mini import scenes
from flux.mini.language import SHAPES, Request, Wanted

from .picture import (
    HALF,
    NAMES,
    NOTABLE_AREA,
    OPENING,
    TINY,
    VISIBLE,
    Flags,
    Floats,
    Image,
    Picture,
    components,
    coverage_of,
    ink_counts,
    measure,
    name_ink,
    nearest_seed,
    paint_of,
)
from .tally import Pair, Verdict

__all__ = ["Blob", "check_objects", "find_blobs"]

# Blobs.
FRINGE_DEPTH = 2.0  # pixels; a solid area no thicker than this is suspected of being a wide fringe,
FRINGE_COLOUR = 30.0  # and is one if it lies no farther than this from the mixtures of background and main colour
MAX_BLOBS = 6  # the largest ones are matched; the surplus still counts against the picture
CORE_SHARE = 0.25  # of the notable area is left at least of each part where a blob has been worn down until it parts
MAX_PARTS = 3  # into which a blob is split where objects touch

# Shapes: a blob's likeness is the correlation of its coverage with an ideal shape's at the best place and radius.
MIN_LIKENESS = 0.925  # below it, a blob has no shape that can be named
CLEAR = 0.95  # from here on, and with CLEAR_LEAD over the next shape, the first guess needs no search
CLEAR_LEAD = 0.05
BLURS = (0.0, 0.8, 1.6)  # ideal shapes are drawn sharp and blurred by so many pixels, as pictures may be
FIRST_BLUR = 0.8
SEARCHED = 3  # the best first guesses that are improved by search
SEARCH_STEPS = (1.0, 0.5)  # pixels of a 128-pixel canvas, coarse to fine
SEARCH_TURNS = 6
CROP_MARGIN = 0.3  # of a blob's extent is left around it, for shapes that fit badly
MODEL_RADIUS = 24.0  # at which an ideal shape's area and centroid are measured
LEAST_RADIUS = 0.5  # that a fit may shrink to; specks that fit nothing would shrink it below zero

# Places, as fractions of the side. Centres are drawn near 0.16..0.27 for "left" and within 0.41..0.59 for "center" and
# across; the border between both zones lies amid what is left free.
SIDE_ZONE = 0.36  # a centre nearer to its edge than this
ACROSS_ZONE = (0.3, 0.7)
CENTRE_ZONE = (SIDE_ZONE, 1 - SIDE_ZONE)
MIN_RELATED = 0.12  # distance along the relation's axis, as a fraction of the side; drawn: at least 0.24

MATCH_WEIGHTS = {"colour": 4, "shape": 4, "position": 3, "size": 1}  # what tells objects apart, in order


@dataclass(frozen=True)
class Blob:
    """One object found in a picture.

    Attributes:
        colour: The palette's nearest colour, or None where none is near.
        shape: The best fitting shape, or None where none fits.
        likeness: How much it is like that shape, 1 at best.
        x: Centre of the fitted shape, in pixels from the left.
        y: Centre of the fitted shape, in pixels from the top.
        radius: Radius of the fitted shape, in pixels.
        area: Covered pixels.
    """

    colour: str | None
    shape: str | None
    likeness: float
    x: float
    y: float
    radius: float
    area: float


def find_blobs(image: Image) -> list[Blob]:
    """The objects of a picture, largest first."""
    return blobs_of(measure(image))


def blobs_of(picture: Picture) -> list[Blob]:
    found = [
        blob
        for region, label in _painted_regions(picture)
        for part, coverage in _bodies(picture, region, label)
        for blob in _fit_parts(picture, part, coverage, label)
    ]
    return sorted(found, key=lambda blob: -blob.area)


def _painted_regions(picture: Picture) -> Iterator[tuple[Flags, int]]:
    """What stands out from the background, cut into areas of one paint.

    Objects of different colours may touch. A colour is believed where it is solid: the fringes between two colours,
    which often pass near a third one, are narrower than the opening, and go to the nearest solid area.
    """
    visible = picture.contrast > VISIBLE
    solid = [
        cv2.morphologyEx((visible & (picture.labels == label)).astype(np.uint8), cv2.MORPH_OPEN, OPENING).astype(bool)
        for label in range(len(NAMES))
    ]
    for component in components(visible, picture.notable):
        main = int(ink_counts(picture, component).argmax())
        areas = {i: s & component for i, s in enumerate(solid) if i != picture.ground_label or i == main}
        seeds = {i: a for i, a in areas.items() if i == main or a.sum() >= picture.notable}
        paint = paint_of(picture, component, main)
        seeds = {i: a for i, a in seeds.items() if i == main or not _is_fringe(picture, a, paint)}
        if len(seeds) < 2 or not seeds[main].any():  # thin figures may have no solid area at all
            yield component, main
            continue
        owner = nearest_seed(list(seeds.values()))
        for order, label in enumerate(seeds):
            yield component & (owner == order), label


def _is_fringe(picture: Picture, area: Flags, paint: Floats) -> bool:
    """Whether an area is but a thin mixture of background and paint."""
    depth = cv2.distanceTransform(np.pad(area, 1).astype(np.uint8), cv2.DIST_C, cv2.DIST_MASK_3).max()
    if depth > FRINGE_DEPTH:
        return False
    axis = paint - picture.ground
    pixels = picture.pixels[area] - picture.ground
    part = np.clip(pixels @ axis / max(float(axis @ axis), 1.0), 0, 1)
    return float(np.median(np.linalg.norm(pixels - part[:, None] * axis, axis=1))) < FRINGE_COLOUR


def _bodies(picture: Picture, region: Flags, label: int) -> Iterator[tuple[Flags, Floats]]:
    """The connected bodies of a region, with their coverage, once its edges are known to half a pixel."""
    others = (picture.contrast > VISIBLE) & ~region
    grown = cv2.dilate(region.astype(np.uint8), OPENING).astype(bool) & ~others
    coverage = coverage_of(picture, paint_of(picture, region, label)) * grown
    bodies = list(components(coverage > HALF, picture.notable))
    if len(bodies) == 1:
        yield bodies[0], coverage
    elif bodies:
        owner = nearest_seed(bodies)
        for order, body in enumerate(bodies):
            yield body, coverage * (owner == order)


def _fit_parts(picture: Picture, body: Flags, coverage: Floats, label: int) -> list[Blob]:
    """A body as one blob, or as several where it is no shape in whole, but is in parts: like objects that touch."""
    colour = name_ink(picture, body, label)
    whole = _fit(coverage, colour, picture.scale)
    if whole.likeness >= CLEAR:
        return [whole]
    best = [whole]
    for cores in _necks(body, picture.scale):
        owner = nearest_seed(cores)
        parts = [_fit(coverage * (owner == i), colour, picture.scale) for i in range(len(cores))]
        worst = min(part.likeness for part in parts)
        if worst >= MIN_LIKENESS and worst > min(b.likeness for b in best):
            best = parts
    return best


def _necks(body: Flags, scale: float) -> Iterator[list[Flags]]:
    """Ways to part a body by wearing it down until it falls apart, least wear first."""
    depth = cv2.distanceTransform(np.pad(body, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)[1:-1, 1:-1]
    for wear in range(1, int(depth.max()) + 1):
        cores = list(components(depth > wear, NOTABLE_AREA * CORE_SHARE * scale**2))
        if 2 <= len(cores) <= MAX_PARTS:
            yield cores


@functools.lru_cache(maxsize=len(SHAPES))
def _ideal(shape: str) -> tuple[float, float]:
    """A shape's area and how far its centroid lies below its centre, at radius 1."""
    side = int(4 * MODEL_RADIUS)  # twice the shape's extent
    mask = scenes.shape_mask(shape, side / 2, side / 2, MODEL_RADIUS, side, side)
    below = float((mask.sum(1) * (np.arange(side) + 0.5)).sum() / mask.sum()) - side / 2
    return float(mask.sum()) / MODEL_RADIUS**2, below / MODEL_RADIUS


@dataclass(frozen=True)
class _Guess:
    """A shape at a place, and how much it is like what is seen there."""

    likeness: float
    shape: str
    x: float
    y: float
    radius: float
    blur: float


def _fit(coverage: Floats, colour: str | None, scale: float) -> Blob:
    """The shape, centre and radius that are most like a coverage (H, W)."""
    area = float(coverage.sum())
    left, top, cut = _crop(coverage)
    rows, columns = cut.sum(1), cut.sum(0)
    x = float(columns @ (np.arange(len(columns)) + 0.5)) / area
    y = float(rows @ (np.arange(len(rows)) + 0.5)) / area
    patch = _standardised(cut)
    guesses = []
    for shape in SHAPES:
        unit_area, below = _ideal(shape)
        radius = math.sqrt(area / unit_area)
        guesses.append(_guess(patch, shape, x, y - below * radius, radius, FIRST_BLUR))
    guesses.sort(key=_likeness, reverse=True)
    best, second = guesses[:2]
    if best.likeness < CLEAR or best.likeness - second.likeness < CLEAR_LEAD:
        best = max((_improve(patch, g, scale) for g in guesses[:SEARCHED]), key=_likeness)
    named = best.shape if best.likeness >= MIN_LIKENESS else None
    return Blob(colour, named, best.likeness, best.x + left, best.y + top, best.radius, area)


def _crop(coverage: Floats) -> tuple[int, int, Floats]:
    """What is not empty of a coverage, with room for a shape that fits badly, and the corner's place."""
    rows, columns = np.nonzero(coverage.any(1))[0], np.nonzero(coverage.any(0))[0]
    margin = math.ceil(max(len(rows), len(columns)) * CROP_MARGIN)
    top, left = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    return int(left), int(top), coverage[top : rows[-1] + margin + 1, left : columns[-1] + margin + 1]


def _guess(patch: Floats, shape: str, x: float, y: float, radius: float, blur: float) -> _Guess:
    """Compare a patch, of mean 0 and norm 1, with a shape at a place."""
    height, width = patch.shape
    radius = max(radius, LEAST_RADIUS)
    ideal = scenes.shape_mask(shape, x, y, radius, width, height)
    if blur:
        ideal = np.asarray(cv2.GaussianBlur(ideal, (0, 0), blur), np.float32)
    return _Guess(_correlation(patch, ideal), shape, x, y, radius, blur)


def _correlation(patch: Floats, ideal: Floats) -> float:
    """Normalised correlation with a patch that has mean 0 and norm 1 already."""
    flat = ideal.ravel()
    mean = float(flat.mean())
    variance = float(flat @ flat) - mean * mean * flat.size
    return float(patch.ravel() @ flat) / math.sqrt(max(variance, TINY))


def _standardised(values: Floats) -> Floats:
    """Values of mean 0 and norm 1."""
    centred = values - values.mean()
    return np.asarray(centred / max(float(np.linalg.norm(centred)), TINY), np.float32)


def _improve(patch: Floats, guess: _Guess, scale: float) -> _Guess:
    """Climb to the best blur, and then to the best place and radius, of a guess's shape."""
    shape = guess.shape
    best = max((_guess(patch, shape, guess.x, guess.y, guess.radius, blur) for blur in BLURS), key=_likeness)
    for step in (s * scale for s in SEARCH_STEPS):
        for _ in range(SEARCH_TURNS):
            before = best
            for right, down, wider in np.eye(3) * step:
                ahead = _guess(patch, shape, best.x + right, best.y + down, best.radius + wider, best.blur)
                back = _guess(patch, shape, best.x - right, best.y - down, best.radius - wider, best.blur)
                best = max(best, ahead, back, key=_likeness)
            if best is before:
                break
    return best


def _likeness(guess: _Guess) -> float:
    return guess.likeness


def check_objects(picture: Picture, request: Request, background: Pair, faults: list[str]) -> Verdict:
    found = blobs_of(picture)
    wanted = [kind for kind in request.objects for _ in range(kind.count)]
    if len(found) != len(wanted):
        faults.append(f"{len(found)} objects, not {len(wanted)}: {', '.join(map(_describe, found)) or 'nothing'}")
    marks = {name: np.zeros(2, int) for name in MATCH_WEIGHTS}
    blobs = _match(found[:MAX_BLOBS], wanted, request.relation, picture)
    for kind, blob in zip(wanted, blobs, strict=True):
        for name, right in _judge(kind, blob, len(wanted) == 1, picture).items():
            marks[name] += (int(right), 1)
            if not right:
                asked = getattr(kind, name)
                faults.append(f"{name} of the {kind.colour} {kind.shape}: {_describe(blob)}, asked {asked}")
    if request.relation is not None:
        right = _is_related(blobs[0], blobs[1], request.relation, picture)
        marks["position"] += (int(right), 1)
        if not right:
            faults.append(f"not {request.relation}: {_describe(blobs[0])}; {_describe(blobs[1])}")
    colour, shape, position, size = ((int(right), int(asked)) for right, asked in marks.values())
    return Verdict(
        colour=colour,
        shape=shape,
        position=position,
        size=size,
        background=background,
        count=(int(len(found) == len(wanted)), 1),
        all_right=not faults,
        faults=tuple(faults),
    )


def _describe(blob: Blob | None) -> str:
    if blob is None:
        return "nothing"
    return f"{blob.colour} {blob.shape} of radius {blob.radius:.1f} at ({blob.x:.0f}, {blob.y:.0f})"


def _match(
    found: Sequence[Blob], wanted: Sequence[Wanted], relation: str | None, picture: Picture
) -> list[Blob | None]:
    """Which blob stands for which wanted object (None: none does), so that as much as possible is right."""
    missing = [None] * max(0, len(wanted) - len(found))
    alone = len(wanted) == 1
    worth = {
        (i, blob): sum(MATCH_WEIGHTS[n] for n, right in _judge(o, blob, alone, picture).items() if right)
        for i, o in enumerate(wanted)
        for blob in (*found, *missing)
    }

    def total(chosen: Iterable[Blob | None]) -> int:
        blobs = tuple(chosen)
        related = relation is not None and _is_related(blobs[0], blobs[1], relation, picture)
        return sum(worth[i, blob] for i, blob in enumerate(blobs)) + MATCH_WEIGHTS["position"] * related

    return list(max(itertools.permutations((*found, *missing), len(wanted)), key=total))


def _judge(kind: Wanted, blob: Blob | None, alone: bool, picture: Picture) -> dict[str, bool]:
    """What was asked of an object, and whether a blob has it."""
    marks = {
        "colour": blob is not None and blob.colour == kind.colour,
        "shape": blob is not None and blob.shape == kind.shape,
    }
    if kind.position is not None:
        marks["position"] = blob is not None and _is_at(blob, kind.position, picture)
    if kind.size is not None:
        marks["size"] = blob is not None and (blob.radius > _size_limit(alone) * picture.scale) == (
            kind.size == "large"
        )
    return marks


def _is_at(blob: Blob, position: str, picture: Picture) -> bool:
    """Whether a blob lies in a position's zone; no two zones share a point."""
    x, y = blob.x / picture.width, blob.y / picture.height
    if position == "center":
        return all(CENTRE_ZONE[0] <= place <= CENTRE_ZONE[1] for place in (x, y))
    out, across = {"left": (x, y), "right": (1 - x, y), "top": (y, x), "bottom": (1 - y, x)}[position]
    outermost = out < min(across, 1 - across)  # of a corner's two edges, the nearer one
    return out < SIDE_ZONE and ACROSS_ZONE[0] < across < ACROSS_ZONE[1] and outermost


def _is_related(first: Blob | None, second: Blob | None, relation: str, picture: Picture) -> bool:
    if first is None or second is None:
        return False
    right, down = first.x - second.x, first.y - second.y
    along, across, side = {
        "left of": (-right, down, picture.width),
        "right of": (right, down, picture.width),
        "above": (-down, right, picture.height),
        "below": (down, right, picture.height),
    }[relation]
    return along > abs(across) and along > MIN_RELATED * side


def _size_limit(alone: bool) -> float:
    """The radius amid small and large on a 128-pixel canvas."""
    return (scenes.RADII[alone]["small"] + scenes.RADII[alone]["large"]) / 2
