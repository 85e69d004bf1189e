"""Scenes: what a request asks for is there, where it was asked for, and drawn exactly."""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from flux.mini.language import LETTERS, SHAPES, WORDS, Request, Wanted, random_request
from flux.mini.scenes import PALETTE, Item, Scene, Sign, draw, lay_out, shape_mask, word_mask

ROOT = Path(__file__).resolve().parents[3]
CANVASES = [(128, 128), (96, 96), (192, 192), (192, 96), (96, 192), (160, 128), (112, 176)]
# Of the circle that surrounds an ideal shape of radius 1: its area.
AREAS = {
    "circle": math.pi,
    "ring": math.pi * (1 - 0.55**2),
    "square": 1.72**2,
    "triangle": 2.1 * 1.82 / 2,
    "star": 10 * 1.12 * 0.45 * math.sin(math.pi / 5) / 2,
    "cross": 2 * (2 * 0.66) - 0.66**2,
}


def scenes(count, canvas=None, seed=0, **options):
    """Requests with their scenes, on one canvas or on all in turn."""
    rng = random.Random(seed)
    for index in range(count):
        request = random_request(rng, **options)
        yield request, lay_out(request, rng, *(canvas or CANVASES[index % len(CANVASES)]))


def wanted_of(request):
    """One ``Wanted`` for each thing, in the order of the scene's items."""
    return [o for o in request.objects for _ in range(o.count)]


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
def test_a_scene_holds_what_was_asked_for(canvas):
    for request, scene in scenes(250, canvas):
        assert (scene.width, scene.height) == canvas
        assert request.background in (None, scene.background)
        if request.word is not None:
            assert scene.sign is not None
            assert scene.sign.word == request.word
            assert request.word_colour in (None, scene.sign.colour)
            assert scene.sign.colour != scene.background
            assert not scene.items
            continue
        assert scene.sign is None
        wanted = Counter((o.shape, o.colour) for o in wanted_of(request))
        assert Counter((item.shape, item.colour) for item in scene.items) == wanted
        assert scene.background not in {item.colour for item in scene.items}


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
def test_objects_lie_where_they_were_asked_for(canvas):
    width, height = canvas
    for request, scene in scenes(300, canvas, seed=1, sign_share=0):
        for wanted, item in zip(wanted_of(request), scene.items, strict=True):
            x, y = item.x / width, item.y / height
            middle = 0.4 < (y if wanted.position in ("left", "right") else x) < 0.6
            assert {
                None: True,
                "left": x < 1 / 3 and middle,
                "right": x > 2 / 3 and middle,
                "top": y < 1 / 3 and middle,
                "bottom": y > 2 / 3 and middle,
                "center": 0.4 < x < 0.6 and 0.4 < y < 0.6,
            }[wanted.position], (request, item)


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_related_objects_lie_as_they_were_asked_to(relation, canvas):
    rng = random.Random(2)
    for size in (None, "small", "large"):
        for _ in range(10):
            request = Request((Wanted("square", "blue", size), Wanted("circle", "red", size)), relation)
            first, second = lay_out(request, rng, *canvas).items
            assert (first.shape, second.shape) == ("square", "circle")
            right, down = first.x - second.x, first.y - second.y
            along, across = {
                "left of": (-right, down),
                "right of": (right, down),
                "above": (-down, right),
                "below": (down, right),
            }[relation]
            assert along > 2 * abs(across) * (1 - 1e-9)
            assert along > first.radius


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
def test_large_objects_are_larger_than_small_ones(canvas):
    border = 14.2 * min(1, min(canvas) / 128)
    seen = set()
    for request, scene in scenes(300, canvas, seed=3, sign_share=0):
        for wanted, item in zip(wanted_of(request), scene.items, strict=True):
            assert wanted.size is None or (item.radius > border) == (wanted.size == "large")
            seen.add(wanted.size)
        # Objects of one kind are of one size.
        for kind in request.objects:
            own = [i.radius > border for o, i in zip(wanted_of(request), scene.items, strict=True) if o == kind]
            assert len(set(own)) == 1
    assert seen == {None, "small", "large"}


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
def test_objects_keep_apart_and_inside(canvas):
    width, height = canvas
    margin = 3 * min(1, min(canvas) / 128)
    for _, scene in scenes(60, canvas, seed=4, sign_share=0):
        for item in scene.items:
            room = item.radius + margin
            assert room <= item.x <= width - room
            assert room <= item.y <= height - room
        for one, other in itertools.combinations(scene.items, 2):
            assert math.dist((one.x, one.y), (other.x, other.y)) >= one.radius + other.radius + margin
        masks = [shape_mask(i.shape, i.x, i.y, i.radius, width, height) for i in scene.items]
        for one, other in itertools.combinations(masks, 2):
            # Corners stick out of the circle that is kept free: a twentieth at most, and rarely.
            assert float((one * other).sum()) <= 0.05 * min(float(one.sum()), float(other.sum()))


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
@pytest.mark.parametrize("word", ["I", "GO", "SUN", "OPEN", "WWWWW", "MILKY"])
def test_words_lie_inside_the_canvas(word, canvas):
    rng = random.Random(5)
    for _ in range(10):
        sign = lay_out(Request(word=word), rng, *canvas).sign
        mask = word_mask(sign, *canvas)
        assert mask.max() == 1
        assert not mask[[0, -1]].any()
        assert not mask[:, [0, -1]].any()


def test_two_objects_at_one_place_are_refused():
    crowd = Request((Wanted("circle", "red", position="left"), Wanted("star", "blue", position="left")))
    with pytest.raises(ValueError, match="two objects are wanted at one place; name different places"):
        lay_out(crowd, random.Random(0))


def test_a_word_wider_than_the_canvas_is_refused():
    with pytest.raises(ValueError, match="128x128 pixels has no room for 9 letters"):
        lay_out(Request(word="LETTERBOX"), random.Random(0))


@pytest.mark.parametrize("canvas", [(96, 96), (96, 192), (128, 128)], ids=str)
def test_the_most_crowded_requests_find_room(canvas):
    rng = random.Random(6)
    for _ in range(30):
        crowd = (
            (Wanted("circle", "red", "large", count=3),),
            (Wanted("star", "red", "large", None, 2), Wanted("ring", "blue", "large")),
        )
        for objects in crowd:
            assert len(lay_out(Request(objects), rng, *canvas).items) == 3
        row = tuple(
            Wanted("square", colour, "large", place)
            for colour, place in (("red", "left"), ("green", "center"), ("blue", "right"))
        )
        assert len(lay_out(Request(row), rng, *canvas).items) == 3


@pytest.mark.parametrize("canvas", [c for c in CANVASES if min(c) % 32 == 0], ids=str)
def test_centres_and_words_lie_on_the_autoencoders_cells(canvas):
    """Fewer different edges, for a few million parameters to draw; odd canvases have no such places."""
    for _, scene in scenes(150, canvas, seed=13):
        for item in scene.items:
            assert item.x % 8 == item.y % 8 == 0
        if scene.sign is not None:
            left = scene.sign.x - len(scene.sign.word) * 16 * scene.sign.scale / 2
            assert scene.sign.y % 8 == 0
            assert left % (16 * scene.sign.scale) == 0  # whole tokens on a canvas of full size
            assert abs(scene.sign.x - scene.width / 2) <= 8


@pytest.mark.parametrize("height", range(96, 193, 16))
def test_letters_fill_whole_tokens_at_every_height(height):
    """On an odd number of token rows too, where the middle lies inside a row."""
    sign = lay_out(Request(word="OPEN"), random.Random(15), 128, height).sign
    assert sign.y % 16 == 0
    assert abs(sign.y - height / 2) <= 8


def test_each_size_has_one_radius():
    radii = {size: set() for size in ("small", "large")}
    for request, scene in scenes(400, (192, 192), seed=14, sign_share=0):
        for wanted, item in zip(wanted_of(request), scene.items, strict=True):
            if wanted.size:
                radii[wanted.size].add((len(scene.items) == 1, item.radius))
    assert radii == {"small": {(True, 11), (False, 11)}, "large": {(True, 26), (False, 18)}}


def test_objects_shrink_on_smaller_canvases_only():
    lone = Request((Wanted("circle", "red", "large"),))
    native, small, big = (
        lay_out(lone, random.Random(7), *canvas).items[0].radius for canvas in ((128, 128), (96, 128), (192, 192))
    )
    assert small == pytest.approx(0.75 * native)
    assert big == native


def test_equal_seeds_give_equal_scenes_and_pictures():
    def drawn(seed):
        laid = [scene for _, scene in scenes(30, seed=seed)]
        return laid, [draw(scene).tobytes() for scene in laid]

    assert drawn(8) == drawn(8)
    assert drawn(8) != drawn(9)


DIGEST = """
import hashlib, random
from flux.mini.language import random_request, phrase, text_of
from flux.mini.scenes import draw, lay_out
rng, digest = random.Random(0), hashlib.sha256()
for _ in range(20):
    request = random_request(rng)
    digest.update(text_of(phrase(request, rng)).encode() + draw(lay_out(request, rng)).tobytes())
print(digest.hexdigest())
"""


def test_pictures_do_not_depend_on_the_process():
    """Python salts the hashes of strings anew in each process."""
    digests = set()
    for salt in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": salt}
        run = subprocess.run(
            [sys.executable, "-c", DIGEST], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        digests.add(run.stdout)
    assert len(digests) == 1


def test_pictures_are_rgb_bytes_of_the_canvas_size():
    picture = draw(Scene(96, 64, "blue"))
    assert picture.shape == (64, 96, 3)
    assert picture.dtype == np.uint8
    assert (picture == PALETTE["blue"]).all()


def test_every_object_is_seen_in_its_colour_on_its_background():
    for _, scene in scenes(150, seed=10, sign_share=0):
        picture = draw(scene)
        assert tuple(picture[0, 0]) == PALETTE[scene.background]
        for item in scene.items:
            # Half-way down the arm of a ring, at the heart of all others.
            y = item.y - (0.775 * item.radius if item.shape == "ring" else 0)
            assert tuple(picture[round(y), round(item.x)]) == PALETTE[item.colour], item
        ideal = Counter()
        for item in scene.items:
            ideal[item.colour] += AREAS[item.shape] * item.radius**2
        for colour, area in ideal.items():
            pure = int((picture == PALETTE[colour]).all(axis=-1).sum())
            assert 0.55 * area < pure < 1.05 * area, (scene, colour)


def test_rings_have_a_hole():
    picture = draw(Scene(64, 64, "white", (Item("ring", "red", 32, 32, 20),)))
    assert tuple(picture[32, 32]) == PALETTE["white"]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_cover_their_ideal_area(shape):
    for radius, tolerance in ((9.5, 0.08), (14, 0.06), (30, 0.03)):
        mask = shape_mask(shape, 40.3, 41.6, radius, 80, 84)
        assert mask.shape == (84, 80)
        assert mask.min() >= 0
        assert mask.max() == 1
        assert float(mask.sum()) == pytest.approx(AREAS[shape] * radius**2, rel=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_lie_around_their_centre(shape):
    mask = shape_mask(shape, 40.3, 41.6, 20, 80, 84)
    ys, xs = np.nonzero(mask > 0.5)
    assert (xs.min() + xs.max() + 1) / 2 == pytest.approx(40.3, abs=0.6)
    assert ys.min() == pytest.approx(41.6 - 20 * (1.12 if shape == "star" else 0.86 if shape == "square" else 1), abs=1)


def test_shapes_differ_from_each_other():
    masks = {shape: shape_mask(shape, 32, 32, 14, 64, 64) for shape in SHAPES}
    for one, other in itertools.combinations(masks.values(), 2):
        assert float(np.abs(one - other).sum()) > 0.15 * min(float(one.sum()), float(other.sum()))


def test_triangles_point_up():
    mask = shape_mask("triangle", 32, 32, 20, 64, 64)
    widths = (mask > 0.5).sum(axis=1)
    assert 0 < widths[15] < widths[30] < widths[45]


def test_edges_are_smooth():
    mask = shape_mask("circle", 32, 32, 20, 64, 64)
    assert len(np.unique(mask)) > 8


@pytest.mark.parametrize("scale", [1.0, 0.75])
def test_every_letter_is_unlike_every_other(scale):
    glyphs = {letter: word_mask(Sign(letter, "black", 20, 20, scale), 40, 40) for letter in LETTERS}
    for one, other in itertools.combinations(LETTERS, 2):
        difference = float(np.abs(glyphs[one] - glyphs[other]).sum())
        assert difference > 0.08 * min(float(glyphs[one].sum()), float(glyphs[other].sum())), (one, other)


@pytest.mark.parametrize("scale", [1.0, 0.75])
def test_letters_are_of_one_height(scale):
    for letter in LETTERS:
        rows = np.flatnonzero(word_mask(Sign(letter, "black", 20, 20, scale), 40, 40).max(axis=1) > 0.5)
        assert rows[-1] - rows[0] + 1 == pytest.approx(28 * scale, abs=1.5), letter


@pytest.mark.parametrize("scale", [1.0, 0.75])
def test_letters_of_a_word_stand_apart_in_order(scale):
    for word in (*WORDS, "WMWMW"):
        mask = word_mask(Sign(word, "black", 64, 30, scale), 128, 60)
        inked = (mask.max(axis=0) > 0).astype(int)
        assert (np.diff(inked) == 1).sum() == len(word), word
    first = word_mask(Sign("LO", "black", 64, 30, scale), 128, 60)[:, :64]
    alone = word_mask(Sign("L", "black", 64 - 8 * scale, 30, scale), 128, 60)[:, :64]
    assert np.array_equal(first, alone)


def test_words_are_drawn_in_their_colour_on_their_background():
    for request, scene in scenes(60, seed=11, sign_share=1):
        picture = draw(scene)
        assert tuple(picture[0, 0]) == PALETTE[scene.background]
        inked = int((picture == PALETTE[scene.sign.colour]).all(axis=-1).sum())
        assert inked > 40 * len(request.word) * scene.sign.scale**2


def test_a_word_that_leaves_the_canvas_is_cut_off():
    mask = word_mask(Sign("HELLO", "black", 0, 0, 1.0), 64, 48)
    assert mask.shape == (48, 64)
    assert mask.any()
