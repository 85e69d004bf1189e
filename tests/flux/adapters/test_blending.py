"""Which predictions make up a step, and with what weights."""

from __future__ import annotations

import itertools

import pytest
import torch

from flux.adapters.blending import predictions_of
from flux.adapters.control_lora import ControlLora
from flux.adapters.guides import Channels, Reference, StyleTokens
from flux.errors import UserError

SIZE = (4, 6)
CPU = torch.device("cpu")
LATENTS = torch.zeros(1, 16, *SIZE)


def channels(**fields):
    return Channels(latents=LATENTS, **fields)


def style(**fields):
    return StyleTokens(tokens=torch.zeros(1, 3, 8), **fields)


def at(guides, fraction):
    """Guides and weights of every prediction at a moment."""
    active = [p for p in predictions_of(guides) if p.covers(fraction)]
    return [(p.guides, p.weight(SIZE, CPU)) for p in active]


def test_without_guides_there_is_one_prediction():
    assert [(p.guides, p.start, p.end) for p in predictions_of([])] == [((), 0.0, 1.0)]


def test_guides_at_full_strength_share_one_prediction():
    guides = [style(), channels(), Reference(latents=LATENTS, strength=0.4)]
    ((given, weight),) = at(guides, 0.5)
    assert set(given) == set(guides)
    assert float(weight) == 1


def test_channels_at_part_strength_are_blended_with_a_prediction_without_them():
    guide = channels(strength=0.3)
    (with_it, much), (without, rest) = at([guide], 0)
    assert (with_it, without) == ((guide,), ())
    assert (float(much), float(rest)) == pytest.approx((0.3, 0.7))


def test_a_strength_above_one_goes_beyond_the_prediction():
    weights = [float(weight) for _, weight in at([channels(strength=1.5)], 0)]
    assert weights == pytest.approx([1.5, -0.5])


def test_two_controls_at_full_strength_are_averaged_with_nothing_left_over():
    one, other = channels(model="canny"), channels()
    found = at([one, other], 0)
    assert [guides for guides, _ in found] == [(one,), (other,)]
    assert [float(weight) for _, weight in found] == [0.5, 0.5]


def test_two_weak_controls_leave_the_rest_to_a_prediction_without_them():
    found = at([channels(strength=0.3), channels(strength=0.2, model="depth")], 0)
    assert [float(weight) for _, weight in found] == pytest.approx([0.3, 0.2, 0.5])


def test_a_region_blends_place_by_place():
    region = torch.zeros(1, 1, *SIZE)
    region[..., :2] = 1
    inside, outside = (weight for _, weight in at([channels(region=region, strength=0.8)], 0))
    assert torch.allclose(inside, 0.8 * region)
    assert torch.allclose(inside + outside, torch.ones(1, 1, *SIZE))


def test_a_region_of_another_size_is_brought_to_the_latents():
    region = torch.zeros(1, 1, 8 * SIZE[0], 8 * SIZE[1])
    region[..., : 8 * 3] = 1
    inside, _ = (weight for _, weight in at([channels(region=region)], 0))
    assert inside.shape == (1, 1, *SIZE)
    assert inside[..., :2].min() > 0.99
    assert inside[..., 4:].max() < 0.01


def test_a_control_lora_has_its_strength_in_the_weights():
    lora = ControlLora(name="canny", layers={}, norms={}, channels=64)
    guide = channels(lora=lora, strength=0.4)
    assert [(guides, float(weight)) for guides, weight in at([guide], 0)] == [((guide,), 1.0)]


def test_guides_act_only_in_their_time():
    early, late = channels(end=0.25), style(start=0.5)
    given = [at([early, late], moment)[0][0] for moment in (0, 0.2, 0.25, 0.4, 0.5, 1)]
    assert given == [(early,), (early,), (), (), (late,), (late,)]


def test_guides_without_strength_take_no_part():
    assert at([channels(strength=0), style(strength=0)], 0) == [((), torch.tensor(1.0))]


@pytest.mark.parametrize("moment", [0, 0.1, 0.3, 0.5, 0.7, 0.9, 1])
def test_weights_always_add_up_to_one_and_order_does_not_matter(moment):
    region = torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    guides = [
        channels(strength=0.9, end=0.5),
        channels(strength=0.7, region=region, model="other", start=0.3),
        style(start=0.1, end=0.7),
        Reference(latents=LATENTS, start=0.5),
    ]
    totals, sets = [], []
    for order in itertools.permutations(guides):
        found = at(order, moment)
        totals.append(sum(weight * torch.ones(1, 1, *SIZE) for _, weight in found))
        sets.append({(frozenset(given), round(float(weight.mean()), 5)) for given, weight in found})
    assert all(torch.allclose(total, torch.ones(1, 1, *SIZE), atol=1e-6) for total in totals)
    assert all(found == sets[0] for found in sets)


@pytest.mark.parametrize(("fields", "says"), [
    ({"strength": -0.1}, "strength"), ({"strength": 2.5}, "strength"), ({"start": 0.5, "end": 0.5}, "0.5"),
    ({"start": 0.8, "end": 0.2}, "0.8"), ({"end": 1.2}, "1.2"), ({"strength": float("nan")}, "nan"),
])  # fmt: skip
def test_what_is_no_strength_or_time_is_refused(fields, says):
    with pytest.raises(UserError, match=says):
        style(**fields)


def lora_guide(**fields):
    return channels(lora=ControlLora(name="canny", layers={}, norms={}, channels=64), **fields)


def test_a_control_lora_shares_with_a_further_model():
    guide, other = lora_guide(), channels(model="depth")
    found = {given: float(weight) for given, weight in at([guide, other], 0)}
    assert found == {(other,): 0.5, (guide,): 0.5}


def test_a_hole_and_a_control_lora_are_one_prediction():
    hole, guide = channels(), lora_guide(strength=0.5)
    ((given, weight),) = at([hole, guide], 0)
    assert set(given) == {hole, guide}
    assert float(weight) == 1


def test_a_control_loras_region_parts_the_models_own_prediction():
    region = torch.zeros(1, 1, *SIZE)
    region[..., :2] = 1
    hole, guide = channels(), lora_guide(region=region)
    inside, outside = at([hole, guide], 0)
    assert set(inside[0]) == {hole, guide}
    assert outside[0] == (hole,)
    assert torch.equal(inside[1], region)
    assert torch.equal(outside[1], 1 - region)
