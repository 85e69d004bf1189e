"""What guided models learn from shows what its prompt says, and what guides it fits."""

from __future__ import annotations

import random

import cv2
import numpy as np
import pytest

from flux.mini.examples import (
    EDITS,
    HOLE_MODES,
    control_example,
    edit_example,
    fill_example,
    grid_picture,
    scene_example,
    style_example,
)
from flux.mini.language import is_held_out
from flux.mini.scenes import LATTICE, PALETTE, RADII, draw, shape_mask

CANVAS = (128, 112)
SHAPE = (112, 128)


def examples(make, count=40, seed=0):
    rng = random.Random(seed)
    return [make(rng) for _ in range(count)]


def test_equal_random_states_give_equal_examples():
    one, other = (fill_example(random.Random(3), CANVAS) for _ in range(2))
    assert (one.prompt, one.scene) == (other.prompt, other.scene)
    assert np.array_equal(one.picture, other.picture)
    assert np.array_equal(one.mask, other.mask)


@pytest.mark.parametrize("held_out", [True, False])
def test_requests_are_of_the_share_that_was_asked_for(held_out):
    for request, _ in examples(lambda rng: scene_example(rng, CANVAS, held_out=held_out), 60):
        assert is_held_out(request) == held_out


def test_scattered_objects_lie_on_the_lattice_apart_and_inside():
    radii = {radius for sizes in RADII.values() for radius in sizes.values()}
    for _, scene in examples(lambda rng: scene_example(rng, (128, 128), sign_share=0.0), 80):
        assert {item.radius for item in scene.items} <= radii
        assert all(item.x % LATTICE == item.y % LATTICE == 0 for item in scene.items)
        covered = sum(shape_mask(i.shape, i.x, i.y, i.radius, 128, 128) for i in scene.items)
        assert covered.max() <= 1.001
        assert not covered[[0, -1]].any()


@pytest.mark.parametrize("mode", HOLE_MODES)
def test_holes_are_masks_of_the_canvas(mode):
    for example in examples(lambda rng: fill_example(rng, CANVAS, mode=mode), 15):
        assert example.picture.shape == (*SHAPE, 3)
        assert example.mask.shape == SHAPE
        assert 0 <= example.mask.min() <= example.mask.max() <= 1.001
        assert example.mask.any()
        assert np.array_equal(example.picture, draw(example.scene))


def test_a_hole_around_an_object_hides_all_of_it_and_the_prompt_names_it():
    for example in examples(lambda rng: fill_example(rng, CANVAS, mode="object")):
        if example.item is None:
            assert example.scene.sign is not None
            continue
        item = example.item
        own = shape_mask(item.shape, item.x, item.y, item.radius, *CANVAS)
        assert example.mask[own > 0.5].min() > 0.3  # soft at its edge where the mask is blurred
        assert f"{item.colour} {item.shape}" in example.prompt.lower()


def test_edges_are_opencvs_and_depth_is_brighter_where_things_are():
    for example in examples(lambda rng: control_example(rng, CANVAS, "canny"), 10):
        assert np.array_equal(example.control[..., 0], cv2.Canny(example.picture, 50, 200))
    for example in examples(lambda rng: control_example(rng, CANVAS, "depth", sign_share=0.0), 10):
        for item in example.scene.items:
            inside = shape_mask(item.shape, item.x, item.y, item.radius, *CANVAS) == 1
            assert example.control[inside].min() > example.control[0, 0].max()
            assert np.ptp(example.control[inside]) == 0


@pytest.mark.parametrize("kind", EDITS)
def test_an_instruction_changes_what_it_names_and_nothing_else(kind):
    for example in examples(lambda rng: edit_example(rng, CANVAS, kind=kind), 12):
        assert example.kind == kind
        assert all(reference.shape == example.picture.shape for reference in example.references)
        if kind == "nothing":
            assert (example.prompt, len(example.references)) == ("", 1)
            assert np.array_equal(example.picture, example.references[0])
        elif kind == "join":
            after = [(item.shape, item.colour) for item in example.after.items]
            assert after == [(s.items[0].shape, s.items[0].colour) for s in example.sources]
        else:
            before, after = example.sources[0], example.after
            gone = [item for item in before.items if item not in after.items]
            new = [item for item in after.items if item not in before.items]
            counts = {"recolour": (1, 1), "remove": (1, 0), "add": (0, 1), "background": (0, 0)}
            assert (len(gone), len(new)) == counts[kind]
            assert (before.background != after.background) == (kind == "background")
            assert np.array_equal(example.picture, draw(after))
            named = [item.shape for item in (*gone, *new)]
            named += [new[0].colour] if kind == "recolour" else [after.background] if kind == "background" else []
            assert all(word in example.prompt for word in named)


def test_a_grid_has_even_lines_both_ways():
    picture = grid_picture(random.Random(0), CANVAS)
    lines = (picture != picture[0, 0]).any(-1)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 2
    assert lines.any()


def has(picture, colour):
    """Whether a picture has pixels of a colour."""
    return bool((picture == PALETTE[colour]).all(-1).any())


def test_a_reference_keeps_what_the_picture_shows():
    for example in examples(lambda rng: style_example(rng, CANVAS)):
        shown = {(item.shape, item.colour) for item in example.scene.items}
        assert all(has(example.picture, colour) for _, colour in shown)
        assert has(example.picture, example.scene.background)
        assert all(word in example.told.lower() for kind in shown for word in kind)
        assert example.scene.background in example.told
        if not example.keep.all():
            (kind,) = shown
            assert example.prompt == ""
            assert 0 < example.keep.mean() < 1
        if example.prompt:
            assert example.scene.background in example.prompt
