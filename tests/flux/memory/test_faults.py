"""What fails on the way of weights is told once, and leaves neither threads nor buffers nor a module half loaded."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from flux.errors import Cancelled, DeviceLostError
from flux.memory.exhaustion import is_exhausted
from flux.memory.lanes import CpuLane, Stages
from flux.memory.loss import is_lost, lost
from flux.memory.residency import Residency
from flux.ops.layers import on_meta
from flux.ops.packed import Linear
from tests import whole

CPU = torch.device("cpu")
COUNT, WIDTH = 6, 8
CUDA = "CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."


class Stored(whole.Stored):
    """Read by a function that may be slow or fail."""

    def __init__(self, number, read):
        super().__init__(torch.full((WIDTH, WIDTH), 0.01 * (number + 1)))
        self.before_read = read


class Arrival:
    def __init__(self, wait):
        self.wait = wait


class Lane(CpuLane):
    """A CPU's, of which one step fails at its ``at``-th call."""

    def __init__(self, step=None, at=0, error=None):
        self.step, self.at, self.error, self.calls = step, at, error, 0
        self.buffers, self.closed = [], 0

    def _do(self, step):
        if step == self.step:
            self.calls += 1
            if self.calls > self.at:  # a device that is gone stays so
                raise self.error

    def buffer(self, size):
        self._do("buffer")
        made = super().buffer(size)
        self.buffers.append(weakref.ref(made))
        return made

    def bring(self, buffer, size, read, after):
        self._do("bring")
        super().bring(buffer, size, read, after)
        return Arrival(lambda: self._do("wait"))

    def leave(self):
        self._do("leave")
        return super().leave()

    def close(self):
        self.closed += 1
        self._do("close")


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Linear(WIDTH, WIDTH, bias=False) for _ in range(COUNT))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def failing(error):
    """A function that raises it."""

    def fail(*_, **__):
        raise error

    return fail


def residency(lane, read=lambda: None):
    with on_meta():
        module = Blocks()
    weights = {f"blocks.{place}.weight": Stored(place, read) for place in range(COUNT)}
    return Residency(
        module, weights, device=CPU, dtype=torch.float32, lane=lane, blocks=[f"blocks.{n}" for n in range(COUNT)]
    )


def run(own, passes=2, limit=0):
    own.load(limit=limit)
    x = torch.ones(WIDTH)
    try:
        for _ in range(passes):
            x = own.module(x)
    finally:
        own.release()
    return x


def check_nothing_is_left(own, lane, threads):
    gc.collect()
    assert own.resident_bytes == 0
    assert all(block.packed is None and block.weight.is_meta for block in own.module.blocks)
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in own.module.blocks)
    assert [thread for thread in threading.enumerate() if thread not in threads] == []
    assert [buffer for buffer in lane.buffers if buffer() is not None] == []


@pytest.mark.parametrize("error", [torch.AcceleratorError(CUDA), RuntimeError(CUDA), MemoryError()])
@pytest.mark.parametrize(
    ("step", "at"),
    [("buffer", 0), ("buffer", 1), ("bring", 0), ("bring", 1), ("bring", 5), ("bring", 9), ("wait", 0), ("wait", 7),
     ("leave", 0), ("leave", 6), ("close", 0)],
)  # fmt: skip
def test_a_lane_that_fails_leaves_nothing_and_the_next_one_works(step, at, error):
    expected, threads = run(residency(CpuLane())), threading.enumerate()
    lane = Lane(step, at, error)
    own = residency(lane)
    with pytest.raises(type(error)):
        run(own)
    error.__traceback__ = None  # whose frames hold buffers
    check_nothing_is_left(own, lane, threads)
    own._lane = Lane()
    assert torch.equal(run(own), expected)
    check_nothing_is_left(own, own._lane, threads)


def test_what_fails_while_another_fault_is_cleared_up_does_not_keep_weights():
    class Dead(Lane):
        def close(self):
            super().close()
            raise torch.AcceleratorError(CUDA)

    threads, lane = threading.enumerate(), Dead("wait", 3, torch.AcceleratorError(CUDA))
    own = residency(lane)
    with pytest.raises(torch.AcceleratorError):
        run(own)
    lane.error.__traceback__ = None
    check_nothing_is_left(own, lane, threads)


def test_where_no_thread_can_be_had_nothing_is_left(monkeypatch):
    threads, lane = threading.enumerate(), Lane()
    own = residency(lane)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", failing(RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError, match="can't start new thread"):
            run(own)
    assert lane.closed == 1
    check_nothing_is_left(own, lane, threads)


def test_a_cancelled_run_does_not_wait_for_more_than_the_transfer_under_way():
    """The reader is held in the middle of the third block, whose turn comes when the run is over already."""
    reads, in_the_middle, goes_on = [], threading.Event(), threading.Event()

    def read():
        reads.append(1)
        if len(reads) == 4:
            in_the_middle.set()
            assert goes_on.wait(10)

    threads, lane = threading.enumerate(), Lane()
    own = residency(lane, read)

    def cancel(place):
        if place == 2:
            assert in_the_middle.wait(10)
            threading.Timer(0.05, goes_on.set).start()
            raise Cancelled("the run was cancelled")

    for place, block in enumerate(own.module.blocks):
        block.register_forward_hook(lambda *_, place=place: cancel(place))
    with pytest.raises(Cancelled):
        run(own)
    for timer in [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]:
        timer.join()
    assert len(reads) == 4  # and none of those that were asked for behind it
    for block in own.module.blocks:
        block._forward_hooks.clear()
    check_nothing_is_left(own, lane, threads)
    assert torch.equal(run(own), run(residency(CpuLane())))


def test_a_reader_that_fails_is_told_to_the_run_and_the_next_one_reads_again():
    fails = [True]

    def read():
        if fails[0]:
            raise OSError(5, "Input/output error")

    lane = Lane()
    own = residency(lane, read)
    with pytest.raises(OSError, match="Input/output error"):
        run(own)
    fails[0] = False
    assert torch.equal(run(own), run(residency(CpuLane())))


class Pin:
    """Pinned memory of which there is only so much."""

    def __init__(self, most):
        self.most, self.asked = most, []

    def __call__(self, size):
        self.asked.append(size)
        if sum(self.asked) > self.most:
            raise RuntimeError("CUDA error: out of memory")
        return torch.empty(size, dtype=torch.uint8)


def test_memory_that_cannot_be_pinned_is_told_of_once_and_ordinary_memory_serves():
    told, pin = [], Pin(100)
    stages = Stages(2, told.append, pin)
    pieces = [stages.piece(turn, 80) for turn in (0, 1, 0, 1)]
    assert [piece.numel() for piece in pieces] == [80] * 4
    assert pieces[0].data_ptr() == pieces[2].data_ptr() != pieces[1].data_ptr() == pieces[3].data_ptr()
    assert stages.piece(1, 90).numel() == 90
    assert pin.asked == [80, 80, 90]
    assert told == ["memory could not be pinned; weights are streamed from ordinary memory, which is slower"]


def test_pinned_memory_is_asked_for_once_for_each_turn_and_let_go():
    pin = Pin(1000)
    stages = Stages(2, None, pin)
    held = [weakref.ref(stages.piece(turn, 50)) for turn in (0, 1)]
    stages.piece(0, 40)
    assert pin.asked == [50, 50]
    stages.piece(0, 60)
    assert pin.asked == [50, 50, 60]
    stages.clear()
    gc.collect()
    assert [piece() for piece in held] == [None, None]


def test_where_there_is_no_memory_at_all_the_fault_is_one_that_lowers_the_plan(monkeypatch):
    stages = Stages(1, None, Pin(0))
    monkeypatch.setattr("flux.memory.lanes.torch.empty", failing(RuntimeError("can't allocate memory")))
    with pytest.raises(RuntimeError) as raised:
        stages.piece(0, 10)
    assert is_exhausted(raised.value)


@pytest.mark.parametrize(
    ("error", "says_so"),
    [
        (torch.AcceleratorError(CUDA), True),
        (RuntimeError(CUDA), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`"), False),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError(CUDA), False),
    ],
)
def test_a_lost_device_is_told_from_other_faults(error, says_so):
    assert is_lost(error) == says_so


def test_what_is_said_of_a_lost_device_has_the_drivers_words_and_the_way_out():
    said = lost(torch.device("cuda:1"), RuntimeError(CUDA))
    assert isinstance(said, DeviceLostError)
    assert str(said).startswith("the device cuda:1 stopped working (CUDA error: unspecified launch failure): ")
    assert "start the program anew" in str(said)
    assert "\n" not in str(said)


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "[enforce fail] can't allocate memory: 5 bytes"])
def test_a_driver_without_memory_is_an_exhausted_one(words):
    assert is_exhausted(RuntimeError(words))
