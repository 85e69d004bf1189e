"""FLUX Fill and FLUX Control in any order, with any strengths, times and regions: the same entries, read the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from fake_host import Vae
from torch import Tensor

SIDE = 32
IMAGE, MASK, CONTROLS = "concat_latent_image", "concat_mask", "fluxfoundry_controls"
FILL = {"strength": 1.0, "start": 0.0, "end": 1.0, "rounding": "soft", "noise_mask": False}
CONTROL = {"kind": "image", "low": 50.0, "high": 200.0, "automatic": False, "fit": "stretch", "strength": 1.0,
           "start": 0.0, "end": 1.0, "slot": 1}  # fmt: skip
ACTING = {
    "fully": {}, "partly": {"strength": 0.5}, "beyond": {"strength": 1.5}, "early": {"end": 0.5},
    "late": {"start": 0.25}, "partly in between": {"strength": 0.3, "start": 0.25, "end": 0.75}, "off": {"strength": 0},
}  # fmt: skip

Part = Callable[[list], list]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


PICTURE, EDGES, DEPTH = (numbers(1, SIDE, SIDE, 3, seed=seed) for seed in range(3))
LEFT = torch.zeros(1, SIDE, SIDE)
LEFT[..., : SIDE // 2] = 1
HOLE = LEFT.transpose(1, 2)
SEEN = Vae().encode(PICTURE * (1 - HOLE[..., None]) + 0.5 * HOLE[..., None])
EMPTY = Vae().encode(torch.full((1, SIDE, SIDE, 3), 0.5))


def prompt(**extra: object) -> list:
    return [[numbers(1, 4, 8), {"guidance": 3.0, **extra}]]


@pytest.fixture
def fill(run: Callable) -> Callable[..., list]:
    def add(conditioning: list, mask: Tensor = HOLE, **changes: object) -> list:
        given = {"positive": conditioning, "vae": Vae(), "image": PICTURE, "mask": mask}
        return run("filling", "Fill", **given, **{**FILL, **changes})[0]

    return add


@pytest.fixture
def control(run: Callable) -> Callable[..., list]:
    def add(conditioning: list, image: Tensor = EDGES, **changes: object) -> list:
        given = {"positive": conditioning, "vae": Vae(), "image": image}
        return run("control", "Control", **given, **{**CONTROL, **changes})[0]

    return add


def told(extra: dict) -> tuple:
    """What an entry is, in words and numbers that can be sorted."""
    image, mask, region = extra.get(IMAGE), extra.get(MASK), extra.get("mask")
    names = {"hole": SEEN, "empty": EMPTY, "edges": Vae().encode(EDGES), "depth": Vae().encode(DEPTH)}

    def name(latent: Tensor | None) -> str:
        return "none" if latent is None else next(key for key, one in names.items() if torch.allclose(one, latent))

    return (
        round(extra.get("start_percent", 0.0), 6), round(extra.get("end_percent", 1.0), 6),
        round(extra.get("strength", 1.0), 6), -1.0 if region is None else round(float(region[0, 0, 0]), 6), name(image),
        -1.0 if mask is None else round(float(mask.mean()), 6),
        tuple((slot, name(latent)) for slot, latent in sorted((extra.get(CONTROLS) or {}).items())),
    )  # fmt: skip


def entries(conditioning: list) -> list[tuple]:
    return sorted(told(extra) for _, extra in conditioning)


@pytest.mark.parametrize(("filling", "following"), list(itertools.product(ACTING, ACTING)))
def test_a_hole_and_a_control_make_the_same_entries_in_either_order(
    fill: Callable, control: Callable, filling: str, following: str
) -> None:
    one = control(fill(prompt(), **ACTING[filling]), **ACTING[following])
    other = fill(control(prompt(), **ACTING[following]), **ACTING[filling])
    assert entries(one) == entries(other)
    assert {entry[4] for entry in entries(one)} <= {"hole", "empty"}  # never edges in the place of a picture
    for _, _, _, _, image, hidden, controls in entries(one):
        assert hidden == (0.5 if image == "hole" else 1.0)
        assert set(controls) <= {(1, "edges")}
    acts = following != "off"
    assert any(entry[6] for entry in entries(one)) == acts


def test_a_hole_and_two_controls_make_the_same_entries_in_every_order(fill: Callable, control: Callable) -> None:
    parts: list[Part] = [
        lambda given: fill(given, strength=0.5, end=0.6),
        lambda given: control(given, region=LEFT, end=0.8),
        lambda given: control(given, DEPTH, slot=2, strength=0.7, start=0.2),
    ]
    made = []
    for order in itertools.permutations(parts):
        given = prompt()
        for part in order:
            given = part(given)
        made.append(entries(given))
    assert all(one == made[0] for one in made)
    assert ((1, "edges"), (2, "depth")) in {entry[6] for entry in made[0]}


def test_a_picture_is_hidden_as_a_whole_by_grey_and_a_mask_of_the_runs_size(fill: Callable) -> None:
    [[_, acting], [_, rest]] = fill(prompt(), strength=0.5)
    assert torch.allclose(acting[IMAGE], SEEN)
    assert torch.equal(rest[IMAGE], EMPTY)
    assert torch.equal(rest[MASK], torch.ones(1, 1, SIDE, SIDE))
    [[_, only]] = fill(prompt())
    assert torch.allclose(only[IMAGE], SEEN)


def test_a_control_goes_beside_a_hole_that_only_some_entries_have(fill: Callable, control: Callable) -> None:
    """As after the host's node that joins prompts."""
    mixed = [*fill(prompt()), *prompt(), *control(prompt(), DEPTH)]
    assert [entry[4] for entry in map(told, (extra for _, extra in control(mixed)))] == ["hole", "none", "none"]
    assert [set(extra[CONTROLS]) for _, extra in control(mixed)] == [{1}] * 3


def test_a_negative_prompt_without_a_hole_gets_its_control_where_the_positive_has_it(
    run: Callable, fill: Callable
) -> None:
    given = {"positive": fill(prompt()), "negative": prompt(), "vae": Vae(), "image": EDGES}
    positive, negative, *_ = run("control", "Control", **given, **CONTROL)
    assert [set(extra[CONTROLS]) for _, extra in (*positive, *negative)] == [{1}, {1}]
    assert IMAGE not in negative[0][1]


def test_a_second_hole_is_told_of_where_both_would_act(fill: Callable, said: Callable[[], str]) -> None:
    early = fill(prompt(), end=0.5)
    both = fill(early, 1 - HOLE, start=0.5)
    assert "a picture with a hole already" not in said()
    assert [float(extra[MASK][0, 0, 0, 0]) for _, extra in both] == [1.0, 0.0]
    fill(early, 1 - HOLE)
    assert "a picture with a hole already, which this one replaces: take one FLUX Fill out" in said()


def test_the_rest_of_a_second_hole_is_the_first(fill: Callable) -> None:
    [[_, second], [_, first]] = fill(fill(prompt()), 1 - HOLE, strength=0.5)
    assert float(second[MASK][0, 0, 0, 0]) == 0
    assert torch.allclose(first[IMAGE], SEEN)


def test_a_latent_with_a_noise_mask_goes_through_a_chain(run: Callable, control: Callable) -> None:
    given = {"positive": prompt(), "vae": Vae(), "image": PICTURE, "mask": HOLE, **FILL, "noise_mask": True}
    positive, negative, latent = run("filling", "Fill", **given)
    chained = {"positive": positive, "negative": negative, "vae": Vae(), "image": EDGES, "latent": latent}
    *_, out, _ = run("control", "Control", **chained, **CONTROL)
    assert torch.equal(out["samples"], Vae().encode(PICTURE))
    assert torch.equal(out["noise_mask"], HOLE[:, None])


# Two models.


class Model:
    """As much of a MODEL as is asked before it is sampled."""

    def __init__(self, name: str) -> None:
        self.model, self.name, self.patches_uuid, self.wrappers = self, name, name, {}


@pytest.fixture
def combine(load: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[[list, list, float], list]:
    """Entries of two models as weight, from when, until when, whose and what they see."""
    experts = load("nodes.bridge.experts")
    monkeypatch.setattr(experts, "check_pair", lambda *_: None)
    monkeypatch.setattr(experts, "join", lambda first, _: (first, {}))
    monkeypatch.setattr(experts, "_predict_alike", lambda first, second: first is second)

    def combined(one: list, other: list, balance: float, *, same: bool = False) -> list[dict]:
        first = Model("first")
        _, made = experts.combine(first, one, first if same else Model("second"), other, balance)
        return [{**extra, "whose": "second" if experts.EXPERT in extra else "first"} for _, extra in made]

    return combined


def weights_at(made: list[dict], moment: float, place: tuple[int, int] = (0, 0)) -> dict[tuple[str, str], float]:
    """Each prediction's share at a moment and a place, as the host has it: by the sum of all."""
    found: dict[tuple[str, str], float] = {}
    for extra in made:
        if extra.get("start_percent", 0.0) <= moment < extra.get("end_percent", 1.0):
            region = extra.get("mask")
            weight = extra.get("strength", 1.0) * (1.0 if region is None else float(region[0][place]))
            key = (extra["whose"], told(extra)[4])
            found[key] = found.get(key, 0.0) + weight
    total = sum(found.values())
    return {key: pytest.approx(weight / total, abs=1e-4) for key, weight in found.items() if abs(weight) > 1e-4 * total}


def engines_weights(load: Callable, strengths: dict[str, float], ends: dict[str, float], moment: float) -> dict:
    """The same of a Fill model's run with a further control model, as the engine has it."""
    guides, blending = load("flux.adapters.guides"), load("flux.adapters.blending")
    given = [
        guides.Channels(latents=torch.zeros(1, 1, 1, 1), model=model, strength=strengths[name], end=ends[name])
        for name, model in (("first", None), ("second", "other"))
    ]
    names = {None: "first", "other": "second"}
    return {
        names[one.model]: float(one.weight((1, 1), torch.device("cpu")))
        for one in blending.predictions_of(given)
        if one.covers(moment)
    }


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("moment", [0.1, 0.9])
def test_a_second_models_control_counts_as_in_the_engine(
    load: Callable, fill: Callable, control: Callable, combine: Callable, strength: float, moment: float
) -> None:
    made = combine(fill(prompt()), control(prompt(), strength=strength, end=0.5), 0.5)
    wanted = engines_weights(load, {"first": 1.0, "second": strength}, {"first": 1.0, "second": 0.5}, moment)
    assert weights_at(made, moment) == {
        ("first", "hole"): wanted["first"], **({("second", "edges"): wanted["second"]} if "second" in wanted else {})
    }  # fmt: skip
    assert len(made) == 2  # no run of the second model that counts for nothing


def test_a_second_models_control_leaves_what_is_outside_its_region_to_the_first(
    fill: Callable, control: Callable, combine: Callable
) -> None:
    made = combine(fill(prompt()), control(prompt(), region=LEFT), 0.5)
    assert weights_at(made, 0.5, (0, SIDE - 1)) == {("first", "hole"): 1.0}
    assert weights_at(made, 0.5) == {("first", "hole"): 0.5, ("second", "edges"): 0.5}


def test_a_second_fill_model_whose_picture_is_over_leaves_all_to_the_first(
    fill: Callable, control: Callable, combine: Callable
) -> None:
    made = combine(control(prompt()), fill(prompt(), end=0.5), 0.3)
    assert weights_at(made, 0.1) == {("first", "edges"): 0.7, ("second", "hole"): 0.3}
    assert weights_at(made, 0.9) == {("first", "edges"): 1.0}


def test_a_second_model_goes_on_while_another_guide_of_its_own_acts(
    fill: Callable, control: Callable, combine: Callable
) -> None:
    guided = control(control(prompt(), end=0.5), DEPTH, slot=2)
    assert ("second", "none") in weights_at(combine(fill(prompt()), guided, 0.5), 0.9)
    held = control(fill(prompt(), end=0.5), end=0.8)
    made = combine(control(prompt()), held, 0.5)
    assert weights_at(made, 0.6) == {("first", "edges"): 0.5, ("second", "empty"): 0.5}
    assert weights_at(made, 0.9) == {("first", "edges"): 1.0}


@pytest.mark.parametrize("first", ["another time", "another place"])
def test_where_there_is_nothing_of_the_first_the_second_goes_on_without_its_control(
    control: Callable, combine: Callable, first: str
) -> None:
    beside = prompt(end_percent=0.7) if first == "another time" else prompt(mask=LEFT)
    made = combine(beside, control(prompt(), end=0.5), 0.5)
    moment, place = (0.8, (0, 0)) if first == "another time" else (0.6, (0, SIDE - 1))
    assert weights_at(made, moment, place)[("second", "none")] == 1.0
    assert weights_at(made, 0.6) == {("first", "none"): 1.0}


def test_a_second_model_alone_and_the_same_one_twice_keep_their_entries(control: Callable, combine: Callable) -> None:
    partly = control(prompt(), strength=0.5, end=0.5)
    alone = combine(prompt(), partly, 1.0)
    assert weights_at(alone, 0.1) == {("second", "edges"): 0.5, ("second", "none"): 0.5}
    assert weights_at(alone, 0.9) == {("second", "none"): 1.0}
    assert len(combine(prompt(), partly, 0.5, same=True)) == 1 + len(partly)
