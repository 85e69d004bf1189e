"""Step caching of a MODEL: nothing of a run stays on it, and what predicts what is told apart."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch

Load = Callable[[str], ModuleType]


class Patcher:
    """A MODEL with wrappers, as the host's."""

    def __init__(self, spec: object, wrappers: dict | None = None) -> None:
        self.model, self.wrappers = SimpleNamespace(spec=spec), wrappers or {}

    def clone(self) -> Patcher:
        return Patcher(
            self.model.spec, {kind: {k: list(w) for k, w in own.items()} for kind, own in self.wrappers.items()}
        )

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: object) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)


@pytest.fixture
def bridge(load: Load) -> ModuleType:
    return load("nodes.bridge.step_cache")


@pytest.fixture
def settings(part: Load) -> type:
    return part("flux.pipelines.step_cache").StepCache


@pytest.fixture
def specs(part: Load) -> dict:
    return part("flux.specs.flux1").FLUX1


def wrappers(model: Patcher) -> list:
    return [wrapper for own in model.wrappers.values() for found in own.values() for wrapper in found]


def sample(wrapper: Callable, steps: int, during: Callable = lambda options: None) -> tuple[object, dict]:
    """Runs a wrapper around ``during``; gives its result and the run's transformer options."""
    extra = {"model_options": {}}
    sigmas = torch.linspace(1, 0, steps + 1)

    def executor(guider, given, arguments, *rest):
        assert given is sigmas
        assert rest == ("rest",)
        during(arguments["model_options"]["transformer_options"])
        return "samples"

    return wrapper(executor, "guider", sigmas, extra, "rest"), extra["model_options"]["transformer_options"]


def test_it_is_put_on_a_clone_and_a_second_one_takes_its_place(bridge, settings, specs) -> None:
    model = Patcher(specs["flux1-dev"])
    once = bridge.put_step_cache(model, settings(threshold=0.1))
    twice = bridge.put_step_cache(once, settings(threshold=0.3))
    assert [len(wrappers(one)) for one in (model, once, twice)] == [0, 1, 1]
    seen = []
    for one in (once, twice):
        [wrapper] = wrappers(one)
        sample(wrapper, 20, lambda options: seen.extend(cached.settings.threshold for cached in options.values()))
    assert seen == [0.1, 0.3]


def test_each_run_has_its_own_memory(bridge, settings, specs) -> None:
    [wrapper] = wrappers(bridge.put_step_cache(Patcher(specs["flux1-dev"]), settings()))
    runs = [sample(wrapper, 20)[1] for _ in range(2)]
    [one], [other] = (run.values() for run in runs)
    assert one is not other
    assert (one.steps, one.known) == (20, {})


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_runs_of_few_steps_are_refused(bridge, part, settings, specs, steps) -> None:
    [wrapper] = wrappers(bridge.put_step_cache(Patcher(specs["flux1-dev"]), settings()))
    with pytest.raises(part("flux.errors").UserError, match="every one changes much; take it out"):
        sample(wrapper, steps)
    assert sample(wrapper, 9)[0] == "samples"


def test_models_of_few_steps_and_of_other_loaders_are_refused(bridge, part, settings, specs) -> None:
    errors = part("flux.errors")
    with pytest.raises(errors.UserError, match=r"FLUX\.1 \[schnell\] is made for 4 steps"):
        bridge.put_step_cache(Patcher(specs["flux1-schnell"]), settings())
    with pytest.raises(errors.MismatchError, match="EasyCache"):
        bridge.put_step_cache(Patcher(None), settings())


def test_what_was_skipped_is_shown_in_the_end(bridge, settings, specs, monkeypatch) -> None:
    shown = []
    monkeypatch.setattr(bridge, "show", shown.append)
    [wrapper] = wrappers(bridge.put_step_cache(Patcher(specs["flux1-dev"]), settings(threshold=0.05, warmup=1)))
    network = SimpleNamespace(block_names=lambda: ["one"] * 5)
    tokens = torch.ones(2, 6, 4)

    def during(options):
        options["uuids"] = ["positive", "negative"]
        for step in range(4):
            times = torch.full((2,), 1 - step / 10)
            evaluation = bridge.evaluation_of(network, options, times, 6)
            if evaluation.recall(torch.zeros_like(tokens), tokens) is None:
                evaluation.remember(tokens)
            bridge.settle(options, evaluation)
        assert shown == []

    sample(wrapper, 10, during)
    assert shown == ["step cache: blocks were skipped in 3 of 10 steps (2, 3, 4), 60 % of their work"]


def test_without_a_cache_there_is_nothing_to_ask(bridge) -> None:
    assert bridge.evaluation_of(None, {}, torch.ones(1), 6) is None
    bridge.settle({}, None)


def test_entries_passes_with_blocks_replaced_and_batches_that_do_not_divide_are_told_apart(bridge) -> None:
    entries = {"uuids": ["a", "b"]}
    plain = bridge.streams_of(entries, 4)
    replaced = bridge.streams_of({**entries, "patches_replace": {"dit": {("double_block", 3): None}}}, 4)
    assert len({*plain, *replaced}) == 4
    assert plain == bridge.streams_of({**entries, "patches_replace": {}}, 2)
    assert len(bridge.streams_of(entries, 3)) == len(bridge.streams_of({}, 3)) == 1
