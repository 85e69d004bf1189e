from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def sizes(part):
    return part("nodes.sizes")


@pytest.mark.parametrize(
    ("aspect", "size"),
    [
        ("1:1", (1024, 1024)), ("4:3", (1184, 880)), ("3:2", (1248, 832)), ("16:9", (1360, 768)), ("21:9", (1568, 672)),
        ("3:4", (880, 1184)), ("2:3", (832, 1248)), ("9:16", (768, 1360)), ("9:21", (672, 1568)),
    ],
)  # fmt: skip
def test_presets_have_a_megapixel_at_their_aspect(sizes, aspect: str, size: tuple[int, int]) -> None:
    assert sizes.picture_size(aspect, 1.0, 0, 0) == size


def test_no_side_gets_longer_than_2048_and_the_aspect_stays(sizes) -> None:
    for aspect, ratio in sizes.ASPECTS.items():
        width, height = sizes.picture_size(aspect, 4.0, 2048, 2048)
        assert max(width, height) <= 2048
        assert width % 16 == height % 16 == 0
        assert ratio is None or width / height == pytest.approx(ratio, rel=0.02)


def test_exact_sizes_are_rounded_to_the_grid(sizes) -> None:
    assert sizes.picture_size(sizes.EXACT, 1.0, 130, 120) == (128, 128)
    assert sizes.picture_size(sizes.EXACT, 1.0, 1, 2048) == (16, 2048)


def test_exact_sizes_that_another_node_gives_are_held_to_2048_too(sizes) -> None:
    assert sizes.picture_size(sizes.EXACT, 1.0, 4000, 100_000) == (2048, 2048)


def test_the_embedded_models_size_ignores_the_rest(sizes) -> None:
    assert sizes.picture_size(sizes.MINI, 4.0, 512, 512) == (128, 128)


def test_tokens_cover_the_picture(sizes) -> None:
    assert sizes.image_tokens(128, 128) == 64
    assert sizes.image_tokens(1024, 1024) == 4096
    assert sizes.image_tokens(130, 16) == 9
