"""What Foundry Mini can be asked, and the sentences that ask it, read back by a parser of the test's own."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from flux.mini.language import MAX_LETTERS, Request, Wanted, is_held_out, phrase, random_request, text_of

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
POSITIONS = ("left", "right", "top", "bottom", "center")
JOINTS = {" to the left of ": "left of", " to the right of ": "right of", " above ": "above", " below ": "below"}
NUMBERS = {"two": 2, "three": 3}


def requests(count, seed=0, **options):
    rng = random.Random(seed)
    return [random_request(rng, **options) for _ in range(count)]


def sentences(request, count=300, seed=0):
    """Many phrasings of one request."""
    rng = random.Random(seed)
    return {text_of(phrase(request, rng)) for _ in range(count)}


def read(sentence):
    """A sentence's meaning, found from its words alone."""
    text = sentence.removesuffix(".")
    text = text[0].lower() + text[1:]
    background = None
    if found := re.search(r"( on an?|,) (\w+) background$", text):
        text, background = text[: found.start()], found[2]
    if found := re.search(r'"(\w+)"', text):
        colour = re.search(r'" in (\w+)$|", (\w+)$', text)
        return Request(word=found[1], word_colour=(colour[1] or colour[2]) if colour else None, background=background)
    relation = next((joint for joint in JOINTS if joint in text), None)
    pieces: list[str] = []
    for piece in text.split(relation) if relation else re.split(r"; |, | and ", text):
        if any(shape in piece for shape in SHAPES):
            pieces.append(piece)
        else:  # what "red circle, left, large" says after its commas
            pieces[-1] += " " + piece
    return Request(tuple(map(read_object, pieces)), JOINTS.get(relation), background)


def read_object(piece):
    words = piece.split()
    (shape,) = [s for w in words for s in SHAPES if w in (s, s + "s", s + "es")]
    (colour,) = [w for w in words if w in COLOURS]
    sizes = [w for w in words if w in ("small", "large")]
    places = [w for w in words if w in POSITIONS]
    counts = [NUMBERS[w] for w in words if w in NUMBERS]
    assert max(len(sizes), len(places), len(counts)) <= 1
    return Wanted(shape, colour, (*sizes, None)[0], (*places, None)[0], (*counts, 1)[0])


ONE = Request((Wanted("circle", "red", "large", "left"),))
RELATED = Request((Wanted("square", "blue"), Wanted("circle", "red")), "right of")
SIGN = Request(word="OPEN", word_colour="red", background="white")


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (ONE, "a large red circle on the left"),
        (ONE, "red circle, left, large"),
        (ONE, "red circle, large, left"),
        (ONE, "On the left a large red circle"),
        (RELATED, "a blue square to the right of a red circle"),
        (replace(RELATED, relation="above"), "a blue square above a red circle"),
        (replace(RELATED, relation=None), "a blue square and a red circle"),
        (Request((Wanted("star", "green", count=2),)), "two green stars"),
        (Request((Wanted("cross", "green", "small", count=3),)), "three small green crosses"),
        (Request((Wanted("ring", "orange"),), background="orange"), "an orange ring on an orange background"),
        (SIGN, 'the word "OPEN" in red on a white background'),
        (SIGN, 'a sign that says "OPEN", red, white background'),
        (Request(word="A"), 'The letter "A".'),
    ],
)
def test_the_documented_sentences_are_among_the_phrasings(request_, sentence):
    assert sentence in sentences(request_, 3000)


def test_phrasing_reaches_every_word_of_the_vocabulary():
    rng = random.Random(0)
    said = " ".join(text_of(phrase(request, rng)) for request in requests(4000))
    words = set(re.findall(r"[a-z]+", said))
    plurals = {shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
    wanted = {*SHAPES, *plurals, *COLOURS, *POSITIONS, "small", "large", "one", "two", "three", "above", "below"}
    assert wanted <= words
    assert set(re.findall("[A-Z]", "".join(re.findall('"(.*?)"', said)))) == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    for colour in COLOURS:
        assert f"{colour} background" in said


def test_a_sentence_says_its_request_and_nothing_else():
    rng = random.Random(1)
    for request in requests(4000):
        sentence = text_of(phrase(request, rng))
        assert read(sentence) == request, sentence


def test_every_object_owns_the_words_that_speak_of_it():
    rng = random.Random(2)
    for request in requests(1000, sign_share=0.3):
        spans = phrase(request, rng)
        if request.word is not None:
            (own,) = [span.text for span in spans if span.owner == 0]
            assert own.startswith(f'"{request.word}"')
            assert request.word_colour is None or own.endswith(request.word_colour)
            continue
        assert [span.owner for span in spans if span.owner is not None] == list(range(len(request.objects)))
        for span in spans:
            if span.owner is not None:
                assert read(span.text).objects == (request.objects[span.owner],)
            else:
                assert not any(shape in span.text for shape in SHAPES)


def test_equal_seeds_give_equal_requests_and_sentences():
    def draw(seed):
        rng = random.Random(seed)
        drawn = [random_request(rng) for _ in range(200)]
        return drawn, [phrase(request, rng) for request in drawn]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_requests_are_drawable():
    for request in requests(3000):
        if request.word is not None:
            assert request.objects == ()
            assert re.fullmatch(f"[A-Z]{{1,{MAX_LETTERS}}}", request.word)
            assert request.background is None or request.background != request.word_colour
            continue
        assert 1 <= sum(o.count for o in request.objects) <= 3
        assert (request.relation is None) or len(request.objects) == 2
        assert request.background not in {o.colour for o in request.objects}
        assert len({(o.shape, o.colour) for o in request.objects}) == len(request.objects)
        places = [o.position for o in request.objects if o.position]
        assert len(set(places)) == len(places)
        assert all(o.count == 1 or o.position is None for o in request.objects)


def test_requests_vary_over_all_kinds():
    drawn = requests(3000)
    signs = sum(request.word is not None for request in drawn)
    assert 0.3 < signs / len(drawn) < 0.4
    assert {sum(o.count for o in request.objects) for request in drawn} == {0, 1, 2, 3}
    assert {request.relation for request in drawn} == {None, "left of", "right of", "above", "below"}
    assert {o.position for request in drawn for o in request.objects} == {None, *POSITIONS}
    assert {len(request.word) for request in drawn if request.word} == {1, 2, 3, 4, 5}
    assert {request.background for request in drawn} == {None, *COLOURS}


def test_sign_share_sets_how_many_requests_are_signs():
    assert all(request.word is None for request in requests(200, sign_share=0))
    assert all(request.word is not None for request in requests(200, sign_share=1))


def test_one_request_in_sixteen_is_held_out():
    rng = random.Random(3)
    words = ["".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(4)) for _ in range(8000)]
    share = sum(is_held_out(Request(word=word)) for word in words) / len(words)
    assert share == pytest.approx(1 / 16, abs=0.01)


def test_training_and_held_out_requests_have_no_sentence_in_common():
    rng = random.Random(4)
    training, held_out = requests(4000), requests(1000, held_out=True)
    assert not any(map(is_held_out, training))
    assert all(map(is_held_out, held_out))
    assert not set(training) & set(held_out)
    said = [{text_of(phrase(request, rng)).lower() for request in share} for share in (training, held_out)]
    assert not said[0] & said[1]


def test_wording_does_not_decide_what_is_held_out():
    for share in (False, True):
        for request in requests(40, seed=5, held_out=share):
            assert all(is_held_out(read(sentence)) == share for sentence in sentences(request, 20))


def test_neither_order_nor_colours_of_a_longer_word_decide_what_is_held_out():
    for request in requests(300, seed=6):
        if request.word is None:
            assert is_held_out(replace(request, objects=request.objects[::-1])) is False
        elif len(request.word) > 2:
            assert is_held_out(Request(word=request.word, word_colour="blue", background="black")) is False


def test_what_is_held_out_never_changes():
    """A model that ships was trained on one share: moving the border would put its training into evaluation."""
    words = "OPEN SHOP MOON SKY TAXI CITY HAT DOG CAT PIZZA".split()
    assert [w for w in words if is_held_out(Request(word=w))] == ["MOON", "SKY", "TAXI", "CITY", "HAT", "DOG"]
    kinds = [("circle", "red"), ("circle", "white"), ("square", "yellow"), ("star", "green"), ("star", "blue")]
    held_out = [kind for kind in kinds if is_held_out(Request((Wanted(*kind),)))]
    assert held_out == [("circle", "white"), ("square", "yellow"), ("star", "blue")]
