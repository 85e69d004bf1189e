"""A tower sees what Hugging Face's processor gives it, masks lie under the picture, tokens are merged as by ToMe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from flux.errors import UserError
from flux.preprocess.vision import MAX_TILES, VIEWS, merge_tokens, reduce_grid, vision_pixels
from flux.specs.vision import SIGLIP_MINI, SIGLIP_SO400M

SIDE, PATCH = SIGLIP_MINI.side, SIGLIP_MINI.patch
GRID = SIGLIP_MINI.grid
LEVEL = 2 / 255  # of 8 bits, in -1..1


def levels(height: int, width: int, batch: int = 1) -> torch.Tensor:
    """A noisy picture of 8-bit levels."""
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (batch, height, width, 3), generator=generator).float() / 255


def ramp(height: int, width: int) -> torch.Tensor:
    """Red grows to the right, green downwards, from 0 to 1 at the edges; blue is 1."""
    red = ((torch.arange(width) + 0.5) / width).expand(height, width)
    green = ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
    return torch.stack([red, green, torch.ones(height, width)], dim=-1)[None]


@pytest.mark.parametrize("spec", [SIGLIP_SO400M, SIGLIP_MINI], ids=lambda spec: spec.name)
@pytest.mark.parametrize(("height", "width"), [(500, 320), (90, 70), (384, 384)])
def test_a_stretched_picture_is_what_siglips_processor_gives(spec, height, width):
    pil = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    processor = pil.SiglipImageProcessorPil(size={"height": spec.side, "width": spec.side})
    image = levels(height, width)
    array = (image[0] * 255).round().byte().numpy()
    wanted = torch.as_tensor(processor(images=Image.fromarray(array), return_tensors="pt")["pixel_values"])
    views = vision_pixels(image, spec.side)
    assert views.weights is None
    assert views.pixels.shape == (1, 3, spec.side, spec.side)
    torch.testing.assert_close(views.pixels, wanted, atol=1e-5, rtol=0)


def test_torchs_own_bicubic_filter_agrees_to_a_level():
    image = levels(300, 200) * 0.6 + 0.2  # Pillow cuts overshoot between its two passes, which torch does not
    wanted = F.interpolate(image.movedim(-1, 1), (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
    assert (vision_pixels(image, SIDE).pixels - wanted).abs().max() < 1.5 * LEVEL


@pytest.mark.parametrize("how", VIEWS)
def test_a_square_picture_is_seen_the_same_in_every_way(how):
    image = levels(200, 200)
    views = vision_pixels(image, SIDE, how)
    assert torch.equal(views.pixels, vision_pixels(image, SIDE).pixels)
    assert views.weights is None or torch.equal(views.weights, torch.ones(1, GRID**2))


@pytest.mark.parametrize(("height", "width"), [(100, 200), (200, 100), (170, 300)])
def test_cropping_sees_the_middle_at_the_pictures_own_aspect(height, width):
    seen = (vision_pixels(ramp(height, width), SIDE, "crop").pixels[0] + 1) / 2
    short = min(height, width)
    for channel, size, axis in ((0, width, 0), (1, height, 1)):
        line = seen[channel].mean(dim=axis)
        wanted = 0.5 + ((torch.arange(SIDE) + 0.5) / SIDE - 0.5) * short / size
        assert (line - wanted)[2:-2].abs().max() < 0.006


def test_padding_sees_all_of_the_picture_with_middle_grey_beside_it_that_weighs_nothing():
    views = vision_pixels(ramp(100, 300), SIDE, "pad")
    grey = (views.pixels[0] == 0).all(dim=0)  # no pixel of this picture is
    rows = grey.all(dim=1)
    assert rows.sum() == SIDE - 42
    assert not grey[~rows].any()
    assert torch.equal(rows, torch.arange(SIDE).sub(62.5).abs() > 21)
    torch.testing.assert_close(views.pixels[:, :, ~rows], vision_squeezed(ramp(100, 300), 42, SIDE))
    wanted = (~rows).float().view(GRID, PATCH).mean(dim=1)[:, None].expand(GRID, GRID)
    torch.testing.assert_close(views.weights, wanted.reshape(1, -1))
    assert 0 < views.weights.sum() < GRID**2


def test_what_counts_of_a_view_is_shown_and_the_rest_is_grey():
    picture, edge = ramp(SIDE, SIDE), 4 * PATCH
    torch.testing.assert_close(vision_pixels(picture, SIDE).shown(), picture, rtol=0, atol=1 / 255)
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, :, edge:] = 1
    shown = vision_pixels(picture, SIDE, mask=mask).shown()
    torch.testing.assert_close(shown[:, :, edge:], picture[:, :, edge:], rtol=0, atol=1 / 255)
    assert (shown[:, :, :edge] == 0.5).all()


def vision_squeezed(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    array = (image[0] * 255).round().byte().numpy()
    resized = np.array(Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized).movedim(-1, 0)[None].float() / 127.5 - 1


@pytest.mark.parametrize(
    ("height", "width", "count"), [(100, 105, 1), (100, 150, 2), (100, 215, 2), (300, 100, 3), (100, 390, 4)]
)
def test_tiles_are_squares_from_end_to_end_and_together_see_everything(height, width, count):
    said = []
    tiles = (vision_pixels(ramp(height, width), SIDE, "tiled", warn=said.append).pixels + 1) / 2
    assert said == []
    assert tiles.shape[0] == count
    along, across = (0, 1) if width > height else (1, 0)
    spans = [(tile[along].min().item(), tile[along].max().item()) for tile in tiles]
    assert spans[0][0] < 0.02
    assert spans[-1][1] > 0.98
    assert all(earlier[1] >= later[0] - 0.01 for earlier, later in zip(spans, spans[1:], strict=False))
    assert all(tile[across].min() < 0.02 and tile[across].max() > 0.98 for tile in tiles)
    widths = [end - start for start, end in spans]
    assert max(widths) - min(widths) < 0.02
    if count > 1:  # squares of the picture, but for the squeeze that saves a tile
        assert widths[0] == pytest.approx(min(height, width) / max(height, width), rel=0.1, abs=0.01)


def test_a_very_long_picture_is_squeezed_into_the_most_tiles_and_this_is_said():
    said = []
    assert vision_pixels(ramp(50, 600), SIDE, "tiled", warn=said.append).pixels.shape[0] == MAX_TILES
    assert len(said) == 1
    assert f"(600x50) is 12.0 times as long as it is wide: it is squeezed into {MAX_TILES} squares" in said[0]


def test_a_batch_gives_each_pictures_views_after_another():
    image = levels(60, 100, batch=2)
    for how in VIEWS:
        both = vision_pixels(image, SIDE, how)
        alone = [vision_pixels(image[index : index + 1], SIDE, how) for index in range(2)]
        assert torch.equal(both.pixels, torch.cat([views.pixels for views in alone]))
        if both.weights is not None:
            assert torch.equal(both.weights, torch.cat([views.weights for views in alone]))


@pytest.mark.parametrize("how", VIEWS)
@pytest.mark.parametrize(("height", "width"), [(120, 200), (200, 120), (90, 90)])
def test_a_mask_lies_where_the_picture_lies_in_every_way_to_see_it(how, height, width):
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : height // 2, width // 3 : 2 * width // 3] = 1
    # The mask is drawn as a picture too: seen through the tower's own view, its brightness must be the weights.
    drawn = mask[..., None].repeat(1, 1, 1, 3)
    views = vision_pixels(drawn, SIDE, how, mask=mask)
    seen = (views.pixels[:, :1] + 1) / 2
    if how == "pad":
        seen = seen.where(views.pixels[:, :1] != 0, 0)  # the grey beside the picture
    wanted = F.avg_pool2d(seen, PATCH).flatten(1)
    assert views.weights.max() > 0.8
    assert views.weights.min() == 0
    assert (views.weights - wanted).abs().max() < 0.02


def test_pixels_that_no_patch_holds_have_no_weight_of_their_own():
    views = vision_pixels(levels(64, 64), SIGLIP_SO400M.side, mask=torch.ones(1, 64, 64))
    assert torch.equal(views.weights, torch.ones(1, SIGLIP_SO400M.grid**2))


def test_one_mask_serves_a_batch_and_a_mask_of_another_size_covers_the_same_places():
    image = levels(80, 120, batch=2)
    mask = torch.zeros(1, 40, 60)
    mask[:, :20] = 1
    said = []
    weights = vision_pixels(image, SIDE, mask=mask, warn=said.append).weights
    assert said == []
    assert torch.equal(weights[0], weights[1])
    large = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert (weights - vision_pixels(image, SIDE, mask=large).weights).abs().max() < 0.1
    assert torch.equal(weights[0].view(GRID, GRID)[:4], torch.ones(4, GRID))
    assert not weights[0].view(GRID, GRID)[5:].any()


def test_a_mask_of_another_aspect_is_stretched_and_this_is_said():
    said = []
    vision_pixels(levels(80, 120), SIDE, mask=torch.ones(1, 50, 50), warn=said.append)
    assert len(said) == 1
    assert "mask (50x50) has another aspect than its picture (120x80): it is stretched" in said[0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: vision_pixels(levels(8, 8), SIDE, "squash"), "'squash'; choose one of stretch, crop, pad, tiled"),
        (lambda: vision_pixels(levels(8, 8)[0], SIDE), "is no picture"),
        (lambda: vision_pixels(levels(8, 8), SIDE, mask=torch.zeros(1, 8, 8)), "mask is black .* or invert the mask"),
        (lambda: vision_pixels(levels(8, 8), SIDE, mask=torch.ones(8, 8)), r"mask has shape \[8, 8\]; give one mask"),
        (lambda: vision_pixels(levels(8, 8), SIDE, mask=torch.ones(2, 8, 8)), r"mask has shape \[2, 8, 8\]"),
        (lambda: reduce_grid(torch.rand(1, 9, 2), None, 4), "grid of 3x3 tokens cannot become 4x4"),
        (lambda: reduce_grid(torch.rand(1, 9, 2), None, 0), "cannot become 0x0"),
        (lambda: merge_tokens(torch.rand(1, 9, 2), None, 0), "0 tokens cannot be left"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_a_mask_that_only_shows_what_is_cropped_away_is_refused():
    mask = torch.zeros(1, 50, 200)
    mask[:, :, :30] = 1
    with pytest.raises(UserError, match="black in all that is seen"):
        vision_pixels(levels(50, 200), SIDE, "crop", mask=mask)


def test_a_view_of_no_grid_is_our_own_mistake():
    with pytest.raises(ValueError, match="10 tokens are no square grid"):
        reduce_grid(torch.rand(1, 10, 2), None, 2)


def random_tokens(count: int, views: int = 1, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(views, count, width, generator=generator), torch.rand(views, count, generator=generator)


def averaged_by_hand(tokens: torch.Tensor, weights: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every new cell's tokens gathered one by one, with the bounds of torch's adaptive pooling."""
    grid = int(tokens.shape[0] ** 0.5)
    bounds = [(i * grid // side, -(-(i + 1) * grid // side)) for i in range(side)]
    cells = [
        [row * grid + column for row in range(*rows) for column in range(*columns)]
        for rows in bounds
        for columns in bounds
    ]
    means = [(tokens[cell] * weights[cell, None]).sum(0) / weights[cell].sum() for cell in cells]
    return torch.stack(means), torch.stack([weights[cell].mean() for cell in cells])


@pytest.mark.parametrize("side", [9, 5, 4, 1])
def test_a_coarser_grid_holds_weighted_averages(side):
    tokens, weights = random_tokens(GRID**2, views=2)
    reduced, left = reduce_grid(tokens, weights, side)
    for view in range(2):
        wanted, wanted_weights = averaged_by_hand(tokens[view], weights[view], side)
        torch.testing.assert_close(reduced[view], wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(left[view], wanted_weights)


def test_a_grid_without_weights_is_averaged_plainly():
    tokens, _ = random_tokens(27**2)
    reduced, left = reduce_grid(tokens, None, 9)
    assert left is None
    torch.testing.assert_close(reduced, tokens.view(1, 9, 3, 9, 3, -1).mean(dim=(2, 4)).flatten(1, 2))


def test_tokens_that_weigh_nothing_have_no_part_in_a_cell_and_a_cell_of_only_such_stays_finite():
    tokens, _ = random_tokens(16)
    weights = torch.zeros(1, 16)
    weights[0, 5] = 1
    reduced, left = reduce_grid(tokens, weights, 2)
    torch.testing.assert_close(reduced[0, 0], tokens[0, 5])
    assert left.tolist() == [[0.25, 0, 0, 0]]
    assert reduced.isfinite().all()


def test_the_grids_type_stays():
    tokens, weights = random_tokens(16)
    reduced, left = reduce_grid(tokens.bfloat16(), weights, 2)
    assert reduced.dtype == torch.bfloat16
    assert left.dtype == torch.float32


def merged_by_hand(tokens: np.ndarray, target: int) -> list[tuple[np.ndarray, set[int]]]:
    """ToMe as its paper tells it, token by token: values, and which of the first tokens each stands for."""
    parts = [(token, {index}) for index, token in enumerate(tokens)]
    while len(parts) > target:
        first, second = list(range(0, len(parts), 2)), list(range(1, len(parts), 2))

        def likeness(a: int, b: int, parts=parts) -> float:
            x, y = parts[a][0], parts[b][0]
            return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

        edges = [max((likeness(a, b), a, b) for b in second) for a in first]
        chosen = sorted(edges, reverse=True)[: min(len(parts) - target, len(parts) // 2)]
        groups = {b: [b] for b in second} | {a: [a] for a in first}
        for _, a, b in chosen:
            groups[b] += groups.pop(a)
        parts = [
            (
                sum(len(parts[i][1]) * parts[i][0] for i in group) / sum(len(parts[i][1]) for i in group),
                set().union(*(parts[i][1] for i in group)),
            )
            for _, group in sorted(groups.items())
        ]
    return parts


@pytest.mark.parametrize("target", [1, 7, 20, 36, 40])
def test_tokens_are_merged_as_the_paper_tells(target):
    tokens, _ = random_tokens(41)
    wanted = torch.from_numpy(np.stack([value for value, _ in merged_by_hand(tokens[0].double().numpy(), target)]))
    merged, weights = merge_tokens(tokens, None, target)
    assert weights is None
    torch.testing.assert_close(merged[0].double(), wanted, atol=1e-5, rtol=1e-5)


def test_merging_keeps_the_mean_and_the_order_and_joins_what_is_alike():
    tokens = torch.tensor([[[1.0, 0], [0, 1], [0, 3], [1, 0.01], [-1, 0], [0, -1]]])
    merged, _ = merge_tokens(tokens, None, 4)
    torch.testing.assert_close(merged, torch.tensor([[[0, 2], [1, 0.005], [-1, 0], [0, -1]]]))
    tokens, _ = random_tokens(64)
    sizes = torch.tensor([len(members) for _, members in merged_by_hand(tokens[0].double().numpy(), 10)])
    merged = merge_tokens(tokens, None, 10)[0][0]
    torch.testing.assert_close((merged * sizes[:, None]).sum(0) / 64, tokens[0].mean(0), atol=1e-5, rtol=1e-5)


def test_as_many_tokens_or_more_change_nothing():
    tokens, weights = random_tokens(9)
    for target in (9, 10):
        same, left = merge_tokens(tokens, weights, target)
        assert same is tokens
        assert left is weights


def test_each_sequence_is_merged_by_itself_and_always_the_same():
    tokens, weights = random_tokens(33, views=3)
    merged, left = merge_tokens(tokens, weights, 12)
    for view in range(3):
        alone, weight = merge_tokens(tokens[view : view + 1], weights[view : view + 1], 12)
        assert torch.equal(merged[view], alone[0])
        assert torch.equal(left[view], weight[0])


def test_tokens_that_are_all_alike_merge_into_themselves():
    merged, left = merge_tokens(torch.ones(1, 8, 4), torch.full((1, 8), 0.5), 3)
    torch.testing.assert_close(merged, torch.ones(1, 3, 4))
    torch.testing.assert_close(left, torch.full((1, 3), 0.5))


def test_merged_tokens_lean_to_what_counts_and_weights_are_averaged():
    tokens = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    merged, left = merge_tokens(tokens, torch.tensor([[0.75, 0.25]]), 1)
    torch.testing.assert_close(merged, torch.tensor([[[1.5, 0.0]]]))
    torch.testing.assert_close(left, torch.tensor([[0.5]]))


def test_tokens_that_weigh_nothing_go_before_any_is_merged():
    tokens, weights = random_tokens(20)
    weights[0, ::2] = 0
    kept, left = merge_tokens(tokens, weights, 10)
    assert torch.equal(kept, tokens[:, 1::2])
    assert torch.equal(left, weights[:, 1::2])
    some, left = merge_tokens(tokens, weights, 12)
    assert torch.equal(some[left > 0], tokens[weights > 0])
    fewer, _ = merge_tokens(tokens, weights, 6)
    torch.testing.assert_close(fewer, merge_tokens(tokens[:, 1::2], weights[:, 1::2], 6)[0])
    nothing, left = merge_tokens(tokens, torch.zeros(1, 20), 6)
    assert nothing.isfinite().all()
    assert not left.any()
