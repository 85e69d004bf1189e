"""How much memory a user grants, in a word or a number, and what that leaves for weights: arithmetic in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import BudgetError, UserError

__all__ = [
    "AUTO",
    "BALANCE",
    "BUDGET",
    "GIB",
    "KEEP",
    "POLICIES",
    "SAVE",
    "Needs",
    "Policy",
    "read_policy",
    "weights_limit",
]

GIB = 1 << 30
AUTO, KEEP, BALANCE, SAVE, BUDGET = "auto", "keep", "balance", "save", "budget"
POLICIES = (AUTO, KEEP, BALANCE, SAVE)
BALANCED = GIB  # that "balance" grants an autoencoder in one piece
RESERVE = GIB // 2  # of free memory, that "auto" leaves to others and to what cannot be foreseen


@dataclass(frozen=True)
class Policy:
    """What a user grants.

    Attributes:
        name: One of ``POLICIES``: all weights stay where they fit ("auto") or in any case ("keep"), half of what could
            be streamed is ("balance"), or all of it ("save"). Or "budget".
        budget: Bytes that a stage may take at most, weights and all, for "budget".
    """

    name: str = AUTO
    budget: int | None = None

    def __str__(self) -> str:
        return self.name if self.budget is None else f"{self.budget / GIB:.4g} GiB"


@dataclass(frozen=True)
class Needs:
    """What a stage can do with.

    Attributes:
        whole: Bytes of its weights where all stay.
        least: Bytes of its weights where all that can be is streamed.
        working: Bytes that it takes besides.
    """

    whole: int
    least: int
    working: int


def read_policy(text: str) -> Policy:
    """A policy from what a user wrote: one of ``POLICIES``, or a number of GiB.

    Raises:
        UserError: It is neither.
    """
    word = text.strip().lower()
    if word in POLICIES:
        return Policy(word)
    try:
        gib = float(word.removesuffix("gib").removesuffix("gb"))
    except ValueError:
        gib = math.nan
    if not 0 < gib < math.inf:
        raise UserError(
            f"there is no memory policy {text!r}; give one of {', '.join(POLICIES)}, or a budget in GiB such as 6"
        )
    return Policy(BUDGET, int(gib * GIB))


def needs_strips(policy: Policy, needs: Needs, available: int) -> bool:
    """Whether what a stage takes in one piece is too much, so that it is to be done in strips.

    Args:
        policy: What the user grants.
        needs: What the stage can do with in one piece.
        available: Bytes free on the device.
    """
    whole = needs.whole + needs.working
    if policy.budget is not None:
        return whole > policy.budget
    if policy.name == AUTO:
        return whole > available - RESERVE
    return policy.name == SAVE or (policy.name == BALANCE and whole > BALANCED)


def allowed(policy: Policy, peak: int, available: int) -> int:
    """Bytes that a run may take at once.

    Args:
        policy: What the user grants.
        peak: The most that any of its stages takes.
        available: Bytes free on the device.
    """
    if policy.budget is not None:
        return policy.budget
    return max(peak, available - RESERVE) if policy.name in (AUTO, KEEP) else peak


def weights_limit(policy: Policy, needs: Needs, available: int) -> int | None:
    """Bytes that a stage's weights may take; None for as many as there are.

    Args:
        policy: What the user grants.
        needs: What the stage can do with.
        available: Bytes free on the device.

    Raises:
        BudgetError: A budget is below what the stage can do with.
    """
    if policy.name == KEEP:
        return None
    if policy.name == SAVE:
        return 0
    if policy.name == BALANCE:
        return (needs.whole + needs.least) // 2
    if policy.budget is not None:
        least = needs.least + needs.working
        if policy.budget < least:
            raise BudgetError(
                f"a budget of {policy} is below the least that this takes, {math.ceil(100 * least / GIB) / 100:g} GiB; "
                "raise it, or ask for a smaller picture or fewer at once",
                least,
            )
        return policy.budget - needs.working
    room = available - RESERVE - needs.working
    return None if needs.whole <= room else max(needs.least, room)
