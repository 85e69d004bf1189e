"""Edges are OpenCV's, on the levels that a picture has, and thresholds that a picture chooses are Otsu's."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from flux.errors import UserError
from flux.preprocess.canny import FAINTEST, HIGH, LOW, LOW_SHARE, auto_thresholds, automatic_canny, canny


def levels(seed: int, shape=(40, 56, 3)) -> np.ndarray:
    """A smooth picture with a coloured square, in 8 bits."""
    noise = np.random.default_rng(seed).uniform(0, 255, shape)
    smooth = ndimage.gaussian_filter(noise, (2, 2, 0)) * 3 - 255
    smooth[10:25, 15:30] += (120, -40, 60)
    return smooth.clip(0, 255).astype(np.uint8)


def as_picture(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).float() / 255


def strengths_by_hand(picture: np.ndarray) -> np.ndarray:
    channels = np.moveaxis(picture.astype(np.int64), -1, 0)  # scipy's filter smooths along every further axis
    return np.max(
        [sum(abs(ndimage.sobel(channel, axis=axis, mode="nearest")) for axis in (0, 1)) for channel in channels], axis=0
    )


def otsu_by_hand(values: np.ndarray) -> int:
    """The threshold whose two classes' means lie farthest apart, weighed by their sizes."""
    scores = []
    for threshold in range(int(values.max())):
        low, high = values[values <= threshold], values[values > threshold]
        scores.append(low.size * high.size * (low.mean() - high.mean()) ** 2 if low.size and high.size else 0)
    return int(np.argmax(scores))


def test_edges_are_what_opencv_finds_in_the_three_channels():
    pictures = levels(0), levels(1)
    edges = canny(as_picture(*pictures))
    assert edges.shape == (2, 40, 56, 3)
    for picture, found in zip(pictures, edges, strict=True):
        wanted = torch.from_numpy(cv2.Canny(picture, 50, 200)).float() / 255
        assert 0 < wanted.mean() < 0.5
        assert torch.equal(found, wanted[..., None].expand(-1, -1, 3))


def test_a_grey_picture_has_the_edges_of_its_three_equal_channels():
    picture = as_picture(levels(2))
    grey = picture.mean(dim=-1, keepdim=True)
    assert torch.equal(canny(grey), canny(grey.repeat(1, 1, 1, 3)))


def test_higher_thresholds_leave_fewer_edges():
    picture = as_picture(levels(3))
    found = [canny(picture, low, high).sum().item() for low, high in ((20, 60), (LOW, HIGH), (200, 400))]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (200, 50, r"low threshold \(200\) is above the high one \(50\); exchange"),
        (-1, 50, "low threshold is -1"),
        (50, float("nan"), "high threshold is nan"),
        (50, float("inf"), "high threshold is inf"),
    ],
)
def test_impossible_thresholds_are_refused(low, high, words):
    with pytest.raises(UserError, match=words):
        canny(as_picture(levels(0)), low, high)


def test_a_picture_chooses_its_high_threshold_by_otsu_and_the_low_one_as_a_share():
    pictures = levels(4), levels(5) // 2
    found = auto_thresholds(as_picture(*pictures))
    assert found[0] != found[1]
    for picture, (low, high) in zip(pictures, found, strict=True):
        strengths = strengths_by_hand(picture)
        wanted = otsu_by_hand(strengths)
        assert wanted > FAINTEST
        assert np.array_equal(strengths > high, strengths > wanted)
        assert low == LOW_SHARE * high
        assert 2 <= high / low <= 3  # Canny's advice


def test_the_automatic_mode_finds_an_outline_that_is_too_faint_for_fixed_thresholds():
    picture = np.full((32, 32, 3), 100, np.uint8)
    picture[8:24, 8:24] += 10
    both = as_picture(picture, levels(6, (32, 32, 3)))
    assert not canny(both)[0].any()
    outline = automatic_canny(both)[0, ..., 0]
    assert outline[8:24, 7:9].any(dim=1).all()
    assert not outline[12:20, 12:20].any()


def test_each_picture_of_a_batch_is_seen_as_it_is_alone():
    pictures = as_picture(levels(7), levels(8) // 3)
    alone = torch.cat([automatic_canny(pictures[:1]), automatic_canny(pictures[1:])])
    assert torch.equal(automatic_canny(pictures), alone)


@pytest.mark.parametrize("noise", [0, 1])
def test_a_flat_picture_has_no_edges_even_where_it_is_a_level_noisy(noise):
    rng = np.random.default_rng(0)
    picture = (128 + rng.integers(0, noise + 1, (32, 32, 3))).astype(np.uint8)
    assert not automatic_canny(as_picture(picture)).any()
