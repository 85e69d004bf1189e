"""Control pictures come to the output's size by Pillow's Lanczos, and nothing happens to their aspect unsaid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from flux.errors import UserError
from flux.preprocess.canny import canny
from flux.preprocess.control import (
    FITS,
    as_bytes,
    as_rgb,
    fit_control,
    has_colours,
    is_black_and_white,
    lacks_edges,
    resize,
)

LOBES = 3  # of Pillow's Lanczos window


def picture(height: int, width: int, channels: int = 3, batch: int = 1) -> torch.Tensor:
    """Smooth, and away from black and white, so that nothing is cut."""
    noise = np.random.default_rng(0).uniform(0, 1, (batch, height, width, channels))
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2, 0))
    return torch.from_numpy((0.3 + 0.4 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.float32))


def lanczos_matrix(size: int, out: int) -> torch.Tensor:
    """(out, size): every output pixel's weights, from the definition of the windowed sinc."""
    scale = size / out
    support = max(1.0, scale)
    rows = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        centre = (i + 0.5) * scale
        for j in range(size):
            x = (j + 0.5 - centre) / support
            if abs(x) < LOBES:
                rows[i, j] = (
                    1.0 if x == 0 else math.sin(math.pi * x) * math.sin(math.pi * x / LOBES) / (x * math.pi) ** 2
                )
    return rows / rows.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(("height", "width"), [(17, 23), (64, 80), (11, 90)])
def test_resizing_is_a_lanczos_filter_that_widens_when_it_shrinks(height, width):
    image = picture(40, 56)
    rows, columns = lanczos_matrix(40, height), lanczos_matrix(56, width)
    wanted = torch.einsum("ih,bhwc,jw->bijc", rows, image.double(), columns)
    torch.testing.assert_close(fit_control(image, height, width).double(), wanted, atol=1e-5, rtol=0)


def test_an_8_bit_picture_comes_out_as_pillow_resizes_it_as_bfl_does():
    image = (picture(60, 90) * 255).round() / 255
    array = (image[0] * 255).round().byte().numpy()
    wanted = torch.from_numpy(np.array(Image.fromarray(array).resize((32, 48), Image.Resampling.LANCZOS))).float()
    assert (fit_control(image, 48, 32)[0] * 255 - wanted).abs().max() < 1.5  # Pillow rounds to levels twice


@pytest.mark.parametrize("how", FITS)
def test_a_picture_of_the_outputs_size_stays_bit_for_bit_and_nothing_is_said(how):
    image, said = picture(48, 64, batch=2), []
    assert torch.equal(fit_control(image, 48, 64, how, said.append), image)
    assert said == []


def test_overshoot_at_hard_edges_is_cut_to_the_range():
    image = torch.zeros(1, 20, 20, 3)
    image[:, :, 10:] = 1
    resized = fit_control(image, 47, 47)
    assert resized.min() == 0
    assert resized.max() == 1


def centres(fitted: torch.Tensor) -> tuple[float, float]:
    """Centre of mass of the brightness (row, column), where a pixel's middle is at its index plus a half."""
    weights = fitted[0, ..., 0].double()
    rows = (torch.arange(weights.shape[0]).double() + 0.5) @ weights.sum(1)
    columns = (torch.arange(weights.shape[1]).double() + 0.5) @ weights.sum(0)
    return (rows / weights.sum()).item(), (columns / weights.sum()).item()


@pytest.mark.parametrize(
    ("how", "row", "column"),
    [
        ("stretch", 20 * 64 / 100, 130 * 64 / 200),
        ("crop", 20 * 64 / 100, (130 - 50) * 64 / 100),
        ("pad", 16 + 20 * 64 / 200, 130 * 64 / 200),
    ],
)
def test_a_spot_lands_where_the_way_says_to_a_part_of_a_pixel(how, row, column):
    image = torch.zeros(1, 100, 200, 3)
    image[:, 16:24, 126:134] = 1  # its centre is row 20, column 130
    found = centres(fit_control(image, 64, 64, how, fill=0.0))
    assert abs(found[0] - row) < 0.1
    assert abs(found[1] - column) < 0.1


def test_padding_repeats_the_edge_or_fills_with_what_is_asked():
    image = picture(20, 40)
    edge, black = fit_control(image, 40, 40, "pad"), fit_control(image, 40, 40, "pad", fill=0.0)
    assert torch.equal(edge[:, 10:30], image)
    assert torch.equal(edge[:, :10], image[:, :1].expand(-1, 10, -1, -1))
    assert torch.equal(edge[:, 30:], image[:, -1:].expand(-1, 10, -1, -1))
    assert torch.equal(black[:, 10:30], image)
    assert not black[:, :10].any()
    assert not black[:, 30:].any()


@pytest.mark.parametrize(
    ("how", "size", "words"),
    [
        ("stretch", (64, 64), "stretched"),
        ("crop", (64, 64), "left and right is cut off"),
        ("crop", (20, 64), "top and bottom is cut off"),
        ("pad", (64, 64), "bands are added at its top and bottom"),
        ("pad", (20, 64), "bands are added at its left and right"),
    ],
)
def test_another_aspect_is_told_with_what_is_done(how, size, words):
    said = []
    assert fit_control(picture(32, 64), *size, how, said.append).shape == (1, *size, 3)
    assert len(said) == 1
    assert "(64x32) has another aspect than the output" in said[0]
    assert words in said[0]


@pytest.mark.parametrize("how", FITS)
def test_what_rounding_to_the_grid_changes_is_not_worth_a_word(how):
    said = []
    assert fit_control(picture(100, 102), 96, 96, how, said.append).shape == (1, 96, 96, 3)
    assert said == []


def test_grey_and_transparent_pictures_become_rgb():
    grey, rgba = picture(8, 9, 1), picture(8, 9, 4)
    assert torch.equal(as_rgb(grey), grey.repeat(1, 1, 1, 3))
    alpha = rgba[..., 3:]
    torch.testing.assert_close(as_rgb(rgba), rgba[..., :3] * alpha + 1 - alpha)
    torch.testing.assert_close(as_rgb(rgba[..., 2:]), (rgba[..., 2:3] * alpha + 1 - alpha).repeat(1, 1, 1, 3))
    assert as_rgb(picture(8, 9).half()).dtype == torch.float32


def test_what_is_transparent_in_a_control_map_is_black():
    lines = torch.ones(1, 8, 8, 4)
    lines[..., 3] = 0
    assert not fit_control(lines, 8, 8).any()


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 8, 8, 5), (0, 8, 8, 3), (1, 0, 8, 3)])
def test_what_is_no_batch_of_pictures_is_refused_by_its_shape(shape):
    with pytest.raises(UserError, match=r"is no picture; give"):
        as_rgb(torch.zeros(shape))


def test_bytes_are_refused_by_their_type():
    with pytest.raises(UserError, match=r"uint8; give floating-point"):
        as_rgb(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))


def test_unknown_ways_and_empty_sizes_are_refused():
    with pytest.raises(UserError, match="'squash'; choose one of stretch, crop, pad"):
        fit_control(picture(8, 8), 8, 8, "squash")
    with pytest.raises(UserError, match="0x8 pixels"):
        fit_control(picture(8, 8), 8, 0)


def test_8_bit_levels_are_the_nearest_ones_even_after_a_way_through_minus_one_to_one():
    whole = torch.arange(256.0)
    there_and_back = ((whole / 127.5 - 1) + 1) / 2  # cutting would take a level from some of them
    assert as_bytes(there_and_back.view(1, 16, 16, 1)).ravel().tolist() == list(range(256))
    assert as_bytes(torch.tensor([-0.1, 0.4 / 255, 0.6 / 255, 1.1])).tolist() == [0, 0, 1, 255]


def test_a_box_takes_a_part_with_fractions_of_pixels():
    ramp = torch.arange(64.0)[None, None, :, None].expand(1, 4, 64, 1) / 64
    part = resize(ramp, 4, 16, Image.Resampling.BILINEAR, (10.5, 0, 26.5, 4))
    torch.testing.assert_close(part[0, 0, 1:-1, 0], (torch.arange(16.0) + 10.5)[1:-1] / 64)


def test_colours_are_what_a_depth_picture_has_not_but_for_what_jpeg_leaves():
    photo, depth = picture(32, 32), picture(32, 32, 1).repeat(1, 1, 1, 3)
    saved = (depth + 0.01 * (picture(32, 32) - 0.5)).clamp(0, 1)
    assert [has_colours(one) for one in (photo, depth, saved)] == [True, False, False]


def test_edges_are_black_and_white_and_pictures_or_plain_sheets_are_not():
    edges = canny(torch.from_numpy(np.random.default_rng(1).uniform(0, 1, (1, 32, 32, 3)).astype(np.float32)))
    stained = edges.clone()
    stained[:, 0, :16] = 0.4  # 16 of 1,024 pixels
    assert all(is_black_and_white(one) for one in (edges, stained))
    grey = edges * 0.9
    coloured = edges * torch.tensor([1.0, 0, 0])
    assert not any(is_black_and_white(one) for one in (grey, coloured, edges * 0, edges * 0 + 1, picture(32, 32)))


def test_one_of_several_pictures_without_edges_is_enough_to_lack_them():
    edges = torch.zeros(2, 8, 8, 3)
    edges[0, 3, 3] = 1
    assert lacks_edges(edges)
    assert not lacks_edges(edges[:1])
