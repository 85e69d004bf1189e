"""A run's report: every stage's plan beside what it took, as text, JSON and a picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from flux.memory.metering import Meter
from flux.memory.policy import read_policy
from flux.memory.report import RunReport
from flux.mini.files import open_mini
from flux.pipelines.hooks import Hooks
from flux.pipelines.plan_picture import draw_plan
from flux.pipelines.plan_text import report_lines
from flux.pipelines.text_to_image import Request, generate, plan_of

STEPS = 3
REQUEST = Request(
    prompt="a red circle",
    steps=STEPS,
    count=2,
    image=torch.zeros(1, 3, 128, 128),
    denoise=1.0,
    memory=read_policy("save"),
)


@pytest.fixture(scope="module")
def report() -> RunReport:
    model = open_mini()
    meter = Meter(model.transformer.device)
    plan = plan_of(model, REQUEST)
    generate(model, REQUEST, Hooks(meter=meter))
    return RunReport(plan, meter.stages)


def test_every_stage_is_there_with_its_passes(report: RunReport) -> None:
    assert {name: len(stage.passes) for name, stage in report.taken.items()} == {
        "clip": 1, "t5": 1, "encode": 1, "transformer": 2 * STEPS, "decode": 2,
    }  # fmt: skip
    assert [planned.name for planned, _ in report.rows() if planned] == [
        "clip", "t5", "encode", "transformer", "decode",
    ]  # fmt: skip


def test_what_stays_and_is_streamed_is_what_was_planned(report: RunReport) -> None:
    for planned, taken in report.rows():
        assert planned is not None
        if planned.name in ("clip", "t5", "transformer"):
            assert planned.streamed_bytes > 0
            assert taken.resident_bytes == planned.resident_bytes + planned.ring_bytes
            assert taken.streamed_bytes >= len(taken.passes) * planned.streamed_bytes


def test_as_text_and_json(report: RunReport) -> None:
    lines = "\n".join(report_lines(report))
    assert "transformer" in lines
    assert "6 x " in lines
    found = json.loads(json.dumps(report.as_json()))
    assert found["policy"] == "save"
    assert len(found["stages"]["transformer"]["taken"]["pass_seconds"]) == 2 * STEPS
    assert found["stages"]["t5"]["planned"]["streamed_bytes"] > 0


def test_a_report_without_a_plan_tells_what_was_taken(report: RunReport) -> None:
    lines = "\n".join(report_lines(RunReport(None, report.taken)))
    assert "transformer" in lines


def test_the_picture_has_a_bar_of_what_was_taken(report: RunReport) -> None:
    assert report.plan is not None
    before, after = draw_plan(report.plan), draw_plan(report.plan, report.taken)
    assert after.height > before.height
    bright = np.all(np.asarray(after) == (0xC9, 0xCC, 0xD1), axis=-1)
    assert bright.sum() > 100
