"""Any guides together: order, strength, region and time; and what is refused, and what a picture's settings say."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from flux.adapters.blending import predictions_of
from flux.adapters.guides import Channels, Reference, StyleTokens
from flux.errors import BudgetError, Cancelled, MismatchError, UserError
from flux.memory.metering import Meter
from flux.memory.policy import Policy, read_policy
from flux.pipelines.denoising import Guidance, Hooks, denoise, prepared
from flux.pipelines.guided import ControlInput, FillInput, ReferenceInput, check_inputs
from flux.pipelines.parts import open_transformer
from flux.pipelines.text_to_image import FluxModel, Request, generate, plan_of, plan_sigmas
from flux.sampling.schedules import (
    SCHEDULES,
    beta_schedule,
    flux_schedule,
    fraction_done,
    linear_schedule,
    make_schedule,
)
from flux.sampling.solvers import SOLVERS
from flux.specs.flux1 import FLUX1, MINI, MINI_REDUX
from tests.guides import (
    CELLS,
    CLOSE,
    GUIDANCE,
    KINDS,
    LORAS,
    MATTERS,
    MU,
    NEGATIVE,
    PROMPT,
    SIGMAS,
    STEPS,
    control,
    fill,
    lora,
    make_lora,
    noise,
    reference,
    style,
)
from tests.oracles import relative_error, rows
from tests.tiny import TINY, open_tiny, write_tiny

CPU = torch.device("cpu")


@contextmanager
def field(parts, guides, *, task="fill", sigmas=SIGMAS, layout="offset", **settings):
    guided = Guidance(guides=guides, models={"canny": parts["canny"]}, layout=layout)
    ready = prepared(parts[task], PROMPT, sigmas, guidance=GUIDANCE, guided=guided, **settings)
    with torch.inference_mode(), ready as velocity:
        yield velocity


def velocity(parts, guides, *, sigma=SIGMAS[1], x=None, **settings):
    with field(parts, guides, **settings) as flow:
        return flow(noise() if x is None else x, sigma)


def walked(parts, guides, *, task="fill", x=None, **settings):
    guided = Guidance(guides=guides, models={"canny": parts["canny"]})
    return denoise(
        parts[task], PROMPT, noise() if x is None else x, SIGMAS, guidance=GUIDANCE, guided=guided, **settings
    )


@contextmanager
def counted(parts):
    """How often each transformer is called inside the block."""
    calls = Counter()

    def count(task):
        return lambda *_: calls.update([task])

    handles = [part.module.register_forward_pre_hook(count(task)) for task, part in parts.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def region(value=None, rows_=CELLS[0], columns=CELLS[1]):
    """A region by latent cell: a value everywhere, or random ones."""
    if value is not None:
        return torch.full((1, 1, rows_, columns), float(value))
    return torch.rand(1, 1, rows_, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_every_guide_changes_what_is_drawn(parts, kind):
    """Without which nothing below would tell anything."""
    assert relative_error(velocity(parts, [KINDS[kind]()]), velocity(parts, [])) > MATTERS


# Order.


def every_guide():
    """One set with all that there is. References keep their order among themselves: it says where they are."""
    return [
        fill(strength=0.9), control(strength=0.6, end=0.75), lora(0, strength=0.8), lora(1, strength=0.5, start=0.25),
        style(15, strength=0.7), style(17, region=region()), reference(strength=0.6), reference(18, region=region()),
    ]  # fmt: skip


def shuffled(guides, seed):
    """In another order, but for references among themselves."""
    mixed = random.Random(seed).sample(guides, len(guides))
    references = (guide for guide in guides if isinstance(guide, Reference))
    return [next(references) if isinstance(guide, Reference) else guide for guide in mixed]


SETS = {
    "all": range(8), "fill and styles": [0, 4, 5], "controls": [1, 2, 3], "fill, control, reference": [0, 1, 6],
    "loras, style, references": [2, 3, 5, 6, 7],
}  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("which", SETS)
def test_guides_in_any_order_give_the_same_result(parts, which, seed):
    guides = [every_guide()[index] for index in SETS[which]]
    result, other = walked(parts, guides), walked(parts, shuffled(guides, seed))
    assert relative_error(other, result) <= CLOSE


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_one_guide_of_each_kind_in_any_order_gives_the_same_bits(parts, strength):
    guides = [fill(strength=strength), lora(strength=strength), style(strength=strength), reference(strength=strength)]
    first = velocity(parts, guides)
    orders = [*itertools.permutations(guides)][5::6]
    assert all(torch.equal(velocity(parts, order), first) for order in orders)


def test_two_controls_in_either_order_give_the_same_bits(parts):
    assert torch.equal(velocity(parts, [fill(), control()]), velocity(parts, [control(), fill()]))


def test_one_lora_follows_two_pictures(parts):
    """As two LoRAs would; not the later picture alone."""
    one, other = lora(0, strength=0.5), Channels(latents=rows(1, 16, *CELLS, seed=19), lora=LORAS[0], strength=0.3)
    twin = replace(LORAS[0], name="twin")
    expected = velocity(parts, [one, replace(other, lora=twin)])
    assert torch.equal(velocity(parts, [one, other]), expected)
    assert relative_error(velocity(parts, [other, one]), expected) <= CLOSE
    assert relative_error(velocity(parts, [one]), expected) > MATTERS


# Strength.


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_leaving_it_out_to_the_bit(parts, kind, tables):
    others = [KINDS[other](strength=0.8) for other in KINDS if other != kind]
    for beside in ([], others):
        without = walked(parts, beside, tables=tables)
        assert torch.equal(walked(parts, [KINDS[kind](strength=0.0), *beside], tables=tables), without)


@pytest.mark.parametrize("kind", KINDS)
def test_a_guide_at_full_strength_costs_one_pass(parts, kind):
    with counted(parts) as calls:
        walked(parts, [KINDS[kind]()])
    assert calls == {"canny" if kind == "control" else "fill": STEPS}


@pytest.mark.parametrize(("guides", "passes"), [
    ([], 1),
    ([fill(), lora(0), lora(1), style(), reference()], 1),
    ([fill(), lora(strength=0.5), style(strength=0.5), reference(strength=0.5)], 1),
    ([style(region=region()), reference(region=region())], 1),
    ([fill(strength=0.0), control(strength=0.0), lora(strength=0.0)], 1),
    ([fill(strength=0.5)], 2),
    ([fill(strength=1.5)], 2),
    ([fill(region=region())], 2),
    ([lora(region=region())], 2),
    ([fill(), control()], 2),
    ([fill(strength=0.5), control(strength=0.25)], 3),
])  # fmt: skip
def test_passes_are_counted(parts, guides, passes):
    with counted(parts) as calls:
        walked(parts, guides)
    assert calls.total() == passes * STEPS


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.5])
def test_a_control_models_strength_goes_from_the_prediction_without_to_the_one_with_it(parts, strength):
    with_it, without = velocity(parts, [control()], task="draw"), velocity(parts, [], task="draw")
    between = velocity(parts, [control(strength=strength)], task="draw")
    assert relative_error(between, without + strength * (with_it - without)) <= CLOSE


@pytest.mark.parametrize("task", ["canny", "fill"])
def test_the_runs_own_model_is_blended_with_itself_told_nothing(parts, task):
    """A control model gets no lines, and Fill a grey picture of which all is painted."""
    given = rows(1, 16 if task == "canny" else 80, *CELLS, seed=11)
    nothing = torch.zeros_like(given)
    nothing[:, 16:] = 1
    half, whole, none = (
        velocity(parts, [Channels(latents=latents, strength=strength)], task=task)
        for latents, strength in ((given, 0.5), (given, 1.0), (nothing, 1.0))
    )
    assert relative_error(half, (whole + none) / 2) <= CLOSE
    assert torch.equal(velocity(parts, [], task=task), none)


def test_two_control_models_at_full_strength_are_averaged(parts):
    own = Channels(latents=rows(1, 16, *CELLS, seed=20))
    one, other = velocity(parts, [own], task="depth"), velocity(parts, [control()], task="depth")
    assert relative_error(velocity(parts, [own, control()], task="depth"), (one + other) / 2) <= CLOSE


def test_the_runs_own_model_may_follow_a_second_picture_as_if_it_were_a_further_one(parts):
    """Its weights are there once; the LoRA is followed by its own prediction alone."""
    own, twin = Channels(latents=rows(1, 16, *CELLS, seed=20)), control()
    one = velocity(parts, [own, lora()], task="canny")
    other = velocity(parts, [replace(twin, model=None)], task="canny")
    both = velocity(parts, [own, twin, lora()], task="canny")
    assert relative_error(both, (one + other) / 2) <= CLOSE
    assert traces(parts) == ([], 0)


def test_a_further_models_prediction_is_that_of_a_run_of_its_own(parts):
    """With styles, references and prompt as they are."""
    beside = [style(strength=0.5), reference()]
    own = replace(control(), model=None)
    alone = velocity(parts, [own, *beside], task="canny")
    assert torch.equal(velocity(parts, [control(), *beside], task="draw"), alone)


@pytest.mark.parametrize("kind", ["style", "reference", "lora"])
def test_a_strength_above_1_and_below_it_differ_from_1(parts, kind):
    made = [velocity(parts, [KINDS[kind](strength=strength)]) for strength in (0.5, 1.0, 1.5)]
    assert all(relative_error(a, b) > MATTERS for a, b in itertools.combinations(made, 2))


# Time.


@pytest.mark.parametrize("sigmas", [
    flux_schedule(STEPS, MU), flux_schedule(STEPS, 1.8278), linear_schedule(STEPS), beta_schedule(STEPS, 1.15),
    [1.0, 0.999, 0.998, 0.2, 0.0], [0.4, 0.3, 0.1, 0.05, 0.01],
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_guide_acts_in_its_time_only(parts, kind, sigmas):
    """In the first half of four steps: at the first two, to the bit, however far each step goes."""
    x = noise()

    def at_every_step(guides):
        with field(parts, guides, sigmas=sigmas) as flow:
            return [flow(x, sigma) for sigma in sigmas[:-1]]

    always, never = at_every_step([KINDS[kind]()]), at_every_step([])
    early, late = at_every_step([KINDS[kind](end=0.5)]), at_every_step([KINDS[kind](start=0.5)])
    assert [torch.equal(a, b) for a, b in zip(early, [*always[:2], *never[2:]], strict=True)] == [True] * STEPS
    assert [torch.equal(a, b) for a, b in zip(late, [*never[:2], *always[2:]], strict=True)] == [True] * STEPS
    assert not any(torch.equal(a, b) for a, b in zip(always, never, strict=True))


@pytest.mark.parametrize("as_told", [float, lambda sigma: float(np.float32(sigma))], ids=["fp64", "fp32"])
@pytest.mark.parametrize("mu", [None, 0.0, MU, 1.15, 1.8278])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fractions_of_any_number_of_steps_fall_between_steps(schedule, mu, as_told):
    """A guide until step k of n, or from then on, acts at k steps, or at the others, whatever the schedule."""
    wrong = []
    for steps in (2, 3, 5, 10, 28, 50):
        sigmas = make_schedule(schedule, steps, mu)
        for step in range(1, steps):
            for guide, expected in ((control(end=step / steps), step), (control(start=step / steps), steps - step)):
                found = evaluations(guide, sigmas, as_told)
                wrong += [(steps, step, found)] if found != expected else []
    assert not wrong


def evaluations(guide, sigmas, as_told=float):
    """At how many of a schedule's times, as a host tells them, a guide acts."""
    own = [prediction for prediction in predictions_of([guide]) if guide in prediction.guides]
    return sum(any(p.covers(fraction_done(as_told(sigma), sigmas)) for p in own) for sigma in sigmas[:-1])


@pytest.mark.parametrize("how", [
    {}, {"schedule": "linear"}, {"schedule": "beta"}, {"schedule": "simple"}, {"width": 1024, "height": 1024},
    {"mu": 3.0}, {"denoise": 0.3}, {"schedule": "linear", "denoise": 0.6},
    {"sigmas": [1 - (step / 20) ** 3 for step in range(21)]},
])  # fmt: skip
def test_half_of_a_run_is_half_of_its_steps_whatever_made_them(how):
    request = Request(prompt="", **{"steps": 20, **how})
    for tokens in (64, 4096):
        sigmas = plan_sigmas(FLUX1["flux1-dev"], request, tokens)
        assert len(sigmas) == 21
        assert evaluations(style(end=0.5), sigmas) == evaluations(style(start=0.5), sigmas) == 10
        assert evaluations(style(start=0.25, end=0.3), sigmas) == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_runs_guides_that_come_and_go(parts, solver):
    guides = [fill(strength=0.7), control(end=0.4), lora(start=0.3), style(start=0.2, end=0.8), reference(end=0.6)]
    ahead, direct = (walked(parts, guides, solver_name=solver, tables=tables) for tables in (True, False))
    assert torch.equal(ahead, direct)
    assert relative_error(ahead, walked(parts, [fill(strength=0.7)], solver_name=solver)) > MATTERS


# Region.


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_of_everything_is_no_region(parts, kind):
    beside = [style(21), reference(22)]
    whole = velocity(parts, [KINDS[kind](strength=0.8), *beside])
    for ones in (region(1), region(1, 37, 51)):
        assert relative_error(velocity(parts, [KINDS[kind](strength=0.8, region=ones), *beside]), whole) <= CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_a_guide_whose_region_is_empty_is_not_there(parts, kind):
    beside = [style(21), reference(22), lora(1, strength=0.5)]  # which that has no place before
    without = velocity(parts, beside)
    assert relative_error(velocity(parts, [*beside, KINDS[kind](region=region(0))]), without) <= CLOSE


@pytest.mark.parametrize("kind", ["fill", "control", "lora"])
def test_a_region_chooses_place_by_place(parts, kind):
    where = region()
    with_it, without = velocity(parts, [KINDS[kind]()]), velocity(parts, [])
    blended = velocity(parts, [KINDS[kind](region=where)])
    assert relative_error(blended, where * with_it + (1 - where) * without) <= CLOSE


# Batches, guidance by a negative prompt, tables.


def test_a_batch_with_guides_of_its_own_equals_single_runs(parts):
    batch, x = 3, noise(3)
    settings = ({"strength": 0.9}, {"strength": 0.6}, {"strength": 0.7}, {"strength": 0.8, "region": region()}, {})
    together = [make(batch=batch, **how) for make, how in zip(KINDS.values(), settings, strict=True)]
    results = walked(parts, together, x=x)
    for index in range(batch):

        def alone(guide, index=index):
            name = "tokens" if isinstance(guide, StyleTokens) else "latents"
            return replace(guide, **{name: getattr(guide, name)[index : index + 1]})

        single = walked(parts, [alone(guide) for guide in together], x=x[index : index + 1])
        assert relative_error(results[index : index + 1], single) <= 10 * CLOSE


def test_styles_are_in_the_positive_pass_only_and_all_else_in_both(parts):
    common, scale = [fill(strength=0.8), lora(), reference(strength=0.7)], 2.5

    def from_prompt(prompt, guides):
        guided = Guidance(guides=guides)
        with torch.inference_mode(), prepared(parts["fill"], prompt, SIGMAS, guidance=GUIDANCE, guided=guided) as flow:
            return flow(noise(), SIGMAS[1])

    positive, negative = from_prompt(PROMPT, [*common, style()]), from_prompt(NEGATIVE, common)
    found = velocity(parts, [style(), *common], negative=NEGATIVE, cfg=scale)
    assert relative_error(found, negative + scale * (positive - negative)) <= CLOSE
    wrong = from_prompt(NEGATIVE, [*common, style()])
    assert relative_error(wrong, negative) > MATTERS


@pytest.mark.parametrize("guides", [
    [], every_guide(), [lora(0), lora(1, strength=0.3)], [lora(end=0.5), control(start=0.5)],
    [lora(region=region())],
])  # fmt: skip
def test_tables_and_the_direct_path_give_the_same_bits(parts, guides):
    """With control LoRAs, too, which have branches on the modulation layers."""
    ahead, direct = (
        walked(parts, guides, tables=tables, negative=NEGATIVE, cfg=1.5, x=noise(2)) for tables in (True, False)
    )
    assert torch.equal(ahead, direct)


# What a run leaves behind.


def traces(parts):
    """What control LoRAs put on modules, and weights in memory."""
    modules = [module for part in parts.values() for module in part.module.modules()]
    kept = [name for module in modules for name in ("branches", "replacements") if name in vars(module)]
    return kept, sum(part.residency.resident_bytes for part in parts.values())


@pytest.mark.parametrize("moment", [0, 1, 5, 7])
@pytest.mark.parametrize("tables", [True, False])
def test_a_run_that_is_cancelled_leaves_no_trace_and_the_next_one_works(parts, moment, tables):
    guides = [fill(strength=0.5), control(), lora(), style()]
    whole, plain = walked(parts, guides), walked(parts, [])
    with counted(parts) as calls:
        hooks = Hooks(cancelled=lambda: calls.total() > moment)
        with pytest.raises(Cancelled):
            walked(parts, guides, hooks=hooks, tables=tables)
    assert calls.total() == moment + 1
    assert traces(parts) == ([], 0)
    assert torch.equal(walked(parts, []), plain)
    assert torch.equal(walked(parts, guides), whole)


def test_cancelling_while_weights_come_leaves_no_trace(parts):
    asked = []

    def cancelled():
        asked.append(None)
        return len(asked) > 40

    with counted(parts) as calls, pytest.raises(Cancelled):
        walked(parts, [lora(), control(strength=0.5)], hooks=Hooks(cancelled=cancelled))
    assert calls.total() == 0
    assert traces(parts) == ([], 0)


def test_runs_with_and_without_a_lora_do_not_know_of_each_other(parts):
    plain, with_one = walked(parts, [], task="draw"), walked(parts, [lora()], task="draw")
    assert traces(parts) == ([], 0)
    for _ in range(2):
        assert torch.equal(walked(parts, [], task="draw"), plain)
        assert torch.equal(walked(parts, [lora()], task="draw"), with_one)
    assert relative_error(with_one, plain) > MATTERS


def test_a_lora_that_does_not_fit_is_refused_and_leaves_no_trace(parts):
    other = make_lora(1, replace(TINY, single_blocks=2))
    guide = Channels(latents=rows(1, 16, *CELLS, seed=1), lora=other)
    with pytest.raises(MismatchError, match=r"does not fit .*; choose the model that it was made for"):
        walked(parts, [lora(), guide])
    assert traces(parts) == ([], 0)


# A request with pictures.

SIDE = 32
OPENED = {
    "draw": ("draw", None), "fill": ("fill", None), "canny": ("canny", "flux1-canny-mini"),
    "depth": ("depth", "flux1-depth-mini"), "edit": ("draw", "flux1-kontext-mini"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(files, tmp_path_factory):
    """Whole models by what they do, with the same text encoders and autoencoder."""
    base = open_tiny(write_tiny(tmp_path_factory.mktemp("whole")))
    return {
        task: FluxModel(open_transformer(files[file], CPU, variant=variant), base.text, base.autoencoder)
        for task, (file, variant) in OPENED.items()
    }


def picture(seed=0, height=SIDE, width=SIDE, batch=1):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def hole(height=SIDE, width=SIDE, batch=1):
    mask = torch.zeros(batch, 1, height, width)
    mask[..., : width // 2] = 1
    return mask


def to_fill(seed=0, height=SIDE, width=SIDE, **how):
    return FillInput(**({"picture": picture(seed, height, width), "mask": hole(height, width)} | how))


def asked(*inputs, **settings):
    return Request(**({"prompt": "a red circle", "steps": 2, "seed": 5, "inputs": inputs} | settings))


def drawn(model, *inputs, **settings):
    return generate(model, asked(*inputs, **settings))[0]


SHARED = {"fill": lambda: [to_fill()], "canny": lambda: [ControlInput(picture=picture(1))],
          "depth": lambda: [ControlInput(picture=picture(2))], "edit": lambda: [ReferenceInput(picture=picture(3))],
          "draw": lambda: [ControlInput(picture=picture(1), lora=LORAS[0])]}  # fmt: skip


@pytest.mark.parametrize("task", SHARED)
def test_every_model_draws_with_the_input_that_it_is_for(models, task):
    result = drawn(models[task], *SHARED[task]())
    assert result.pixels.shape == (SIDE, SIDE, 3)
    assert result.pixels.float().std() > 1
    assert not torch.equal(result.pixels, drawn(models[task], *SHARED[task](), seed=6).pixels)


def test_all_kinds_of_inputs_run_together_in_any_order(models):
    inputs = [
        to_fill(), ControlInput(picture=picture(1), model=models["canny"].transformer, strength=0.5, end=0.5),
        ControlInput(picture=picture(2), lora=LORAS[0], strength=0.7), ReferenceInput(picture=picture(3, 20, 50)),
        StyleTokens(tokens=rows(1, 4, TINY.context_width, seed=7), strength=0.6),
    ]  # fmt: skip
    first = drawn(models["fill"], *inputs).pixels.int()
    assert (drawn(models["fill"], *inputs[::-1]).pixels.int() - first).abs().max() <= 1
    for index in range(1, len(inputs)):
        without = inputs[:index] + inputs[index + 1 :]
        assert (drawn(models["fill"], *without).pixels.int() - first).abs().max() > 1


def with_two_models_and_a_lora(models, **settings):
    other, lora = models["canny"].transformer, LORAS[0]
    inputs = ControlInput(picture=picture(1), model=other, end=0.5), ControlInput(picture=picture(2), lora=lora)
    return asked(to_fill(), *inputs, **settings)


def test_two_models_and_a_lora_keep_to_one_budget_and_draw_the_same(models, monkeypatch):
    both = [models[task].transformer for task in ("fill", "canny")]
    plan = plan_of(models["fill"], with_two_models_and_a_lora(models, memory=read_policy("save")))
    most = Policy("budget", plan.peak_bytes + 1000)
    limit = plan_of(models["fill"], with_two_models_and_a_lora(models, memory=most)).stage("transformer").limit
    taken, meter = [], Meter(CPU)
    hooks = Hooks(cancelled=lambda: taken.append(sum(part.residency.resident_bytes for part in both)), meter=meter)
    (found,) = generate(models["fill"], with_two_models_and_a_lora(models, memory=most), hooks)
    assert torch.equal(found.pixels, generate(models["fill"], with_two_models_and_a_lora(models))[0].pixels)
    whole = sum(part.residency.accounts.footprint().device_bytes for part in both)
    assert 0 < max(taken) <= limit < whole
    assert meter.stages["transformer"].resident_bytes == max(taken)
    loras = 4 * LORAS[0].parameters
    assert [stage.beside >= loras for stage in plan.stages if "transformer" in stage.name] == [True, True]


def stage_of(models, task, *inputs, name="transformer", **settings):
    return plan_of(models[task], asked(*inputs, **settings)).stage(name)


def test_only_models_that_predict_something_are_planned(models):
    other = models["canny"].transformer
    names = [
        [
            stage.title
            for stage in plan_of(models["draw"], asked(ControlInput(picture=picture(), model=other, **how))).stages
            if "transformer" in stage.name
        ]
        for how in ({}, {"strength": 0.5}, {"strength": 0.0}, {"end": 0.5})
    ]
    own, control = models["draw"].transformer.spec.title, other.spec.title
    assert names == [[control], [own, control], [own], [own, control]]


def test_tables_and_passes_are_planned_for_every_prediction(models):
    once = stage_of(models, "draw", ControlInput(picture=picture(), lora=LORAS[0]))
    parted = stage_of(models, "draw", ControlInput(picture=picture(), lora=LORAS[0], region=hole()))
    assert parted.passes == 2 * once.passes
    table = sum(layer.out_features for layer in models["draw"].transformer.module.modulation_layers().values())
    assert parted.activations - once.activations == 2 * 4 * table  # of two steps, in fp32
    assert stage_of(models, "draw", steps=20, solver="heun").passes == 39


def test_modulations_are_brought_once_for_all_that_need_the_same(models, monkeypatch):
    part, brought = models["draw"].transformer, []
    real = type(part.residency).borrow
    monkeypatch.setattr(type(part.residency), "borrow", lambda own, prefix: brought.append(prefix) or real(own, prefix))
    layers = len(part.module.modulation_layers())
    drawn(models["draw"], negative="blue", cfg=3.0)
    assert len(brought) == layers
    drawn(models["draw"], ControlInput(picture=picture(), lora=LORAS[0], region=hole()), negative="blue", cfg=3.0)
    assert len(brought) == 3 * layers  # with the LoRA, and without


def test_pictures_are_encoded_at_their_own_size_in_a_plan_too(models):
    small = stage_of(models, "edit", ReferenceInput(picture=picture(0, 16, 16)), width=16, height=16, name="encode")
    large = stage_of(models, "edit", ReferenceInput(picture=picture(0, 64, 96)), width=16, height=16, name="encode")
    assert large.activations > 10 * small.activations
    both = [ReferenceInput(picture=picture(0, 16, 16)), ReferenceInput(picture=picture(0, 64, 96))]
    two = stage_of(models, "edit", *both, width=16, height=16, name="encode")
    assert (two.activations, two.passes) == (large.activations, 2)


def test_a_budget_without_room_for_the_second_model_is_refused_before_anything_is_read(models):
    least = plan_of(models["fill"], asked(to_fill(), memory=read_policy("save"))).peak_bytes
    budget = Policy("budget", least + 1000)
    drawn(models["fill"], to_fill(), memory=budget)
    with pytest.raises(BudgetError, match="below the least"):
        generate(models["fill"], with_two_models_and_a_lora(models, memory=budget), Hooks(progress=pytest.fail))


def test_samples_of_the_posterior_do_not_depend_on_the_inputs_order(models):
    one = ControlInput(picture=picture(1), model=models["canny"].transformer, posterior="sample")
    inputs = [to_fill(posterior="sample"), one]
    assert torch.equal(drawn(models["fill"], *inputs).pixels, drawn(models["fill"], *inputs[::-1]).pixels)
    mean = drawn(models["fill"], to_fill(), replace(one, posterior="mean"))
    assert not torch.equal(drawn(models["fill"], *inputs).pixels, mean.pixels)


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_picture_k_of_a_count_equals_a_run_of_its_own_with_its_seed(models, posterior):
    several = generate(models["fill"], asked(to_fill(posterior=posterior), count=2))
    for result in several:
        assert torch.equal(result.pixels, drawn(models["fill"], to_fill(posterior=posterior), seed=result.seed).pixels)


@pytest.mark.parametrize(("task", "inputs", "size"), [
    ("fill", [ReferenceInput(picture=picture(0, 80, 16)), to_fill(0, 32, 48)], (32, 48)),
    ("canny", [ReferenceInput(picture=picture(0, 80, 16)), ControlInput(picture=picture(0, 48, 16))], (48, 16)),
    ("edit", [ReferenceInput(picture=picture(0, 16, 48)), ReferenceInput(picture=picture(0, 64, 64))], (16, 48)),
    ("draw", [StyleTokens(tokens=rows(1, 4, TINY.context_width, seed=7))], (TINY.native_side, TINY.native_side)),
])  # fmt: skip
def test_inputs_give_the_size_by_their_kind_whatever_their_order(models, task, inputs, size):
    orders = [inputs, inputs[::-1]] if task != "edit" else [inputs]
    for order in orders:
        settings = drawn(models[task], *order, steps=1).settings
        assert (settings["height"], settings["width"]) == size


def test_a_size_that_is_asked_for_comes_first_and_then_the_picture_to_start_from(models):
    assert drawn(models["fill"], to_fill(0, 32, 48), width=16).pixels.shape == (32, 16, 3)
    started = drawn(models["fill"], to_fill(0, 32, 48), image=picture(0, 16, 16), denoise=0.9)
    assert started.pixels.shape == (16, 16, 3)


def test_an_inputs_size_is_rounded_to_16_and_it_is_said(models):
    told = []
    (result,) = generate(models["edit"], asked(ReferenceInput(picture=picture(0, 30, 41))), Hooks(warn=told.append))
    assert result.pixels.shape == (32, 48, 3)
    assert told == ["width 41 is not a multiple of 16: 48 is used", "height 30 is not a multiple of 16: 32 is used"]


def test_an_input_of_another_size_is_brought_to_the_runs(models):
    small = ControlInput(picture=picture(1, 16, 16).expand(1, 3, 16, 16))
    assert drawn(models["canny"], small, width=32, height=48).pixels.shape == (48, 32, 3)
    plain = torch.full((1, 3, 16, 16), 0.25)
    same = [
        drawn(models["canny"], ControlInput(picture=each), width=32, height=32).pixels
        for each in (plain, torch.full((1, 3, 32, 32), 0.25))
    ]
    assert (same[0].int() - same[1].int()).abs().max() <= 1


def test_strength_and_time_of_an_input_reach_the_run(models):
    plain = drawn(models["fill"], to_fill(strength=0.0)).pixels
    whole = drawn(models["fill"], to_fill()).pixels
    made = [
        drawn(models["fill"], to_fill(**how)).pixels
        for how in ({"strength": 0.5}, {"end": 0.5}, {"start": 0.5}, {"region": hole()})
    ]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations([plain, whole, *made], 2))


def test_the_settings_tell_of_every_input(models):
    inputs = [
        to_fill(rounding="hidden", posterior="sample"),
        ControlInput(picture=picture(), lora=LORAS[0], strength=0.5),
        ControlInput(picture=picture(), model=models["canny"].transformer, end=0.5),
        ReferenceInput(picture=picture(), region=hole()),
        StyleTokens(tokens=rows(1, 4, TINY.context_width, seed=7), start=0.25),
    ]
    settings = drawn(models["fill"], *inputs, layout="index").settings
    assert settings["inputs"] == [
        {"kind": "fill", "strength": 1.0, "rounding": "hidden", "posterior": "sample"},
        {"kind": "control", "strength": 0.5, "lora": "lora 71"},
        {"kind": "control", "strength": 1.0, "start": 0.0, "end": 0.5, "model": "tiny-canny.safetensors"},
        {"kind": "reference", "strength": 1.0, "region": True},
        {"kind": "style", "strength": 1.0, "start": 0.25, "end": 1.0},
    ]
    assert settings["layout"] == "index"
    assert json.loads(json.dumps(settings)) == settings


def test_norms_of_a_control_lora_come_in_by_its_strength_when_asked_to(models):
    given = ControlInput(picture=picture(), lora=LORAS[0], strength=0.5)
    whole, by_strength = (drawn(models["draw"], given, norms_by_strength=choice) for choice in (False, True))
    assert not torch.equal(whole.pixels, by_strength.pixels)
    assert ("norms_by_strength" in whole.settings, by_strength.settings["norms_by_strength"]) == (False, True)


@pytest.mark.parametrize("make", [ControlInput, ReferenceInput], ids=["control", "reference"])
def test_a_region_of_another_aspect_is_told_of(models, make):
    told = []
    task = {ControlInput: "canny", ReferenceInput: "edit"}[make]
    for region in (hole(), torch.ones(1, 1, 16, 64)):
        generate(models[task], asked(make(picture=picture(), region=region), steps=1), Hooks(warn=told.append))
    [found] = [line for line in told if "region" in line]
    assert found.startswith(f"a region (64x16) has another aspect than the output ({SIDE}x{SIDE}): it is stretched")


def test_settings_of_a_run_without_inputs_are_as_they_were(models):
    assert not {"inputs", "layout"} & set(drawn(models["draw"], width=SIDE, height=SIDE).settings)


def test_explicit_sigmas_need_no_shift_however_large_the_picture_is(models):
    with pytest.raises(Cancelled):
        generate(
            models["draw"], Request(prompt="", width=8192, height=8192, sigmas=[1.0, 0.0]),
            Hooks(cancelled=lambda: True),
        )  # fmt: skip


# What cannot be done.


def test_a_model_that_fills_is_refused_without_an_input_as_before(models):
    with pytest.raises(MismatchError, match=r"takes 384 input channels.*choose a text-to-image model"):
        drawn(models["fill"])


def reference_to(**how):
    return ReferenceInput(picture=picture(), **how)


def controls(**how):
    return ControlInput(picture=picture(), **how)


def encoded(channels, batch=1, scale=1.0, **how):
    return Channels(latents=scale * rows(batch, channels, 4, 4, seed=1), **how)


def encoded_style(shape=(1, 3, 192), scale=1.0, **how):
    return StyleTokens(tokens=scale * rows(*shape, seed=1), **how)


NAN = float("nan")
SMALL_LORA = make_lora(1)
STYLE = StyleTokens(tokens=torch.zeros(1, 3, 64))
WRONG = [
    ("flux1-dev", [to_fill()], "no input for a picture with a hole; choose FLUX.1 Fill"),
    ("flux1-kontext-dev", [to_fill(), reference_to()], "no input for a picture with a hole; choose FLUX.1 Fill"),
    ("flux1-canny-dev", [to_fill(), controls()], "no input for a picture with a hole; choose FLUX.1 Fill"),
    ("flux1-fill-dev", [reference_to()], "paints into a picture: give it one, with a mask"),
    ("flux1-fill-dev", [controls()], "no input for a control picture; choose FLUX.1 Canny"),
    ("flux1-dev", [controls()], "no input for a control picture; choose FLUX.1 Canny"),
    ("flux1-canny-dev", [reference_to()], "follows the edges of a picture: give it one"),
    ("flux1-depth-dev", [reference_to()], "follows the depth of a picture: give it one"),
    ("flux1-mini", [STYLE], "have width 64, but Foundry Mini takes 192; use the Redux adapter of its family"),
    ("flux1-dev", [encoded(80)], "takes no channels beside the picture's; choose a Fill, Canny or Depth model"),
    ("flux1-mini", [controls(lora=SMALL_LORA)], "lora 1 is for a FLUX.1 model of width 128"),
]
MISTAKEN = [
    ("flux1-fill-dev", [to_fill(), to_fill()], "two pictures with holes were given; give one"),
    ("flux1-canny-dev", [controls(), controls()], "give one of them a control model of its own, or use control LoRAs"),
    (
        "flux1-fill-dev",
        [FillInput(picture=picture()[0], mask=hole())],
        "the picture has shape (3, 32, 32); give one of (1, 3",
    ),
    (
        "flux1-fill-dev",
        [FillInput(picture=picture(), mask=hole()[0])],
        "the mask has shape (1, 32, 32); give one of (1, 1, H",
    ),
    (
        "flux1-fill-dev",
        [FillInput(picture=picture(), mask=picture())],
        "the mask has shape (1, 3, 32, 32); give one of (1, 1",
    ),
    ("flux1-canny-dev", [ControlInput(picture=hole())], "the picture has shape (1, 1, 32, 32); give one of (1, 3"),
    ("flux1-kontext-dev", [ReferenceInput(picture=picture()[..., :0])], "the picture has shape (1, 3, 32, 0); give"),
    (
        "flux1-kontext-dev",
        [reference_to(region=picture())],
        "the region has shape (1, 3, 32, 32); give one of (1, 1, H, W)",
    ),
    ("flux1-kontext-dev", [reference_to(region=hole(batch=2))], "the region has shape (2, 1, 32, 32); give"),
    ("flux1-fill-dev", [to_fill(rounding="up")], "no rounding 'up'; choose one of: soft, hidden, binary"),
    ("flux1-fill-dev", [to_fill(posterior="mode")], "no posterior 'mode'; choose one of: mean, sample"),
    ("flux1-fill-dev", [to_fill(mask=hole() * 0)], "the mask is empty, so there is nothing to repaint; paint white"),
    ("flux1-fill-dev", [to_fill(mask=hole() * 255)], "from 0 to 255; give numbers in 0..1, which are bytes divided by"),
    ("flux1-fill-dev", [to_fill(mask=hole() - 1)], "the mask has numbers from -1 to 0; give numbers in 0..1"),
    (
        "flux1-fill-dev",
        [to_fill(mask=hole() * NAN)],
        "numbers in the mask are not finite (NaN or infinite); give",
    ),
    ("flux1-fill-dev", [to_fill(picture=picture() / 0)], "numbers in the picture are not finite"),
    ("flux1-canny-dev", [ControlInput(picture=picture() * NAN)], "numbers in the picture are not finite"),
    ("flux1-kontext-dev", [ReferenceInput(picture=picture() * NAN)], "numbers in the picture are not finite"),
    ("flux1-kontext-dev", [reference_to(region=hole() * 0)], "the region is black everywhere"),
    ("flux1-kontext-dev", [reference_to(region=hole() * NAN)], "numbers in the region are not finite"),
    ("flux1-kontext-dev", [reference_to(region=hole() * 2)], "the region has numbers from 0 to 2; give"),
    (
        "flux1-mini",
        [encoded_style(shape=(3, 192))],
        "the style tokens have shape (3, 192); give one of (1, tokens, 192)",
    ),
    ("flux1-mini", [encoded_style(shape=(2, 3, 192))], "the style tokens have shape (2, 3, 192); give one of (1, "),
    ("flux1-mini", [encoded_style(scale=NAN)], "numbers in the style tokens are not finite"),
    ("flux1-mini", [encoded_style(weights=torch.ones(4))], "weights have shape (4,); give one for each of 3 tokens"),
    ("flux1-mini", [encoded_style(weights=torch.ones(3) / 0)], "numbers in the style tokens' weights are not finite"),
    ("flux1-mini", [encoded_style(region=hole() * 0)], "the region is black everywhere"),
    ("flux1-fill-dev", [encoded(16)], "the guide's latents have shape (1, 16, 4, 4); give one of (1, 80, h, w)"),
    (
        "flux1-fill-dev",
        [encoded(80, batch=2)],
        "the guide's latents have shape (2, 80, 4, 4); give one of (1, 80, h, w)",
    ),
    ("flux1-fill-dev", [encoded(80, scale=NAN)], "numbers in the guide's latents are not finite"),
    ("flux1-dev", [encoded(16, model="canny")], "name canny, which a request has not; give their picture as"),
    (
        "flux1-dev",
        [encoded(80, lora=LORAS[0])],
        "the guide's latents have shape (1, 80, 4, 4); give one of (1, 16, h, w)",
    ),
    ("flux1-kontext-dev", [Reference(latents=rows(1, 8, 4, 4, seed=1))], "the reference's latents have shape (1, 8, 4"),
    (
        "flux1-kontext-dev",
        [Reference(latents=rows(1, 16, 4, 4, seed=1) * NAN)],
        "numbers in the reference's latents are not finite",
    ),
]


@pytest.mark.parametrize(
    ("name", "inputs", "words", "error"),
    [(*case, MismatchError) for case in WRONG] + [(*case, UserError) for case in MISTAKEN],
)
def test_what_does_not_go_together_is_refused_and_what_to_do_is_said(name, inputs, words, error):
    told = []
    for order in (inputs, inputs[::-1]):
        with pytest.raises(error) as caught:
            check_inputs(FLUX1[name], order, told.append)
        assert words in str(caught.value)
        assert any(verb in str(caught.value) for verb in ("choose", "give", "use"))
    assert told == []


@pytest.mark.parametrize(("how", "words"), [
    ({"mask": torch.ones(1, 1, SIDE, SIDE)}, "the mask covers the whole picture"),
    ({"mask": torch.nn.functional.pad(torch.zeros(1, 1, 8, 8), (12,) * 4, value=1.0)}, "invert the mask"),
    ({"mask": hole(16, 64)}, "the mask (64x16) is of another size than the picture (32x32): it is resized and stretch"),
    ({"mask": hole(16, 16)}, "the mask (16x16) is of another size than the picture (32x32): it is resized"),
])  # fmt: skip
def test_a_mask_that_looks_like_a_mistake_is_told_of_once(how, words):
    told = []
    check_inputs(FLUX1["flux1-fill-dev"], [to_fill(**how)], told.append)
    assert len(told) == 1
    assert words in told[0]


def test_of_the_part_of_a_mask_that_was_checked_nothing_is_said_but_that_it_is_empty():
    told = []
    check_inputs(FLUX1["flux1-fill-dev"], [to_fill(mask=torch.ones(1, 1, SIDE, SIDE), mask_checked=True)], told.append)
    assert told == []
    with pytest.raises(UserError, match="the mask is empty"):
        check_inputs(FLUX1["flux1-fill-dev"], [to_fill(mask=hole() * 0, mask_checked=True)], told.append)


def test_pictures_of_another_aspect_than_the_runs_are_told_of(models):
    told = []
    tall, square = ControlInput(picture=picture(1, 64, 16)), ControlInput(picture=picture(1, 96, 96))
    for given in (tall, square):
        generate(models["canny"], asked(given, width=SIDE, height=SIDE), Hooks(warn=told.append))
    generate(models["fill"], asked(to_fill(0, 32, 48), width=SIDE, height=SIDE), Hooks(warn=told.append))
    assert told == [
        f"the {what} has another aspect than the output (32x32): it is stretched, which changes its shapes"
        for what in ("control picture (16x64)", "picture with the hole (48x32)")
    ]


@pytest.mark.parametrize(("task", "channels"), [("fill", 80), ("canny", 16), ("depth", 16)])
def test_encoded_channels_are_all_that_a_model_needs(models, task, channels):
    assert drawn(models[task], encoded(channels), width=SIDE, height=SIDE).pixels.float().std() > 1


def test_encoded_channels_of_another_size_than_the_runs_are_refused(models):
    words = r"latents are of 4x4 cells, and the run of 6x4, 8 pixels each; encode a picture of 48x32, or give the run"
    with pytest.raises(UserError, match=words):
        drawn(models["fill"], to_fill(), encoded(80), width=48, height=32)


@pytest.mark.parametrize(("given", "words"), [
    ({"image": picture() * NAN}, "numbers in the image are not finite"),
    ({"image": picture(), "mask": hole() / 0}, "numbers in the mask are not finite"),
    ({"image": picture(), "mask": hole() * 255}, "the mask has numbers from 0 to 255; give numbers in 0..1"),
])  # fmt: skip
def test_a_picture_to_start_from_has_numbers_and_its_mask_in_0_to_1(models, given, words):
    with pytest.raises(UserError, match=words):
        generate(models["draw"], Request(prompt="", steps=1, **given))


def test_a_control_has_either_a_lora_or_a_model(models):
    both = controls(lora=LORAS[0], model=models["canny"].transformer)
    with pytest.raises(UserError, match="both a LoRA and a model; give one of them"):
        drawn(models["draw"], both)


def test_a_further_model_that_takes_no_control_is_refused_by_its_name(models):
    with pytest.raises(MismatchError, match=r"Foundry Mini Fill \(another size\) has no input for a control picture"):
        drawn(models["draw"], controls(model=models["fill"].transformer))


@pytest.mark.parametrize("kind", [to_fill, controls, reference_to, style])
@pytest.mark.parametrize(("how", "words"), [
    ({"strength": -0.1}, "the strength is -0.1; give a number from 0 to 2"),
    ({"strength": 2.1}, "the strength is 2.1; give a number from 0 to 2"),
    ({"strength": float("nan")}, "the strength is nan; give a number"),
    ({"start": 0.5, "end": 0.5}, "it starts at 0.5 and ends at 0.5; give fractions of the run"),
    ({"start": 0.8, "end": 0.2}, "it starts at 0.8 and ends at 0.2; give fractions"),
    ({"end": 1.5}, "ends at 1.5; give fractions"),
    ({"start": -0.5}, "starts at -0.5 and ends at 1; give fractions"),
])  # fmt: skip
def test_what_is_no_strength_or_time_is_refused_at_once(kind, how, words):
    with pytest.raises(UserError) as caught:
        kind(**how)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["pictures", "tokens"])
def test_references_to_a_model_that_was_not_trained_for_them_are_warned_of_and_drawn(models, kind):
    given = reference_to() if kind == "pictures" else Reference(latents=rows(1, 16, 4, 4, seed=1))
    told = []
    generate(models["draw"], asked(given, width=SIDE, height=SIDE), Hooks(warn=told.append))
    assert told == ["Foundry Mini (another size) was not trained to look at references; choose FLUX.1 Kontext (or "
                    "kontext-mini)"]  # fmt: skip
    told.clear()
    generate(models["edit"], asked(given, width=SIDE, height=SIDE), Hooks(warn=told.append))
    assert told == []


@pytest.mark.parametrize(("spec", "strength", "told_of"), [
    (MINI, 1.0, True), (MINI, 0.0, False), (MINI_REDUX, 1.0, False), (FLUX1["flux1-dev"], 1.0, False),
    (FLUX1["flux1-kontext-mini"], 0.5, True),
])  # fmt: skip
def test_redux_tokens_to_a_model_that_was_not_trained_for_them_are_warned_of(spec, strength, told_of):
    told: list[str] = []
    check_inputs(spec, [StyleTokens(tokens=rows(1, 4, spec.context_width, seed=1), strength=strength)], told.append)
    says = [f"{spec.title} was not trained to heed Redux; choose FLUX.1 [dev] (or redux-mini)"]
    assert told == (says if told_of else [])


def test_a_layout_that_there_is_not_is_refused(models):
    with pytest.raises(UserError, match="no layout 'grid' of references; choose one of: offset, index, uxo"):
        drawn(models["edit"], reference_to(), layout="grid")


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("task", ["fill", "canny", "edit"])
def test_a_batch_as_one_input_is_refused(models, task, batch):
    photos = picture(batch=batch)
    given = {
        "fill": lambda: FillInput(picture=photos, mask=hole()),
        "canny": lambda: ControlInput(picture=photos), "edit": lambda: ReferenceInput(picture=photos),
    }[task]()  # fmt: skip
    with pytest.raises(UserError, match=rf"the picture has shape \({batch}, 3, {SIDE}, {SIDE}\); give one of"):
        drawn(models[task], given, count=batch)
