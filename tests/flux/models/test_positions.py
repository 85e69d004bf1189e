"""Token positions and their rotation, against diffusers' and against what a rotation must be."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from flux.models.positions import LAYOUTS, apply_rope, image_ids, reference_ids, rope, rope_in_place, text_ids
from tests.oracles import TOLERANCE, relative_error, rows

AXES = (16, 56, 56)


def test_image_ids_count_rows_then_columns():
    assert image_ids(2, 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4), (3, 11), (64, 48)])
def test_image_ids_equal_those_of_diffusers(height, width):
    theirs = FluxPipeline._prepare_latent_image_ids(1, height, width, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(height, width), theirs)


def test_text_ids_are_zero():
    assert torch.equal(text_ids(5), torch.zeros(5, 3))


def grid_at(corner, grid):
    """Ids of a picture's tokens, row-major, the first of them at ``corner``."""
    place, top, left = corner
    return [[place, top + row, left + column] for row in range(grid[0]) for column in range(grid[1])]


# Latent cells of pictures, the output's, and by layout where the first token of each is: ComfyUI's rule by hand.
LAID_OUT = {
    "one": ([(4, 6)], (8, 8), {"offset": [(1, 0, 0)], "index": [(1, 0, 0)], "uxo": [(0, 4, 4)]}),
    "alike": (
        [(4, 4), (4, 4), (4, 4), (4, 4)],
        (4, 8),
        {
            "offset": [(1, 0, 0), (1, 2, 0), (1, 0, 2), (1, 4, 0)],
            "index": [(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0)],
            "uxo": [(0, 2, 4), (0, 4, 6), (0, 6, 8), (0, 8, 10)],
        },
    ),
    "wide, then tall": (
        [(4, 6), (4, 6), (8, 2), (2, 2)],
        (6, 4),
        {
            "offset": [(1, 0, 0), (1, 2, 0), (1, 0, 3), (1, 4, 0)],
            "index": [(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0)],
            "uxo": [(0, 3, 2), (0, 5, 5), (0, 7, 8), (0, 11, 9)],
        },
    ),
    "odd": (
        [(5, 3), (3, 5), (7, 1)],
        (5, 6),
        {
            "offset": [(1, 0, 0), (1, 3, 0), (1, 0, 3)],
            "index": [(1, 0, 0), (2, 0, 0), (3, 0, 0)],
            "uxo": [(0, 3, 3), (0, 6, 5), (0, 7, 7)],
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LAID_OUT)
def test_references_are_laid_out_by_comfyuis_rule(case, layout):
    sizes, image, corners = LAID_OUT[case]
    grids = [(math.ceil(height / 2), math.ceil(width / 2)) for height, width in sizes]
    expected = [ids for corner, grid in zip(corners[layout], grids, strict=True) for ids in grid_at(corner, grid)]
    assert reference_ids(sizes, image, layout).tolist() == expected


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4), (3, 11)])
def test_one_reference_has_the_ids_of_diffusers_kontext(height, width):
    theirs = FluxKontextPipeline._prepare_latent_image_ids(1, height, width, torch.device("cpu"), torch.float32)
    theirs[..., 0] = 1
    assert torch.equal(reference_ids([(2 * height, 2 * width)], (8, 8)), theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_two_tokens_of_image_and_references_are_in_one_place(layout):
    sizes, image = [(4, 6), (7, 3), (2, 9), (8, 8), (1, 1)], (6, 10)
    ids = torch.cat((image_ids(3, 5), reference_ids(sizes, image, layout)))
    assert len(ids.unique(dim=0)) == len(ids) == 15 + 6 + 8 + 5 + 16 + 1


def test_zero_ids_rotate_nothing_exactly():
    x = rows(2, 3, 5, 128, seed=0)
    assert torch.equal(rope(text_ids(5), AXES, 10_000.0), torch.ones(5, 64, dtype=torch.complex64))
    assert torch.equal(apply_rope(x, rope(text_ids(5), AXES, 10_000.0)), x)


@pytest.mark.parametrize("axes", [AXES, (2, 6, 8), (16, 10, 14)])
def test_rotation_equals_that_of_diffusers(axes):
    ids = torch.cat((text_ids(2), image_ids(5, 9) + torch.tensor([1.0, 200.0, 3.0])))
    x = rows(2, 3, len(ids), sum(axes), seed=0)
    theirs = apply_rotary_emb(x, FluxPosEmbed(10_000, list(axes))(ids))
    assert relative_error(apply_rope(x, rope(ids, axes, 10_000.0)), theirs) <= TOLERANCE


def test_each_axis_turns_only_its_own_dimensions():
    for axis, (start, stop) in enumerate([(0, 8), (8, 36), (36, 64)]):
        ids = torch.zeros(1, 3)
        ids[0, axis] = 5
        turned = rope(ids, AXES, 10_000.0)[0] != 1
        assert turned.nonzero().flatten().tolist() == list(range(start, stop))


def test_first_pair_turns_counterclockwise_by_the_position():
    unit = torch.zeros(1, 1, 1, 128)
    unit[..., 0] = 1
    turned = apply_rope(unit, rope(torch.tensor([[2.0, 0.0, 0.0]]), AXES, 10_000.0)).flatten()
    torch.testing.assert_close(turned[:2], torch.tensor([math.cos(2), math.sin(2)]))
    assert not turned[2:].any()


def test_rotated_products_depend_on_the_distance_only():
    q, k = rows(1, 1, 1, 128, seed=0), rows(1, 1, 1, 128, seed=1)

    def product(at, other):
        here, there = (rope(torch.tensor([ids]).float(), AXES, 10_000.0) for ids in (at, other))
        return float((apply_rope(q, here) * apply_rope(k, there)).sum())

    assert product((0, 3, 40), (0, 8, 31)) == pytest.approx(product((1, 13, 59), (1, 18, 50)), rel=1e-4)


def test_rotation_keeps_the_dtype_and_works_in_fp32():
    x = rows(1, 2, 45, 128, seed=0).bfloat16()
    rotation = rope(image_ids(5, 9), AXES, 10_000.0)
    assert torch.equal(apply_rope(x, rotation), apply_rope(x.float(), rotation).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_in_place_gives_the_same_and_takes_what_it_was_given(dtype):
    x, rotation = rows(2, 45, 2, 128, seed=0).to(dtype).transpose(1, 2), rope(image_ids(5, 9), AXES, 10_000.0)
    wanted = apply_rope(x, rotation)
    turned = rope_in_place(x, rotation)
    assert torch.equal(turned, wanted)
    assert (turned.data_ptr() == x.data_ptr()) == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_for_the_compiler_equals_the_complex_one(dtype, monkeypatch):
    x, rotation = rows(2, 2, 45, 128, seed=0).to(dtype), rope(image_ids(5, 9), AXES, 10_000.0)
    complex_one = apply_rope(x, rotation)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for_compiler = apply_rope(x, rotation)
    assert for_compiler.dtype == dtype
    torch.testing.assert_close(for_compiler, complex_one)
