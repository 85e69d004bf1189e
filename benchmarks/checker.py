"""Says whether a picture shows what a prompt of Foundry Mini asked for, from its pixels alone.

The picture is measured first and compared with the request afterwards: what it shows (its background, its blobs with
their colour, shape, centre and radius, or the word that can be read in it) is found without a look at what was asked.
Thresholds are fixed and stand below with their reasons; none is tuned to a model.

Legend: (H, W) pixels; coverage is how much of a pixel an object hides, 0..1; ``scale`` is how much smaller than on a
128-pixel canvas things are drawn; areas are in pixels of a 128-pixel canvas.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from flux.mini import scenes
from flux.mini.language import LETTERS, SHAPES, Request, Wanted

__all__ = ["Blob", "Tally", "Verdict", "check", "find_blobs", "read_word"]

Image = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Pair = tuple[int, int]

NAMES = tuple(scenes.PALETTE)
PALETTE = np.asarray([scenes.PALETTE[name] for name in NAMES], np.float32)

# Colours. Orange and yellow are the nearest pair of the palette, 80 apart in RGB.
HALF = 0.5  # the coverage at an edge
LEAST_RADIUS = 0.5  # that a fit may shrink to; specks that fit nothing would shrink it below zero
TINY = 1e-6  # keeps divisions and ties finite
BORDER = 3  # the drawing rules keep this frame almost free of objects
BORDER_SHARE = 0.6  # of the frame must have one colour for it to count as the background's
VISIBLE = 40.0  # a pixel this far from the background belongs to an object: half the distance of the nearest pair
TRUE_COLOUR = 70.0  # farther than this from every palette colour, an area has no colour that can be named
SAME_INK = 0.65  # of an object's inner pixels must have its colour
DEEP = 0.6  # inner pixels: those at least this far in, as a fraction of the deepest one

# Blobs. The smallest object that is ever drawn, a shrunk star, covers 107 pixels of a 128-pixel canvas.
NOTABLE_AREA = 32.0  # smaller specks are not objects, neither wanted nor surplus
OPENING = np.ones((3, 3), np.uint8)  # takes away the fringe of a third colour that lies between two others
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

# Places, as fractions of the side. Centres are drawn near 0.16..0.27 for "left" and within 0.41..0.59 for "center" and
# across; the border between both zones lies amid what is left free.
SIDE_ZONE = 0.36  # a centre nearer to its edge than this
ACROSS_ZONE = (0.3, 0.7)
CENTRE_ZONE = (SIDE_ZONE, 1 - SIDE_ZONE)
MIN_RELATED = 0.12  # distance along the relation's axis, as a fraction of the side; drawn: at least 0.24

MATCH_WEIGHTS = {"colour": 4, "shape": 4, "position": 3, "size": 1}  # what tells objects apart, in order

# Words.
MIN_LETTER = 0.5  # correlation below which a cell holds no letter
UNREADABLE = "?"
LETTER_REACH = 3  # pixels that a letter may lie off its cell's centre
LETTER_BLUR = 0.8  # of the templates; sharp ones lose the corners that tell D from O once a picture is soft
FAINT = 1.0  # a cell whose coverage varies less than this in all is empty
CELL_MARGIN = 2  # empty rows above and below a letter that are part of its template


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


@dataclass(frozen=True)
class _Picture:
    """A picture measured against its background.

    Attributes:
        pixels: (H, W, 3) RGB.
        labels: (H, W) index of each pixel's nearest palette colour.
        ground: The background's own colour, (3,).
        background: The background's name, or None where no colour prevails at the border.
        contrast: (H, W) distance of each pixel from ``ground``.
        scale: Of objects, 1 on canvases of 128 pixels and more.
    """

    pixels: Floats
    labels: Labels
    ground: Floats
    background: str | None
    contrast: Floats
    scale: float

    @property
    def height(self) -> int:
        return int(self.labels.shape[0])

    @property
    def width(self) -> int:
        return int(self.labels.shape[1])

    @property
    def letter_scale(self) -> float:
        """How much smaller than on a 128-pixel canvas letters are drawn."""
        return scenes.letter_scale(self.width, self.height)

    @property
    def ground_label(self) -> int:
        """The palette colour nearest to the background; no second paint where it shines through, as in a ring."""
        return int(np.linalg.norm(PALETTE - self.ground, axis=1).argmin())

    @property
    def notable(self) -> float:
        """The least area of an object, in pixels of this canvas."""
        return NOTABLE_AREA * self.scale**2


def check(image: Image, request: Request) -> Verdict:
    """Compare a picture with a request.

    Args:
        image: (H, W, 3) RGB.
        request: What was asked for.

    Raises:
        ValueError: The image is not (H, W, 3) bytes.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != len(PALETTE[0]):
        raise ValueError(f"expected RGB bytes (H, W, 3), found {image.dtype} {image.shape}; convert the picture first")
    picture = _measure(image)
    faults: list[str] = []
    background: Pair = (0, 0)
    if request.background is not None:
        background = (int(picture.background == request.background), 1)
        if not background[0]:
            faults.append(f"background is {picture.background}, not {request.background}")
    if request.word is not None:
        return _check_sign(picture, request, background, faults)
    return _check_objects(picture, request, background, faults)


# --- measuring ------------------------------------------------------------------------------------------------------


def _measure(image: Image) -> _Picture:
    pixels = image.astype(np.float32)
    # |p - c|^2 without |p|^2, which all colours share
    distances = (PALETTE**2).sum(1)[:, None] - 2 * PALETTE @ pixels.reshape(-1, len(PALETTE[0])).T
    labels = distances.argmin(0).reshape(image.shape[:2])
    frame = np.ones(labels.shape, bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    counts = np.bincount(labels[frame], minlength=len(NAMES))
    main = int(counts.argmax())
    ground = np.median(pixels[frame & (labels == main)], axis=0).astype(np.float32)
    difference = pixels - ground
    contrast = np.sqrt(np.einsum("hwc,hwc->hw", difference, difference))
    scale = min(1.0, min(image.shape[:2]) / scenes.NATIVE_SIDE)
    background = NAMES[main] if counts[main] >= BORDER_SHARE * counts.sum() and _name(ground) else None
    return _Picture(pixels, labels, ground, background, contrast, scale)


def _name(colour: Floats) -> str | None:
    """The palette's nearest colour, or None where none is near."""
    distances = np.linalg.norm(PALETTE - colour, axis=1)
    return NAMES[int(distances.argmin())] if distances.min() <= TRUE_COLOUR else None


def _deep(picture: _Picture, mask: Flags) -> Flags:
    """The inner pixels of a mask, and of these the half that stands out most: what edges and blur tint least."""
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3)[1:-1, 1:-1]
    inner = mask & (depth >= DEEP * depth.max())
    return np.asarray(inner & (picture.contrast >= np.median(picture.contrast[inner])))


def _counts(picture: _Picture, mask: Flags) -> NDArray[np.int64]:
    """How many of a mask's inner pixels have each palette colour."""
    return np.bincount(picture.labels[_deep(picture, mask)], minlength=len(NAMES))


def _paint_of(picture: _Picture, mask: Flags, label: int) -> Floats:
    """The measured colour of a mask's inner pixels, as far as they have the colour ``label``."""
    inner = _deep(picture, mask)
    same = inner & (picture.labels == label)
    return np.asarray(np.median(picture.pixels[same if same.any() else inner], axis=0), np.float32)


def _name_ink(picture: _Picture, mask: Flags, label: int) -> str | None:
    """The name of a mask's colour, or None where it is mottled or far from the palette."""
    counts = _counts(picture, mask)
    return _name(_paint_of(picture, mask, label)) if counts[label] >= SAME_INK * counts.sum() else None


def _coverage(picture: _Picture, paint: Floats) -> Floats:
    """How much of each pixel a paint hides, if there were no other on the background."""
    axis = paint - picture.ground
    full = max(float(axis @ axis), VISIBLE**2)
    return np.asarray(np.clip((picture.pixels - picture.ground) @ axis / full, 0, 1), np.float32)


def _components(mask: Flags, least: float) -> Iterator[Flags]:
    """The connected parts of a mask that have at least an area, largest first."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    for index in sorted(range(1, count), key=lambda i: -areas[i]):
        if areas[index] >= least:
            yield np.asarray(labels == index)


def _nearest(seeds: Sequence[Flags]) -> NDArray[np.int64]:
    """(H, W) index of the nearest seed."""
    distances = [cv2.distanceTransform((~s).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5) for s in seeds]
    return np.asarray(np.argmin(distances, axis=0))


# --- objects --------------------------------------------------------------------------------------------------------


def find_blobs(image: Image) -> list[Blob]:
    """The objects of a picture, largest first."""
    return _blobs(_measure(image))


def _blobs(picture: _Picture) -> list[Blob]:
    found = [
        blob
        for region, label in _painted_regions(picture)
        for part, coverage in _bodies(picture, region, label)
        for blob in _fit_parts(picture, part, coverage, label)
    ]
    return sorted(found, key=lambda blob: -blob.area)


def _painted_regions(picture: _Picture) -> Iterator[tuple[Flags, int]]:
    """What stands out from the background, cut into areas of one paint.

    Objects of different colours may touch. A colour is believed where it is solid: the fringes between two colours,
    which often pass near a third one, are narrower than the opening, and go to the nearest solid area.
    """
    visible = picture.contrast > VISIBLE
    solid = [
        cv2.morphologyEx((visible & (picture.labels == label)).astype(np.uint8), cv2.MORPH_OPEN, OPENING).astype(bool)
        for label in range(len(NAMES))
    ]
    for component in _components(visible, picture.notable):
        main = int(_counts(picture, component).argmax())
        areas = {i: s & component for i, s in enumerate(solid) if i != picture.ground_label or i == main}
        seeds = {i: a for i, a in areas.items() if i == main or a.sum() >= picture.notable}
        paint = _paint_of(picture, component, main)
        seeds = {i: a for i, a in seeds.items() if i == main or not _is_fringe(picture, a, paint)}
        if len(seeds) < 2 or not seeds[main].any():  # thin figures may have no solid area at all
            yield component, main
            continue
        owner = _nearest(list(seeds.values()))
        for order, label in enumerate(seeds):
            yield component & (owner == order), label


def _is_fringe(picture: _Picture, area: Flags, paint: Floats) -> bool:
    """Whether an area is but a thin mixture of background and paint."""
    depth = cv2.distanceTransform(np.pad(area, 1).astype(np.uint8), cv2.DIST_C, cv2.DIST_MASK_3).max()
    if depth > FRINGE_DEPTH:
        return False
    axis = paint - picture.ground
    pixels = picture.pixels[area] - picture.ground
    part = np.clip(pixels @ axis / max(float(axis @ axis), 1.0), 0, 1)
    return float(np.median(np.linalg.norm(pixels - part[:, None] * axis, axis=1))) < FRINGE_COLOUR


def _bodies(picture: _Picture, region: Flags, label: int) -> Iterator[tuple[Flags, Floats]]:
    """The connected bodies of a region, with their coverage, once its edges are known to half a pixel."""
    others = (picture.contrast > VISIBLE) & ~region
    grown = cv2.dilate(region.astype(np.uint8), OPENING).astype(bool) & ~others
    coverage = _coverage(picture, _paint_of(picture, region, label)) * grown
    bodies = list(_components(coverage > HALF, picture.notable))
    if len(bodies) == 1:
        yield bodies[0], coverage
    elif bodies:
        owner = _nearest(bodies)
        for order, body in enumerate(bodies):
            yield body, coverage * (owner == order)


def _fit_parts(picture: _Picture, body: Flags, coverage: Floats, label: int) -> list[Blob]:
    """A body as one blob, or as several where it is no shape in whole, but is in parts: like objects that touch."""
    colour = _name_ink(picture, body, label)
    whole = _fit(coverage, colour, picture.scale)
    if whole.likeness >= CLEAR:
        return [whole]
    best = [whole]
    for cores in _necks(body, picture.scale):
        owner = _nearest(cores)
        parts = [_fit(coverage * (owner == i), colour, picture.scale) for i in range(len(cores))]
        worst = min(part.likeness for part in parts)
        if worst >= MIN_LIKENESS and worst > min(b.likeness for b in best):
            best = parts
    return best


def _necks(body: Flags, scale: float) -> Iterator[list[Flags]]:
    """Ways to part a body by wearing it down until it falls apart, least wear first."""
    depth = cv2.distanceTransform(np.pad(body, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)[1:-1, 1:-1]
    for wear in range(1, int(depth.max()) + 1):
        cores = list(_components(depth > wear, NOTABLE_AREA * CORE_SHARE * scale**2))
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


def _check_objects(picture: _Picture, request: Request, background: Pair, faults: list[str]) -> Verdict:
    found = _blobs(picture)
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
    found: Sequence[Blob], wanted: Sequence[Wanted], relation: str | None, picture: _Picture
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


def _judge(kind: Wanted, blob: Blob | None, alone: bool, picture: _Picture) -> dict[str, bool]:
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


def _is_at(blob: Blob, position: str, picture: _Picture) -> bool:
    """Whether a blob lies in a position's zone; no two zones share a point."""
    x, y = blob.x / picture.width, blob.y / picture.height
    if position == "center":
        return all(CENTRE_ZONE[0] <= place <= CENTRE_ZONE[1] for place in (x, y))
    out, across = {"left": (x, y), "right": (1 - x, y), "top": (y, x), "bottom": (1 - y, x)}[position]
    outermost = out < min(across, 1 - across)  # of a corner's two edges, the nearer one
    return out < SIDE_ZONE and ACROSS_ZONE[0] < across < ACROSS_ZONE[1] and outermost


def _is_related(first: Blob | None, second: Blob | None, relation: str, picture: _Picture) -> bool:
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


# --- words ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ink:
    """Everything notable on a background, taken for letters: its coverage (H, W) and the colours of its parts."""

    coverage: Floats
    colours: tuple[str | None, ...]


def read_word(image: Image) -> str:
    """The word on a sign, ``?`` for each letter that cannot be read; nothing is known of what it should be."""
    picture = _measure(image)
    return _read(_ink(picture).coverage, picture.letter_scale)


def _check_sign(picture: _Picture, request: Request, background: Pair, faults: list[str]) -> Verdict:
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


def _ink(picture: _Picture) -> _Ink:
    visible = picture.contrast > VISIBLE
    parts = list(_components(visible, picture.notable))
    if not parts:
        return _Ink(np.zeros(visible.shape, np.float32), ())
    main = int(_counts(picture, visible).argmax())
    coverage = _coverage(picture, _paint_of(picture, visible, main))
    kept = cv2.dilate(np.any(parts, axis=0).astype(np.uint8), OPENING)  # with the edges, without specks
    colours = [_name_ink(picture, part, int(_counts(picture, part).argmax())) for part in parts]
    return _Ink(coverage * kept, tuple(colours))


def _line(coverage: Floats, scale: float) -> tuple[int, int]:
    """The rows, first and behind the last, that hold most ink within the height of a letter."""
    height = min(math.ceil(scenes.LETTER_HEIGHT * scale), len(coverage))
    sums = np.concatenate([[0.0], np.cumsum(coverage.sum(1))])
    inside = sums[height:] - sums[:-height]
    best = np.nonzero(inside >= inside.max() - TINY)[0]
    top = int(round(float(best.mean())))
    return top, top + height


def _is_surplus(coverage: Floats, picture: _Picture) -> bool:
    """Whether there is a notable thing out of the word's line."""
    top, bottom = _line(coverage, picture.letter_scale)
    outside = coverage > HALF
    outside[max(top - LETTER_REACH, 0) : bottom + LETTER_REACH] = False
    return any(True for _ in _components(outside, picture.notable))


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


# --- tallies --------------------------------------------------------------------------------------------------------


TALLIED = ("colour", "shape", "position", "size", "background", "count")
SHORT_WORDS = (3, 4)  # letters of the words that the project's goal names


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
