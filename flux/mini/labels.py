"""What lies at every image token of a scene, as answers to questions.

Training asks a middle block of the transformer these questions beside the velocity. The velocity alone says little
about what a thing is: a star in a circle's place costs a few cells' error. Asked directly, the network learns early
which prompt words decide what is where. (The idea is REPA's, Yu et al. 2024, with the scene's own truth in place of
another network's features.) The head that answers is dropped afterwards.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .language import COLOURS, LETTERS, SHAPES
from .scenes import LATTICE, LETTER_CELL, LETTER_HEIGHT, Scene

__all__ = ["IGNORED", "QUESTIONS", "TOKEN", "token_labels"]

TOKEN = 16  # pixels that a token covers along each side
IGNORED = 255  # where a question has no answer
NOTHING, OBJECT, LETTER = range(3)
FARTHEST = 4  # lattice steps from a token to the middle of its thing
QUESTIONS = {
    "background": len(COLOURS),
    "kind": 3,
    "shape": len(SHAPES),
    "letter": len(LETTERS),
    "colour": len(COLOURS),
    "across": 2 * FARTHEST + 1,
    "down": 2 * FARTHEST + 1,
}
REACH = 1.1  # how far a shape's corners lie beyond its radius

Labels = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
Box = tuple[float, float, float, float, str, str, str]  # x, y, half width, half height, shape, letter, colour


def token_labels(scene: Scene) -> Labels:
    """Answers (rows * columns, questions) in the order of ``QUESTIONS``; ``IGNORED`` where one does not apply."""
    rows, columns = scene.height // TOKEN, scene.width // TOKEN
    labels = np.full((rows, columns, len(QUESTIONS)), IGNORED, np.uint8)
    labels[..., 0] = COLOURS.index(scene.background)
    labels[..., 1] = NOTHING
    most = np.zeros((rows, columns))
    centre_y, centre_x = (TOKEN * (np.arange(n) + 0.5) for n in (rows, columns))
    for x, y, half_width, half_height, shape, letter, colour in _boxes(scene):
        across = _overlap(centre_x, x, half_width)
        down = _overlap(centre_y, y, half_height)
        covered = down[:, None] * across[None, :]
        mine = covered > most
        most = np.maximum(most, covered)
        labels[mine, 1] = OBJECT if shape else LETTER
        labels[mine, 2] = SHAPES.index(shape) if shape else IGNORED
        labels[mine, 3] = LETTERS.index(letter) if letter else IGNORED
        labels[mine, 4] = COLOURS.index(colour)
        labels[..., 5] = np.where(mine, _steps(x - centre_x)[None, :], labels[..., 5])
        labels[..., 6] = np.where(mine, _steps(y - centre_y)[:, None], labels[..., 6])
    return labels.reshape(rows * columns, len(QUESTIONS))


def _boxes(scene: Scene) -> list[Box]:
    """Every object and every letter with the box that it fills."""
    boxes: list[Box] = [(i.x, i.y, i.radius * REACH, i.radius * REACH, i.shape, "", i.colour) for i in scene.items]
    if (sign := scene.sign) is not None:
        cell = LETTER_CELL * sign.scale
        first = sign.x - (len(sign.word) - 1) / 2 * cell
        boxes += [
            (first + k * cell, sign.y, cell / 2, LETTER_HEIGHT * sign.scale / 2, "", letter, sign.colour)
            for k, letter in enumerate(sign.word)
        ]
    return boxes


def _overlap(centres: Floats, middle: float, half: float) -> Floats:
    """Pixels along one axis that a thing shares with each token."""
    low = np.maximum(centres - TOKEN / 2, middle - half)
    high = np.minimum(centres + TOKEN / 2, middle + half)
    shared: Floats = np.maximum(high - low, 0)
    return shared


def _steps(distance: Floats) -> Floats:
    """Distances as lattice steps, counted from 0."""
    steps: Floats = np.clip(np.round(distance / LATTICE), -FARTHEST, FARTHEST) + FARTHEST
    return steps
