from __future__ import annotations

import pytest


@pytest.mark.parametrize("text", ["1.0, 0.5, 0", "1 .5 0", " 1;0.5;\n0 "])
def test_explicit_sigmas_may_be_parted_in_any_usual_way(part, text: str) -> None:
    assert part("nodes.sampling").parse_sigmas(text) == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("text", "words"), [("1, a, 0", "'a'"), ("1, 2, 0", "is 2.0"), ("0.5", "two sigmas"), ("1, nan, 0", "nan")]
)
def test_wrong_explicit_sigmas_are_named(part, text: str, words: str) -> None:
    with pytest.raises(part("flux.errors").UserError, match=words):
        part("nodes.sampling").parse_sigmas(text)
