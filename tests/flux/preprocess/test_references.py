"""References reach the grid without a pixel moved, and what is scaled or stretched is said."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from flux.errors import UserError
from flux.preprocess.references import (
    GRID,
    KONTEXT_SIZES,
    fit_reference,
    kontext_size,
    reference_size_of_output,
)


def grid_picture(height: int, width: int, pitch: int = 24) -> torch.Tensor:
    """Lines with a coloured ground that differs from place to place, so that no shift maps it onto itself."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ground = torch.rand(3, height // pitch + 1, width // pitch + 1, generator=torch.Generator().manual_seed(0))
    image = ground[:, rows // pitch, columns // pitch].movedim(0, -1) * 0.7
    image[(rows % pitch < 2) | (columns % pitch < 2)] = 1.0
    return image[None]


def shift(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far two pictures (1, H, W, 3) lie apart, in pixels, by OpenCV's phase correlation."""
    grey = [np.ascontiguousarray(picture[0].mean(dim=-1).numpy(), dtype=np.float32) for picture in (a, b)]
    window = cv2.createHanningWindow(grey[0].shape[::-1], cv2.CV_32F)
    (dx, dy), _ = cv2.phaseCorrelate(*grey, window)
    return float(np.hypot(dx, dy))


def test_the_shift_measure_sees_a_shift():
    image = grid_picture(200, 300)
    assert shift(image[:, :-3, :-4], image[:, 3:, 4:]) == pytest.approx(5, abs=0.3)


@pytest.mark.parametrize(("height", "width"), [(200, 300), (192, 304), (17, 33), (16, 16), (5, 7)])
def test_a_padded_reference_holds_the_picture_bit_for_bit_at_the_top_left(height, width):
    image, said = grid_picture(height, width), []
    fitted = fit_reference(image, warn=said.append)
    assert said == []
    assert (fitted.size.height, fitted.size.width) == (height, width)
    assert torch.equal(fitted.picture[:, :height, :width], image)
    assert torch.equal(fitted.size.cut(fitted.picture), image)
    padded_height, padded_width = fitted.picture.shape[1:3]
    assert (padded_height % GRID, padded_width % GRID) == (0, 0)
    assert 0 <= padded_height - height < GRID
    assert 0 <= padded_width - width < GRID


def test_what_is_added_repeats_the_right_and_bottom_edges():
    image = grid_picture(20, 30)
    padded = fit_reference(image).picture
    assert padded.shape == (1, 32, 32, 3)
    assert torch.equal(padded[:, :20, 30:], image[:, :, -1:].expand(-1, -1, 2, -1))
    assert torch.equal(padded[:, 20:], padded[:, 19:20].expand(-1, 12, -1, -1))


def test_a_reference_above_the_budget_is_scaled_with_its_aspect_kept_and_this_is_said():
    image, said = grid_picture(600, 900), []
    fitted = fit_reference(image, budget_pixels=300 * 450, warn=said.append)
    assert (fitted.size.height, fitted.size.width) == (300, 450)
    assert said == ["the reference (900x600) has more pixels than its budget of 135000: it is scaled to 450x300"]
    halved = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 2).movedim(1, -1)
    content = fitted.size.cut(fitted.picture)
    assert (content - halved).abs().mean() < 0.05
    assert shift(content, halved) < 0.05


@pytest.mark.parametrize(("height", "width", "budget"), [(611, 397, 100_000), (1000, 1001, 999_999), (48, 1200, 9_000)])
def test_scaled_content_keeps_to_the_budget_and_its_aspect_to_a_pixel(height, width, budget):
    size = fit_reference(torch.rand(1, height, width, 3), budget_pixels=budget).size
    assert size.height * size.width <= budget
    assert abs(size.width - size.height * width / height) <= width / height + 1


def test_a_reference_of_just_the_budget_is_not_touched():
    image, said = grid_picture(64, 100), []
    assert torch.equal(fit_reference(image, budget_pixels=6400, warn=said.append).picture[:, :, :100], image)
    assert said == []


@pytest.mark.parametrize(("how", "side"), [("pad", 1023), ("kontext", 1024)])
def test_a_grid_that_is_scaled_stays_in_its_place(how, side):
    image = grid_picture(1056, 1056)
    fitted = fit_reference(image, how, budget_pixels=1023**2)
    content = fitted.size.cut(fitted.picture)
    assert content.shape == (1, side, side, 3)
    wanted = cv2.resize(image[0].numpy(), (side, side), interpolation=cv2.INTER_AREA)
    # OpenCV widens pictures to sides that suit its Fourier transform, and is then off by half a pixel; 1000 suits it.
    assert shift(content[:, :1000, :1000], torch.from_numpy(wanted)[None, :1000, :1000]) < 0.1


def test_cropping_takes_the_middle():
    image = grid_picture(70, 101)
    fitted = fit_reference(image, "crop")
    assert torch.equal(fitted.picture, image[:, 3:67, 2:98])
    assert (fitted.size.height, fitted.size.width) == (64, 96)


def brute_force_size(width: int, height: int) -> tuple[int, int]:
    best = None
    for w, h in sorted(KONTEXT_SIZES):
        distance = abs(width / height - w / h)
        if best is None or distance < best[0]:
            best = distance, (w, h)
    return best[1]


def test_the_kontext_size_has_the_nearest_aspect_and_ties_go_to_the_smaller():
    assert kontext_size(640, 640) == (1024, 1024)
    assert kontext_size(1, 1000) == (672, 1568)
    assert kontext_size(1000, 1) == (1568, 672)
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 3000, (300, 2)).tolist():
        assert kontext_size(width, height) == brute_force_size(width, height)
    for size in KONTEXT_SIZES:
        assert kontext_size(*size) == size
        assert size[0] % GRID == size[1] % GRID == 0


def test_kontexts_own_way_is_pillows_lanczos_to_the_recommended_size_and_says_that_it_stretches():
    image, said = ((grid_picture(200, 270) * 0.6 + 0.2) * 255).round() / 255, []  # nothing overshoots the range
    fitted = fit_reference(image, "kontext", warn=said.append)
    width, height = kontext_size(270, 200)
    array = (image[0] * 255).round().byte().numpy()
    wanted = torch.from_numpy(np.array(Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS)))
    assert fitted.picture.shape == (1, height, width, 3)
    off = (fitted.picture[0] * 255 - wanted).abs()
    assert off.max() < 1.5  # Pillow rounds to levels twice
    assert (fitted.size.padded_height, fitted.size.padded_width) == (height, width)
    assert said == [f"the reference (270x200) is resized to {width}x{height}"]
    fit_reference(grid_picture(100, 400), "kontext", warn=said.append)
    assert "(400x100) is stretched to 1568x672" in said[-1]
    assert len(said) == 2


def test_an_output_gets_a_references_size_by_the_padded_size_and_a_cut():
    size = reference_size_of_output(250, 333)
    assert (size.padded_height, size.padded_width) == (256, 336)
    output = torch.rand(2, 256, 336, 3)
    assert torch.equal(size.cut(output), output[:, :250, :333])
    with pytest.raises(ValueError, match="333x250, not 336x256"):
        size.cut(output[:, :250, :333])


def test_transparent_references_are_shown_on_white():
    clear = torch.zeros(1, 16, 16, 4)
    assert torch.equal(fit_reference(clear).picture, torch.ones(1, 16, 16, 3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit_reference(torch.rand(1, 32, 32, 3), "squash"), "'squash'; choose one of pad, kontext, crop"),
        (lambda: fit_reference(torch.rand(1, 32, 32, 3), budget_pixels=255), "budget of 255 pixels does not hold"),
        (lambda: fit_reference(torch.rand(1, 8, 32, 3), "crop"), "32x8 cannot be cropped to multiples of 16; pad it"),
        (lambda: fit_reference(torch.rand(1, 4, 400, 3)), r"\(400x4\) is more than 32 times as long"),
        (lambda: fit_reference(torch.rand(32, 32, 3)), "is no picture"),
        (lambda: reference_size_of_output(0, 32), "32x0 on a grid of 16 is no size"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_sentence(call, words):
    with pytest.raises(UserError, match=words):
        call()


@pytest.mark.parametrize(
    ("size", "wanted"), [((128, 128), (128, 128)), ((64, 200), (80, 192)), ((300, 100), (192, 80))]
)
def test_kontexts_sizes_are_in_proportion_to_what_a_model_was_trained_on(size, wanted):
    assert kontext_size(*size, native_side=128) == wanted
    said = []
    fitted = fit_reference(torch.rand(1, size[1], size[0], 3), "kontext", warn=said.append, native_side=128)
    assert fitted.picture.shape[1:3] == wanted[::-1]
    assert bool(said) == (size != wanted)


def test_a_reference_that_is_only_resized_is_said_too():
    said = []
    fit_reference(torch.rand(1, 512, 512, 3), "kontext", warn=said.append)
    assert said == ["the reference (512x512) is resized to 1024x1024"]
