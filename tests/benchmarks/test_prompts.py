"""What the embedded models are measured on."""

from __future__ import annotations

import pytest

from benchmarks.prompts import OTHER_CANVASES, draw_group, measure, requests_for_measuring
from flux.mini.files import MINI_SCHNELL, open_mini
from flux.mini.language import Request, Wanted, is_held_out, mirrored


def test_measured_prompts_are_new_to_training_either_way_round():
    chosen = requests_for_measuring(400)
    assert len({text for _, text in chosen}) == 400
    assert 20 < sum(request.relation is not None for request, _ in chosen) < 50  # 65 % objects, one in eight related
    for request, text in chosen:
        assert text
        assert is_held_out(request)
        assert is_held_out(mirrored(request))


def test_measured_prompts_are_the_same_every_time():
    assert requests_for_measuring(50) == requests_for_measuring(50)
    assert requests_for_measuring(50) != requests_for_measuring(50, seed=1)


def test_a_mirrored_relation_means_the_same():
    square, circle = Wanted("square", "blue"), Wanted("circle", "red")
    assert mirrored(Request((square, circle), "left of")) == Request((circle, square), "right of")
    assert mirrored(Request((square, circle), "above", "white")) == Request((circle, square), "below", "white")
    assert mirrored(Request((square, circle))) == Request((square, circle))


@pytest.mark.parametrize("canvas", OTHER_CANVASES)
def test_other_canvases_are_drawn_and_judged_at_their_own_size(canvas):
    model = open_mini(MINI_SCHNELL)
    width, height = canvas
    assert draw_group(model, ["a red star"], 1, canvas).shape == (1, height, width, 3)
    rates = measure("mini-schnell", 16, model=model, canvas=canvas).tally.rates()
    assert rates["all asked"] == 16
    assert rates["background"] >= 0.75  # against noise: a plain ground of the right colour is there
