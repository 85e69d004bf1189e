"""Step caching: what is skipped and what never is, against diffusers' cache, and beside everything else in a run."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks import FirstBlockCacheConfig

from flux.adapters.guides import Channels
from flux.errors import UserError
from flux.memory.streaming import Streamer
from flux.mini import files
from flux.models.flux1 import Flux1
from flux.pipelines.denoising import Guidance, Hooks, denoise, prepared
from flux.pipelines.parts import open_transformer
from flux.pipelines.step_cache import FEW_STEPS, CachedSteps, StepCache, check_few, check_steps
from flux.pipelines.text_to_image import Request, generate
from flux.sampling.packing import pack
from flux.sampling.schedules import flux_schedule
from flux.sampling.solvers import SOLVERS
from flux.specs.flux1 import FLUX1
from tests.guides import CELLS, GUIDANCE, NEGATIVE, PROMPT, lora, make_lora, noise, reference
from tests.oracles import flux1_oracle, relative_error, rows
from tests.tiny import TINY, write_tiny

CPU = torch.device("cpu")
DEEP = replace(TINY, name="deep", double_blocks=2, single_blocks=4)
STEPS, MU = 14, 0.6
SIGMAS = flux_schedule(STEPS, MU)
BLOCKS = 6
LOOSE = StepCache(threshold=0.7, max_skips=2, warmup=3)  # random weights change far more than trained ones
ALWAYS = StepCache(threshold=1.0, max_skips=2, warmup=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("deep"), DEEP).transformer


@pytest.fixture
def part(path):
    return open_transformer(path, CPU, torch.float32, keep="numbers")


def run(part, settings=None, *, batch=1, **how):
    """Latents, and what was skipped."""
    cached = None if settings is None else CachedSteps(settings, SIGMAS)
    latents = denoise(part, PROMPT, noise(batch), SIGMAS, guidance=GUIDANCE, cached=cached, **how)
    return latents, None if cached is None else cached.skipped


class Spy:
    """How many blocks every call of a transformer ran."""

    def __init__(self, monkeypatch):
        self.calls = []
        real = Flux1.forward

        def forward(model, image, conditions, modulations, observe=None, *rest):
            self.calls.append(0)

            def count(index):
                self.calls[-1] += 1

            return real(model, image, conditions, modulations, count, *rest)

        monkeypatch.setattr(Flux1, "forward", forward)


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


# When a step is skipped


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("how", [{}, {"negative": NEGATIVE, "cfg": 2.0}, {"mask": torch.eye(6)[None, None, :4]}])
def test_a_threshold_of_0_gives_the_bits_of_a_run_without_a_cache(part, solver, how):
    plain, _ = run(part, solver_name=solver, **how)
    cached, skipped = run(part, replace(LOOSE, threshold=0.0), solver_name=solver, **how)
    assert torch.equal(plain, cached)
    assert (skipped.skipped, skipped.blocks, skipped.share) == ((), 0, 0.0)


def test_a_skipped_step_runs_the_first_block_only(part, spy):
    _, skipped = run(part, LOOSE)
    assert set(spy.calls) == {1, BLOCKS}
    assert [index + 1 for index, count in enumerate(spy.calls) if count == 1] == list(skipped.skipped)
    assert skipped.blocks == spy.calls.count(1) * (BLOCKS - 1)
    assert skipped.share == pytest.approx(1 - sum(spy.calls) / (STEPS * BLOCKS))


@pytest.mark.parametrize(("max_skips", "warmup"), [(1, 1), (2, 3), (5, 1), (1000, 4), (3, 12), (3, 13), (3, 1000)])
def test_warmup_cap_and_last_step_are_kept_however_high_the_threshold(part, spy, max_skips, warmup):
    run(part, StepCache(threshold=1.0, max_skips=max_skips, warmup=warmup))
    kinds = "".join("s" if count == 1 else "c" for count in spy.calls)
    between = max(0, STEPS - warmup - 1)
    expected = (("s" * max_skips + "c") * STEPS)[:between]
    assert kinds == "c" * min(warmup, STEPS - 1) + expected + "c"


def test_a_higher_threshold_skips_more_and_moves_farther_from_the_run_without(part):
    plain, _ = run(part)
    found = [run(part, replace(LOOSE, threshold=threshold)) for threshold in (0.5, 0.6, 1.0)]
    blocks = [skipped.blocks for _, skipped in found]
    errors = [relative_error(latents, plain) for latents, _ in found]
    assert blocks == sorted(set(blocks))
    assert errors == sorted(errors)
    assert errors[-1] < 0.5


def test_what_was_too_much_for_a_threshold_is_told(part):
    _, skipped = run(part, replace(LOOSE, threshold=1e-6))
    assert skipped.skipped == ()
    assert 1e-6 < skipped.least < 1
    assert skipped.sentence() == (
        f"step cache: nothing was skipped at the threshold of 1e-06; the least change was {skipped.least:.3f}"
    )
    _, lower = run(part, replace(LOOSE, threshold=skipped.least * 1.001, max_skips=1))
    assert len(lower.skipped) >= 1


def test_what_was_skipped_is_told(part):
    _, skipped = run(part, replace(ALWAYS, max_skips=3))
    assert skipped.sentence() == (
        "step cache: blocks were skipped in 8 of 14 steps (4, 5, 6, 8, 9, 10, 12, 13), 48 % of their work"
    )
    assert skipped.described() == {
        "threshold": 1.0, "max_skips": 3, "warmup": 3, "skipped": [4, 5, 6, 8, 9, 10, 12, 13]
    }  # fmt: skip


# Against diffusers

PLENTY = 1000  # skips, as diffusers has no cap


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9])
@torch.inference_mode()
def test_steps_and_numbers_are_those_of_diffusers_first_block_cache(path, threshold):
    part = open_transformer(path, CPU, torch.float32)
    cached = CachedSteps(
        StepCache(threshold=threshold, max_skips=PLENTY, warmup=1),
        [*SIGMAS, -1.0],  # one step more, so that the last of the walk may be skipped too, as there
    )
    ours = []
    denoise(
        part, PROMPT, noise(), SIGMAS, guidance=GUIDANCE, cached=cached,
        hooks=Hooks(preview=lambda _step, estimate: ours.append(estimate)),
    )  # fmt: skip
    with part.resident() as model:
        theirs, skipped = diffusers_walk(model, threshold)
    assert list(cached.skipped.skipped) == skipped
    assert max(relative_error(pack(a), b) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def diffusers_walk(model, threshold):
    """Each step's estimate of the final latents, packed, and the numbers of the steps that were skipped."""
    oracle = flux1_oracle(model)
    oracle.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    ran, skipped, walk = [], [], []
    last = oracle.single_transformer_blocks[-1].attn
    last.register_forward_hook(lambda *_: ran.append(1))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / STEPS, STEPS).tolist(), mu=MU)
    tokens = pack(noise())
    places = torch.zeros(CELLS[0] // 2, CELLS[1] // 2, 3)
    places[..., 1] = torch.arange(CELLS[0] // 2)[:, None]
    places[..., 2] = torch.arange(CELLS[1] // 2)[None]
    for step, time in enumerate(scheduler.timesteps):
        before = len(ran)
        with oracle.cache_context("cond"):
            velocity = oracle(
                hidden_states=tokens,
                encoder_hidden_states=PROMPT.tokens,
                pooled_projections=PROMPT.pooled,
                timestep=(time / 1000).expand(1),
                guidance=torch.full((1,), GUIDANCE),
                img_ids=places.flatten(0, 1),
                txt_ids=torch.zeros(PROMPT.tokens.shape[1], 3),
            ).sample
        if len(ran) == before:
            skipped.append(step + 1)
        walk.append(tokens - time / 1000 * velocity)
        tokens = scheduler.step(velocity, time, tokens).prev_sample
    return walk, skipped


def test_the_thresholds_of_that_comparison_skip_some_steps_and_not_all(path):
    part = open_transformer(path, CPU, torch.float32)
    with part.resident() as model, torch.inference_mode():
        counts = [len(diffusers_walk(model, threshold)[1]) for threshold in (0.5, 0.6, 0.8)]
    assert counts == sorted(set(counts))
    assert 0 < counts[1] < counts[2] < STEPS - 1


# Beside everything else


def test_each_prompt_is_compared_with_itself(part, spy):
    """The negative prompt decides as it does in a run of its own along the same latents: here its own cfg of 0."""
    alone, of_negative = run(part, LOOSE, cfg=0.0, negative=NEGATIVE)
    calls = list(spy.calls)
    assert len(calls) == 2 * STEPS
    plain, _ = run(part, cfg=0.0, negative=NEGATIVE)
    assert not torch.equal(alone, plain)
    spy.calls.clear()
    other = denoise(
        part, NEGATIVE, noise(), SIGMAS, guidance=GUIDANCE, cached=CachedSteps(LOOSE, SIGMAS)
    )  # the same latents, with the negative prompt as the only one
    assert spy.calls == calls[1::2]
    assert relative_error(other, alone) < 1e-6
    assert calls[::2] != calls[1::2] or of_negative.blocks == 2 * (BLOCKS - 1) * spy.calls.count(1)


def test_guides_that_part_a_step_into_predictions_each_have_their_own(part, spy):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.guides.LORAS", [make_lora(71, DEEP)])
        region = torch.zeros(1, 1, *CELLS)
        region[..., 2:] = 1
        guided = Guidance(guides=[lora(region=region), reference()])
    plain, _ = run(part, guided=guided)
    exact, _ = run(part, replace(LOOSE, threshold=0.0), guided=guided)
    assert torch.equal(plain, exact)
    spy.calls.clear()
    near, skipped = run(part, ALWAYS, guided=guided)
    assert len(spy.calls) == 2 * STEPS
    assert spy.calls[::2] != spy.calls[1::2]  # one with the LoRA, one without: they change at different times
    assert spy.calls[::2].count(1) * spy.calls[1::2].count(1) > 0
    assert skipped.blocks == spy.calls.count(1) * (BLOCKS - 1)
    assert 0 < relative_error(near, plain) < 0.5


def test_a_guide_that_comes_in_later_begins_with_a_step_in_full(part, spy):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.guides.LORAS", [make_lora(71, DEEP)])
        guided = Guidance(guides=[lora(start=0.5)])
    run(part, replace(ALWAYS, max_skips=PLENTY), guided=guided)
    assert spy.calls[:8] == [BLOCKS] * 3 + [1] * 4 + [BLOCKS]
    assert 1 in spy.calls[8:]


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_skips_and_ends_near_its_run_without(part, solver):
    plain, _ = run(part, solver_name=solver)
    cached, skipped = run(part, LOOSE, solver_name=solver)
    assert skipped.blocks > 0
    assert 0 < relative_error(cached, plain) < 0.2


def test_of_heuns_two_evaluations_at_one_time_the_second_is_skipped_first(part, spy):
    """It differs by the solver's correction only, so that a threshold below every step's change still skips it."""
    _, by_euler = run(part, replace(LOOSE, threshold=1e-6))
    spy.calls.clear()
    _, by_heun = run(part, replace(LOOSE, threshold=by_euler.least * 0.9), solver_name="heun")
    assert len(spy.calls) == 2 * STEPS - 1
    skipped = [index for index, count in enumerate(spy.calls) if count == 1]
    assert skipped
    assert all(index % 2 == 0 for index in skipped)  # after the first, even calls begin a step where an odd one ended
    assert by_heun.blocks == len(skipped) * (BLOCKS - 1)


@pytest.mark.parametrize("keep", ["numbers", "packed"])
@pytest.mark.parametrize("limit", [0, 400_000])
def test_streamed_blocks_give_the_same_bits_and_skip_the_same(path, limit, keep):
    whole, expected = run(open_transformer(path, CPU, torch.float32, keep=keep), LOOSE)
    streamed, skipped = run(open_transformer(path, CPU, torch.float32, keep=keep), LOOSE, limit=limit)
    assert torch.equal(whole, streamed)
    assert skipped == expected
    assert skipped.skipped


def test_a_skipped_step_brings_no_more_than_its_first_block_and_the_one_behind(path, monkeypatch):
    reads = []
    request = Streamer._request

    def counted(self, slot, after):
        reads.append(self._next)
        return request(self, slot, after)

    monkeypatch.setattr(Streamer, "_request", counted)
    part = open_transformer(path, CPU, torch.float32, keep="numbers")
    _, skipped = run(part, LOOSE, limit=0)
    full = (STEPS - len(skipped.skipped)) * BLOCKS
    assert len(reads) <= full + 2 * len(skipped.skipped) + 2


def test_pictures_of_a_batch_are_skipped_together_where_all_have_changed_little(part):
    known = CachedSteps(replace(LOOSE, warmup=1), SIGMAS)
    calm = rows(2, 6, 8, seed=1)
    restless = torch.stack((calm[0], 2 * calm[1]))  # on the mean 0.5
    zeros = torch.zeros_like(calm)
    for after, skips in ((calm, False), (calm, True), (restless, False)):
        evaluation = known.evaluation(["prompt"], SIGMAS[4], own=6, blocks=BLOCKS)
        found = evaluation.recall(zeros, after)
        assert (found is not None) == skips
        if found is None:
            evaluation.remember(2 * after)
            known.settle(evaluation)
        else:
            assert torch.equal(found, 2 * after)


def test_the_change_is_that_of_the_pictures_own_tokens():
    known = CachedSteps(replace(LOOSE, warmup=1), SIGMAS)
    before, after = torch.zeros(1, 8, 4), torch.ones(1, 8, 4)
    first = known.evaluation(["prompt"], SIGMAS[4], own=2, blocks=BLOCKS)
    assert first.recall(before, after) is None
    first.remember(after)
    known.settle()
    moved = after.clone()
    moved[:, :2] += 0.8  # which is 0.2 of all tokens
    assert known.evaluation(["prompt"], SIGMAS[5], own=2, blocks=BLOCKS).recall(before, moved) is None
    moved = after.clone()
    moved[:, 2:] += 3
    assert known.evaluation(["prompt"], SIGMAS[5], own=2, blocks=BLOCKS).recall(before, moved) is not None


def test_prompts_that_come_together_and_then_apart_keep_their_own(part):
    known = CachedSteps(replace(LOOSE, warmup=1), SIGMAS)
    both, zeros = rows(2, 6, 8, seed=1), torch.zeros(2, 6, 8)
    together = known.evaluation(["a", "b"], SIGMAS[4], own=6, blocks=BLOCKS)
    assert together.recall(zeros, both) is None
    together.remember(both + rows(2, 6, 8, seed=2))
    known.settle(together)
    apart = known.evaluation(["b"], SIGMAS[5], own=6, blocks=BLOCKS)
    assert relative_error(apart.recall(zeros[1:], both[1:]), both[1:] + rows(2, 6, 8, seed=2)[1:]) < 1e-6
    other = known.evaluation(["b", "c"], SIGMAS[5], own=6, blocks=BLOCKS)
    assert other.recall(zeros, both) is None


def test_a_prompt_whose_picture_has_another_size_is_computed():
    known = CachedSteps(replace(LOOSE, warmup=1), SIGMAS)
    for count, skips in ((6, False), (4, False), (4, True)):
        tokens = torch.ones(1, count, 8)
        evaluation = known.evaluation(["prompt"], SIGMAS[4], own=count, blocks=BLOCKS)
        found = evaluation.recall(torch.zeros_like(tokens), tokens)
        assert (found is not None) == skips
        if found is None:
            evaluation.remember(tokens)
        known.settle(evaluation)


@pytest.mark.parametrize("limits", [{}, {"negative": NEGATIVE, "cfg": 2.0}])
@pytest.mark.parametrize("within", ["before", "behind the first block", "at the end"])
@pytest.mark.parametrize("at", [7, 9, 12])
def test_a_step_that_is_repeated_because_memory_ran_out_decides_as_before(path, monkeypatch, limits, within, at):
    def opened():
        return open_transformer(path, CPU, torch.float32, keep="numbers")

    expected, skipped = run(opened(), LOOSE, **limits)
    real, count = Flux1.forward, iter(range(1000))

    def forward(model, image, conditions, modulations, observe=None, *rest):
        fails = next(count) == at

        def watch(index):
            if fails and within == "behind the first block" and index == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        if fails and within == "before":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        result = real(model, image, conditions, modulations, watch, *rest)
        if fails and within == "at the end":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(Flux1, "forward", forward)
    told = []
    given, again = run(opened(), LOOSE, hooks=Hooks(warn=told.append), **limits)
    assert torch.equal(given, expected)
    assert again == skipped
    assert len(told) <= 1


def test_velocities_of_a_second_walk_are_those_of_the_first_once_it_has_begun_again(part):
    cached = CachedSteps(LOOSE, SIGMAS)
    with torch.inference_mode(), prepared(part, PROMPT, SIGMAS, guidance=GUIDANCE, cached=cached) as velocity:
        walks = []
        for _ in range(2):
            cached.begin()
            walks.append([velocity(noise() * sigma, sigma) for sigma in SIGMAS[:-1]])
    assert all(torch.equal(*pair) for pair in zip(*walks, strict=True))


# What is refused


@pytest.mark.parametrize("spec", FLUX1.values(), ids=list(FLUX1))
def test_models_that_are_made_for_few_steps_are_refused(spec):
    if spec.steps > FEW_STEPS:
        check_few(spec)
        return
    with pytest.raises(UserError, match=r"is made for 4 steps, and changes so much at every one"):
        check_few(spec)


def test_some_models_are_and_some_are_not():
    assert {spec.steps > FEW_STEPS for spec in FLUX1.values()} == {True, False}


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_runs_of_few_steps_are_refused(steps):
    with pytest.raises(UserError, match=rf"with {steps} steps? every one changes much; take it out, or take more than"):
        check_steps(steps)
    check_steps(FEW_STEPS + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "threshold is -0.1; give a number from 0 to 1"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"max_skips": 0}, "max_skips is 0; give a whole number from 1 to 1000"),
        ({"max_skips": True}, "max_skips is True"),
        ({"warmup": 0}, "warmup is 0"),
        ({"warmup": 1.5}, r"warmup is 1\.5"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        StepCache(**settings)


# Whole pictures


@pytest.fixture(scope="module")
def mini():
    return files.open_mini()


def test_pictures_of_the_embedded_model_are_close_to_those_without(mini):
    def pictures(settings):
        request = Request(prompt="a red circle on a blue background", steps=28, seed=3, count=3, step_cache=settings)
        return generate(mini, request)

    found = []
    for ours, plain in zip(pictures(StepCache()), pictures(None), strict=True):
        error = (ours.pixels.double() - plain.pixels.double()).square().mean()
        found.append(10 * float(torch.log10(255**2 / error)))
        assert len(ours.settings["step_cache"]["skipped"]) >= 4
        assert "step_cache" not in plain.settings
    assert min(found) > 40
    assert statistics.median(found) < 100  # something was skipped


def test_each_picture_of_a_run_is_that_of_its_own_seed_and_is_told_of(mini):
    request = Request(prompt="a green star", seed=5, count=2, step_cache=StepCache(threshold=0.2))
    told, warned = [], []
    first, second = generate(mini, request, Hooks(tell=told.append, warn=warned.append))
    [alone] = generate(mini, replace(request, seed=6, count=1))
    assert torch.equal(second.pixels, alone.pixels)
    assert second.settings == alone.settings
    assert warned == []
    assert [sentence.startswith("step cache: blocks were skipped in ") for sentence in told] == [True, True]
    assert first.settings["step_cache"]["threshold"] == 0.2


def test_a_picture_that_is_painted_into_and_followed_is_cached_too():
    model = files.open_mini(files.MINI_FILL)
    latents = rows(1, 80, 16, 16, seed=2)
    request = Request(
        prompt="a green star", seed=5, inputs=[Channels(latents=latents)], step_cache=StepCache(threshold=0.3)
    )
    [picture] = generate(model, request)
    assert picture.settings["step_cache"]["skipped"]


@pytest.mark.parametrize("changes", [{"steps": 8}, {"steps": 1}, {"sigmas": [1.0, 0.5, 0.0]}])
def test_a_request_of_few_steps_is_refused_before_anything_is_loaded(mini, changes):
    with pytest.raises(UserError, match="every one changes much"):
        generate(mini, Request(prompt="", step_cache=StepCache(), **changes))


def test_a_request_to_a_model_of_few_steps_is_refused():
    model = files.open_mini(files.MINI_SCHNELL)
    with pytest.raises(UserError, match="Foundry Mini schnell is made for 4 steps"):
        generate(model, Request(prompt="", steps=20, step_cache=StepCache()))


def test_a_request_without_steps_needs_no_cache(mini):
    image = torch.full((1, 3, 128, 128), 0.5)
    request = Request(prompt="", image=image, denoise=0.0, step_cache=StepCache())
    [picture] = generate(mini, request)
    assert "step_cache" not in picture.settings
