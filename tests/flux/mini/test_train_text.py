"""The text encoders' trainer learns, repeats itself, and goes on where it was interrupted."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch

from flux.mini import train_flow, train_text
from flux.mini.language import Request, Span, Wanted, is_held_out
from flux.mini.train_text import pooled_batch, prompt_with_answers, token_batch
from flux.specs.text import CLIP_MINI, T5_MINI
from flux.weights.readers.tokenizer import read_clip_tokenizer, read_t5_tokenizer
from tests.training import (
    FORMATS,
    TINY_CLIP,
    TINY_T5,
    TOKENIZER,
    assert_equal_models,
    set_format,
)

pytestmark = pytest.mark.usefixtures("tiny")


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
