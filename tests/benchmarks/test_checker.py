"""The checker accepts what was asked for and names what differs, on clean pictures and on worn ones."""

from __future__ import annotations

import random
from dataclasses import replace

import cv2
import numpy as np
import pytest

from benchmarks.checker import Tally, check, find_blobs, read_word
from flux.mini.language import COLOURS, LETTERS, POSITIONS, RELATIONS, SHAPES, SIZES, Request, Wanted, random_request
from flux.mini.scenes import PALETTE, Item, Scene, Sign, draw, lay_out, shape_mask, word_mask

CANVASES = ((128, 128), (96, 96), (128, 96), (192, 128))  # width, height
PICTURES = 400
CHANGES = 40  # pictures for each attribute, every other one worn
LEAST = 0.99  # of the worn pictures are accepted (1,200 give 99.7 %, and fewer leave room for chance); all clean ones
RED_CIRCLE = Request(objects=(Wanted("circle", "red"),))


def laid_out(seed, sign_share=0.35):
    """A request, of training's and of evaluation's share in turn, and a scene that shows it exactly."""
    rng = random.Random(seed)
    width, height = CANVASES[seed % len(CANVASES)]
    request = random_request(rng, sign_share=sign_share, held_out=seed // len(CANVASES) % 2 == 1)
    return request, lay_out(request, rng, width, height)


def worn(image, seed):
    """Blur, noise and JPEG with halved colour resolution: about 25 to 33 dB."""
    noise = np.random.default_rng(seed).normal(0, 6, image.shape)
    soft = np.clip(cv2.GaussianBlur(image, (0, 0), 0.7) + noise, 0, 255).astype(np.uint8)
    return cv2.imdecode(cv2.imencode(".jpg", soft, [cv2.IMWRITE_JPEG_QUALITY, 75])[1], cv2.IMREAD_COLOR)


def with_object(request, rng, **change):
    index = change.pop("index", None)
    index = rng.randrange(len(request.objects)) if index is None else index
    objects = list(request.objects)
    objects[index] = replace(objects[index], **{k: v(objects[index]) for k, v in change.items()})
    return replace(request, objects=tuple(objects))


def other(rng, values, *taken):
    return rng.choice([value for value in values if value not in taken])


def change(request, attribute, rng):
    """The request with one attribute changed, or None where it does not name the attribute."""
    if request.word is not None:
        if attribute == "word":
            at = rng.randrange(len(request.word))
            letter = other(rng, LETTERS, request.word[at])
            return replace(request, word=request.word[:at] + letter + request.word[at + 1 :])
        if attribute == "colour" and request.word_colour:
            return replace(request, word_colour=other(rng, COLOURS, request.word_colour))
        if attribute == "background" and request.background:
            return replace(request, background=other(rng, COLOURS, request.background))
        return None
    if attribute == "colour":
        return with_object(request, rng, colour=lambda o: other(rng, COLOURS, o.colour))
    if attribute == "shape":
        return with_object(request, rng, shape=lambda o: other(rng, SHAPES, o.shape))
    if attribute == "background" and request.background:
        return replace(request, background=other(rng, COLOURS, request.background))
    if attribute == "relation" and request.relation:
        return replace(request, relation=other(rng, RELATIONS, request.relation))
    if attribute == "count":
        shown = sum(o.count for o in request.objects)
        return with_object(request, rng, count=lambda o: o.count + (1 if shown < 3 or o.count == 1 else -1))
    named = [i for i, o in enumerate(request.objects) if getattr(o, attribute, None)]
    if not named:
        return None
    index = rng.choice(named)
    values = {"position": POSITIONS, "size": SIZES}.get(attribute, ())
    return with_object(request, rng, index=index, **{attribute: lambda o: other(rng, values, getattr(o, attribute))})


def flagged(verdict, attribute):
    if attribute == "word":
        return not verdict.word_right
    right, asked = getattr(verdict, "position" if attribute == "relation" else attribute)
    return right < asked


def changed_pictures(attribute, number):
    """Seed, picture of one request, and another request that differs in the attribute alone."""
    for seed in range(100_000):
        rng = random.Random(-1 - seed)
        request, scene = laid_out(seed, sign_share=1.0 if attribute == "word" else 0.2)
        wrong = change(request, attribute, rng)
        if wrong is not None:
            yield seed, draw(scene), wrong
            number -= 1
        if not number:
            return


def test_accepts_pictures_that_show_what_was_asked():
    refused = {"clean": [], "worn": []}
    tally = Tally()
    for seed in range(PICTURES):
        request, scene = laid_out(seed)
        image = draw(scene)
        for state, picture in (("clean", image), ("worn", worn(image, seed))):
            verdict = check(picture, request)
            tally.add(verdict, request)
            if not verdict.all_right:
                refused[state].append((seed, verdict.faults))
    assert refused["clean"] == []
    assert len(refused["worn"]) <= (1 - LEAST) * PICTURES, refused["worn"]
    assert tally.rates()["all asked"] == 2 * PICTURES


@pytest.mark.parametrize(
    "attribute", ["colour", "shape", "position", "relation", "size", "background", "count", "word"]
)
def test_names_the_one_attribute_that_differs(attribute):
    for seed, image, wrong in changed_pictures(attribute, CHANGES):
        verdict = check(worn(image, seed) if seed % 2 else image, wrong)
        assert flagged(verdict, attribute), (seed, wrong, verdict)
        assert not verdict.all_right


def paint(mask, colour="red", image=None):
    """A mask (H, W) in a colour on an image, white where none is given."""
    image = np.full((*mask.shape, 3), PALETTE["white"], np.float32) if image is None else image.astype(np.float32)
    tint = np.asarray(PALETTE.get(colour, colour), np.float32)
    return (image + np.float32(mask)[..., None] * (tint - image) + 0.5).astype(np.uint8)


ROWS, COLUMNS = np.mgrid[:128, :128] + 0.5
CIRCLE = shape_mask("circle", 60, 60, 20, 128, 128)


@pytest.mark.parametrize(
    "mask",
    [
        CIRCLE * (COLUMNS < 60),
        CIRCLE * ((COLUMNS < 60) | (ROWS < 60)),
        ((COLUMNS - 60) / 26) ** 2 + ((ROWS - 60) / 20) ** 2 < 1,
        abs(COLUMNS - 60) + abs(ROWS - 60) < 20,
        shape_mask("triangle", 60, 64, 20, 128, 128)[::-1],
        shape_mask("ring", 60, 60, 20, 128, 128) * ((COLUMNS < 60) | (abs(ROWS - 60) > 5)),
        shape_mask("cross", 60, 60, 20, 128, 128) * (COLUMNS > 54),
        shape_mask("star", 60, 60, 20, 128, 128) * (ROWS < 66),
    ],
    ids=["half circle", "pie", "ellipse", "diamond", "upside down", "open ring", "three arms", "cut star"],
)
def test_gives_no_shape_to_what_is_none_of_the_six(mask):
    (blob,) = find_blobs(paint(mask))
    assert blob.shape is None


@pytest.mark.parametrize("colour", [(128, 128, 128), (255, 120, 120), (120, 70, 20)], ids=["grey", "pink", "brown"])
def test_gives_no_colour_to_what_is_off_the_palette(colour):
    assert check(paint(CIRCLE, colour), RED_CIRCLE).colour == (0, 1)


def test_counts_what_was_not_asked_for():
    beside = paint(shape_mask("star", 110, 110, 7, 128, 128), "red", paint(CIRCLE))
    verdict = check(beside, RED_CIRCLE)
    assert (verdict.count, verdict.shape, verdict.all_right) == ((0, 1), (1, 1), False)
    halves = paint(CIRCLE * (COLUMNS < 60), "blue", paint(CIRCLE))
    assert check(halves, RED_CIRCLE).count == (0, 1)


@pytest.mark.parametrize("colours", [("red", "red"), ("red", "yellow")], ids=["one colour", "two colours"])
def test_parts_objects_whose_corners_touch(colours):
    items = tuple(Item("square", c, x, x, 18.0) for c, x in zip(colours, (45.0, 74.0), strict=True))
    blobs = find_blobs(worn(draw(Scene(128, 128, "orange", items)), 0))
    assert sorted((b.colour, b.shape) for b in blobs) == sorted((c, "square") for c in colours)


def test_no_place_has_two_names():
    rng = random.Random(0)
    for _ in range(60):
        x, y = rng.uniform(15, 113), rng.uniform(15, 113)
        image = draw(Scene(128, 128, "white", (Item("circle", "red", x, y, 11.0),)))
        asked = [Request(objects=(Wanted("circle", "red", position=position),)) for position in POSITIONS]
        assert sum(check(image, request).position[0] for request in asked) <= 1


def sign(words_and_colours, pitch=16.0):
    """Letters at a pitch, each in its own colour, on white."""
    image = np.full((128, 160, 3), PALETTE["white"], np.uint8)
    for index, (letter, colour) in enumerate(words_and_colours):
        x = 80 + (index - (len(words_and_colours) - 1) / 2) * pitch
        image = paint(word_mask(Sign(letter, colour, x, 64.0, 1.0), 160, 128), colour, image)
    return image


@pytest.mark.parametrize("pitch", [15.0, 16.0, 17.0])
def test_reads_letters_that_are_set_a_little_tight_or_wide(pitch):
    assert read_word(sign([(letter, "red") for letter in "HELP"], pitch)) == "HELP"


def test_letters_in_two_inks_have_not_the_asked_colour():
    request = Request(word="HELP", word_colour="red")
    verdict = check(sign([("H", "red"), ("E", "red"), ("L", "blue"), ("P", "red")]), request)
    assert (verdict.colour, verdict.word_right) == ((0, 1), True)


def test_a_thing_beside_the_word_is_surplus():
    image = paint(shape_mask("circle", 30, 20, 10, 160, 128), "red", sign([(letter, "red") for letter in "HELP"]))
    verdict = check(image, Request(word="HELP", word_colour="red"))
    assert (verdict.count, verdict.word_right, verdict.all_right) == ((0, 1), True, False)


def test_a_blank_picture_shows_nothing():
    blank = np.full((96, 128, 3), 246, np.uint8)
    assert check(blank, RED_CIRCLE).colour == (0, 1)
    assert check(blank, Request(word="A", word_colour="red")).read == ""


def test_refuses_what_is_no_picture():
    with pytest.raises(ValueError, match="expected RGB bytes"):
        check(np.zeros((128, 128, 3), np.float32), RED_CIRCLE)


def test_a_tally_leaves_out_what_was_never_asked():
    tally = Tally()
    for word, colour in (("HELP", "red"), ("HEAP", "blue")):
        request = Request(word=word, word_colour=colour)
        tally.add(check(sign([(letter, "red") for letter in "HELP"]), request), request)
    rates = tally.rates()
    assert (rates["words of 3-4 letters"], rates["words of 3-4 letters asked"]) == (0.5, 2)
    assert rates["letters"] == 7 / 8
    assert rates["colour of words"] == 0.5
    assert "colour" not in rates
    assert "words of 3-4 letters" in tally.table()


def test_what_is_like_no_shape_is_judged_and_not_a_fault() -> None:
    """A barely trained model draws anything; the checker must say what is wrong with it, whatever it is."""
    request = Request(objects=(Wanted("circle", "red"),))
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(size=(128, 128, 3)).astype(np.float32)
        soft = cv2.GaussianBlur(noise, (0, 0), 9)
        soft = (soft - soft.min()) / (soft.max() - soft.min())
        picture = np.where(soft[..., :1] > 0.62, 255 * soft, 246).astype(np.uint8)
        assert not check(cv2.GaussianBlur(picture, (0, 0), 1.2), request).all_right
