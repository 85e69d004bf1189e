"""What a user grants, and what it leaves for weights."""

from __future__ import annotations

import pytest

from flux.errors import UserError
from flux.memory.policy import GIB, POLICIES, RESERVE, Needs, Policy, needs_strips, read_policy, weights_limit

NEEDS = Needs(whole=16 * GIB, least=1 * GIB, working=2 * GIB)


@pytest.mark.parametrize("word", POLICIES)
def test_policies_are_words(word):
    assert read_policy(f" {word.upper()} ") == Policy(word)
    assert str(read_policy(word)) == word


@pytest.mark.parametrize("text", ["6", "6.0", "6 GiB", "6gb", " 6GiB "])
def test_a_number_is_a_budget_in_gib(text):
    assert read_policy(text) == Policy("budget", 6 * GIB)
    assert str(read_policy(text)) == "6 GiB"


@pytest.mark.parametrize("text", ["", "fast", "0", "-1", "nan", "inf", "6 MB"])
def test_anything_else_is_refused_with_the_choices(text):
    with pytest.raises(UserError, match="auto, keep, balance, save, or a budget in GiB"):
        read_policy(text)


@pytest.mark.parametrize(
    ("policy", "available", "limit"),
    [
        ("keep", 0, None),
        ("save", 80 * GIB, 0),
        ("balance", 0, 8.5 * GIB),
        ("auto", 18 * GIB + RESERVE, None),
        ("auto", 18 * GIB + RESERVE - 1, 16 * GIB - 1),
        ("auto", 0, 1 * GIB),
        ("12", 0, 10 * GIB),
        ("3", 0, 1 * GIB),
    ],
)
def test_what_is_left_for_weights(policy, available, limit):
    assert weights_limit(read_policy(policy), NEEDS, available) == limit


def test_a_budget_below_the_least_says_what_the_least_is():
    with pytest.raises(UserError, match=r"a budget of 2\.5 GiB is below the least that this takes, 3 GiB; raise it"):
        weights_limit(read_policy("2.5"), NEEDS, 80 * GIB)


@pytest.mark.parametrize(
    ("policy", "available", "strips"),
    [
        ("keep", 0, False), ("save", 80 * GIB, True), ("auto", 18 * GIB + RESERVE, False),
        ("auto", 18 * GIB + RESERVE - 1, True), ("balance", 80 * GIB, True), ("18", 0, False), ("17.9", 0, True),
    ],
)  # fmt: skip
def test_what_is_too_much_in_one_piece_is_done_in_strips(policy, available, strips):
    assert needs_strips(read_policy(policy), NEEDS, available) == strips


def test_balance_leaves_small_pictures_in_one_piece():
    assert not needs_strips(Policy("balance"), Needs(GIB // 4, GIB // 4, GIB // 4), 0)
