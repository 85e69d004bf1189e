"""The embedded guided models, on a few held-out cases each: do they do what they are there for?

The tables of ``benchmarks.guided`` ask many; a rate of the few here lies within ``LUCK`` of theirs.
"""

from __future__ import annotations

import random

import cv2
import numpy as np
import pytest
import torch

from benchmarks import guided
from flux.mini import files
from flux.mini.scenes import PALETTE
from flux.pipelines.guided import ReferenceInput
from flux.pipelines.text_to_image import Request, generate
from flux.preprocess.references import fit_reference

CASES = 32
LUCK = 0.1  # two deviations of a rate of nine in ten among so many
BYTE = 255
HALF_A_PIXEL = 0.5
HALF_ALIKE = 0.5  # of a correlation that is 1 for the same picture


def rates(name: str) -> dict[str, float]:
    return guided.MEASURES[name](CASES).rates()


def test_fill_paints_what_is_asked_for_into_the_hole_and_keeps_the_rest():
    seen = rates("fill")
    assert seen["object in the hole"] >= 0.9 - LUCK
    assert seen["rest kept"] >= 0.9 - LUCK


@pytest.mark.parametrize("name", ["canny", "depth", "canny LoRA", "depth LoRA"])
def test_outlines_follow_the_control_and_colours_the_prompt(name):
    seen = rates(name)
    assert seen["IoU of outlines"] >= 0.85 - LUCK / 4
    assert seen["colours"] >= 0.9 - LUCK


def test_kontext_makes_the_change_that_is_named_and_leaves_the_rest():
    seen = rates("edit")
    assert seen["change made"] >= 0.85 - LUCK
    assert seen["rest: colours equal"] >= 0.9 - LUCK
    assert seen["rest: IoU"] >= 0.9 - LUCK / 4


@pytest.mark.parametrize(("seed", "size"), [(0, (128, 128)), (1, (128, 128)), (2, (120, 104)), (3, (104, 120))])
def test_kontext_leaves_lines_where_they_are(seed, size):
    picture = lines_apart(seed, *size)
    fitted = fit_reference(torch.from_numpy(picture)[None].float() / BYTE)
    request = Request(prompt="", seed=seed, inputs=[ReferenceInput(picture=fitted.picture.permute(0, 3, 1, 2))])
    [drawn] = generate(files.open_mini(files.MINI_KONTEXT), request)
    made = drawn.pixels.numpy()[: size[1], : size[0]]
    first, second = (cv2.cvtColor(one, cv2.COLOR_RGB2GRAY).astype(np.float32) for one in (picture, made))
    (across, down), response = cv2.phaseCorrelate(first, second, cv2.createHanningWindow(size, cv2.CV_32F))
    assert response > HALF_ALIKE
    assert max(abs(across), abs(down)) < HALF_A_PIXEL


def lines_apart(seed: int, width: int, height: int) -> np.ndarray:
    """Lines across and down at uneven distances, so that no shift but none brings all of them together."""
    rng = random.Random(seed)
    picture = np.full((height, width, 3), PALETTE["white"], np.uint8)
    for axis, length in enumerate((height, width)):
        place = rng.randrange(4, 16)
        while place < length - 4:
            picture[(slice(None),) * axis + (slice(place, place + 3),)] = PALETTE["blue"]
            place += rng.randrange(12, 28)
    return picture
