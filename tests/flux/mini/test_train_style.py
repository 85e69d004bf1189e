"""Training of the embedded Redux: what its tokens have to say, and where."""

from __future__ import annotations

import random

import pytest
import torch

from flux.mini.build import Builder
from flux.mini.examples import scene_example
from flux.mini.language import Request, Wanted, phrase, text_of
from flux.mini.loop import FlowRecipe
from flux.mini.scenes import Item, Scene, draw, lay_out
from flux.mini.train_style import GROUND, Style, cells_of, train_words, vision_view, words_of
from flux.specs.vision import SIGLIP_MINI

GRID = 8
STEPS = 30


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("style")
    return Builder(folder, 0, "cpu", compiled=False, report=lambda line: None).bench()


def test_cells_are_of_the_object_that_covers_their_middle():
    left = Item("circle", "red", 40.0, 64.0, 20.0)
    right = Item("square", "blue", 104.0, 24.0, 12.0)
    cells = torch.tensor(cells_of(Scene(128, 128, "white", (left, right)), GRID)).reshape(GRID, GRID)
    assert cells[4, 2] == 0
    assert cells[1, 6] == 1
    assert cells[7, 7] == cells[0, 0] == GROUND
    assert set(cells.flatten().tolist()) == {GROUND, 0, 1}
    assert cells_of(Scene(128, 128, "white", ()), GRID) == [GROUND] * GRID**2


def test_cells_of_an_object_say_its_words_and_all_others_the_rest(bench):
    request = Request(objects=(Wanted("circle", "red"), Wanted("square", "blue")), background="green")
    scene = lay_out(request, random.Random(1))
    [words] = words_of([(request, scene)], bench, GRID)
    sentence = text_of(phrase(request, random.Random("words")))
    whole = bench.encoders.encode([sentence]).tokens[0]
    said = [int((whole - word).abs().sum(-1).argmin()) for word in words]
    assert torch.equal(words, whole[said])
    cells = cells_of(scene, GRID)
    groups = [{column for column, cell in zip(said, cells, strict=True) if cell == item} for item in (GROUND, 0, 1)]
    assert all(groups)
    assert not groups[0] & groups[1] | groups[1] & groups[2] | groups[0] & groups[2]


@pytest.mark.parametrize("seed", range(20))
def test_every_scene_can_be_said(bench, seed):
    seen = [scene_example(random.Random(seed), (128, 128), sign_share=0.0)]
    words = words_of(seen, bench, SIGLIP_MINI.grid)
    assert words.shape[:2] == (1, SIGLIP_MINI.grid**2)
    assert bool(torch.isfinite(words).all())


def test_training_gets_nearer_to_the_words_and_goes_on_where_it_stopped(bench, tmp_path):
    told, recipe = [], FlowRecipe(steps=STEPS, decay=10, batch=8)
    trained = train_words(tmp_path, bench, recipe, seed=0, report=told.append)
    assert error(trained, bench) < 0.9 * error(Style().eval(), bench)
    again = train_words(tmp_path, bench, recipe, seed=0, report=told.append)
    assert told[-1].endswith(f"resumed at step {STEPS}")
    assert error(again, bench) == error(trained, bench)


def error(style, bench):
    """Of what is said about scenes that were not seen, to the variance of what is to be said."""
    seen = [scene_example(random.Random(f"unseen {index}"), (128, 128), sign_share=0.0) for index in range(16)]
    wanted = words_of(seen, bench, SIGLIP_MINI.grid)
    with torch.inference_mode():
        said = style(torch.stack([vision_view(draw(scene)) for _, scene in seen]))
    return float((said - wanted).square().mean() / wanted.var())
