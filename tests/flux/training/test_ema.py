"""The moving average, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flux.training.ema import Ema


class Numbers(nn.Module):
    """Two parameters and a buffer."""

    def __init__(self, value):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), float(value)))
        self.shift = nn.Parameter(torch.full((2, 2), -float(value)))
        self.register_buffer("steps", torch.zeros(1))


def set_to(module, value):
    with torch.no_grad():
        module.scale.fill_(value)
        module.shift.fill_(-value)


def averages(decay, values, start=1.0):
    """The average after each update, as defined."""
    out, mean = [], start
    for n, value in enumerate(values, 1):
        keep = min(decay, (1 + n) / (10 + n))
        mean = keep * mean + (1 - keep) * value
        out.append(mean)
    return out


@pytest.mark.parametrize("decay", [0.999, 0.3, 0.0])
def test_updates_move_the_average_by_the_warmed_up_decay(decay):
    module = Numbers(1)
    average = Ema(module, decay)
    values = [2.0, -1.0, 0.5, 4.0, 4.0, 3.0]
    for value, expected in zip(values, averages(decay, values), strict=True):
        set_to(module, value)
        average.update(module)
        torch.testing.assert_close(average.weights["scale"], torch.full((3,), expected))
        torch.testing.assert_close(average.weights["shift"], torch.full((2, 2), -expected))


def test_the_decay_reaches_its_full_value():
    module = Numbers(0)
    average = Ema(module, 0.5)
    for _ in range(20):
        average.update(module)
    set_to(module, 1.0)
    average.update(module)
    assert average.weights["scale"].tolist() == [0.5] * 3


def test_the_average_is_a_copy():
    module = Numbers(1)
    average = Ema(module, 0.9)
    set_to(module, 5.0)
    assert average.weights["scale"].tolist() == [1] * 3
    average.update(module)
    assert module.scale.tolist() == [5] * 3
    assert not average.weights["scale"].requires_grad


def test_copying_gives_the_module_the_average_and_nothing_else():
    module, other = Numbers(1), Numbers(7)
    average = Ema(module, 0.9)
    average.copy_to(other)
    assert other.scale.tolist() == [1] * 3
    assert other.scale.requires_grad
    set_to(other, 3.0)
    assert average.weights["scale"].tolist() == [1] * 3
    assert set(average.weights) == {"scale", "shift"}


def test_a_loaded_average_goes_on_as_if_it_had_never_stopped():
    values = [2.0, -1.0, 0.5, 4.0, 4.0, 3.0]
    module = Numbers(1)
    first = Ema(module, 0.999)
    for value in values[:3]:
        set_to(module, value)
        first.update(module)
    saved = {name: weight.clone() for name, weight in first.weights.items()}
    second = Ema(Numbers(9), 0.999)
    second.load(saved | {"foreign": torch.zeros(1)}, updates=3)
    for average in (first, second):
        for value in values[3:]:
            set_to(module, value)
            average.update(module)
    assert torch.equal(first.weights["scale"], second.weights["scale"])
    assert set(second.weights) == {"scale", "shift"}
    assert saved["scale"].tolist() == pytest.approx([averages(0.999, values[:3])[-1]] * 3)  # loading copied
