"""Colours are matched by what both pictures show around the mask, and only then."""

from __future__ import annotations

import cv2
import pytest
import torch

from flux.editing.colour import RING, match_colour, ring_around
from flux.errors import UserError


def picture(seed=0, height=80, width=90):
    """Smooth colours away from black and white."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 8, 9, generator=generator) * 0.4 + 0.3
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].movedim(0, -1)[None].clamp(0, 1)


def centre(height=80, width=90):
    mask = torch.zeros(1, height, width)
    mask[:, 30:50, 30:60] = 1
    return mask


def shifted_in_lab(image, gain, offset):
    lab = cv2.cvtColor(image[0].numpy(), cv2.COLOR_RGB2Lab)
    mean = lab.reshape(-1, 3).mean(0)
    out = cv2.cvtColor(((lab - mean) * gain + mean + offset).astype("float32"), cv2.COLOR_Lab2RGB)
    return torch.from_numpy(out)[None]


def test_a_shift_of_the_whole_picture_is_taken_out():
    original = picture()
    painted = shifted_in_lab(original, 0.9, (3.0, -2.0, 4.0))
    matched = match_colour(painted, original, centre())
    assert (painted - original).abs().mean() > 0.02
    assert (matched - original).abs().mean() < 0.003


def test_means_and_deviations_in_the_ring_become_the_originals():
    original, mask = picture(), centre()
    painted = shifted_in_lab(picture(), 0.8, (5.0, 3.0, -3.0))
    where = ring_around(mask, RING)[0].numpy()
    theirs = cv2.cvtColor(original[0].numpy(), cv2.COLOR_RGB2Lab)[where]
    ours = cv2.cvtColor(match_colour(painted, original, mask)[0].numpy(), cv2.COLOR_RGB2Lab)[where]
    assert abs(ours.mean(0) - theirs.mean(0)).max() < 0.2
    assert abs(ours.std(0) - theirs.std(0)).max() < 0.2


def test_what_is_under_the_mask_does_not_count():
    original, mask = picture(), centre()
    painted = torch.where(mask[..., None] > 0, torch.tensor([1.0, 0.0, 0.0]), original)
    assert torch.allclose(match_colour(painted, original, mask), painted, atol=2e-3)


def test_half_the_strength_makes_half_of_the_change():
    original, mask = picture(), centre()
    painted = shifted_in_lab(original, 1.0, (2.0, 1.0, 0.0))
    whole, half = (match_colour(painted, original, mask, strength) - painted for strength in (1.0, 0.5))
    assert whole.abs().max() > 0.01
    assert torch.allclose(half, whole / 2, atol=1e-6)


def test_each_picture_of_a_batch_is_matched_by_itself():
    originals = torch.cat([picture(0), picture(1)])
    painted = torch.cat([picture(0), shifted_in_lab(picture(1), 1.0, (4.0, 0.0, 0.0))])
    together = match_colour(painted, originals, centre())
    for index in range(2):
        one = slice(index, index + 1)
        assert torch.equal(together[one], match_colour(painted[one], originals[one], centre()))


def test_no_strength_and_no_ring_change_nothing_and_the_latter_is_said():
    original, painted, said = picture(0), picture(1), []
    assert match_colour(painted, original, centre(), 0.0, warn=said.append) is painted
    assert not said
    full = torch.ones(1, 80, 90)
    assert torch.equal(match_colour(painted, original, full, warn=said.append), painted)
    assert len(said) == 1
    assert "more context" in said[0]


def test_a_flat_ring_moves_the_colour_and_does_not_blow_up_the_rest():
    original = torch.full((1, 40, 40, 3), 0.5)
    painted = torch.full((1, 40, 40, 3), 0.52)
    mask = torch.zeros(1, 40, 40)
    mask[:, 15:25, 15:25] = 1
    painted[:, 15:25, 15:25] = picture(3, 10, 10)
    matched = match_colour(painted, original, mask)
    assert torch.allclose(matched[mask == 0], original[mask == 0], atol=2e-3)
    assert (matched - painted)[mask > 0].abs().max() < 0.05


def test_pictures_that_come_in_are_not_changed():
    original, painted = picture(0), picture(1)
    copies = original.clone(), painted.clone()
    match_colour(painted, original, centre())
    assert torch.equal(original, copies[0])
    assert torch.equal(painted, copies[1])


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(UserError, match="give a number from 0 to 1"):
        match_colour(picture(), picture(), centre(), strength)
