"""Memory comes back when nothing refers to it any more, is lent again, and is let go when it is asked for."""

from __future__ import annotations

import gc
import itertools
import threading

import pytest
import torch

from flux.ops import host_memory
from flux.ops.host_memory import HUGE_PAGES, Lender, drop_spare, empty, in_large_pages, into

CPU = torch.device("cpu")
LARGE = HUGE_PAGES // 4 * 3  # numbers of fp32


@pytest.fixture(autouse=True)
def _nothing_spare():
    gc.collect()
    drop_spare()
    yield
    drop_spare()


def spare_bytes():
    gc.collect()
    block = host_memory._lender._block
    return 0 if block is None else block.nbytes


def test_memory_lies_where_torch_would_put_it():
    for dtype, rows in itertools.product((torch.float32, torch.bfloat16), (1500, 1501)):
        memory = empty((rows, 1500), dtype, CPU)
        assert memory.shape == (rows, 1500)
        assert memory.dtype == dtype
        assert memory.data_ptr() % host_memory.ALIGNMENT == 0
        assert memory.fill_(2).sum(dtype=torch.float64) == 2 * rows * 1500


def test_memory_in_large_pages_is_let_go_at_once():
    memory = in_large_pages((LARGE, 2), torch.float32)
    assert memory.shape == (LARGE, 2)
    assert memory.data_ptr() % host_memory.ALIGNMENT == 0
    assert memory.fill_(2).sum(dtype=torch.float64) == 4 * LARGE
    del memory
    assert spare_bytes() == 0


def test_what_came_back_is_lent_again():
    first = empty((LARGE,), torch.float32, CPU)
    place = first.data_ptr()
    assert spare_bytes() == 0
    del first
    assert spare_bytes() >= LARGE * 4
    second = empty((LARGE - 5,), torch.float32, CPU)
    assert second.data_ptr() == place
    assert spare_bytes() == 0


@pytest.mark.parametrize("inside", [False, True])
def test_memory_does_not_come_back_while_a_view_of_it_lives(inside):
    with torch.inference_mode(inside):
        whole = empty((LARGE,), torch.float32, CPU).fill_(7)
        view = whole.view(-1, 4)[3:5].T
        kept = torch.nn.Parameter(whole[:8], requires_grad=False)
        del whole
        assert spare_bytes() == 0
        others = [empty((LARGE,), torch.float32, CPU).zero_() for _ in range(3)]
        assert bool((view == 7).all())
        assert bool((kept == 7).all())
        del view, kept, others
    assert spare_bytes() > 0


def test_a_block_far_too_large_is_not_taken():
    large = empty((16 * LARGE,), torch.float32, CPU)
    place = large.data_ptr()
    del large
    small = empty((LARGE,), torch.float32, CPU)
    assert small.data_ptr() != place
    assert spare_bytes() >= 64 * LARGE


def test_the_larger_of_two_is_kept_and_no_more_than_a_limit(monkeypatch):
    small, large = empty((LARGE,), torch.float32, CPU), empty((2 * LARGE,), torch.float32, CPU)
    del large, small
    assert spare_bytes() >= 8 * LARGE
    drop_spare()
    assert spare_bytes() == 0
    monkeypatch.setattr(host_memory, "LARGEST_SPARE", LARGE)
    memory = empty((LARGE,), torch.float32, CPU)
    del memory
    assert spare_bytes() == 0


def test_memory_that_comes_back_while_the_lock_is_held_is_taken_in_later():
    """As when the garbage collector runs in the middle of ``take``: whoever waited there would wait for itself."""
    lent = empty((LARGE,), torch.float32, CPU)
    with host_memory._lender._lock:
        del lent
        gc.collect()
    assert host_memory._lender.nbytes >= LARGE


def test_garbage_in_cycles_does_not_stop_a_thread_for_ever():
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(200):
            cycle = [empty((LARGE,), torch.float32, CPU)]
            cycle.append(cycle)
    finally:
        gc.set_threshold(*before)


def test_the_next_of_just_this_size_and_type_goes_into_a_place():
    place = torch.empty(6)
    with into(place):
        others = [empty(shape, dtype, CPU) for shape, dtype in (((5,), torch.float32), ((6,), torch.bfloat16))]
        taken = empty((2, 3), torch.float32, CPU)
        again = empty((2, 3), torch.float32, CPU)
    assert taken.data_ptr() == place.data_ptr()
    assert taken.shape == (2, 3)
    assert place.data_ptr() not in {other.data_ptr() for other in (*others, again)}
    with into(place):
        pass
    assert empty((6,), torch.float32, CPU).data_ptr() != place.data_ptr()


def test_other_threads_do_not_take_the_place():
    place, found = torch.empty(6), []
    with into(place):
        thread = threading.Thread(target=lambda: found.append(empty((6,), torch.float32, CPU)))
        thread.start()
        thread.join()
    assert found[0].data_ptr() != place.data_ptr()


def test_every_lender_has_memory_of_its_own():
    lender = Lender()
    memory = lender.empty((LARGE,), torch.float32, CPU)
    place = memory.data_ptr()
    del memory
    assert spare_bytes() == 0
    assert lender.nbytes >= 4 * LARGE
    assert lender.empty((LARGE,), torch.float32, CPU).data_ptr() == place
    assert lender.empty((LARGE,), torch.float32, torch.device("meta")).is_meta
