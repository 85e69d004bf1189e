"""Work is shared out once and whole, alike in every thread, and leaves torch's own threads as they were."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from flux.weights.formats.threads import TELLING, Pace, share_out, spans_of


@pytest.mark.parametrize(
    ("total", "step", "spans"), [(0, 4, []), (8, 4, [(0, 4), (4, 8)]), (9, 4, [(0, 4), (4, 8), (8, 9)])]
)
def test_spans_cover_everything_once(total, step, spans):
    assert spans_of(total, step) == spans


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_every_span_is_done_once(threads):
    done = []
    share_out(lambda spans: done.extend(spans), spans_of(1000, 7), threads)
    assert sorted(done) == spans_of(1000, 7)


def test_torch_runs_alone_in_each_thread_and_as_before_in_the_callers():
    before, seen = torch.get_num_threads(), {}
    meeting = threading.Barrier(2)

    def work(_):
        meeting.wait(10)  # so that both threads take part
        seen[threading.get_ident()] = torch.get_num_threads()

    share_out(work, spans_of(4, 1), 2)
    assert list(seen.values()) == [1, 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("inside", [False, True])
def test_threads_are_in_inference_mode_where_the_caller_is(inside):
    seen = []
    with torch.inference_mode(inside):
        share_out(lambda spans: seen.append(torch.is_inference_mode_enabled()), [(0, 1)], 2)
    assert seen == [inside, inside]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_fault_in_a_thread_is_raised(threads):
    def fail(spans):
        raise MemoryError

    with pytest.raises(MemoryError):
        share_out(fail, [(0, 1), (1, 2)], threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_makes_threads_of_its_own():
    share_out(lambda spans: list(spans), [(0, 1)], 2)
    child = os.fork()
    if child == 0:
        done = []
        share_out(lambda spans: done.extend(spans), [(0, 1), (1, 2)], 2)
        os._exit(0 if sorted(done) == [(0, 1), (1, 2)] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_torchs_threads_are_left_alone_after_they_were_slow_and_longer_each_time():
    pace = Pace(slow=1e9)
    waits = []
    for _ in range(3):
        assert pace.together()
        pace.told(TELLING, seconds=1.0)
        count = 0
        while not pace.together():
            count += 1
        waits.append(count)
        pace._left = 0
    assert waits[0] < waits[1] < waits[2]
    pace.told(TELLING, seconds=1e-3)
    assert pace.together()
    assert pace.together()


def test_little_work_tells_nothing():
    pace = Pace(slow=1e9)
    pace.told(100, seconds=1.0)
    assert pace.together()
