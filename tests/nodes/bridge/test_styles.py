"""Style tokens in a CONDITIONING weigh what the engine's own run weighs, in any order and beside the host's styles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flux.adapters.attending import gather
from flux.adapters.guides import StyleTokens

PROMPT, WIDTH = 5, 8
ROWS, COLUMNS = 4, 3  # image tokens
PIXELS, CELLS = 16, 2  # along a token's side
ROUNDING = 1e-3  # of fp16, for logarithms of strengths up to 2


@pytest.fixture(scope="module")
def styles(part: Callable[[str], ModuleType]) -> ModuleType:
    return part("nodes.bridge.styles")


@pytest.fixture
def prompt() -> Tensor:
    return torch.randn(1, PROMPT, WIDTH, generator=torch.Generator().manual_seed(1))


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def region(rows: int = ROWS, columns: int = COLUMNS, seed: int = 9) -> Tensor:
    """Some image tokens in, some out, one partly."""
    tokens = (numbers(rows, columns, seed=seed) > 0.5).float()
    tokens[0, 0], tokens[0, 1], tokens[-1, -1] = 1, 0, 0.25
    return tokens.repeat_interleave(PIXELS, 0).repeat_interleave(PIXELS, 1)[None, None]


def no_stretch(mask: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    assert old == new
    return mask


def stretch(mask: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bilinear on both sides of the mask, the other side's tokens as channels; what the host does."""
    text = mask.shape[1] - math.prod(old)

    def columns(values: Tensor) -> Tensor:
        image = values[..., text:].unflatten(-1, old)
        return torch.cat((values[..., :text], F.interpolate(image, new, mode="bilinear").flatten(-2)), dim=-1)

    return columns(columns(mask).transpose(1, 2)).transpose(1, 2)


CASES = {
    "half": [StyleTokens(tokens=numbers(1, 3, WIDTH, seed=2), strength=0.5)],
    "masked": [StyleTokens(tokens=numbers(1, 4, WIDTH, seed=2), weights=torch.tensor([1.0, 0.25, 0.0, 1.0]))],
    "more than one": [
        StyleTokens(tokens=numbers(1, 3, WIDTH, seed=2), strength=2.0),
        StyleTokens(tokens=numbers(1, 2, WIDTH, seed=3)),
        StyleTokens(tokens=numbers(1, 4, WIDTH, seed=4), strength=0.3),
    ],
    "in a region": [StyleTokens(tokens=numbers(1, 3, WIDTH, seed=2), region=region())],
    "in two regions": [
        StyleTokens(tokens=numbers(1, 3, WIDTH, seed=2), strength=0.7, region=region()),
        StyleTokens(tokens=numbers(1, 2, WIDTH, seed=3), strength=1.4, region=1 - region()),
        StyleTokens(tokens=numbers(1, 2, WIDTH, seed=4)),
    ],
}


def as_styles(styles: ModuleType, guides: list[StyleTokens]) -> list:
    """Guides in the node's terms: strengths in the weights, and no token that weighs nothing."""
    made = []
    for guide in guides:
        weights = torch.ones(guide.tokens.shape[1]) if guide.weights is None else guide.weights
        kept = weights > 0
        made.append(styles.Style(guide.tokens[:, kept], weights[kept] * guide.strength, guide.region))
    return made


@pytest.mark.parametrize("name", CASES)
def test_text_and_mask_are_those_of_the_engines_own_run(styles: ModuleType, prompt: Tensor, name: str) -> None:
    ours = as_styles(styles, CASES[name])
    # A style that does nothing but ask for the grid at which both are to be compared.
    fine = styles.Style(torch.zeros(1, 1, WIDTH), torch.ones(1), torch.ones(1, 1, ROWS * PIXELS, COLUMNS * PIXELS))
    guides = [*CASES[name], StyleTokens(tokens=fine.tokens, region=fine.region)]
    text, extra = styles.append_styles(prompt, {}, [*ours, fine], no_stretch)
    wanted = gather(prompt, guides, (ROWS * CELLS, COLUMNS * CELLS))
    assert wanted.bias is not None
    assert torch.equal(text, wanted.text)
    assert extra[styles.MASK_GRID] == (ROWS, COLUMNS)
    bias = wanted.bias[0].clamp(min=styles.NEVER)
    assert bias.isfinite().all()
    torch.testing.assert_close(extra[styles.MASK].float(), bias, atol=ROUNDING, rtol=0)


def test_a_style_of_strength_one_everywhere_needs_no_mask(styles: ModuleType, prompt: Tensor) -> None:
    style = styles.Style(numbers(1, 3, WIDTH, seed=2), torch.ones(3))
    text, extra = styles.append_styles(prompt, {"guidance": 3.5}, [style], no_stretch)
    assert torch.equal(text, torch.cat((prompt, style.tokens), dim=1))
    assert styles.MASK not in extra
    assert extra["guidance"] == 3.5


def test_without_a_region_the_mask_is_one_for_all_of_the_picture(styles: ModuleType, prompt: Tensor) -> None:
    style = styles.Style(numbers(1, 3, WIDTH, seed=2), torch.full((3,), 0.5))
    _, extra = styles.append_styles(prompt, {}, [style], no_stretch)
    assert extra[styles.MASK_GRID] == (1, 1)
    assert extra[styles.MASK].shape == (1, PROMPT + 3 + 1, PROMPT + 3 + 1)


def trio(styles: ModuleType) -> dict[str, object]:
    """Of different strengths, lengths, regions and grids."""
    return {
        "a": styles.Style(numbers(1, 3, WIDTH, seed=2), torch.tensor([0.5, 1.0, 2.0]), region()),
        "b": styles.Style(numbers(1, 2, WIDTH, seed=3), torch.tensor([1.0, 1.0])),
        "c": styles.Style(numbers(1, 4, WIDTH, seed=4), torch.full((4,), 0.3), region(2, 2, seed=5)),
    }


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_one_after_the_other_in_any_order_is_what_all_at_once_is(
    styles: ModuleType, prompt: Tensor, order: tuple[str, ...]
) -> None:
    given = trio(styles)
    text, extra = prompt, {}
    for name in order:
        text, extra = styles.append_styles(text, extra, [given[name]], stretch)
    whole, wanted = styles.append_styles(prompt, {}, list(given.values()), stretch)
    # Where the tokens of a, b, c and the image's stand in the sequence of this order.
    places, behind = {}, PROMPT
    for name in order:
        count = len(given[name].weights)
        places[name] = range(behind, behind + count)
        behind += count
    sequence = [*range(PROMPT), *places["a"], *places["b"], *places["c"], *range(behind, behind + ROWS * COLUMNS)]
    assert torch.equal(text[:, sequence[: whole.shape[1]]], whole)
    assert extra[styles.MASK_GRID] == wanted[styles.MASK_GRID] == (ROWS, COLUMNS)
    assert torch.equal(extra[styles.MASK][:, sequence][:, :, sequence], wanted[styles.MASK])


def test_nothing_that_came_in_is_changed(styles: ModuleType, prompt: Tensor) -> None:
    style = trio(styles)["a"]
    text, extra = styles.append_styles(prompt, {}, [style], stretch)
    before = text.clone(), extra[styles.MASK].clone(), extra.copy()
    styles.append_styles(text, extra, [style], stretch)
    assert torch.equal(text, before[0])
    assert torch.equal(extra[styles.MASK], before[1])
    assert extra == before[2]


@pytest.mark.parametrize("kind", ["bias", "bool"])
def test_what_another_node_weighs_stays_as_it_is(styles: ModuleType, prompt: Tensor, kind: str) -> None:
    size = PROMPT + 4 * 2
    allowed = numbers(1, size, size, seed=6) > 0.3
    foreign = allowed if kind == "bool" else torch.where(allowed, numbers(1, size, size, seed=7), -math.inf)
    style = styles.Style(numbers(1, 3, WIDTH, seed=2), torch.full((3,), 0.5))
    _, extra = styles.append_styles(prompt, {styles.MASK: foreign, styles.MASK_GRID: (4, 2)}, [style], no_stretch)
    mask = extra[styles.MASK].float()
    others = [*range(PROMPT), *range(PROMPT + 3, size + 3)]
    kept = mask[:, others][:, :, others]
    assert extra[styles.MASK_GRID] == (4, 2)
    assert torch.equal(kept == styles.NEVER, ~allowed)
    values = torch.zeros(1, size, size) if kind == "bool" else foreign
    torch.testing.assert_close(kept[allowed], values[allowed], atol=ROUNDING, rtol=0)
    assert (mask[:, others, PROMPT : PROMPT + 3] - math.log(0.5)).abs().max() < ROUNDING
    assert (mask[:, PROMPT : PROMPT + 3] == 0).all()


def test_a_mask_of_another_grid_is_stretched_to_the_regions_without_a_number_that_is_none(
    styles: ModuleType, prompt: Tensor
) -> None:
    foreign = torch.zeros(1, PROMPT + 1, PROMPT + 1)
    foreign[:, :, 1], foreign[:, :, 2] = -math.inf, 0.5
    style = styles.Style(numbers(1, 3, WIDTH, seed=2), torch.ones(3), region())
    _, extra = styles.append_styles(prompt, {styles.MASK: foreign, styles.MASK_GRID: (1, 1)}, [style], stretch)
    mask = extra[styles.MASK]
    image = slice(PROMPT + 3, None)
    assert mask.shape[-1] == PROMPT + 3 + ROWS * COLUMNS
    assert mask.isfinite().all()
    assert (mask[:, image, 1] == styles.NEVER).all()
    assert (mask[:, image, 2] == 0.5).all()


def test_a_mask_that_flux_would_not_read_is_left_out(styles: ModuleType, prompt: Tensor) -> None:
    style = styles.Style(numbers(1, 3, WIDTH, seed=2), torch.full((3,), 0.5))
    _, plain = styles.append_styles(prompt, {}, [style], no_stretch)
    _, extra = styles.append_styles(prompt, {styles.MASK: torch.ones(1, PROMPT)}, [style], no_stretch)
    assert torch.equal(extra[styles.MASK], plain[styles.MASK])


def test_a_mask_that_does_not_belong_to_the_text_is_refused(
    part: Callable[[str], ModuleType], styles: ModuleType, prompt: Tensor
) -> None:
    style = styles.Style(numbers(1, 3, WIDTH, seed=2), torch.full((3,), 0.5))
    text, extra = styles.append_styles(prompt, {}, [style], no_stretch)
    longer = torch.cat((text, prompt), dim=1)
    with pytest.raises(
        part("flux.errors").UserError, match=r"has 13 text tokens, but its attention mask is made for 8"
    ):
        styles.append_styles(longer, extra, [style], no_stretch)


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [(1024, 1024, (64, 64)), (128, 96, (8, 6)), (130, 100, (9, 7)), (8, 8, (1, 1)), (2048, 1024, (90, 45))],
)
def test_the_grid_is_the_one_of_a_picture_of_the_regions_size_as_far_as_memory_allows(
    styles: ModuleType, height: int, width: int, grid: tuple[int, int]
) -> None:
    assert styles.grid_of(torch.ones(1, 1, height, width)) == grid
