"""Masks are checked and fitted, and what is exactly 0 in them stays so."""

from __future__ import annotations

import math
import random

import pytest
import torch

from flux.editing.masks import (
    DISC,
    KERNEL_SIGMAS,
    MAX_BLUR,
    MAX_GROW,
    MaskOptions,
    as_mask,
    blur,
    check_mask,
    feather_inward,
    fill_holes,
    fit_mask,
    grow,
    match_batch,
    prepare_mask,
)
from flux.errors import UserError
from flux.mini.examples import fill_example


def blob(height=40, width=50, top=10, left=12, bottom=25, right=30):
    mask = torch.zeros(1, height, width)
    mask[:, top:bottom, left:right] = 1
    return mask


def random_masks(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        height, width = (int(side) for side in torch.randint(9, 41, (2,), generator=generator))
        values = torch.rand(2, height, width, generator=generator)
        yield values * (torch.rand(2, height, width, generator=generator) < 0.08)


def discs_greatest(mask, radius):
    """The greatest value within a radius of each pixel, by looking at each."""
    _, height, width = mask.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    out = torch.zeros_like(mask)
    for row in range(height):
        for column in range(width):
            near = (rows - row) ** 2 + (columns - column) ** 2 <= radius**2
            out[:, row, column] = mask[:, near].amax(1)
    return out


def warnings_of(mask):
    said = []
    check_mask(mask, said.append)
    return said


def test_growing_takes_the_greatest_value_within_the_radius():
    for mask in random_masks():
        for radius in (1, 3, 7):
            assert torch.equal(grow(mask, radius), discs_greatest(mask, radius))


def test_shrinking_takes_the_least_value_and_does_not_move_the_pictures_border():
    for mask in random_masks():
        mask = grow(mask, 4)
        assert torch.equal(grow(mask, -3), 1 - discs_greatest(1 - mask, 3))
    half = blob(top=0, left=0, bottom=40, right=20)
    assert torch.equal(grow(half, -5), blob(top=0, left=0, bottom=40, right=15))


def test_a_large_growth_is_round_and_never_reaches_farther_than_asked():
    size, radius = 141, 60
    point = blob(size, size, size // 2, size // 2, size // 2 + 1, size // 2 + 1)
    steps = torch.arange(size) - size // 2
    distance = torch.hypot(steps[:, None].float(), steps[None].float())
    grown = grow(point, radius)[0] > 0
    assert not grown[distance > radius].any()
    assert grown[distance <= radius - math.ceil(radius / DISC)].all()
    assert grown[size // 2].sum() == grown[:, size // 2].sum() == 2 * radius + 1


def test_no_change_at_all_gives_the_mask_back():
    mask = next(random_masks(1))
    fitted = prepare_mask(mask, *mask.shape[1:], MaskOptions())
    assert torch.equal(fitted.repaint, mask)
    assert torch.equal(fitted.blend, mask)


def test_a_hole_is_filled_and_a_bay_and_what_the_border_closes_are_not():
    mask = blob(40, 50, 5, 5, 35, 45)
    ring = mask - blob(40, 50, 12, 12, 20, 20)
    assert torch.equal(fill_holes(ring), mask)
    bay = mask - blob(40, 50, 12, 12, 40, 20).mul(mask)
    assert torch.equal(fill_holes(bay), bay)
    wall = torch.zeros(1, 40, 50)
    wall[:, :, 25] = 1
    assert torch.equal(fill_holes(wall), wall)


def test_a_line_that_touches_at_corners_encloses():
    diamond = torch.zeros(1, 9, 9)
    for step in range(4):
        for row, column in ((4 - step, step), (4 + step, step), (step, 4 + step), (8 - step, 4 + step)):
            diamond[0, row, column] = 1
    diamond[0, 4, 8] = diamond[0, 0, 4] = diamond[0, 8, 4] = 1
    assert fill_holes(diamond)[0, 4, 1:8].all()


def test_the_hole_of_a_soft_ring_becomes_as_strong_as_its_crest():
    hard = blob(60, 60, 10, 10, 50, 50) - blob(60, 60, 22, 22, 38, 38)
    soft = blur(hard, 2.0)
    filled = fill_holes(soft)
    assert (filled >= soft).all()
    assert (filled[0, 18:42, 18:42] >= soft.max() * 15 / 16 - 1e-6).all()
    assert torch.equal(filled[0, :10], soft[0, :10])


def test_blurring_is_a_gaussian_that_ends_at_its_reach():
    sigma, size = 3.0, 61
    point = blob(size, size, 30, 30, 31, 31)
    soft = blur(point, sigma)[0]
    steps = torch.arange(size).double() - 30
    line = torch.exp(-(steps**2) / (2 * sigma**2)) * (steps.abs() <= KERNEL_SIGMAS * sigma)
    expected = (line / line.sum())[:, None] * (line / line.sum())
    assert torch.allclose(soft.double(), expected, atol=1e-6)
    assert not soft[expected == 0].any()


def test_blurring_does_not_soften_what_touches_the_pictures_border():
    half = blob(30, 30, 0, 0, 30, 15)
    assert torch.equal(blur(half, 2.0)[0, 0], blur(half, 2.0)[0, 15])
    assert blur(half, 2.0)[0, :, 0].min() > 0.999


def test_an_inward_edge_leaves_zeros_alone_and_is_nowhere_above_the_mask():
    for mask in random_masks():
        mask = grow(mask, 3)
        for sigma in (0.3, 1.0, 4.0, MAX_BLUR):
            soft = feather_inward(mask, sigma)
            assert not soft[mask == 0].any()
            assert (soft <= mask).all()
            assert (soft[mask > 0] > 0).all()


def test_an_inward_edge_is_as_steep_as_a_gaussians():
    sigma = 6.0
    half = blob(20, 120, 0, 40, 20, 120)
    inward = feather_inward(half, sigma)[0, 10].diff()
    outward = blur(half, sigma)[0, 10].diff()
    assert inward.max().item() == pytest.approx(outward.max().item(), rel=0.02)
    assert (inward >= 0).all()
    t = (torch.arange(22) + 0.5) / (1.5 * math.sqrt(2 * math.pi) * sigma)
    assert torch.allclose(feather_inward(half, sigma)[0, 10, 40:62], 3 * t**2 - 2 * t**3, atol=1e-5)
    assert feather_inward(half, sigma)[0, 10, 70:].min() == 1


def test_a_line_thinner_than_the_soft_edge_is_still_repainted():
    line = blob(40, 40, 20, 3, 21, 37)
    assert feather_inward(line, 8.0).max() == 1
    both = torch.maximum(line, blob(40, 40, 0, 0, 15, 40))
    soft = feather_inward(both, 2.0)
    assert soft[0, 20].max() == 1
    assert 0 < soft[0, 14, 20] < 0.2


def test_a_full_mask_has_no_edge_to_soften():
    full = torch.ones(1, 8, 8)
    assert torch.equal(feather_inward(full, 5.0), full)
    assert torch.equal(blur(full, 5.0), full)


def test_an_outward_edge_tells_the_model_of_all_that_is_blended():
    mask = blob()
    fitted = prepare_mask(mask, 40, 50, MaskOptions(blur=2.0, blur_inward=False))
    assert (fitted.repaint[fitted.blend > 0] > 0).all()
    assert (fitted.repaint[mask == 1] == 1).all()
    assert (fitted.blend[mask == 0] > 0).any()
    assert not fitted.blend[grow(mask, math.ceil(KERNEL_SIGMAS * 2.0) * 2) == 0].any()


def test_inverting_comes_first_and_keeps_exactly_what_was_white():
    mask = torch.ones(1, 20, 20)
    mask[:, 5:9, 6:12] = 0
    fitted = prepare_mask(mask, 20, 20, MaskOptions(invert=True, grow=1))
    assert torch.equal(fitted.blend, grow(1 - mask, 1))
    kept = prepare_mask(torch.ones(1, 7, 7).index_fill(2, torch.tensor([0]), 0), 31, 45, MaskOptions(invert=True))
    assert not kept.blend[:, :, 20:].any()


def test_nothing_that_comes_in_is_changed():
    mask = blob(40, 50) * 0.7
    before = mask.clone()
    prepare_mask(mask, 40, 50, MaskOptions(invert=True, fill_holes=True, grow=-2, blur=1.5))
    prepare_mask(mask, 33, 61, MaskOptions(fill_holes=True, grow=2, blur=1.5, blur_inward=False))
    assert torch.equal(mask, before)


@pytest.mark.parametrize("shape", [(5, 6), (1, 5, 6), (3, 5, 6), (3, 1, 5, 6)])
def test_masks_come_in_all_layouts_that_are_used(shape):
    values = torch.linspace(-1, 2, math.prod(shape)).reshape(shape)
    assert torch.equal(as_mask(values), values.clamp(0, 1).reshape(-1, 5, 6))
    assert as_mask(values > 0).dtype == torch.float32


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5, 6), (1, 0, 6), (0, 5, 6)])
def test_what_is_no_mask_is_refused_by_shape(shape):
    with pytest.raises(UserError, match=r"is no mask; give"):
        as_mask(torch.zeros(shape))


def test_a_mask_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match="not finite"):
        as_mask(torch.full((1, 3, 3), math.nan))


def test_a_mask_of_another_size_is_resized_and_said():
    said = []
    fitted = fit_mask(blob(20, 30, 5, 5, 15, 20), 40, 60, said.append)
    assert fitted.shape == (1, 40, 60)
    assert torch.equal(fitted[0, 12:28, 12:38], torch.ones(16, 26))
    assert not fitted[0, :8].any()
    assert said == ["the mask (30x20) is of another size than the picture (60x40): it is resized"]


def test_a_mask_of_another_aspect_is_said_to_be_stretched():
    said = []
    fit_mask(torch.ones(1, 64, 64), 40, 60, said.append)
    assert len(said) == 1
    assert "(64x64)" in said[0]
    assert "stretched" in said[0]


def test_a_thin_line_survives_when_the_mask_shrinks():
    line = blob(200, 200, 100, 0, 101, 200)
    assert (fit_mask(line, 25, 25)[0].amax(0) > 0).all()


def test_a_mask_of_the_pictures_size_is_taken_as_it_is_and_nothing_is_said():
    said, mask = [], next(random_masks(1))
    assert fit_mask(mask, *mask.shape[1:], said.append) is mask
    assert not said


def test_an_empty_mask_is_refused_before_its_size_is_talked_about():
    said = []
    with pytest.raises(UserError, match=r"mask is empty.*paint white.*transparency"):
        prepare_mask(torch.zeros(1, 64, 64), 300, 200, MaskOptions(), said.append)
    assert not said


def test_a_full_mask_that_is_inverted_is_empty():
    with pytest.raises(UserError, match="mask is empty"):
        prepare_mask(torch.ones(1, 8, 8), 8, 8, MaskOptions(invert=True))


def test_a_mask_that_shrinks_to_nothing_is_refused_with_the_pixels():
    with pytest.raises(UserError, match=r"shrinks by 9 pixels"):
        prepare_mask(blob(), 40, 50, MaskOptions(grow=-9))


def test_a_full_mask_is_said():
    assert warnings_of(torch.ones(1, 8, 8)) == [
        "the mask covers the whole picture: all of it is repainted and nothing kept"
    ]


def test_a_mask_that_keeps_only_the_middle_is_hinted_to_be_inverted():
    (sentence,) = warnings_of(1 - blob())
    assert "invert the mask" in sentence
    assert "87%" in sentence


@pytest.mark.parametrize(
    "meant",
    [blob(top=8, left=26, bottom=24, right=50), blob(top=20, left=15, bottom=40, right=30),
     blob(top=0, left=0, bottom=20, right=20)],
    ids=["at a side", "on the ground", "in a corner"],
)  # fmt: skip
def test_so_is_one_that_keeps_a_thing_at_the_border(meant):
    (sentence,) = warnings_of(1 - meant)
    assert "invert the mask" in sentence
    assert warnings_of(meant) == []


def test_masks_of_objects_are_told_from_inverted_ones():
    rng = random.Random(3)
    examples = [fill_example(rng, (128, 128), mode="object") for _ in range(150)]
    masks = [torch.from_numpy(example.mask)[None] for example in examples if example.item is not None][:100]
    assert sum(bool(warnings_of(1 - mask)) for mask in masks) >= 90
    assert sum(bool(warnings_of(mask)) for mask in masks) <= 2


@pytest.mark.parametrize(
    "mask",
    [
        blob(),
        blob(top=0, left=0, bottom=40, right=48),
        blob(top=2, left=2, bottom=38, right=48),
        blob(top=0, left=0, bottom=2, right=50),
    ],
    ids=["middle", "nearly all", "all but the border", "an edge"],
)
def test_a_usual_mask_is_not_hinted_at(mask):
    assert warnings_of(mask) == []


def test_a_mask_that_jpeg_left_nearly_black_is_said():
    (sentence,) = warnings_of((blob() + 0.01).clamp(max=1))
    assert "nearly black" in sentence
    assert warnings_of(blur(blob(), 1.0)) == []


def test_what_is_said_names_the_masks_that_it_is_about():
    masks = torch.cat([blob(), torch.ones(1, 40, 50), torch.zeros(1, 40, 50), torch.zeros(1, 40, 50)])
    assert warnings_of(masks) == [
        "mask 2 of 4: the mask covers the whole picture: all of it is repainted and nothing kept",
        "mask 3, 4 of 4: the mask is empty, so this picture stays as it is",
    ]


@pytest.mark.parametrize("shapes", [(1, 4), (4, 1), (4, 4)])
def test_one_of_pictures_or_masks_does_for_all(shapes):
    pictures, masks = match_batch(torch.zeros(shapes[0], 2, 2, 3), torch.zeros(shapes[1], 2, 2))
    assert pictures.shape == (4, 2, 2, 3)
    assert masks.shape == (4, 2, 2)


def test_numbers_of_pictures_and_masks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="3 pictures and 2 masks"):
        match_batch(torch.zeros(3, 2, 2, 3), torch.zeros(2, 2, 2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"grow": MAX_GROW + 1}, "grow by 513 pixels; give"),
        ({"grow": -MAX_GROW - 1}, "grow by -513 pixels; give"),
        ({"blur": -1.0}, "blur is -1 pixels; give"),
        ({"blur": math.nan}, "blur is nan pixels; give"),
        ({"blur": math.inf}, "blur is inf pixels; give"),
    ],
)
def test_options_out_of_range_are_refused_with_the_range(options, match):
    with pytest.raises(UserError, match=match):
        MaskOptions(**options)
