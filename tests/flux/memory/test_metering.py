"""What a meter notes: passes, peaks, streamed bytes and waiting, by stage."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from flux.memory.metering import LOOK_EVERY, Meter, NoMeter, ResidentGauge
from flux.memory.streamed import Passed

CPU = torch.device("cpu")
MIB = 1 << 20


class Weights:
    def __init__(self) -> None:
        self.resident_bytes, self.passed = 0, Passed()


def meter() -> Meter:
    return Meter(CPU, clock=itertools.count().__next__)  # every look at the clock is a second


def test_passes_are_timed_from_one_to_the_next() -> None:
    own, weights = meter(), Weights()
    with own.stage("t5", "T5", weights):
        own.begin()
        own.tick()
        own.tick()
    assert own.stages["t5"].passes == [1, 1]
    assert own.stages["t5"].seconds > 2


def test_a_stage_that_runs_again_goes_on() -> None:
    own, weights = meter(), Weights()
    for _ in range(3):
        with own.stage("decode", "autoencoder", weights):
            own.begin()
            own.tick()
    assert list(own.stages) == ["decode"]
    assert own.stages["decode"].passes == [1, 1, 1]


def test_what_was_streamed_counts_from_the_stage_on() -> None:
    own, weights = meter(), Weights()
    weights.passed = Passed(100, 1.0)
    with own.stage("transformer", "FLUX", weights):
        weights.passed, weights.resident_bytes = Passed(350, 1.5), 70
        own.tick()
        weights.resident_bytes = 0  # released before the stage ends
    stage = own.stages["transformer"]
    assert (stage.streamed_bytes, stage.waited, stage.resident_bytes) == (250, 0.5, 70)


def test_a_stage_that_fails_is_noted_and_the_next_one_is_its_own() -> None:
    own, weights = meter(), Weights()
    with pytest.raises(ValueError, match="no"), own.stage("t5", "T5", weights):
        raise ValueError("no")
    own.tick()  # of no stage
    assert own.stages["t5"].passes == []
    with own.stage("transformer", "FLUX", weights):
        own.tick()
    assert len(own.stages["transformer"].passes) == 1


def test_the_peak_is_of_the_stage_and_not_of_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [0]
    monkeypatch.setattr(ResidentGauge, "_now", lambda self: taken[0])
    own, weights = Meter(CPU), Weights()
    with own.stage("transformer", "FLUX", weights):
        taken[0] = 64 * MIB
        time.sleep(20 * LOOK_EVERY)
        taken[0] = 8 * MIB
    with own.stage("decode", "autoencoder", weights):
        time.sleep(2 * LOOK_EVERY)
    assert own.stages["transformer"].peak_bytes == 64 * MIB
    assert own.stages["decode"].peak_bytes == 8 * MIB


def test_a_process_that_grows_is_seen_to_grow() -> None:
    gauge = ResidentGauge()
    gauge.start()
    held = torch.ones(256 * MIB, dtype=torch.uint8)
    most = gauge.most()
    assert most >= 0
    assert ResidentGauge()._now() >= held.nbytes


def test_without_a_meter_nothing_is_noted() -> None:
    own = NoMeter()
    with own.stage("t5", "T5", Weights()):
        own.begin()
        own.tick()
