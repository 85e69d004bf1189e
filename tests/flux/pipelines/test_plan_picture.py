"""The picture of a plan: bars as long as what they stand for, and a line where memory ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import ImageColor

from flux.memory.policy import GIB, read_policy
from flux.pipelines.plan_picture import BAR, GAP, LABEL, MARGIN, OVER, STACK, TOP, draw_plan, spelled
from flux.pipelines.planning import Job, plan_run, planned_of_spec
from flux.specs.flux1 import FLUX1
from flux.specs.text import CLIP_L, T5_XXL


@pytest.fixture(scope="module")
def parts():
    return [planned_of_spec(spec, torch.bfloat16) for spec in (CLIP_L, T5_XXL, FLUX1["flux1-dev"])]


def drawn(parts, policy, available=24 * GIB):
    plan = plan_run(parts, Job(width=1024, height=1024), read_policy(policy), device="cuda", available=available)
    return plan, np.asarray(draw_plan(plan))


def pixels_of(row, colour):
    return int((row == ImageColor.getrgb(colour)).all(axis=-1).sum())


@pytest.mark.parametrize("policy", ["keep", "balance", "save", "6"])
def test_bars_are_as_long_as_what_they_stand_for(parts, policy):
    plan, picture = drawn(parts, policy)
    assert len(plan.stages) == 3
    rows = [picture[TOP + index * (BAR + GAP) + 2] for index in range(3)]
    whole = [sum(pixels_of(row, colour) for *_, colour in STACK) for row in rows]
    scale = whole[2] / plan.stages[2].peak_bytes
    for stage, row in zip(plan.stages, rows, strict=True):
        for attribute, _, colour in STACK:
            assert pixels_of(row, colour) == pytest.approx(scale * getattr(stage, attribute), abs=2)


def test_the_line_is_at_the_budget_or_at_what_is_free(parts):
    for policy, line in (("6", 6 * GIB), ("keep", 20 * GIB)):
        plan, picture = drawn(parts, policy, 20 * GIB)
        row = picture[TOP + 2 * (BAR + GAP) + 2]
        [bar] = [sum(pixels_of(row, colour) for *_, colour in STACK)]
        [x] = set(np.flatnonzero((picture[TOP - 2] == ImageColor.getrgb(OVER)).all(axis=-1)) // 2 * 2)
        assert x - MARGIN - LABEL == pytest.approx(bar * line / plan.stages[2].peak_bytes, abs=4)


def test_what_is_beyond_the_line_is_red(parts):
    plan, picture = drawn(parts, "keep", 8 * GIB)
    row = slice(TOP + 2 * (BAR + GAP) + 5, TOP + 2 * (BAR + GAP) + BAR - 5)
    end = MARGIN + LABEL + sum(pixels_of(picture[TOP + 2 * (BAR + GAP) + 2], colour) for *_, colour in STACK)
    assert plan.peak_bytes > 8 * GIB
    assert any(pixels_of(line, OVER) for line in picture[row, end:])


def test_few_bytes_are_told_in_mib():
    assert [spelled(size) for size in (0, 3 << 20, GIB // 2, 17 * GIB)] == [
        "0.0 MiB",
        "3.0 MiB",
        "0.50 GiB",
        "17.00 GiB",
    ]
