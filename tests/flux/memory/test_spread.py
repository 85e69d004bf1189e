"""Which blocks are streamed: as few as the budget asks for, far from one another."""

from __future__ import annotations

import pytest

from flux.memory.spread import SLOTS, Spread, evenly, shares, spread_over

KEPT, STORED = (40, 40, 40, 20, 20, 20, 20, 20), (20, 20, 20, 10, 10, 10, 10, 10)


@pytest.mark.parametrize("among", range(1, 60))
def test_streamed_blocks_are_spread_evenly(among):
    for count in range(1, among + 1):
        places = evenly(count, among)
        assert len(set(places)) == count
        assert list(places) == sorted(places)
        around = [*places, places[0] + among]  # the next pass follows at once
        gaps = [after - before for before, after in zip(around[:-1], around[1:], strict=True)]
        assert max(gaps) - min(gaps) <= 1
        assert places[0] >= 0
        assert places[-1] < among


def test_without_a_limit_all_stay():
    found = spread_over(KEPT, STORED, None)
    assert (found.streamed, found.resident_bytes, found.ring_bytes, found.streamed_bytes) == ((), sum(KEPT), 0, 0)
    assert spread_over(KEPT, STORED, sum(KEPT)).streamed == ()


def test_as_few_are_streamed_as_the_budget_asks_for():
    for budget in range(2 * max(STORED), sum(KEPT)):
        found = spread_over(KEPT, STORED, budget)
        assert found.device_bytes <= budget
        fewer = range(len(found.streamed))
        assert all(Spread(KEPT, STORED, evenly(count, len(KEPT))).device_bytes > budget for count in fewer)


def test_where_no_budget_is_enough_the_least_is_taken():
    found = spread_over(KEPT, STORED, 0)
    assert found.streamed == tuple(range(len(KEPT)))
    assert found.device_bytes == found.ring_bytes == SLOTS * max(STORED)


def test_a_single_block_has_a_single_buffer():
    assert spread_over((8,), (4,), 4).ring_bytes == 4


def test_a_ring_that_takes_more_than_the_blocks_is_not_built():
    assert spread_over((5, 5), (5, 5), 1).streamed == ()


def test_a_limit_is_dealt_out_by_what_is_lacking() -> None:
    assert shares(100, [(10, 50), (10, 90)]) == [10 + 80 * 40 // 120, 10 + 80 * 80 // 120]
    assert sum(shares(140, [(10, 50), (10, 90)])) == 140
    assert shares(5, [(10, 50), (10, 90)]) == [10, 10]
    assert shares(100, [(10, 10), (20, 20)]) == [10, 20]
    assert shares(100, [(10, 50)]) == [100]
    assert shares(None, [(10, 50), (10, 90)]) == [None, None]
