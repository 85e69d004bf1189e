"""The measuring of guided models: truth passes, and each kind of fault is seen."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import guided
from flux.mini.examples import control_example, edit_example
from flux.mini.scenes import draw
from tests.benchmarks.figures import rows_of


def judged(example, image):
    score = guided.Score("test")
    guided._judge_edit(score, example, image)
    return score.rates()


def some_edit(kind, seed=1):
    rng = random.Random(seed)
    while True:
        example = edit_example(rng, guided.CANVAS, kind=kind)
        if example.sources[0].items and len(example.after.items) > 1:
            return example


@pytest.mark.parametrize("kind", ["recolour", "remove", "add", "background"])
def test_the_right_edit_passes_and_an_unchanged_picture_does_not(kind):
    for seed in range(4):
        example = some_edit(kind, seed)
        right, same = judged(example, example.picture), judged(example, example.references[0])
        assert right["change made"] == 1
        assert right["rest: IoU"] > 0.95
        assert right["rest: colours equal"] == 1
        assert same["change made"] == 0


def test_an_object_that_went_missing_is_seen():
    example = some_edit("background")
    poorer = replace(example.after, items=example.after.items[1:])
    rates = judged(example, draw(poorer))
    assert rates["change made"] == 1
    assert rates["rest: colours equal"] == 0
    assert rates["rest: IoU"] < 0.7


def test_another_colour_of_the_rest_is_seen():
    example = some_edit("remove")
    item = example.after.items[0]
    colour = next(c for c in ("red", "blue") if c not in (item.colour, example.after.background))
    changed = replace(example.after, items=(replace(item, colour=colour), *example.after.items[1:]))
    rates = judged(example, draw(changed))
    assert rates["rest: colours equal"] == 0
    assert rates["rest: IoU"] > 0.95


def test_outlines_that_are_off_lower_the_iou():
    example = control_example(random.Random(2), guided.CANVAS, "canny", sign_share=0.0)
    truth = guided._covered(example.scene)
    seen = guided.covered_in(example.picture)
    assert guided.iou(truth, seen) > 0.93
    assert guided.iou(truth, np.roll(seen, 6, axis=1)) < guided.iou(truth, np.roll(seen, 2, axis=1)) < 0.95
    assert guided.iou(truth, np.zeros_like(truth)) == 0


def test_what_is_taken_over_counts_once():
    found = ["red", "red", "blue"]
    assert [guided._taken(found, colour) for colour in ("red", "red", "red", "green", "blue")] == [
        True, True, False, False, True,
    ]  # fmt: skip


def test_shares_means_and_faults_are_told_by_name():
    score = guided.Score("test")
    score.mark("object in the hole", right=True)
    score.mark("object in the hole", right=False, fault="it is a cross")
    score.value("rest: IoU", 0.5)
    assert score.rates() == {"object in the hole": 0.5, "rest: IoU": 0.5}
    assert score.faults == ["object in the hole: it is a cross"]


def test_shares_and_means_stand_in_the_table_beside_their_bars(monkeypatch):
    score = guided.Score("kontext-mini", {"change made": [True] * 3 + [False], "other": [True]}, {"rest: IoU": [0.5]})
    monkeypatch.setattr(guided, "MEASURES", {"edit": lambda count: score})
    report = guided.table(4, ["edit"])
    assert report.text.splitlines()[2:5] == [
        "| kontext-mini | change made | 75.0 % | ≥ 85 % |",
        "| kontext-mini | other | 100.0 % |  |",
        "| kontext-mini | rest: IoU | 0.500 | ≥ 0.90 |",
    ]
    assert "\n\n4 held-out cases each" in report.text
    assert [(row["measured"], row["bar"]) for row in rows_of(report)] == [(0.75, 0.85), (1.0, None), (0.5, 0.9)]
    assert report.data["strengths"] == []


def test_the_kept_table_has_every_model_and_keeps_every_bar():
    text = (Path(guided.__file__).parent / "tables" / "guided.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "-mini" in line]
    found: dict[str, dict[str, float]] = {}
    for model, what, measured, _ in rows:
        number = float(measured.removesuffix(" %"))
        found.setdefault(model, {})[what] = number / 100 if measured.endswith("%") else number
    assert list(found) == [
        "fill-mini", "canny-mini", "depth-mini", "canny-mini LoRA", "depth-mini LoRA", "kontext-mini", "redux-mini",
    ]  # fmt: skip
    for model, rates in found.items():
        assert {what: rate for what, rate in rates.items() if rate < guided.BARS.get(what, 0.0)} == {}, model
    assert {what for rates in found.values() for what in rates} >= set(guided.BARS)
    assert "It falls with every step." in text
    assert f"Weights: {guided.weights_mark()}." in text, "measure again: python -m benchmarks --write"
