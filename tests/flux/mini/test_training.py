"""The trainers of the embedded model: every stage learns, repeats itself, and goes on where it was interrupted."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from flux.mini import __main__ as command
from flux.mini import build, train_autoencoder, train_flow, train_text
from flux.mini.build import STAGES, preview_factors
from flux.mini.dataset import LatentSet
from flux.mini.files import FOLDER, MiniFiles, open_mini
from flux.mini.labels import IGNORED, QUESTIONS
from flux.mini.language import Request, Span, Wanted, is_held_out
from flux.mini.train_autoencoder import AutoencoderRecipe, crops, pixels_from_bytes, psnr_on_fresh_scenes
from flux.mini.train_flow import Batches, FlowRecipe, SceneHead, initialise, train_base, train_guided, train_schnell
from flux.mini.train_text import TextRecipe, pooled_batch, prompt_with_answers, token_batch, train_text_encoders
from flux.models.autoencoder import Autoencoder
from flux.models.flux1 import Flux1
from flux.sampling.packing import pack
from flux.specs.autoencoder import MINI as MINI_AUTOENCODER
from flux.specs.flux1 import MINI, MINI_SCHNELL
from flux.specs.text import CLIP_MINI, T5_MINI
from flux.training import muon
from flux.training.checkpoints import load_checkpoint
from flux.training.flow import TextBatch, flow_targets, predict_velocity
from flux.weights.readers.tokenizer import read_clip_tokenizer, read_t5_tokenizer

# As in tests/oracles.py: tiny models are slower on several threads.
torch.set_num_threads(1)

TOKENIZER = FOLDER / "tokenizer.json"
FORMATS = [torch.float32, torch.bfloat16]
TINY = replace(MINI, context_width=12, pooled_width=10, hidden=32, axes=(4, 6, 6), double_blocks=1, single_blocks=2)
TINY_SCHNELL = replace(TINY, guidance_embedding=False)
TINY_AUTOENCODER = replace(MINI_AUTOENCODER, base_channels=8, channel_multipliers=(1, 1, 1, 1), norm_groups=2)
TINY_T5 = replace(T5_MINI, width=32, heads=2, head_width=16, mlp_width=32, layers=1)
TINY_CLIP = replace(CLIP_MINI, width=32, mlp_width=32, layers=1)
TRAINERS = (train_autoencoder, train_text, train_flow, muon)


class Interruption(Exception):  # noqa: N818 - not an error
    """What ends a run from outside."""


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Tiny models in one number format on every machine; the global random state is given back."""
    set_format(monkeypatch, torch.float32)
    monkeypatch.setattr(train_autoencoder, "MINI", TINY_AUTOENCODER)
    monkeypatch.setattr(train_autoencoder, "EVENING_BATCHES", 2)
    monkeypatch.setattr(train_text, "T5_MINI", TINY_T5)
    monkeypatch.setattr(train_text, "CLIP_MINI", TINY_CLIP)
    monkeypatch.setattr(train_flow, "MINI", TINY)
    monkeypatch.setattr(train_flow, "MINI_SCHNELL", TINY_SCHNELL)
    with torch.random.fork_rng():
        yield


def set_format(monkeypatch, dtype):
    for module in TRAINERS:
        monkeypatch.setattr(module, "fast_dtype", lambda device: dtype)


@contextmanager
def interruption(monkeypatch, owner, name, call):
    """Runs the block until a function is called for the given time, counted from 0, and stops it there."""
    original = getattr(owner, name)
    calls = iter(range(1_000_000))

    def counted(*args, **kwargs):
        if next(calls) == call:
            raise Interruption
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(Interruption):
            yield


def assert_equal_checkpoints(one, other):
    (tensors, meta), (others, other_meta) = load_checkpoint(one), load_checkpoint(other)
    assert meta == other_meta
    assert tensors.keys() == others.keys()
    different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not different


def assert_equal_models(one, other):
    for (name, mine), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


# The autoencoder


def run_autoencoder(path, joint=6, decoder=4, seed=0, report=lambda line: None, **numbers):
    recipe = AutoencoderRecipe(joint_steps=joint, decoder_steps=decoder, batch=4, crop=32, save_every=4, **numbers)
    return train_autoencoder.train_autoencoder(path, recipe, seed=seed, report=report)


def test_autoencoder_learns(tmp_path):
    numbers = {"learning_rate": 1e-2, "ema_decay": 0.5}
    untrained = psnr_on_fresh_scenes(run_autoencoder(tmp_path / "short.safetensors", 1, 0, **numbers), count=4)
    trained = psnr_on_fresh_scenes(run_autoencoder(tmp_path / "long.safetensors", 30, 10, **numbers), count=4)
    assert untrained + 1 < trained < 60


@pytest.mark.parametrize("dtype", FORMATS)
def test_autoencoder_trains_in_each_format_to_finite_fp32_weights(dtype, tmp_path, monkeypatch):
    set_format(monkeypatch, dtype)
    model = run_autoencoder(tmp_path / "ae.safetensors", 2, 1)
    assert not model.training
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert bool(parameter.isfinite().all())


def test_autoencoder_repeats_itself(tmp_path):
    one, same, other = (
        run_autoencoder(tmp_path / f"{name}.safetensors", 2, 1, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert_equal_models(one, same)
    assert not torch.equal(one.encoder.conv_in.weight, other.encoder.conv_in.weight)


def test_an_interrupted_autoencoder_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Interrupted in the first phase, between the two, and in the second."""
    whole = run_autoencoder(tmp_path / "whole.safetensors")
    lines = []
    for call in (5, 2, 3):
        with interruption(monkeypatch, train_autoencoder, "_loss", call):
            run_autoencoder(tmp_path / "broken.safetensors", report=lines.append)
    resumed = run_autoencoder(tmp_path / "broken.safetensors", report=lines.append)
    assert lines == [f"autoencoder: resumed at step {step}" for step in (4, 6, 8)]
    assert_equal_checkpoints(tmp_path / "whole.safetensors", tmp_path / "broken.safetensors")
    assert_equal_models(whole, resumed)


def test_the_second_phase_trains_the_decoder_alone(tmp_path):
    """Latents may be cached between the phases: what makes them must stay."""
    path = tmp_path / "ae.safetensors"
    run_autoencoder(path, 3, 0)
    first, _ = load_checkpoint(path)
    path.unlink()
    model = run_autoencoder(path, 3, 3)
    second, _ = load_checkpoint(path)
    encoder = [name for name in model.state_dict() if name.startswith("encoder.")]
    decoder = [name for name in model.state_dict() if name.startswith("decoder.")]
    for name in encoder:
        assert torch.equal(second[f"model.{name}"], second[f"average.{name}"])
        # The latents are evened out in the encoder's last layer; all before it is the first phase's average.
        assert torch.equal(second[f"model.{name}"], first[f"average.{name}"]) == ("conv_out" not in name)
    assert any(not torch.equal(second[f"average.{name}"], first[f"average.{name}"]) for name in decoder)


def test_the_posterior_has_the_noise_that_the_decoder_is_trained_to_forgive():
    model = Autoencoder(TINY_AUTOENCODER)
    train_autoencoder._fix_posterior(model)
    log_variance = model.encoder(torch.rand(1, 3, 32, 32)).chunk(2, dim=1)[1]
    deviation = (log_variance / 2).exp() * TINY_AUTOENCODER.scale
    torch.testing.assert_close(deviation, torch.full_like(deviation, 0.08))


def test_crops_are_pieces_of_scenes():
    batch = crops(random.Random(0), 5, 48)
    assert batch.shape == (5, 3, 48, 48)
    assert -1 <= float(batch.min()) < float(batch.max()) <= 1
    assert torch.equal(batch, crops(random.Random(0), 5, 48))
    assert not torch.equal(batch, crops(random.Random(1), 5, 48))


def test_bytes_become_pixels_from_minus_one_to_one():
    image = torch.tensor([[[0, 255, 51]]], dtype=torch.uint8).numpy()
    assert pixels_from_bytes(image).flatten().tolist() == pytest.approx([-1, 1, -0.6])


def test_psnr_is_that_of_the_error_in_bytes():
    """An autoencoder that is 5 of 255 too bright everywhere."""
    brighter = SimpleNamespace(encode=lambda pixels: pixels, decode=lambda latents: latents + 2 * 5 / 255)
    assert psnr_on_fresh_scenes(brighter, count=3) == pytest.approx(34.15, abs=0.01)


def test_preview_factors_are_the_linear_map_to_mean_colours(monkeypatch):
    monkeypatch.setattr(build, "PREVIEW_SCENES", 4)
    to_latent = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))

    def encode(pixels):
        return torch.einsum("bchw,cd->bdhw", F.avg_pool2d(pixels, 8), to_latent) + 0.5

    found = preview_factors(SimpleNamespace(encode=encode, spec=SimpleNamespace(downscale=8)))
    factors, bias = torch.tensor(found["factors"]), torch.tensor(found["bias"])
    assert factors.shape == (16, 3)
    colours = torch.rand(10, 3) * 2 - 1
    torch.testing.assert_close((colours @ to_latent + 0.5) @ factors + bias, colours, rtol=1e-3, atol=1e-3)


# The text encoders


@pytest.fixture
def run_text(tmp_path):
    """Trains from a checkpoint of the given name, or of a new one each time."""
    names = itertools.count()

    def run(steps, seed=0, report=lambda line: None, name=None, **recipe):
        checkpoint = tmp_path / f"{name or next(names)}.safetensors"
        return train_text_encoders(
            checkpoint, TOKENIZER, TextRecipe(steps=steps, batch=8, **recipe), seed=seed, report=report
        )

    return run


def test_text_encoders_learn(run_text):
    lines = []
    run_text(100, report=lines.append)
    losses = [float(re.search(r"loss ([\d.]+);", line)[1]) for line in lines]
    assert len(losses) == 2
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("dtype", FORMATS)
def test_text_encoders_train_in_each_format_to_finite_fp32_weights(dtype, monkeypatch, run_text):
    set_format(monkeypatch, dtype)
    for model in run_text(2):
        assert not model.training
        for parameter in model.parameters():
            assert parameter.dtype == torch.float32
            assert bool(parameter.isfinite().all())


def test_text_encoders_repeat_themselves(run_text):
    first = run_text(3)
    torch.rand(5)
    for one, same, other in zip(first, run_text(3), run_text(3, seed=1), strict=True):
        assert_equal_models(one, same)
        assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_text_encoders_that_were_interrupted_end_as_if_they_had_not_been(run_text, monkeypatch):
    whole, told = run_text(6), []
    original = train_text.pooled_batch
    calls = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(train_text, "pooled_batch", lambda r: original(r) if next(calls) < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_text(6, name="broken", save_every=2)
    resumed = run_text(6, name="broken", report=told.append)
    assert told[0] == "text: resumed at step 4"
    for one, other in zip(whole, resumed, strict=True):
        assert_equal_models(one, other)


def test_text_encoders_never_see_a_request_that_is_held_out():
    rng = random.Random(0)
    assert not any(is_held_out(prompt_with_answers(rng)[0]) for _ in range(1000))


def answers_by_token(request, spans):
    """What each token of a prompt is to answer, zeros left out."""
    tokenizer = read_t5_tokenizer(TOKENIZER, T5_MINI)
    ids, answers = token_batch([(request, spans)], tokenizer)
    used = int((ids[0] != 0).sum())
    for values in answers.values():
        assert bool((values[0, used:] == -100).all())
    told = [{q: int(v[0, i]) for q, v in answers.items() if int(v[0, i]) not in (0, -100)} for i in range(used)]
    return [tokenizer.token(int(i)) for i in ids[0, :used]], told, answers


def test_tokens_answer_for_the_object_that_they_belong_to():
    request = Request((Wanted("circle", "red", "large", "left"), Wanted("star", "blue", count=2)), None, "white")
    spans = [Span("a large red circle on the left", 0), Span(" and "), Span("two blue stars", 1)]
    spans.append(Span(" on a white background"))
    tokens, told, answers = answers_by_token(request, spans)
    shared = {"background": 8, "things": 3}
    circle = shared | {"colour": 1, "shape": 1, "size": 2, "position": 1, "count": 1}
    stars = shared | {"colour": 3, "shape": 4, "count": 2, "index": 1}
    expected = dict.fromkeys("▁a ▁large ▁red ▁circle ▁on ▁the ▁left".split(), circle)
    expected |= dict.fromkeys(("▁two", "▁blue", "▁stars"), stars) | {"▁and": shared, "</s>": shared}
    for token, answer in list(zip(tokens, told, strict=True))[:11]:
        assert answer == expected[token], token
    assert told[-1] == shared
    # Tokens of no object are not asked about objects.
    assert answers["colour"][0, tokens.index("▁and")] == -100


def test_related_objects_know_their_side():
    request = Request((Wanted("square", "blue"), Wanted("circle", "red")), "above")
    spans = [Span("a blue square", 0), Span(" above "), Span("a red circle", 1)]
    tokens, told, _ = answers_by_token(request, spans)
    assert tokens[:7] == "▁a ▁blue ▁square ▁above ▁a ▁red ▁circle".split()
    assert [answer.get("relation", 0) for answer in told[:7]] == [3, 3, 3, 0, 7, 7, 7]


@pytest.mark.parametrize("lead", ["the word ", "A sign that says ", ""])
def test_letters_know_which_they_are_and_where(lead):
    request = Request(word="BOB", word_colour="green")
    spans = [Span(lead), Span('"BOB" in green', 0)] if lead else [Span('"BOB" in green', 0)]
    tokens, told, _ = answers_by_token(request, spans)
    letters = [(t, a["letter"], a["place"]) for t, a in zip(tokens, told, strict=True) if "letter" in a]
    assert letters == [("B", 2, 1), ("O", 15, 2), ("B", 2, 3)]
    assert all(answer["length"] == 3 for answer in told)
    assert all(told[tokens.index(t)]["colour"] == 2 for t in ("B", "O", "▁green"))


def test_the_pooled_vector_answers_for_the_whole_prompt():
    requests = [
        Request((Wanted("circle", "red"), Wanted("star", "white", count=2)), None, "black"),
        Request(word="CAT", word_colour="orange"),
    ]
    answers, kinds = pooled_batch(requests)
    assert answers["background"].tolist() == [7, 0]
    assert answers["things"].tolist() == [3, 0]
    assert answers["length"].tolist() == [0, 3]
    assert answers["word colour"].tolist() == [0, 5]
    assert [answers[f"letter {i}"].tolist() for i in range(5)] == [[0, 3], [0, 1], [0, 20], [0, 0], [0, 0]]
    assert kinds[0].nonzero().flatten().tolist() == [0, 7 * 6 + 3]
    assert not kinds[1].any()


# The transformers


class FakeEncoders:
    """Encodes a prompt to normal numbers that are its own."""

    def __init__(self):
        self.prompts = []

    def encode(self, prompts):
        self.prompts.append(prompts)
        generators = [torch.Generator().manual_seed(sum(map(ord, prompt)) + len(prompt)) for prompt in prompts]
        tokens = torch.stack([torch.randn(5, TINY.context_width, generator=g) for g in generators])
        return TextBatch(tokens, torch.stack([torch.randn(TINY.pooled_width, generator=g) for g in generators]))


def latent_set(per_size=4):
    """A few latents of two sizes, each with a word of its own."""
    sizes = {(128, 128): (4, 4), (96, 128): (6, 4)}
    generator = torch.Generator().manual_seed(1)
    latents = {canvas: torch.randn(per_size, 16, *size, generator=generator).half() for canvas, size in sizes.items()}
    words = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    requests = {canvas: [Request(word=next(words)) for _ in range(per_size)] for canvas in sizes}
    labels = {}
    for canvas, (height, width) in sizes.items():
        shape = (per_size, height * width // 4)
        drawn = [torch.randint(size, shape, generator=generator) for size in QUESTIONS.values()]
        labels[canvas] = torch.stack(drawn, dim=-1).to(torch.uint8)
        labels[canvas][:, 0, 1:] = IGNORED
    return LatentSet(latents, requests, labels)


def base_model():
    """A teacher: random, but one whose output depends on text and time."""
    torch.manual_seed(3)
    return Flux1(TINY).eval()


def recipe(steps, learning_rate=2e-2, save_every=4):
    return FlowRecipe(steps=steps, decay=4, batch=4, learning_rate=learning_rate, save_every=save_every)


def run_base(folder, steps=10, seed=0, report=lambda line: None, data=None, **options):
    return train_base(
        folder, data or latent_set(), FakeEncoders(), recipe(steps, **options), seed=seed, device="cpu", report=report
    )


def run_guided(folder, steps=10, seed=0, report=lambda line: None, data=None, **options):
    return train_guided(
        folder, base_model(), data or latent_set(), FakeEncoders(), recipe(steps, **options),
        seed=seed, device="cpu", report=report,
    )  # fmt: skip


def run_schnell(folder, steps=10, seed=0, report=lambda line: None, data=None, **options):
    return train_schnell(
        folder, base_model(), data or latent_set(), FakeEncoders(), recipe(steps, **options),
        seed=seed, device="cpu", report=report,
    )  # fmt: skip


RUNS = {"base": run_base, "guided": run_guided, "schnell": run_schnell}


@torch.no_grad()
def velocity(model, noisy, time, text, guidance=None):
    count = len(noisy)
    strength = None if guidance is None else torch.full((count,), float(guidance))
    return predict_velocity(model, noisy, torch.full((count,), float(time)), text, strength)


def probe(count=4):
    """A batch to judge by: latents, their text, and noise."""
    data = latent_set(count)
    text = FakeEncoders().encode([f'the word "{request.word}"' for request in data.requests[128, 128]])
    latents = data.latents[128, 128].float()
    return latents, text, torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))


def test_base_learns_the_velocity_from_data_to_noise(tmp_path):
    latents, text, noise = probe()
    torch.manual_seed(0)
    start = Flux1(TINY)
    initialise(start)
    errors = []
    for model in (start, run_base(tmp_path, 40)):
        noisy, target = flow_targets(latents, noise, torch.full((4,), 0.6))
        errors.append(float(F.mse_loss(velocity(model, noisy, 0.6, text), pack(target))))
    assert errors[1] < 0.9 * errors[0]


def test_base_learns_what_lies_where(tmp_path):
    """The head reads the tapped block; trained, it knows the labels of what it has seen."""
    data = latent_set()
    latents, text, noise = probe()
    losses = []
    for steps in (1, 60):
        model = run_base(tmp_path / str(steps), steps)
        head = SceneHead(TINY.hidden)
        tensors, _ = load_checkpoint(tmp_path / str(steps) / "base.safetensors")
        head.load_state_dict({k.removeprefix("helper."): v for k, v in tensors.items() if k.startswith("helper.")})
        seen = []
        with torch.no_grad(), model.single_blocks[1].register_forward_hook(lambda _m, _i, out, to=seen: to.append(out)):
            velocity(model, flow_targets(latents, noise, torch.full((4,), 0.3))[0], 0.3, text)
            losses.append(float(head.loss(seen[0][:, text.tokens.shape[1] :], data.labels[128, 128])))
    assert losses[1] < 0.9 * losses[0]


def test_the_base_model_comes_back_without_what_watched_its_training(tmp_path):
    model = run_base(tmp_path, 1)
    assert not any(module._forward_hooks for module in model.modules())
    assert set(model.state_dict()) == set(Flux1(TINY).state_dict())


def test_the_head_asks_every_question_where_it_has_an_answer():
    torch.manual_seed(0)
    head = SceneHead(TINY.hidden)
    hidden = torch.randn(2, 3, TINY.hidden)
    labels = torch.full((2, 3, len(QUESTIONS)), IGNORED, dtype=torch.uint8)
    for question, size in enumerate(QUESTIONS.values()):
        labels[0, 1, question] = size - 1
    logits = head.answers(head.norm(hidden))[0, 1].split(tuple(QUESTIONS.values()))
    expected = torch.stack([-each.log_softmax(0)[-1] for each in logits]).mean()
    torch.testing.assert_close(head.loss(hidden, labels), expected)


def test_guided_learns_what_guidance_gives_in_two_passes(tmp_path):
    latents, text, noise = probe()
    empty = FakeEncoders().encode([""])
    empty = TextBatch(empty.tokens.expand(4, -1, -1), empty.pooled.expand(4, -1))
    base, student = base_model(), run_guided(tmp_path, 400, learning_rate=1e-2)
    time = torch.tensor(train_flow.TIME_MEAN).sigmoid().item()  # the median of the times that training draws
    noisy, _ = flow_targets(latents, noise, torch.full((4,), time))
    before, after = 0.0, 0.0
    for strength in (1.0, 3.5, 6.0):
        positive, negative = velocity(base, noisy, time, text), velocity(base, noisy, time, empty)
        target = negative + strength * (positive - negative)
        before += float(F.mse_loss(velocity(base, noisy, time, text, strength), target))
        after += float(F.mse_loss(velocity(student, noisy, time, text, strength), target))
    assert after < 0.7 * before


def test_schnell_learns_to_take_the_teachers_substeps_at_once(tmp_path):
    latents, text, noise = probe()
    guided, student = base_model(), run_schnell(tmp_path, 40, learning_rate=1e-2)
    y = pack(noise)
    for k in range(4):  # from time 1 to 3/4
        time = 1 - k / 16
        y = y - velocity(guided, unpacked(y), time, text, 3.0) / 16
    target = (pack(noise) - y) * 4
    untrained = Flux1(TINY_SCHNELL)
    untrained.load_state_dict({k: v for k, v in guided.state_dict().items() if "guidance_in" not in k})
    before = float(F.mse_loss(velocity(untrained, noise, 1.0, text), target))
    after = float(F.mse_loss(velocity(student, noise, 1.0, text), target))
    assert after < 0.7 * before


class Velocities:
    """Stands before ``predict_velocity`` and keeps what it was asked."""

    def __init__(self):
        self.times, self.tokens, self.guidance = [], [], []

    def __call__(self, model, noisy, times, text, guidance=None):
        self.times.append(times)
        self.tokens.append(text.tokens)
        self.guidance.append(guidance)
        return predict_velocity(model, noisy, times, text, guidance)


@pytest.fixture
def asked(monkeypatch):
    velocities = Velocities()
    monkeypatch.setattr(train_flow, "predict_velocity", velocities)
    return velocities


def test_base_drops_one_prompt_in_ten_and_knows_no_guidance(tmp_path, asked):
    run_base(tmp_path, 100)
    empty = FakeEncoders().encode([""]).tokens[0]
    dropped = sum(bool(torch.equal(row, empty)) for tokens in asked.tokens for row in tokens)
    assert 20 < dropped < 65  # of 400
    assert asked.guidance == [None] * 100


def test_guided_teaches_many_strengths_with_a_teacher_that_has_none(tmp_path, asked):
    run_guided(tmp_path, 40)
    assert asked.guidance[0::2] == [None] * 40
    strengths = torch.cat(asked.guidance[1::2])
    assert 1 <= float(strengths.min()) < 1.5
    assert 5.5 < float(strengths.max()) <= 6
    empty = FakeEncoders().encode([""]).tokens
    for teacher, student in zip(asked.times[0::2], asked.times[1::2], strict=True):
        assert torch.equal(teacher, student.repeat(2))
    for teacher, student in zip(asked.tokens[0::2], asked.tokens[1::2], strict=True):
        assert torch.equal(teacher[: len(student)], student)
        assert torch.equal(teacher[len(student) :], empty.expand_as(student))


def test_schnell_walks_to_each_of_its_four_steps(tmp_path, asked):
    run_schnell(tmp_path, 40)
    students = [float(t[0]) for t, g in zip(asked.times, asked.guidance, strict=True) if g is None]
    teachers = [(float(t[0]), float(g[0])) for t, g in zip(asked.times, asked.guidance, strict=True) if g is not None]
    assert set(students) == {1.0, 0.75, 0.5, 0.25}
    assert {time for time, _ in teachers} == {1 - k / 16 for k in range(16)}
    assert {strength for _, strength in teachers} == {3.0}
    assert len(teachers) == 4 * 40


def unpacked(tokens):
    """Tokens of a 4x4 latent back to it."""
    return tokens.view(-1, 2, 2, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 16, 4, 4)


def test_schnell_has_no_guidance_input(tmp_path):
    model = run_schnell(tmp_path, 1)
    assert model.guidance_in is None
    assert model.spec == TINY_SCHNELL


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("stage", RUNS)
def test_transformers_train_in_each_format_to_finite_fp32_weights(stage, dtype, tmp_path, monkeypatch):
    set_format(monkeypatch, dtype)
    model = RUNS[stage](tmp_path, 3)
    assert not model.training
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert bool(parameter.isfinite().all())


@pytest.mark.parametrize("stage", RUNS)
def test_transformers_repeat_themselves(stage, tmp_path):
    one, same, other = (RUNS[stage](tmp_path / name, 3, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert_equal_models(one, same)
    assert not torch.equal(one.img_in.weight, other.img_in.weight)


@pytest.mark.parametrize("stage", RUNS)
def test_an_interrupted_transformer_goes_on_bit_for_bit(stage, tmp_path, monkeypatch):
    whole = RUNS[stage](tmp_path / "whole")
    with interruption(monkeypatch, Batches, "labelled_at", 6):
        RUNS[stage](tmp_path / "broken")
    lines = []
    torch.manual_seed(99)
    resumed = RUNS[stage](tmp_path / "broken", report=lines.append)
    assert lines[0] == f"{stage}: resumed at step 4"
    assert_equal_checkpoints(tmp_path / "whole" / f"{stage}.safetensors", tmp_path / "broken" / f"{stage}.safetensors")
    assert_equal_models(whole, resumed)


@pytest.mark.parametrize("stage", RUNS)
def test_a_finished_stage_is_taken_from_its_checkpoint(stage, tmp_path, monkeypatch):
    finished = RUNS[stage](tmp_path, 3)
    monkeypatch.setattr(Batches, "labelled_at", None)
    assert_equal_models(finished, RUNS[stage](tmp_path, 3))


def test_the_returned_weights_are_the_averaged_ones(tmp_path):
    model = run_base(tmp_path, 5)
    tensors, meta = load_checkpoint(tmp_path / "base.safetensors")
    assert meta == {"step": 5, "stage": "base", "updates": 5}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[f"average.{name}"])
    assert not torch.equal(tensors["model.img_in.weight"], tensors["average.img_in.weight"])


def test_teachers_stay_as_they_are(tmp_path):
    teacher = base_model()
    train_guided(
        tmp_path, teacher, latent_set(), FakeEncoders(), recipe(3), seed=0, device="cpu", report=lambda line: None
    )
    assert_equal_models(teacher, base_model())


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(tmp_path):
    run_base(tmp_path, 4)
    before = (tmp_path / "base.safetensors").read_bytes()
    broken = latent_set()
    for latents in broken.latents.values():
        latents.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="base: the loss is nan at step 4; lower the learning rate"):
        run_base(tmp_path, 8, data=broken)
    assert (tmp_path / "base.safetensors").read_bytes() == before


def test_progress_is_reported(tmp_path):
    lines = []
    run_base(tmp_path, 20, report=lines.append)
    assert len(lines) == 1
    assert re.fullmatch(r"base 20/20: loss \d\.\d{4}, \d+ samples/s", lines[0])


@pytest.mark.parametrize("guidance", [None, 4.0])
def test_an_initialised_transformer_predicts_nothing_yet(guidance):
    model = Flux1(TINY)
    initialise(model)
    latents, text, noise = probe()
    assert not velocity(model, noise, 0.5, text, guidance).any()


def test_guidance_has_no_part_before_it_is_trained():
    model = base_model()
    initialise(model)
    _, text, _ = probe()
    times = torch.full((4,), 0.5)
    with torch.no_grad():
        without, with_it = (model.embed(times, text.pooled, g) for g in (None, torch.full((4,), 4.0)))
    assert torch.equal(without, with_it)


def test_muon_takes_the_blocks_matrices_and_leaves_the_rest_to_adamw():
    with torch.device("meta"):
        model = Flux1(MINI)
    taken = {name for name, p in model.named_parameters() if train_flow._is_matrix(name, p)}
    assert taken == {
        f"double_blocks.0.{stream}_{part}.weight"
        for stream in ("img", "txt")
        for part in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    } | {f"single_blocks.{i}.linear{n}.weight" for i in range(MINI.single_blocks) for n in (1, 2)}


def test_batches_pair_latents_with_prompts_that_ask_for_them():
    data, encoders = latent_set(), FakeEncoders()
    batches = Batches(data, encoders, 6, "test")
    assert encoders.prompts == [[""]]
    others = 0
    for step in range(300):
        latents, text, labels, _ = batches.labelled_at(step)
        prompts = encoders.prompts[-1]
        assert latents.dtype == torch.float32
        assert len(latents) == len(prompts) == len(text.tokens) == 6
        canvas = next(c for c in data.latents if data.latents[c].shape[1:] == latents.shape[1:])
        words = [request.word for request in data.requests[canvas]]
        asked = [words.index(re.search('"(.)"', prompt)[1]) for prompt in prompts]
        assert torch.equal(latents, data.latents[canvas][asked].float())
        assert torch.equal(labels, data.labels[canvas][asked])
        others += canvas != (128, 128)
    assert 75 < others < 135  # of 300, at a share of 0.35


def test_scenes_with_more_objects_are_drawn_more_often():
    data, encoders = latent_set(), FakeEncoders()
    crowd = Request(objects=(Wanted("star", "red", count=3),))
    data.requests[128, 128][2] = crowd
    batches = Batches(data, encoders, 6, "test")
    drawn = 0
    for step in range(300):
        latents, *_ = batches.labelled_at(step)
        if latents.shape[1:] == (16, 4, 4):
            drawn += sum("three red stars" in prompt.lower() for prompt in encoders.prompts[-1])
    share = drawn / (300 * 6 * (1 - train_flow.OTHER_SIZES_SHARE))
    assert share == pytest.approx(2 / 5, abs=0.05)  # 2 against three signs of 1


def test_a_batch_is_a_function_of_seed_and_step():
    def batch(seed, step):
        encoders = FakeEncoders()
        batches = Batches(latent_set(), encoders, 6, seed)
        latents, _, rng = batches.at(step)
        return latents.tolist(), encoders.prompts[-1], rng.random()

    assert batch("a", 5) == batch("a", 5)
    assert batch("a", 5) != batch("a", 6)
    assert batch("a", 5) != batch("b", 5)


def test_the_empty_prompt_is_repeated_for_a_batch():
    batches = Batches(latent_set(), FakeEncoders(), 2, "test")
    empty = batches.empty_batch(3)
    alone = FakeEncoders().encode([""])
    assert torch.equal(empty.tokens, alone.tokens.expand(3, -1, -1))
    assert torch.equal(empty.pooled, alone.pooled.expand(3, -1))


def test_encoders_give_each_prompt_its_tokens_and_its_vector(run_text):
    t5, clip = run_text(1)
    encoders = train_flow.FrozenEncoders(
        t5, clip, read_t5_tokenizer(TOKENIZER, T5_MINI), read_clip_tokenizer(TOKENIZER, CLIP_MINI)
    )
    prompts = ["a red circle", "", 'the word "OPEN" in red']
    batch = encoders.encode(prompts)
    assert batch.tokens.shape == (3, T5_MINI.length, TINY_T5.width)
    assert batch.pooled.shape == (3, TINY_CLIP.width)
    assert batch.tokens.dtype == batch.pooled.dtype == torch.float32
    assert not batch.tokens.requires_grad
    for index, prompt in enumerate(prompts):
        alone = encoders.encode([prompt])
        torch.testing.assert_close(batch.tokens[index], alone.tokens[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch.pooled[index], alone.pooled[0], rtol=1e-4, atol=1e-5)


# The whole build


@pytest.fixture
def short_build(tmp_path, monkeypatch):
    """The shipped model's own sizes, a step for each stage, and a folder in place of the pack's weights."""
    monkeypatch.setattr(train_autoencoder, "MINI", MINI_AUTOENCODER)
    monkeypatch.setattr(train_text, "T5_MINI", T5_MINI)
    monkeypatch.setattr(train_text, "CLIP_MINI", CLIP_MINI)
    monkeypatch.setattr(train_flow, "MINI", MINI)
    monkeypatch.setattr(train_flow, "MINI_SCHNELL", MINI_SCHNELL)
    stage = {"steps": 1, "decay": 1, "batch": 2, "learning_rate": 1e-3}
    short = {
        "FOLDER": tmp_path / "weights",
        "AUTOENCODER": AutoencoderRecipe(joint_steps=1, decoder_steps=1, batch=2, crop=32),
        "TEXT": TextRecipe(steps=1, batch=2),
        "NATIVE_SCENES": 2,
        "OTHER_SCENES": 1,
        "BASE": stage,
        "GUIDED": stage,
        "SCHNELL": stage,
        "PREVIEW_SCENES": 2,
        "psnr_on_fresh_scenes": functools.partial(psnr_on_fresh_scenes, count=1),
    }
    for name, value in short.items():
        monkeypatch.setattr(build, name, value)
    return tmp_path


def test_a_whole_build_installs_files_that_open(short_build, capsys):
    folder, target = short_build / "checkpoints", short_build / "weights"
    assert command.main(["--folder", str(folder)]) == 0
    said = capsys.readouterr().out
    assert [stage for stage in STAGES if f"{stage}: done in" in said] == list(STAGES)
    # Each stage is taken from its checkpoint when it is run again.
    assert command.main(["--folder", str(folder), "--stage", "guided", "--stage", "text"]) == 0
    assert "guided: resumed at step 1" in capsys.readouterr().out

    lines = []
    build.Builder(folder, 0, "cpu", compiled=False, report=lines.append).install(target)
    expected = {
        "ae": torch.float16,
        "clip": torch.bfloat16,
        "t5": torch.bfloat16,
        "flux1-mini": torch.bfloat16,
        "flux1-mini-schnell": torch.bfloat16,
    }
    files = {name: target / f"{name}.safetensors" for name in expected}
    assert {path.name for path in target.iterdir()} == {*(path.name for path in files.values()), "tokenizer.json"}
    assert len(lines) == len(expected)
    for name, dtype in expected.items():
        assert {tensor.dtype for tensor in load_file(files[name]).values()} == {dtype}
        assert files[name].stat().st_mode & 0o777 == 0o644
        with safe_open(files[name], "pt") as file:
            assert file.metadata()["license"] == "Apache-2.0"
    with safe_open(files["ae"], "pt") as file:
        preview = json.loads(file.metadata()["preview"])
    assert (len(preview["factors"]), len(preview["bias"])) == (16, 3)
    averaged, _ = load_checkpoint(folder / "guided.safetensors")
    shipped = load_file(files["flux1-mini"])
    assert all(torch.equal(shipped[k], averaged[f"average.{k}"].bfloat16()) for k in shipped)

    for name, spec in (("flux1-mini", MINI), ("flux1-mini-schnell", MINI_SCHNELL)):
        shared = {kind: files[kind] for kind in ("clip", "t5")}
        opened = open_mini(
            MiniFiles(files[name], autoencoder=files["ae"], tokenizer=target / "tokenizer.json", **shared)
        )
        assert opened.transformer.spec == spec
        assert opened.autoencoder.spec == MINI_AUTOENCODER
        with opened.transformer.resident() as transformer:
            assert all(bool(parameter.isfinite().all()) for parameter in transformer.parameters())


def test_a_stage_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--stage", "dessert"])
    assert "autoencoder" in capsys.readouterr().err
