"""A picture grows, its own area stays bit for bit, and the seam is soft on the new side."""

from __future__ import annotations

import math
import random

import pytest
import torch

from flux.editing.outpaint import ANCHORS, FILLS, MAX_SIDE, extend, finish, plan_outpaint, plan_to_aspect
from flux.errors import NumericError, UserError


def bits(picture):
    return picture.contiguous().view(torch.int32)


def original_area(picture, plan):
    return picture[:, plan.top : plan.top + plan.height, plan.left : plan.left + plan.width]


def random_plan(rng, height, width):
    sides = [rng.choice([0, 1, 13, 16, 40]) for _ in range(4)]
    sides[rng.randrange(4)] = rng.randint(1, 50)
    return plan_outpaint(height, width, *sides, multiple=rng.choice([8, 16]))


@pytest.mark.parametrize("seed", range(50))
def test_the_original_area_is_exact_for_any_sides(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    height, width = rng.choice([(1, 1), (33, 47), (64, 64), (90, 31)])
    plan = random_plan(rng, height, width)
    image = torch.randn(rng.choice([1, 2]), height, width, 3, generator=generator) * rng.choice([1.0, 1e4])
    image[image.abs() < 0.1] = -0.0
    before = image.clone()
    canvas = extend(image, plan, rng.randint(0, min(height, width) // 2), rng.choice(FILLS))
    painted = torch.rand(canvas.picture.shape, generator=generator)
    result = finish(canvas, painted)
    assert result.shape == (image.shape[0], plan.result_height, plan.result_width, 3)
    assert torch.equal(bits(original_area(result, plan)), bits(before))
    assert torch.equal(bits(original_area(canvas.picture, plan)), bits(before))
    assert torch.equal(bits(image), bits(before))


def test_plans_give_at_least_what_was_asked_and_a_canvas_that_divides():
    rng = random.Random(1)
    for _ in range(300):
        height, width = rng.randint(1, 300), rng.randint(1, 300)
        sides = [rng.choice([0, 0, rng.randint(1, 100)]) for _ in range(4)]
        if not any(sides):
            continue
        left, right, top, bottom = sides
        multiple = rng.choice([1, 8, 16, 32])
        said = []
        plan = plan_outpaint(height, width, left, right, top, bottom, multiple, said.append)
        given = plan.left, plan.right, plan.top, plan.bottom
        assert all(asked <= got < asked + multiple for asked, got in zip(sides, given, strict=True))
        assert all(got == 0 for asked, got in zip(sides, given, strict=True) if not asked)
        assert plan.canvas_height % multiple == plan.canvas_width % multiple == 0
        assert max(plan.spare_right, plan.spare_bottom) < multiple
        assert (plan.spare_right == 0) or not (left or right)
        assert (plan.spare_bottom == 0) or not (top or bottom)
        assert bool(said) == (list(given) != sides)


def test_what_is_added_beyond_what_was_asked_is_said_for_the_side():
    said = []
    plan = plan_outpaint(100, 512, left=50, warn=said.append)
    assert (plan.left, plan.right, plan.result_width) == (64, 0, 576)
    assert (plan.result_height, plan.canvas_height) == (100, 112)
    assert said == ["so that the canvas divides by 16, more pixels are added than asked for: left 64 for 50"]


def test_missing_pixels_go_to_the_larger_of_two_sides():
    assert plan_outpaint(64, 64, left=20, right=5).left == 27
    assert plan_outpaint(64, 64, top=5, bottom=20).bottom == 27


@pytest.mark.parametrize("aspect", [(16, 9), (9, 16), (1, 1), (21, 9), (2.39, 1), (4, 5)])
@pytest.mark.parametrize("size", [(64, 80), (500, 333), (333, 501), (1, 1000)])
def test_a_picture_grows_to_an_aspect_to_the_nearest_pixel_and_is_never_cut(aspect, size):
    height, width = size
    plan = plan_to_aspect(height, width, *aspect)
    assert plan.result_height >= height
    assert plan.result_width >= width
    assert plan.result_height == height or plan.result_width == width
    ratio = aspect[0] / aspect[1]
    assert abs(plan.result_width - plan.result_height * ratio) <= max(0.5, 0.5 * ratio) + 1e-6
    assert plan.canvas_height % 16 == plan.canvas_width % 16 == 0
    assert abs(plan.left - plan.right) <= 1
    assert abs(plan.top - plan.bottom) <= 1


@pytest.mark.parametrize(
    ("anchor", "wide", "high"),
    [
        ("center", (32, 32, 0, 0), (0, 0, 32, 32)),
        ("left", (0, 64, 0, 0), (0, 0, 32, 32)),
        ("right", (64, 0, 0, 0), (0, 0, 32, 32)),
        ("top", (32, 32, 0, 0), (0, 0, 0, 64)),
        ("bottom", (32, 32, 0, 0), (0, 0, 64, 0)),
    ],
)
def test_an_anchor_says_where_the_picture_stands(anchor, wide, high):
    assert anchor in ANCHORS
    for aspect, expected in (((2, 1), wide), ((1, 2), high)):
        plan = plan_to_aspect(64, 64, *aspect, anchor=anchor)
        assert (plan.left, plan.right, plan.top, plan.bottom) == expected


def test_the_mask_is_1_in_the_new_area_and_falls_to_0_over_the_feather_within_the_original():
    plan = plan_outpaint(64, 80, left=16, bottom=32)
    mask = extend(torch.rand(1, 64, 80, 3), plan, feather=8).mask[0]
    new = torch.ones(plan.canvas_height, plan.canvas_width, dtype=torch.bool)
    new[plan.top : plan.top + 64, plan.left : plan.left + 80] = False
    assert (mask[new] == 1).all()
    row = mask[20, 16:]
    assert (row[:8] > 0).all()
    assert (row[:8] < 1).all()
    assert (row[:8].diff() < 0).all()
    assert not row[8:].any()
    assert not mask[:50, 30:].any()
    assert torch.equal(mask[:64, 60].flip(0)[:20], row[:20])


def test_without_a_feather_mask_and_blend_are_hard():
    plan = plan_outpaint(64, 80, right=16)
    canvas = extend(torch.rand(1, 64, 80, 3), plan)
    assert torch.equal(canvas.mask, canvas.blend)
    assert not canvas.mask[:, :, :80].any()
    assert (canvas.mask[:, :, 80:] == 1).all()
    painted = torch.rand(canvas.picture.shape)
    assert torch.equal(finish(canvas, painted)[:, :, 80:], painted[:, :, 80:])


def test_the_seam_fades_from_the_originals_edge_to_what_was_painted_on_the_new_side():
    plan = plan_outpaint(64, 80, right=32)
    canvas = extend(torch.zeros(1, 64, 80, 3), plan, feather=10)
    row = finish(canvas, torch.ones(canvas.picture.shape))[0, 30, :, 0]
    assert not row[:80].any()
    assert (row[80:91].diff() > 0).all()
    assert 0 < row[80] < 0.05
    assert (row[90:] == 1).all()


def test_the_seam_at_a_corner_is_round():
    plan = plan_outpaint(32, 32, right=32, bottom=32)
    blend = extend(torch.rand(1, 32, 32, 3), plan, feather=15).blend[0]
    for down, across, distance in ((3, 4, 5), (6, 8, 10), (9, 12, 15)):
        assert blend[31 + down, 31 + across].item() == pytest.approx(blend[20, 31 + distance].item())


def test_the_new_area_is_grey_or_repeats_the_edge():
    image, plan = torch.rand(1, 32, 32, 3), plan_outpaint(32, 32, left=16, top=16)
    grey = extend(image, plan, fill="grey").picture
    assert (grey[:, :16] == 0.5).all()
    assert (grey[:, :, :16] == 0.5).all()
    edge = extend(image, plan, fill="edge").picture
    assert torch.equal(edge[:, 16:, 3], image[:, :, 0])
    assert torch.equal(edge[:, 2, 16:], image[:, 0])
    assert torch.equal(edge[:, 0, 0], image[:, 0, 0])


def test_a_side_that_was_not_asked_for_does_not_grow_though_the_canvas_does():
    image = torch.rand(1, 50, 64, 3)
    plan = plan_outpaint(50, 64, left=16)
    canvas = extend(image, plan, feather=4)
    assert canvas.picture.shape == (1, 64, 80, 3)
    assert (canvas.mask[:, 50:] == 1).all()
    assert not canvas.mask[:, 40:50, 30:].any()
    result = finish(canvas, torch.rand(canvas.picture.shape))
    assert result.shape == (1, 50, 80, 3)


def test_several_paintings_of_one_canvas_give_several_pictures_and_a_batch_stays_one():
    plan = plan_outpaint(32, 32, left=16)
    one = extend(torch.rand(1, 32, 32, 3), plan)
    assert finish(one, torch.rand(3, 32, 48, 3)).shape == (3, 32, 48, 3)
    two = extend(torch.rand(2, 32, 32, 3), plan)
    assert two.mask.shape == two.blend.shape == (2, 32, 48)
    assert torch.equal(finish(two, torch.rand(2, 32, 48, 3))[:, :, 16:], two.original)


def test_five_growths_in_a_row_keep_the_first_picture():
    rng = random.Random(7)
    first = image = torch.rand(1, 33, 41, 3)
    top = left = 0
    for _ in range(5):
        plan = random_plan(rng, *image.shape[1:3])
        canvas = extend(image, plan, feather=8)
        image = finish(canvas, torch.rand(canvas.picture.shape))
        top, left = top + plan.top, left + plan.left
    assert torch.equal(image[:, top : top + 33, left : left + 41], first)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: plan_outpaint(64, 64), "no side is to grow; give"),
        (lambda: plan_outpaint(64, 64, left=-16), "-16 pixels are to be added at the left; give 0 or more"),
        (lambda: plan_outpaint(64, 64, left=MAX_SIDE), "add less"),
        (lambda: plan_outpaint(0, 64, left=16), "64x0 pixels cannot grow"),
        (lambda: plan_outpaint(64, 64, left=16, multiple=0), "divide by 0; give"),
        (lambda: plan_to_aspect(64, 64, 1, 1), "nothing to add"),
        (lambda: plan_to_aspect(1080, 1920, 16, 9), "nothing to add"),
        (lambda: plan_to_aspect(64, 64, 0, 1), "give two numbers above 0"),
        (lambda: plan_to_aspect(64, 64, 1, math.nan), "give two numbers above 0"),
        (lambda: plan_to_aspect(64, 64, 2, 1, anchor="middle"), "choose one of center, left"),
        (lambda: plan_to_aspect(64, 64, 1000, 1), "add less"),
        (lambda: plan_to_aspect(64, 64, 2, 1, multiple=-1), "divide by -1; give"),
        (lambda: extend(torch.rand(1, 64, 60, 3), plan_outpaint(64, 64, left=16)), "is 60x64 and the plan"),
        (lambda: extend(torch.rand(1, 64, 64, 3), plan_outpaint(64, 64, left=16), feather=33), "give 0 to 32"),
        (lambda: extend(torch.rand(1, 64, 64, 3), plan_outpaint(64, 64, left=16), feather=-1), "give 0 to 32"),
        (lambda: extend(torch.rand(1, 64, 64, 3), plan_outpaint(64, 64, left=16), fill="red"), "one of grey, edge"),
        (lambda: extend(torch.rand(64, 64, 3), plan_outpaint(64, 64, left=16)), "is no picture"),
        (lambda: extend(torch.full((1, 64, 64, 3), math.nan), plan_outpaint(64, 64, left=16)), "not finite .*; give"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_what_to_do(call, match):
    with pytest.raises(UserError, match=match):
        call()


def test_a_painting_that_does_not_fit_the_canvas_is_refused():
    canvas = extend(torch.rand(2, 32, 32, 3), plan_outpaint(32, 32, left=16))
    with pytest.raises(UserError, match="is 32x32 and the canvas 48x32"):
        finish(canvas, torch.rand(2, 32, 32, 3))
    with pytest.raises(UserError, match="the canvas has 2 pictures, and the number of painted ones is 3"):
        finish(canvas, torch.rand(3, 32, 48, 3))
    with pytest.raises(NumericError, match="not finite"):
        finish(canvas, torch.full((2, 32, 48, 3), math.inf))
