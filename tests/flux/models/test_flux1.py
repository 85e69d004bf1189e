"""FLUX.1's transformer against diffusers', and what the engine promises beyond it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from flux.models import flux1
from flux.models.flux1 import Conditions, Flux1, timestep_embedding
from flux.models.positions import image_ids, text_ids
from flux.specs.flux1 import FLUX1
from tests.oracles import TOLERANCE, flux1_oracle, flux1_to_diffusers, randomise, relative_error, rows, swap_halves

TINY = replace(
    FLUX1["flux1-dev"],
    name="tiny",
    context_width=48,
    pooled_width=24,
    hidden=64,
    heads=2,
    axes=(8, 12, 12),
    double_blocks=2,
    single_blocks=3,
)
SPECS = {
    "dev": TINY,
    "schnell": replace(TINY, guidance_embedding=False),
    "one-head": replace(TINY, hidden=40, heads=1, axes=(16, 10, 14), double_blocks=1, single_blocks=5),
    "canny": replace(TINY, hidden=96, heads=3, axes=(4, 16, 12), double_blocks=3, single_blocks=1, in_channels=128),
    "fill": replace(TINY, hidden=48, heads=3, axes=(2, 6, 8), single_blocks=2, in_channels=384),
    "no-single": replace(TINY, single_blocks=0),
    "no-double": replace(TINY, double_blocks=0, guidance_embedding=False),
    # large enough for oneDNN's product, in ``ops.linear``
    "large": replace(TINY, hidden=256, axes=(32, 48, 48), context_width=272, double_blocks=1, single_blocks=1),
    "wide-context": replace(TINY, context_width=160, pooled_width=96, hidden=128, axes=(16, 24, 24)),
}
SIZES = {"square": (4, 4), "wide": (3, 11), "odd": (5, 7)}


def build(spec, seed=0):
    return randomise(Flux1(spec), seed)


def inputs(spec, batch=1, height=4, width=4, text_length=6, seed=1):
    """Image tokens, conditions, times, pooled vectors and guidance strengths, a row different from the next."""
    image = rows(batch, height * width, spec.in_channels, seed=seed)
    text = rows(batch, text_length, spec.context_width, seed=seed + 1)
    pooled = rows(batch, spec.pooled_width, seed=seed + 2)
    times = torch.tensor([0.37, 1.0, 0.004])[:batch]
    guidance = torch.tensor([3.5, 30.0, 1.0])[:batch] if spec.guidance_embedding else None
    return image, Conditions(text, text_ids(text_length), image_ids(height, width)), times, pooled, guidance


def run(model, image, conditions, times, pooled, guidance=None):
    return model(image, conditions, model.modulate(model.embed(times, pooled, guidance)))


def run_oracle(oracle, image, conditions, times, pooled, guidance=None):
    return oracle(
        hidden_states=image,
        encoder_hidden_states=conditions.text,
        pooled_projections=pooled,
        timestep=times,
        guidance=guidance,
        img_ids=conditions.image_ids,
        txt_ids=conditions.text_ids,
    ).sample


@pytest.mark.usefixtures("as_run")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", SPECS)
def test_velocity_equals_diffusers(variant, size, batch):
    model = build(SPECS[variant])
    given = inputs(SPECS[variant], batch, *SIZES[size])
    assert relative_error(run(model, *given), run_oracle(flux1_oracle(model), *given)) <= TOLERANCE


@pytest.mark.usefixtures("as_run")
def test_velocity_equals_diffusers_for_small_activations():
    """Small enough for the epsilon of every norm to show."""
    model = build(TINY)
    for name, parameter in model.named_parameters():
        if "_in." in name or "qkv" in name or "linear1" in name:
            parameter *= 0.03
    image, *rest = inputs(TINY, batch=2)
    assert relative_error(run(model, image, *rest), run_oracle(flux1_oracle(model), image, *rest)) <= TOLERANCE


@pytest.mark.usefixtures("as_run")
@pytest.mark.parametrize("text_length", [1, 33])
def test_velocity_equals_diffusers_for_any_text_length(text_length):
    model = build(TINY)
    given = inputs(TINY, batch=2, height=2, width=3, text_length=text_length)
    assert relative_error(run(model, *given), run_oracle(flux1_oracle(model), *given)) <= TOLERANCE


@pytest.mark.usefixtures("as_run")
def test_velocity_equals_diffusers_with_text_at_places_of_its_own():
    model = build(TINY)
    image, conditions, *rest = inputs(TINY, batch=2)
    placed = conditions._replace(text_ids=torch.tensor([[i % 3, 7 * i, 100 - i] for i in range(6)]).float())
    ours = run(model, image, placed, *rest)
    assert relative_error(ours, run_oracle(flux1_oracle(model), image, placed, *rest)) <= TOLERANCE
    assert relative_error(ours, run(model, image, conditions, *rest)) > 1e-3


@pytest.mark.usefixtures("as_run")
def test_velocity_equals_diffusers_with_a_reference_image_behind_the_own():
    model = build(TINY)
    image, conditions, *rest = inputs(TINY, height=4, width=6)
    reference = image_ids(2, 3)
    reference[:, 0] = 1
    given = (
        torch.cat((image, rows(1, 6, 64, seed=9)), dim=1),
        conditions._replace(image_ids=torch.cat((conditions.image_ids, reference))),
        *rest,
    )
    assert relative_error(run(model, *given), run_oracle(flux1_oracle(model), *given)) <= TOLERANCE


def test_parity_fails_where_the_final_halves_are_not_swapped():
    model = build(TINY)
    given = inputs(TINY)
    oracle = flux1_oracle(model)
    state = flux1_to_diffusers(model.state_dict())
    unswapped = {key: swap_halves(tensor) for key, tensor in state.items() if key.startswith("norm_out.")}
    oracle.load_state_dict(state | unswapped)
    assert relative_error(run(model, *given), run_oracle(oracle, *given)) > 0.1


def test_no_guidance_equals_a_model_without_the_embedder():
    model = build(TINY)
    *given, _ = inputs(TINY, batch=2)
    oracle = flux1_oracle(model, guidance_embedding=False)
    assert relative_error(run(model, *given), run_oracle(oracle, *given)) <= TOLERANCE


def test_guidance_is_ignored_by_a_model_without_the_embedder():
    model = build(SPECS["schnell"])
    *given, _ = inputs(model.spec)
    torch.testing.assert_close(run(model, *given, torch.tensor([30.0])), run(model, *given), rtol=0, atol=0)


@pytest.mark.usefixtures("as_run")
def test_bf16_is_within_two_percent_of_fp32_and_no_worse_than_diffusers():
    """Both sides have the same bf16 weights and inputs, so only the arithmetic differs.

    2 % of the largest value is five bf16 steps (2**-8 each) after five blocks.
    """
    spec = replace(TINY, hidden=128, axes=(16, 24, 24))
    half = build(spec).to(torch.bfloat16)
    exact = Flux1(spec).requires_grad_(False)
    exact.load_state_dict(half.state_dict())
    image, conditions, _, pooled, _ = inputs(spec, batch=2, height=6, width=6)
    low = (
        image.bfloat16(),
        conditions._replace(text=conditions.text.bfloat16()),
        torch.tensor([0.5, 0.25]),  # bf16 holds 1000 times these: diffusers rounds that to the model's dtype
        pooled.bfloat16(),
        torch.tensor([4.0, 2.0]),  # the same
    )
    high = (low[0].float(), conditions._replace(text=low[1].text.float()), low[2], low[3].float(), low[4])
    truth = run(exact, *high)
    ours = run(half, *low)
    theirs = run_oracle(flux1_oracle(half).to(torch.bfloat16), *low)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, truth) <= 0.02
    assert relative_error(ours, truth) <= 1.5 * relative_error(theirs, truth)


@torch.inference_mode()
def test_the_way_without_a_copy_gives_the_same_numbers():
    model = build(TINY)
    block = model.single_blocks[0]
    fused = rows(2, 7, 3 * TINY.hidden + TINY.mlp_width, seed=1)
    mixed = rows(2, TINY.heads, 7, TINY.hidden // TINY.heads, seed=2)
    assert torch.equal(block._join(mixed, fused), block._join_in_place(mixed, fused.clone()))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_used_up_is_never_what_was_given(dtype, monkeypatch):
    model = build(TINY).to(dtype)
    image, conditions, times, pooled, guidance = inputs(TINY, batch=3)
    given = [image.to(dtype), conditions.text.to(dtype), conditions.image_ids]
    kept = [tensor.clone() for tensor in given]
    modulations = model.modulate(model.embed(times, pooled.to(dtype), guidance))
    before = [tensor.clone() for tensor in (*modulations.image, *modulations.text, *modulations.single)]
    used_up = model(given[0], conditions._replace(text=given[1]), modulations)
    assert all(map(torch.equal, given, kept))
    assert all(map(torch.equal, (*modulations.image, *modulations.text, *modulations.single), before))
    monkeypatch.setattr(flux1, "_copies", lambda: True)
    copied = model(given[0], conditions._replace(text=given[1]), modulations)
    assert relative_error(used_up, copied) <= (1e-6 if dtype == torch.float32 else 1e-2)  # norms differ in a last bit


FP16_MAX = torch.finfo(torch.float16).max


@torch.inference_mode()
@pytest.mark.parametrize("stream", ["txt_mlp.2", "img_mlp.2", "linear2"])
def test_fp16_that_overflows_stays_finite_and_near(stream):
    """A row of weights that takes one channel past fp16's range, as FLUX.1's text side does in some blocks."""
    exact = build(replace(TINY, double_blocks=1, single_blocks=1))
    for name, parameter in exact.named_parameters():
        if name.endswith(f"{stream}.weight"):
            parameter[3] *= 4e4
    half = Flux1(exact.spec).requires_grad_(False).half()
    half.load_state_dict({name: tensor.clamp(-FP16_MAX, FP16_MAX) for name, tensor in exact.state_dict().items()})
    image, conditions, times, pooled, guidance = inputs(exact.spec)
    low = run(half, image.half(), conditions._replace(text=conditions.text.half()), times, pooled.half(), guidance)
    assert bool(torch.isfinite(low).all())
    assert relative_error(low.float(), run(exact, image, conditions, times, pooled, guidance)) < 0.2


def test_rows_of_a_batch_do_not_see_each_other():
    model = build(TINY)
    image, conditions, times, pooled, guidance = inputs(TINY, batch=3)
    together = run(model, image, conditions, times, pooled, guidance)
    for row in range(3):
        one = slice(row, row + 1)
        alone = run(
            model, image[one], conditions._replace(text=conditions.text[one]), times[one], pooled[one], guidance[one]
        )
        assert relative_error(together[one], alone) <= TOLERANCE


def test_modulations_of_a_batch_are_those_of_each_row_alone():
    model = build(TINY)
    vec = rows(3, TINY.hidden, seed=5)
    together = model.modulate(vec)
    assert [len(part) for part in together[:3]] == [2, 2, 3]
    for row in range(3):
        alone = model.modulate(vec[row : row + 1])
        pairs = [
            *zip(together.image, alone.image, strict=True),
            *zip(together.text, alone.text, strict=True),
            *zip(together.single, alone.single, strict=True),
            (together.final, alone.final),
        ]
        assert max(relative_error(many[row : row + 1], one) for many, one in pairs) <= TOLERANCE


def test_modulations_from_the_layers_one_by_one_are_those_of_modulate():
    model = build(TINY)
    vec = rows(2, TINY.hidden, seed=5)
    layers = model.modulation_layers()
    parameters = dict(model.named_parameters())
    outputs = [
        torch.nn.functional.linear(
            torch.nn.functional.silu(vec), parameters[f"{prefix}.weight"], parameters[f"{prefix}.bias"]
        )
        for prefix in layers
    ]
    gathered, made = model.gather_modulations(outputs), model.modulate(vec)
    torch.testing.assert_close(tuple(gathered), tuple(made))


def test_observer_is_called_once_before_every_block_in_order():
    model = build(TINY)
    events = []
    for index, block in enumerate([*model.double_blocks, *model.single_blocks]):
        block.register_forward_hook(lambda *_, index=index: events.append(("ran", index)))
    image, conditions, times, pooled, guidance = inputs(TINY)
    modulations = model.modulate(model.embed(times, pooled, guidance))
    model(image, conditions, modulations, observe=lambda index: events.append(("told", index)))
    assert events == [(what, index) for index in range(5) for what in ("told", "ran")]


@pytest.mark.parametrize("last", [0, 1, 2, 4])
def test_exception_from_the_observer_stops_the_forward(last):
    model = build(TINY)
    ran = []
    for index, block in enumerate([*model.double_blocks, *model.single_blocks]):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    image, conditions, times, pooled, guidance = inputs(TINY)
    modulations = model.modulate(model.embed(times, pooled, guidance))

    def stop(index):
        if index == last:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        model(image, conditions, modulations, observe=stop)
    assert ran == list(range(last))


def test_timestep_embedding_has_the_published_values():
    """For t = 0.5, where fp32 holds the arguments (500 and a little less) to 1.5e-5 only, here as in every engine."""
    embedding = timestep_embedding(torch.tensor([0.5]), 256)
    assert embedding.shape == (1, 256)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding[0, :3], torch.tensor([-0.883849, 0.945943, 0.848515]), rtol=0, atol=1.6e-5)
    torch.testing.assert_close(
        embedding[0, 128:131], torch.tensor([-0.467772, 0.324334, -0.529172]), rtol=0, atol=1.6e-5
    )


def test_timestep_embedding_equals_diffusers_bit_for_bit():
    times = torch.tensor([0.0, 0.001, 0.37, 0.5, 1.0, 3.5, 30.0])
    theirs = get_timestep_embedding(times * 1000, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(times, 256), theirs)


def test_timestep_embedding_has_the_published_frequencies():
    """A time of 1/1000 makes the angle the frequency itself, which the sine of the small one shows unchanged."""
    sines = timestep_embedding(torch.tensor([1e-3]), 256)[0, 128:]
    assert float(sines[1].asin()) == pytest.approx(0.930572, abs=1e-6)
    assert float(sines[127]) == pytest.approx(1.074608e-4, rel=1e-6)


def test_timestep_embedding_is_computed_in_fp32_for_bf16_times():
    times = torch.tensor([0.37], dtype=torch.bfloat16)
    assert torch.equal(timestep_embedding(times, 256), timestep_embedding(times.float(), 256))


class Shortcut:
    """Gives ``answer`` behind the first block, and notes what it is shown."""

    def __init__(self, answer=None):
        self.answer, self.shown, self.last = answer, None, None

    def recall(self, before, after):
        self.shown = before.clone(), after.clone()
        return self.answer

    def remember(self, last):
        self.last = last.clone()


def run_with(model, shortcut, observe=None):
    image, conditions, *moment = inputs(TINY, batch=2)
    return model(image, conditions, model.modulate(model.embed(*moment)), observe, shortcut=shortcut)


def test_a_shortcut_that_knows_nothing_changes_no_bit_and_sees_both_ends():
    model, shortcut = build(TINY), Shortcut()
    image, conditions, *moment = inputs(TINY, batch=2)
    modulations = model.modulate(model.embed(*moment))
    plain = model(image, conditions, modulations)
    assert torch.equal(run_with(model, shortcut), plain)
    before, after = shortcut.shown
    assert torch.equal(before, model.img_in(image))
    assert after.shape == before.shape
    assert not torch.equal(after, before)
    assert torch.equal(model.final_layer(shortcut.last, modulations.final), plain)


def test_what_a_shortcut_knows_stands_in_for_all_blocks_but_the_first():
    model, ran = build(TINY), []
    shortcut = Shortcut(answer=rows(2, 16, TINY.hidden, seed=4))
    _, _, *moment = inputs(TINY, batch=2)
    expected = model.final_layer(shortcut.answer, model.modulate(model.embed(*moment)).final)
    assert torch.equal(run_with(model, shortcut, ran.append), expected)
    assert ran == [0]
    assert shortcut.last is None
