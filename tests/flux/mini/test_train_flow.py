"""The transformers' trainers: every stage learns, repeats itself, and goes on where it was interrupted."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional as F

from flux.mini import loop, train_flow
from flux.mini.dataset import LatentSet
from flux.mini.labels import IGNORED, QUESTIONS
from flux.mini.language import Request, Wanted
from flux.mini.train_flow import Batches, FlowRecipe, SceneHead, initialise, train_base, train_guided, train_schnell
from flux.models.flux1 import Flux1
from flux.sampling.packing import pack
from flux.specs.flux1 import MINI
from flux.training.checkpoints import load_checkpoint
from flux.training.flow import TextBatch, flow_targets, predict_velocity
from tests.training import (
    FORMATS,
    TINY,
    TINY_SCHNELL,
    assert_equal_checkpoints,
    assert_equal_models,
    interruption,
    set_format,
)

pytestmark = pytest.mark.usefixtures("tiny")


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
    for model in (start, run_base(tmp_path, 400)):
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
    taken = {name for name, p in model.named_parameters() if loop._is_matrix(name, p)}
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
    assert 190 < others < 255  # of 300, at a share of 0.75


def test_scenes_with_more_objects_are_drawn_more_often():
    data, encoders = latent_set(), FakeEncoders()
    crowd, lone = (Request(objects=(Wanted("star", "red", count=count),)) for count in (3, 1))
    data.requests[128, 128][:] = [lone, lone, crowd, lone]
    batches = Batches(data, encoders, 6, "test")
    drawn = 0
    for step in range(300):
        latents, *_ = batches.labelled_at(step)
        if latents.shape[1:] == (16, 4, 4):
            drawn += sum("three red stars" in prompt.lower() for prompt in encoders.prompts[-1])
    share = drawn / (300 * 6 * (1 - train_flow.OTHER_SIZES_SHARE))
    assert share == pytest.approx(2 / 6.5, abs=0.05)  # 2 against three of 1.5


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
    empty = batches.empty.repeated(3)
    alone = FakeEncoders().encode([""])
    assert torch.equal(empty.tokens, alone.tokens.expand(3, -1, -1))
    assert torch.equal(empty.pooled, alone.pooled.expand(3, -1))
