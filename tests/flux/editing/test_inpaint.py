"""What an inpaint mask keeps leaves bit for bit as it came in, and what is put back stands where it stood."""

from __future__ import annotations

import math
import random

import cv2
import numpy as np
import pytest
import torch

from flux.editing.inpaint import MAX_ASPECT, CropOptions, composite, crop_for_inpaint, stitch
from flux.editing.masks import KERNEL_SIGMAS, MaskOptions, grow
from flux.errors import NumericError, UserError

SMALL = CropOptions(side=64, min_context=4)


def bits(picture):
    return picture.contiguous().view(torch.int32)


def random_picture(rng, batch, height, width):
    """fp32 of several kinds: 8-bit levels, any number, far outside of 0..1, and signed zeros and denormals."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    values = torch.rand(batch, height, width, 3, generator=generator)
    kind = rng.randrange(4)
    if kind == 0:
        return (values * 255).round() / 255
    if kind == 1:
        return values
    if kind == 2:
        return (values - 0.5) * 1e4
    odd = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 1.0, 0.1])
    return odd[torch.randint(len(odd), values.shape, generator=generator)]


def random_mask(rng, batch, height, width):
    """Boxes and discs, hard or soft, of which some touch the border; never empty."""
    mask = torch.zeros(batch, height, width)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    for plane in mask:
        for _ in range(rng.randint(1, 3)):
            row, column, size = rng.randrange(height), rng.randrange(width), rng.uniform(0, max(height, width) / 3)
            if rng.random() < 0.5:
                inside = ((rows - row) ** 2 + (columns - column) ** 2) <= size**2
            else:
                inside = ((rows - row).abs() <= size) & ((columns - column).abs() <= size * rng.random())
            plane[inside] = 1.0 if rng.random() < 0.6 else rng.random()
            plane[row, column] = 1.0
        if rng.random() < 0.3:
            plane *= torch.from_numpy(np.random.default_rng(rng.randrange(1 << 30)).random((height, width))).float()
    return mask


def random_case(rng):
    height, width = rng.choice([(1, 1), (1, 37), (53, 2), (33, 47), (64, 64), (97, 61), (150, 200)])
    pictures, masks = rng.choice([(1, 1), (1, 1), (2, 1), (1, 2), (2, 2)])
    return random_picture(rng, pictures, height, width), random_mask(rng, masks, height, width)


def random_options(rng, mask_options):
    multiple = rng.choice([1, 8, 16, 16])
    return CropOptions(
        context=rng.uniform(1, 3),
        min_context=rng.choice([0, 3, 16]),
        side=rng.choice([0, 32, 64, 100]),
        multiple=multiple,
        mask=mask_options,
    )


def painted_for(rng, crop, count=None):
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return torch.rand(count or crop.picture.shape[0], *crop.picture.shape[1:], generator=generator)


@pytest.mark.parametrize("seed", range(60))
def test_every_pixel_that_the_users_mask_keeps_leaves_bit_for_bit(seed):
    rng = random.Random(seed)
    image, mask = random_case(rng)
    before = image.clone(), mask.clone()
    options = random_options(rng, MaskOptions(blur=rng.choice([0.0, 0.5, 2.0, 9.0])))
    crop = crop_for_inpaint(image, mask, options)
    result = stitch(crop, painted_for(rng, crop), colour_match=rng.choice([0.0, 0.0, 1.0]))
    originals, masks = image.expand_as(result), mask.expand(result.shape[:3])
    assert torch.equal(bits(result)[masks == 0], bits(originals)[masks == 0])
    assert torch.equal(bits(image), bits(before[0]))
    assert torch.equal(mask, before[1])
    assert result.data_ptr() != image.data_ptr()


@pytest.mark.parametrize("seed", range(40))
def test_what_grown_and_blurred_masks_do_not_reach_leaves_bit_for_bit(seed):
    rng = random.Random(1000 + seed)
    image, mask = random_case(rng)
    blur, widen = rng.choice([0.0, 1.0, 3.0]), rng.choice([0, 1, 5, 20])
    options = random_options(rng, MaskOptions(blur=blur, grow=widen, blur_inward=False, fill_holes=rng.random() < 0.5))
    crop = crop_for_inpaint(image, mask, options)
    result = stitch(crop, painted_for(rng, crop))
    originals, blend = image.expand_as(result), crop.blend.expand(result.shape[:3])
    assert torch.equal(bits(result)[blend == 0], bits(originals)[blend == 0])
    if not options.mask.fill_holes:
        reach = widen + math.ceil(KERNEL_SIGMAS * blur * math.sqrt(2)) + 2
        far = grow(mask, reach).expand(result.shape[:3]) == 0
        assert torch.equal(bits(result)[far], bits(originals)[far])


@pytest.mark.parametrize("seed", range(60))
def test_a_crop_holds_the_mask_divides_by_the_multiple_and_stays_within_where_it_can(seed):
    rng = random.Random(2000 + seed)
    image, mask = random_case(rng)
    options = random_options(rng, MaskOptions())
    crop = crop_for_inpaint(image, mask, options)
    height, width = image.shape[1:3]
    box = crop.box
    assert crop.picture.shape[1:3] == crop.mask.shape[1:3]
    assert crop.picture.shape[0] == crop.mask.shape[0] == max(image.shape[0], mask.shape[0])
    assert all(side % options.multiple == 0 for side in crop.picture.shape[1:3])
    outside = torch.ones(height, width, dtype=torch.bool)
    outside[max(box.top, 0) : box.top + box.height, max(box.left, 0) : box.left + box.width] = False
    assert not mask[:, outside].any()
    for start, length, limit in ((box.top, box.height, height), (box.left, box.width, width)):
        if length <= limit:
            assert 0 <= start <= limit - length
        else:
            assert start <= 0
            assert start + length >= limit


def test_the_crops_area_is_about_the_models_best_and_its_aspect_is_kept():
    rng = random.Random(5)
    for _ in range(40):
        height, width = rng.randint(300, 900), rng.randint(300, 900)
        mask = torch.zeros(1, height, width)
        top, left = rng.randrange(height - 60), rng.randrange(width - 60)
        mask[:, top : top + rng.randint(20, 200), left : left + rng.randint(20, 200)] = 1
        crop = crop_for_inpaint(torch.zeros(1, height, width, 3), mask, CropOptions(side=256))
        h, w = crop.picture.shape[1:3]
        assert 0.75 < h * w / 256**2 < 1.35
        assert crop.box.height / crop.box.width == pytest.approx(h / w, rel=0.02)
        assert max(h / w, w / h) <= MAX_ASPECT * 1.2


def test_ten_edits_in_a_row_leave_all_outside_the_union_of_masks_bit_equal():
    for seed in range(6):
        rng = random.Random(3000 + seed)
        image = first = random_picture(rng, 1, 97, 131)
        union = torch.zeros(1, 97, 131, dtype=torch.bool)
        for _ in range(10):
            mask = random_mask(rng, 1, 97, 131) * (torch.arange(131) > 20)
            mask[:, 50, 60] = 1
            crop = crop_for_inpaint(image, mask, random_options(rng, MaskOptions(blur=rng.choice([0.0, 3.0]))))
            image = stitch(crop, painted_for(rng, crop), colour_match=rng.choice([0.0, 0.5]))
            union |= mask > 0
        assert torch.equal(bits(image)[~union], bits(first)[~union])
        assert (image != first)[union].any()


def test_what_a_hard_mask_repaints_is_what_was_painted():
    rng = random.Random(0)
    image, mask = torch.rand(1, 100, 120, 3), torch.zeros(1, 100, 120)
    mask[:, 40:60, 50:80] = 1
    crop = crop_for_inpaint(image, mask, CropOptions(side=0))
    painted = painted_for(rng, crop)
    result = stitch(crop, painted)
    top, left = crop.box.top, crop.box.left
    assert torch.equal(result[:, 40:60, 50:80], painted[:, 40 - top : 60 - top, 50 - left : 80 - left])


def test_a_soft_mask_blends_by_its_value():
    image, mask = torch.zeros(1, 64, 64, 3), torch.zeros(1, 64, 64)
    mask[:, 20:40, 20:40] = 0.25
    crop = crop_for_inpaint(image, mask, CropOptions(side=0))
    result = stitch(crop, torch.ones_like(crop.picture))
    assert torch.equal(result[..., 0], mask)


@pytest.mark.parametrize("seed", range(20))
def test_a_crop_at_the_pictures_scale_is_not_resampled_and_stitches_to_the_original(seed):
    rng = random.Random(4000 + seed)
    image, mask = random_case(rng)
    crop = crop_for_inpaint(image, mask, CropOptions(side=0, mask=MaskOptions(blur=rng.choice([0.0, 2.0]))))
    assert crop.picture.shape[1:3] == (crop.box.height, crop.box.width)
    result = stitch(crop, crop.picture)
    assert torch.equal(result, image.expand_as(result))
    inside = crop.box.within(*image.shape[1:3])
    part = crop.picture[inside.shifted(-crop.box.top, -crop.box.left).slices]
    assert torch.equal(bits(part), bits(image[inside.slices].expand_as(part)))


def test_a_box_of_nearly_the_models_size_is_not_resampled():
    image, mask = torch.rand(1, 300, 300, 3), torch.zeros(1, 300, 300)
    mask[:, 100:220, 100:224] = 1
    crop = crop_for_inpaint(image, mask, CropOptions(context=1, min_context=0, side=128))
    assert (crop.box.height, crop.box.width) == tuple(crop.picture.shape[1:3]) == (128, 128)
    assert torch.equal(crop.picture, image[crop.box.slices])


def grid(height, width, period=23):
    """Lines of about 4 pixels, smooth enough to be resized, with a shading that makes each place its own."""
    rows, columns = torch.arange(height).float()[:, None], torch.arange(width).float()[None]
    lines = [torch.exp(-(((place % period) - period / 2) ** 2) / 8) for place in (rows, columns)]
    shading = 0.3 * (rows / height) * (columns / width)
    return (
        (0.6 * torch.maximum(*torch.broadcast_tensors(*lines)) + shading)
        .clamp(0, 1)[None, :, :, None]
        .repeat(1, 1, 1, 3)
    )


def shift_between(first, second):
    """Pixels by which the second is the first moved, by least squares of its slopes (Lucas and Kanade, 1981)."""
    first, second = first.double(), second.double()
    slopes = torch.stack(torch.gradient((first + second) / 2)).flatten(1)
    moved = torch.linalg.lstsq(slopes.T, (first - second).flatten()[:, None]).solution
    return moved.norm().item()


def shift_by_phase(first, second):
    window = cv2.createHanningWindow((first.shape[1], first.shape[0]), cv2.CV_32F)
    shift, _ = cv2.phaseCorrelate(first.numpy(), second.numpy(), window)
    return math.hypot(*shift)


def test_both_measures_see_a_known_shift():
    picture = grid(120, 130)[0, ..., 0]
    quarter = torch.from_numpy(
        cv2.warpAffine(picture.numpy(), np.float32([[1, 0, 0.25], [0, 1, 0]]), (130, 120), flags=cv2.INTER_CUBIC)
    )
    inner = (slice(5, -5), slice(5, -5))
    assert 0.25 < shift_between(picture[inner], quarter[inner]) < 0.35  # slopes between pixels are a little steeper
    assert shift_by_phase(picture[inner], picture.roll(1, 1)[inner]) == pytest.approx(1, abs=0.1)


BOX_SIDE = 150  # about that of the box around the test's masks


@pytest.mark.parametrize("side", [48, 80, 200, 333])
@pytest.mark.parametrize("place", [(70, 80), (0, 0), (131, 7)], ids=["middle", "corner", "edge"])
def test_resizing_to_the_model_and_back_shifts_nothing(side, place):
    image, mask = grid(211, 197), torch.zeros(1, 211, 197)
    top, left = place
    mask[:, top : top + 80, left : left + 90] = 1
    crop = crop_for_inpaint(image, mask, CropOptions(context=1.2, side=side))
    assert crop.picture.shape[1] != crop.box.height
    result = stitch(crop, crop.picture)
    part = (slice(top, top + 80), slice(left, left + 90), 0)
    assert shift_between(image[0][part], result[0][part]) < 0.05
    if side >= BOX_SIDE:  # below it the fine structure is gone that phases are measured by
        assert shift_by_phase(image[0][part], result[0][part]) < 0.1
    assert not torch.equal(image, result)


def test_the_crops_picture_stands_where_its_mask_does():
    image, mask = torch.zeros(1, 160, 160, 3), torch.zeros(1, 160, 160)
    mask[:, 61:97, 33:80] = 1
    image[mask == 1] = 1
    crop = crop_for_inpaint(image, mask, CropOptions(side=176, multiple=8))
    assert (crop.picture[..., 0] - crop.mask).abs().max() < 0.35  # Lanczos and bilinear differ at the edge
    assert ((crop.picture[..., 0] - crop.mask).abs() > 0.1).float().mean() < 0.05
    assert torch.allclose(crop.picture[..., 0].mean(), crop.mask.mean(), atol=2e-3)


def test_a_picture_smaller_than_the_box_repeats_its_edge_which_is_cut_off_again():
    image, mask = torch.rand(1, 20, 30, 3), torch.zeros(1, 20, 30)
    mask[:, 5:12, 8:20] = 1
    crop = crop_for_inpaint(image, mask, CropOptions(side=0))
    assert crop.picture.shape[1:3] == (32, 32)
    assert torch.equal(crop.picture[:, 0], crop.picture[:, -crop.box.top])
    result = stitch(crop, torch.ones_like(crop.picture))
    assert result.shape == image.shape
    assert torch.equal(result, torch.where(mask[..., None] > 0, torch.ones(()), image))


def test_a_long_thin_mask_gets_a_crop_that_is_not_too_long():
    mask = torch.zeros(1, 40, 600)
    mask[:, 20, :] = 1
    crop = crop_for_inpaint(torch.rand(1, 40, 600, 3), mask, CropOptions(side=128))
    assert crop.picture.shape[2] / crop.picture.shape[1] <= MAX_ASPECT


def test_pictures_of_a_batch_share_one_box_around_all_masks():
    image, masks = torch.rand(2, 100, 100, 3), torch.zeros(2, 100, 100)
    masks[0, 10:20, 10:20] = 1
    masks[1, 80:90, 70:85] = 1
    crop = crop_for_inpaint(image, masks, CropOptions(side=0, context=1, min_context=0))
    result = stitch(crop, torch.zeros_like(crop.picture))
    assert torch.equal(result, torch.where(masks[..., None] > 0, torch.zeros(()), image))


def test_several_paintings_of_one_crop_give_several_pictures():
    rng = random.Random(1)
    image, mask = torch.rand(1, 70, 70, 3), torch.zeros(1, 70, 70)
    mask[:, 30:40, 30:40] = 1
    crop = crop_for_inpaint(image, mask, SMALL)
    painted = painted_for(rng, crop, count=3)
    together = stitch(crop, painted)
    assert together.shape[0] == 3
    for index in range(3):
        assert torch.equal(together[index : index + 1], stitch(crop, painted[index : index + 1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pictures_of_less_precision_keep_their_type_and_bits(dtype):
    image, mask = torch.rand(1, 70, 70, 3).to(dtype), torch.zeros(1, 70, 70)
    mask[:, 30:40, 30:40] = 0.5
    crop = crop_for_inpaint(image, mask, SMALL)
    assert crop.picture.dtype == torch.float32
    result = stitch(crop, torch.rand_like(crop.picture))
    assert result.dtype == dtype
    assert torch.equal(result.view(torch.int16)[mask == 0], image.view(torch.int16)[mask == 0])


def test_a_blend_keeps_even_what_is_not_finite():
    original = torch.tensor([math.nan, math.inf, -0.0]).view(1, 1, 1, 3)
    kept = composite(original, torch.rand(1, 1, 1, 3), torch.zeros(1, 1, 1))
    assert torch.equal(bits(kept), bits(original))


def test_colours_are_matched_only_when_asked():
    image, mask = torch.rand(1, 100, 100, 3) * 0.2 + 0.4, torch.zeros(1, 100, 100)
    mask[:, 40:60, 40:60] = 1
    crop = crop_for_inpaint(image, mask, CropOptions(side=0))
    painted = crop.picture + 0.1
    off, on = (stitch(crop, painted, colour_match=strength) for strength in (0.0, 1.0))
    assert torch.equal(off[mask == 1], (image + 0.1)[mask == 1])
    assert (on - image)[mask == 1].abs().mean() < 0.02


def test_a_crop_without_a_ring_says_that_colours_are_not_matched():
    said = []
    crop = crop_for_inpaint(torch.rand(1, 32, 32, 3), torch.ones(1, 32, 32), CropOptions(side=0))
    stitch(crop, crop.picture, said.append, colour_match=1.0)
    assert len(said) == 1
    assert "not matched" in said[0]


def test_a_mask_of_another_size_is_fitted_and_what_it_then_keeps_is_exact():
    said, image = [], torch.rand(1, 90, 150, 3)
    mask = torch.zeros(1, 30, 50)
    mask[:, 10:20, 20:30] = 1
    crop = crop_for_inpaint(image, mask, SMALL, said.append)
    result = stitch(crop, torch.zeros_like(crop.picture))
    assert len(said) == 1
    assert "it is resized" in said[0]
    changed = (result != image).any(-1)[0]
    assert changed[33:57, 63:87].all()
    assert not changed[:28].any()
    assert not changed[:, 92:].any()


def test_an_empty_mask_is_refused():
    with pytest.raises(UserError, match="the mask is empty"):
        crop_for_inpaint(torch.rand(1, 50, 60, 3), torch.zeros(1, 64, 64))


@pytest.mark.parametrize("shape", [(50, 60, 3), (1, 50, 60, 4), (1, 50, 60), (1, 0, 60, 3)])
def test_what_is_no_picture_is_refused_by_shape(shape):
    with pytest.raises(UserError, match="is no picture; give"):
        crop_for_inpaint(torch.zeros(shape), torch.ones(1, 50, 60))


def test_a_picture_of_whole_numbers_is_refused():
    with pytest.raises(UserError, match=r"torch\.uint8; give floating-point"):
        crop_for_inpaint(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.ones(1, 8, 8))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_picture_with_numbers_that_are_not_finite_is_refused(value):
    image = torch.rand(1, 50, 60, 3)
    image[0, 49, 59, 2] = value  # far from the mask
    with pytest.raises(UserError, match="numbers in the picture are not finite .*; give finite ones"):
        crop_for_inpaint(image, torch.nn.functional.pad(torch.ones(1, 4, 4), (0, 56, 0, 46)), SMALL)


def test_numbers_of_pictures_and_masks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="3 pictures and 2 masks"):
        crop_for_inpaint(torch.rand(3, 20, 20, 3), torch.ones(2, 20, 20))


def test_a_painting_of_another_size_or_number_is_refused_with_both():
    crop = crop_for_inpaint(torch.rand(2, 50, 60, 3), torch.ones(1, 50, 60), CropOptions(side=64))
    height, width = crop.picture.shape[1:3]
    with pytest.raises(UserError, match=f"is {width}x{height + 16} and the crop {width}x{height}; give"):
        stitch(crop, torch.rand(2, height + 16, width, 3))
    with pytest.raises(UserError, match="the crop has 2 pictures, and the number of painted ones is 3"):
        stitch(crop, torch.rand(3, height, width, 3))
    with pytest.raises(UserError, match="the number of painted ones is 1"):
        stitch(crop, torch.rand(1, height, width, 3))
    with pytest.raises(UserError, match="is no picture"):
        stitch(crop, torch.rand(2, height, width, 4))


def test_a_painting_that_is_not_finite_is_refused():
    crop = crop_for_inpaint(torch.rand(1, 50, 60, 3), torch.ones(1, 50, 60), SMALL)
    with pytest.raises(NumericError, match="not finite"):
        stitch(crop, torch.full_like(crop.picture, math.nan))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"context": 0.5}, r"context factor is 0\.5; give"),
        ({"context": math.nan}, "context factor is nan; give"),
        ({"min_context": -1}, "least context is -1 pixels; give"),
        ({"multiple": 0}, "divide by 0; give"),
        ({"side": 8}, "side is 8 pixels; give 16 to"),
        ({"side": -1}, "side is -1 pixels; give 16 to"),
        ({"side": 100_000}, "side is 100000 pixels; give"),
    ],
)
def test_crop_options_out_of_range_are_refused_with_the_range(options, match):
    with pytest.raises(UserError, match=match):
        CropOptions(**options)
