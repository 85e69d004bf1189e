"""What the embedded models are measured on."""

from __future__ import annotations

import pytest

from benchmarks import prompts
from benchmarks.prompts import BARS, OTHER_CANVASES, draw_group, measure, requests_for_measuring
from flux.mini.files import MINI_SCHNELL, open_mini
from flux.mini.language import Request, Wanted, is_held_out, mirrored
from tests.benchmarks.figures import rows_of


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


def test_the_table_has_a_row_for_each_bar_and_one_for_each_other_canvas(monkeypatch):
    monkeypatch.setattr(prompts, "OTHER_CANVASES", ((96, 96),))
    report = prompts.table(6, ["mini-schnell"])
    rows = rows_of(report)
    assert {row["what"]: row["bar"] for row in rows} == BARS
    assert all(0 <= row["rates"]["mini-schnell"] <= 1 for row in rows)
    assert report.data["seconds"]["mini-schnell"] > 0
    [canvas] = report.data["canvases"]
    assert (canvas["width"], canvas["height"], canvas["prompts"]) == (96, 96, 1)
    lines = report.text.splitlines()
    assert lines[:2] == ["| | mini-schnell | bar (mini) |", "|---|---|---|"]
    assert [line.split(" | ")[-1] for line in lines[2:6]] == ["≥ 98 % |", "≥ 95 % |", "≥ 97 % |", "≥ 90 % |"]
    assert lines[-1].startswith("| 96x96, 1 prompts | ")
