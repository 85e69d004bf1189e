"""What training asks about every token of a scene."""

from __future__ import annotations

import random

import numpy as np

from flux.mini.labels import IGNORED, LETTER, NOTHING, OBJECT, QUESTIONS, TOKEN, token_labels
from flux.mini.language import COLOURS, LETTERS, SHAPES, Request, Wanted, random_request
from flux.mini.scenes import Item, Scene, Sign, lay_out

NAMES = tuple(QUESTIONS)


def at(scene: Scene, row: int, column: int) -> dict[str, int]:
    grid = token_labels(scene).reshape(scene.height // TOKEN, scene.width // TOKEN, len(QUESTIONS))
    return dict(zip(NAMES, grid[row, column].tolist(), strict=True))


def test_a_token_on_an_object_knows_the_object_and_where_its_middle_is():
    scene = Scene(128, 128, "white", (Item("star", "red", 40.0, 56.0, 18.0),))
    middle = at(scene, 3, 2)  # its own middle is at (40, 56)
    assert middle["kind"] == OBJECT
    assert middle["shape"] == SHAPES.index("star")
    assert middle["colour"] == COLOURS.index("red")
    assert middle["letter"] == IGNORED
    assert (middle["across"], middle["down"]) == (4, 4)
    left = at(scene, 3, 1)  # 16 pixels to the left: the star is two lattice steps to the right
    assert (left["across"], left["down"]) == (6, 4)


def test_a_token_on_the_background_knows_only_the_background():
    scene = Scene(128, 128, "white", (Item("star", "red", 40.0, 56.0, 18.0),))
    answers = at(scene, 7, 7)
    assert answers.pop("background") == COLOURS.index("white")
    assert answers.pop("kind") == NOTHING
    assert set(answers.values()) == {IGNORED}


def test_tokens_on_a_word_know_their_letter():
    scene = Scene(128, 128, "white", sign=Sign("OPEN", "red", 64.0, 64.0, 1.0))
    row = [at(scene, 3, column) for column in range(8)]
    letters = [LETTERS[a["letter"]] for a in row if a["kind"] == LETTER]
    assert letters == sorted(letters, key="OPEN".index)
    assert set(letters) == set("OPEN")


def test_every_answer_is_one_of_the_questions_choices_on_any_canvas():
    rng = random.Random(3)
    for width, height in ((128, 128), (96, 96), (192, 128)):
        for _ in range(60):
            labels = token_labels(lay_out(random_request(rng), rng, width, height))
            assert labels.shape == (width * height // TOKEN**2, len(QUESTIONS))
            for column, choices in zip(labels.T, QUESTIONS.values(), strict=True):
                assert np.all((column < choices) | (column == IGNORED))


def test_every_object_is_seen_by_some_token():
    rng = random.Random(4)
    wanted = Request(objects=(Wanted("circle", "red", "small"), Wanted("cross", "blue", "small")))
    for _ in range(50):
        labels = token_labels(lay_out(wanted, rng))
        shapes = set(labels[:, NAMES.index("shape")].tolist()) - {IGNORED}
        assert shapes == {SHAPES.index("circle"), SHAPES.index("cross")}
