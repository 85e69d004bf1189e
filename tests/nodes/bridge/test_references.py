"""References beside styles weigh what the engine's own run weighs; and what FLUX Reference refuses and gives back."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from fake_host import Vae
from torch import Tensor
from torch.nn import functional as F

REFERENCE = {"strength": 1.0, "start": 0.0, "end": 1.0, "layout": "auto", "fit": "pad", "max_megapixels": 1.0}
PROMPT, WIDTH, ROWS, COLUMNS = 5, 8, 4, 4  # text tokens, their width, and image tokens
CELLS, PIXELS = 2, 16  # along a token's side
ROUNDING = 1e-3  # of fp16, for logarithms of strengths up to 2


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(**extra: object) -> list:
    return [[numbers(1, 4, WIDTH), {"guidance": 3.0, **extra}]]


@pytest.fixture
def references(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("nodes.bridge.references")


@pytest.fixture
def refer(run: Callable) -> Callable[..., tuple]:
    def add(**changes: object) -> tuple:
        given = {"conditioning": prompt(), "vae": Vae(), "image": numbers(1, 48, 32, 3), **REFERENCE}
        return run("references", "Reference", **{**given, **changes})

    return add


def left(rest: float = 0.0) -> Tensor:
    """A region (1, 1, H, W) of the picture's left half, and something of it everywhere."""
    region = torch.full((1, 1, ROWS * PIXELS, COLUMNS * PIXELS), rest)
    region[..., : COLUMNS * PIXELS // 2] = 1
    return region


STYLES = {
    "weak": ([0.2], None), "strong": ([2.0], None), "in a region": ([1.0], left()),
    "weak in a region": ([0.3], left(0.1)), "several": ([0.2, 1.0, 1.7], left(0.4)),
}  # fmt: skip
VIEWS = {"plain": (1.0, None), "weak": (0.4, None), "in a region": (0.7, left())}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("style", STYLES)
def test_styles_and_references_weigh_what_the_engines_own_run_weighs(
    load: Callable[[str], ModuleType], references: ModuleType, style: str, view: str
) -> None:
    styles, guides, attending = (
        load(name) for name in ("nodes.bridge.styles", "flux.adapters.guides", "flux.adapters.attending")
    )
    (strengths, region), (strength, seen) = STYLES[style], VIEWS[view]
    text, tokens = numbers(1, PROMPT, WIDTH), [numbers(1, 3, WIDTH, seed=index) for index in range(len(strengths))]
    # One more that does nothing but ask for the grid at which both are to be compared.
    fine = styles.Style(torch.zeros(1, 1, WIDTH), torch.ones(1), torch.ones(1, 1, ROWS * PIXELS, COLUMNS * PIXELS))
    made = [styles.Style(each, torch.full((3,), own), region) for each, own in zip(tokens, strengths, strict=True)]
    joined, extra = styles.append_styles(text, {}, [*made, fine], lambda mask, *_: mask)
    size, latents = (ROWS * CELLS, COLUMNS * CELLS), numbers(1, 2, 4, 6)
    bias = references.joint_bias(
        extra[styles.MASK].float(), [(strength, seen)], joined.shape[1], size, [6], torch.device("cpu")
    )
    wanted = attending.gather(
        text,
        [
            *(
                guides.StyleTokens(tokens=each, strength=own, region=region)
                for each, own in zip(tokens, strengths, strict=True)
            ),
            guides.StyleTokens(tokens=fine.tokens, region=fine.region),
            guides.Reference(latents=latents, strength=strength, region=seen),
        ],
        size,
    ).bias
    assert bias.shape == wanted[0].shape
    torch.testing.assert_close(
        bias.clamp(min=styles.NEVER), wanted[0].clamp(min=styles.NEVER), atol=ROUNDING, rtol=1e-3
    )
    assert bool((bias[:, -6:, PROMPT : PROMPT + 3] != 0).all())


def test_a_mask_without_references_is_given_on_as_it_is(references: ModuleType) -> None:
    mask = numbers(1, PROMPT + 4, PROMPT + 4)
    assert torch.equal(references.joint_bias(mask, (), PROMPT, (4, 4), [], torch.device("cpu")), mask)


def test_references_attend_to_image_and_references_freely_under_a_mask(references: ModuleType) -> None:
    mask = -numbers(2, PROMPT + 4, PROMPT + 4)
    bias = references.joint_bias(mask, (), PROMPT, (4, 4), [3, 2], torch.device("cpu"))
    assert torch.equal(bias[:, : PROMPT + 4, : PROMPT + 4], mask)
    assert not bias[:, PROMPT + 4 :, PROMPT:].any()
    assert torch.equal(bias[:, PROMPT + 4 :, :PROMPT], mask[:, :1, :PROMPT].expand(-1, 5, -1))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 32, 8, 8), (1, 128, 4, 4), (1, 16, 1, 8, 8)])
def test_a_reference_of_another_family_is_refused(
    load: Callable[[str], ModuleType], references: ModuleType, shape: tuple[int, ...]
) -> None:
    with pytest.raises(load("flux.errors").MismatchError, match=r"carries a reference of shape \[1, .* with 16 chan"):
        references.reference_tokens([torch.zeros(1, 16, 8, 8), torch.zeros(shape)], 64, 16)


def test_references_of_the_models_own_channels_get_zeros_for_what_only_the_image_has(references: ModuleType) -> None:
    latent = numbers(1, 16, 6, 8)
    [tokens] = references.reference_tokens([latent], 128, 16)
    assert tokens.shape == (1, 12, 128)
    assert torch.equal(tokens[0, 0, :64].view(16, 2, 2), latent[0, :, :2, :2])
    assert not tokens[..., 64:].any()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vae": Vae(4)}, "FLUX.1's have 16 channels"),
        ({"vae": Vae(128)}, "FLUX.1's have 16 channels"),
        ({"image": numbers(1, 32, 32, 3) / 0}, "not finite"),
        ({"region": torch.zeros(1, 32, 32)}, "the region's mask is black everywhere, so the reference would be seen"),
        ({"region": torch.ones(2, 32, 32)}, r"the region has shape \[2, 32, 32\]; give one mask"),
    ],
)
def test_what_a_reference_cannot_take_is_refused(
    load: Callable[[str], ModuleType], refer: Callable, given: dict, words: str
) -> None:
    with pytest.raises(load("flux.errors").FluxFoundryError, match=words):
        refer(**given)


def test_a_result_of_a_reference_above_its_budget_is_scaled_back(
    load: Callable[[str], ModuleType], run: Callable, refer: Callable, said: Callable[[], str]
) -> None:
    image = F.interpolate(numbers(2, 3, 5, 4), (101, 83), mode="bilinear").movedim(1, -1)
    _, latent, crop = refer(image=image, max_megapixels=0.004)
    height, width = (8 * side for side in latent["samples"].shape[-2:])
    assert height * width < 101 * 83
    assert "scales the result back to the reference's own size, 83x101" in said()
    drawn = numbers(2, height, width, 3)
    [whole] = run("editing", "Stitch", image=drawn, crop=crop, colour_match=0.0)
    control, fit = load("flux.preprocess.control"), load("flux.preprocess.references")
    size = fit.fit_reference(image, "pad", round(0.004 * 1024 * 1024)).size
    assert torch.equal(whole, control.resize(size.cut(drawn), 101, 83))
    [same] = run("editing", "Stitch", image=crop.picture, crop=crop, colour_match=0.0)
    assert float((same - image).abs().mean()) < 0.02


@pytest.mark.parametrize(("fit", "size"), [("pad", (101, 83)), ("crop", (96, 80)), ("kontext", (1104, 944))])
def test_a_result_within_the_budget_has_the_size_that_its_fit_says(
    run: Callable, refer: Callable, said: Callable[[], str], fit: str, size: tuple[int, int]
) -> None:
    _, _, crop = refer(image=numbers(1, 101, 83, 3), fit=fit)
    [whole] = run("editing", "Stitch", image=crop.picture, crop=crop, colour_match=0.0)
    assert whole.shape[1:3] == size
    assert "scales the result back" not in said()


def test_a_reference_of_strength_0_leaves_the_prompt_as_it_is(refer: Callable) -> None:
    conditioning, latent, _ = refer(strength=0.0)
    assert [set(extra) for _, extra in conditioning] == [{"guidance"}]
    assert math.prod(latent["samples"].shape) == 16 * 6 * 4
