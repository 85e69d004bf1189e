"""A picture measured against its background: labels, contrast, paints, and what hangs together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from flux.mini import scenes

__all__ = ["Picture", "components", "coverage_of", "ink_counts", "measure", "name_ink", "nearest_seed", "paint_of"]

Image = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

NAMES = tuple(scenes.PALETTE)
PALETTE = np.asarray([scenes.PALETTE[name] for name in NAMES], np.float32)

# Colours. Orange and yellow are the nearest pair of the palette, 80 apart in RGB.
HALF = 0.5  # the coverage at an edge
TINY = 1e-6  # keeps divisions and ties finite
BORDER = 3  # the drawing rules keep this frame almost free of objects
BORDER_SHARE = 0.6  # of the frame must have one colour for it to count as the background's
VISIBLE = 40.0  # a pixel this far from the background belongs to an object: half the distance of the nearest pair
TRUE_COLOUR = 70.0  # farther than this from every palette colour, an area has no colour that can be named
SAME_INK = 0.65  # of an object's inner pixels must have its colour
DEEP = 0.6  # inner pixels: those at least this far in, as a fraction of the deepest one

# The smallest object that is ever drawn, a shrunk star, covers 107 pixels of a 128-pixel canvas.
NOTABLE_AREA = 32.0  # smaller specks are not objects, neither wanted nor surplus
OPENING = np.ones((3, 3), np.uint8)  # takes away the fringe of a third colour that lies between two others


@dataclass(frozen=True)
class Picture:
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


def measure(image: Image) -> Picture:
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
    return Picture(pixels, labels, ground, background, contrast, scale)


def _name(colour: Floats) -> str | None:
    """The palette's nearest colour, or None where none is near."""
    distances = np.linalg.norm(PALETTE - colour, axis=1)
    return NAMES[int(distances.argmin())] if distances.min() <= TRUE_COLOUR else None


def _deep(picture: Picture, mask: Flags) -> Flags:
    """The inner pixels of a mask, and of these the half that stands out most: what edges and blur tint least."""
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3)[1:-1, 1:-1]
    inner = mask & (depth >= DEEP * depth.max())
    return np.asarray(inner & (picture.contrast >= np.median(picture.contrast[inner])))


def ink_counts(picture: Picture, mask: Flags) -> NDArray[np.int64]:
    """How many of a mask's inner pixels have each palette colour."""
    return np.bincount(picture.labels[_deep(picture, mask)], minlength=len(NAMES))


def paint_of(picture: Picture, mask: Flags, label: int) -> Floats:
    """The measured colour of a mask's inner pixels, as far as they have the colour ``label``."""
    inner = _deep(picture, mask)
    same = inner & (picture.labels == label)
    return np.asarray(np.median(picture.pixels[same if same.any() else inner], axis=0), np.float32)


def name_ink(picture: Picture, mask: Flags, label: int) -> str | None:
    """The name of a mask's colour, or None where it is mottled or far from the palette."""
    counts = ink_counts(picture, mask)
    return _name(paint_of(picture, mask, label)) if counts[label] >= SAME_INK * counts.sum() else None


def coverage_of(picture: Picture, paint: Floats) -> Floats:
    """How much of each pixel a paint hides, if there were no other on the background."""
    axis = paint - picture.ground
    full = max(float(axis @ axis), VISIBLE**2)
    return np.asarray(np.clip((picture.pixels - picture.ground) @ axis / full, 0, 1), np.float32)


def components(mask: Flags, least: float) -> Iterator[Flags]:
    """The connected parts of a mask that have at least an area, largest first."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    for index in sorted(range(1, count), key=lambda i: -areas[i]):
        if areas[index] >= least:
            yield np.asarray(labels == index)


def nearest_seed(seeds: Sequence[Flags]) -> NDArray[np.int64]:
    """(H, W) index of the nearest seed."""
    distances = [cv2.distanceTransform((~s).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5) for s in seeds]
    return np.asarray(np.argmin(distances, axis=0))
