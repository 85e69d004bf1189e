"""Noise against torch's global seed, as ComfyUI draws it, and against diffusers' randn_tensor."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flux.errors import UserError
from flux.sampling.noise import NOISE_STYLES, check_seed, comfyui_batch_noise, draw_noise, image_seeds

SHAPE = (16, 6, 4)
LAST = 2**64 - 1


def global_draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What code that calls torch.manual_seed and randn on the CPU gets."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("style", NOISE_STYLES)
@pytest.mark.parametrize("seeds", [[7], [7, 8, 3], [LAST, 0]])
def test_noise_is_fp32_on_the_cpu_with_one_row_for_each_seed(style: str, seeds: list[int]) -> None:
    noise = draw_noise(SHAPE, seeds, style)
    assert noise.shape == (len(seeds), *SHAPE)
    assert noise.dtype == torch.float32
    assert noise.device.type == "cpu"
    assert torch.equal(noise, draw_noise(SHAPE, seeds, style))


@pytest.mark.parametrize("style", ["comfyui", "bfl", "diffusers"])
def test_image_k_of_a_batch_equals_a_single_run_with_its_seed(style: str) -> None:
    seeds = image_seeds(LAST - 1, 4)
    batch = draw_noise(SHAPE, seeds, style)
    for row, seed in zip(batch, seeds, strict=True):
        assert torch.equal(row, draw_noise(SHAPE, [seed], style)[0])
    assert len({float(row.sum()) for row in batch}) == 4


@pytest.mark.parametrize("seed", [0, 1234, 2**32 + 5, LAST])
def test_comfyui_noise_is_what_its_global_seed_draws(seed: int) -> None:
    assert torch.equal(draw_noise(SHAPE, [seed], "comfyui"), global_draw(seed, 1, *SHAPE))


def test_bfl_noise_is_drawn_in_bf16_and_equals_the_rounded_fp32_draw() -> None:
    noise = draw_noise(SHAPE, [42], "bfl")
    assert torch.equal(noise, global_draw(42, 1, *SHAPE, dtype=torch.bfloat16).float())
    assert torch.equal(noise, draw_noise(SHAPE, [42]).bfloat16().float())
    assert not torch.equal(noise, draw_noise(SHAPE, [42]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_diffusers_noise_is_drawn_in_the_given_dtype_from_a_generator_for_each_image(dtype: torch.dtype) -> None:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (3, 9)]
    theirs = randn_tensor((2, *SHAPE), generator=generators, device=torch.device("cpu"), dtype=dtype)
    assert torch.equal(draw_noise(SHAPE, [3, 9], "diffusers", dtype=dtype), theirs.float())


def test_comfyui_batch_noise_is_one_draw_from_the_first_seed() -> None:
    expected = global_draw(5, 3, *SHAPE)
    assert torch.equal(comfyui_batch_noise(SHAPE, 5, 3), expected)
    assert torch.equal(draw_noise(SHAPE, image_seeds(5, 3), "comfyui_batch"), expected)
    each = draw_noise(SHAPE, image_seeds(5, 3))
    assert torch.equal(each[0], expected[0])
    assert not torch.equal(each[1], expected[1])


def test_noise_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    for style in NOISE_STYLES:
        draw_noise(SHAPE, [1, 2], style)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_noise_is_standard_normal() -> None:
    noise = draw_noise((16, 64, 64), [11], "comfyui")
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.std()) == pytest.approx(1, abs=0.01)


def test_seeds_count_up_and_wrap_after_the_last() -> None:
    assert image_seeds(40, 3) == [40, 41, 42]
    assert image_seeds(LAST - 1, 4) == [LAST - 1, LAST, 0, 1]
    assert image_seeds(40, 0) == []


def test_torch_takes_exactly_the_seeds_that_are_let_through() -> None:
    generator = torch.Generator("cpu")
    for seed in (0, 2**63, LAST):
        assert check_seed(seed) == seed
        assert generator.manual_seed(seed).initial_seed() == seed
    with pytest.raises((RuntimeError, ValueError)):
        generator.manual_seed(LAST + 1)


def test_seeds_two_to_the_32_apart_draw_the_same_on_the_cpu() -> None:
    """As the module's docstring says; a torch that changes this changes the noise of large seeds."""
    assert torch.equal(draw_noise(SHAPE, [5]), draw_noise(SHAPE, [5 + 2**32]))


@pytest.mark.parametrize("seed", [-1, LAST + 1])
def test_seeds_out_of_range_are_refused_everywhere(seed: int) -> None:
    for call in (
        lambda: check_seed(seed),
        lambda: image_seeds(seed, 2),
        lambda: draw_noise(SHAPE, [0, seed]),
        lambda: comfyui_batch_noise(SHAPE, seed, 1),
    ):
        with pytest.raises(UserError, match=f"Seed {seed} is outside 0 to {LAST}"):
            call()


def test_an_unknown_style_or_no_seed_is_refused() -> None:
    with pytest.raises(UserError, match=r"'a1111'.*comfyui, comfyui_batch, bfl, diffusers"):
        draw_noise(SHAPE, [1], "a1111")
    with pytest.raises(UserError, match="no seed"):
        draw_noise(SHAPE, [])
