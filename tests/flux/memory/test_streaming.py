"""The streamer's order and buffers: what runs finds its own weights, and nothing is brought over what still runs."""

from __future__ import annotations

import contextlib
import itertools
import threading

import pytest
import torch

from flux.errors import FileError
from flux.memory import streaming
from flux.memory.accounts import ALIGNMENT, buffer_bytes
from flux.memory.lanes import CpuLane, QueueLane, lane_for
from flux.memory.streamed import StreamedBlocks
from flux.memory.streaming import Streamer, Unit
from flux.ops import dtypes
from flux.ops.packed import Linear
from tests import whole

COUNT, WIDTH = 5, 4


class Stored(whole.Stored):
    """The number of its block, again and again."""

    def __init__(self, number, reads):
        super().__init__(torch.full((WIDTH, WIDTH), float(number), dtype=torch.bfloat16))
        self.number, self.reads, self.gone = number, reads, False

    def before_read(self):
        if self.gone:
            raise FileError("it is gone")
        self.reads.append(self.number)


def unit_bytes(unit):
    return buffer_bytes(weight for _, weight in unit.layers)


class Lane(CpuLane):
    """A CPU's, which counts buffers and knows which are in use."""

    def __init__(self):
        self.buffers, self.departures, self.closed = [], [], False

    def buffer(self, size):
        self.buffers.append(super().buffer(size))
        return self.buffers[-1]

    def bring(self, buffer, size, read, after):
        if after is not None:
            assert after in self.departures, "a buffer is brought to before its block was left"
        return super().bring(buffer, size, read, after)

    def leave(self):
        self.departures.append(super().leave())
        return self.departures[-1]

    def close(self):
        self.closed = True


class Blocks:
    """Blocks of a layer each, some of them streamed."""

    def __init__(self, places=range(COUNT)):
        self.reads = []
        with torch.device("meta"):
            self.layers = [Linear(WIDTH, WIDTH, bias=False) for _ in range(COUNT)]
        self.weights = {place: Stored(place, self.reads) for place in places}
        self.units = [Unit(place, ((self.layers[place], weight),)) for place, weight in self.weights.items()]
        self.lane = Lane()

    def run(self, streamer, places=range(COUNT)):
        """What each streamed block gives of ones."""
        given = []
        for place in places:
            streamer.before(place)
            if place in self.weights:
                given.append(float(self.layers[place](torch.ones(WIDTH))[0]) / WIDTH)
        return given


@pytest.fixture
def blocks():
    return Blocks()


@pytest.fixture
def streamer(blocks):
    streamer = Streamer(blocks.units, blocks.lane)
    yield streamer
    streamer.close()


def test_every_block_finds_its_own_weights_pass_after_pass(blocks, streamer):
    for _ in range(3):
        assert blocks.run(streamer) == [0, 1, 2, 3, 4]
    assert blocks.reads[: 2 * COUNT] == [*range(COUNT), *range(COUNT)]


def test_there_are_two_buffers_of_the_largest_size_and_never_more(blocks, streamer):
    for _ in range(3):
        blocks.run(streamer)
    assert [buffer.numel() for buffer in blocks.lane.buffers] == [ALIGNMENT] * 2
    assert streamer.ring_bytes == 2 * ALIGNMENT == 2 * max(map(unit_bytes, blocks.units))


def test_what_was_brought_is_counted(blocks, streamer):
    blocks.run(streamer)
    assert streamer.brought == sum(map(unit_bytes, blocks.units))


@pytest.mark.parametrize("places", [(0,), (4,), (1, 3), (0, 2, 4), range(COUNT)])
def test_blocks_that_stay_are_left_alone(places):
    blocks = Blocks(places)
    streamer = Streamer(blocks.units, blocks.lane)
    for _ in range(3):
        assert blocks.run(streamer) == list(places)
    streamer.close()


def test_the_next_block_comes_while_one_runs(blocks, streamer):
    streamer.before(0)
    for _ in range(1000):
        if blocks.reads == [0, 1]:
            break
        threading.Event().wait(0.001)
    assert blocks.reads == [0, 1]
    streamer.before(1)  # gives the first buffer to the third block
    assert float(blocks.layers[1](torch.ones(WIDTH))[0]) == WIDTH


def test_a_block_that_has_run_has_no_weights(blocks, streamer):
    streamer.before(0)
    streamer.before(1)
    assert blocks.layers[0].packed is None
    assert blocks.layers[1].packed is not None


def test_a_block_that_says_when_it_has_run_makes_room_at_once(blocks, streamer):
    begun = len(blocks.lane.departures)
    streamer.before(0)
    streamer.after(3)  # another one
    assert blocks.layers[0].packed is not None
    streamer.after(0)
    assert blocks.layers[0].packed is None
    assert len(blocks.lane.departures) == begun + 1
    assert blocks.run(streamer, range(1, COUNT)) == [1, 2, 3, 4]


def test_asking_twice_for_a_block_changes_nothing(blocks, streamer):
    streamer.before(0)
    bound = blocks.layers[0].packed
    streamer.before(0)
    assert blocks.layers[0].packed is bound


@pytest.mark.parametrize("broken_off", range(COUNT))
@pytest.mark.parametrize("from_", range(COUNT))
def test_a_pass_that_was_broken_off_is_begun_again(broken_off, from_):
    blocks = Blocks()
    streamer = Streamer(blocks.units, blocks.lane)
    blocks.run(streamer, range(broken_off + 1))
    again = range(from_, COUNT)
    assert blocks.run(streamer, again) == list(again)
    assert blocks.run(streamer) == [0, 1, 2, 3, 4]
    streamer.close()


def test_what_is_on_its_way_stays_where_a_pass_leaves_out_all_but_its_first_block(blocks, streamer):
    blocks.run(streamer)
    for _ in range(3):
        assert blocks.run(streamer, [0]) == [0]
        streamer.after(0)
    assert blocks.run(streamer) == [0, 1, 2, 3, 4]
    for _ in range(1000):
        if len(blocks.reads) >= 2 * COUNT:
            break
        threading.Event().wait(0.001)
    assert blocks.reads.count(1) <= 3  # once for each pass in full, and once ahead


def test_where_the_first_block_stays_leaving_out_the_others_brings_nothing():
    blocks = Blocks((1, 3))
    streamer = Streamer(blocks.units, blocks.lane)
    blocks.run(streamer)
    for _ in range(5):
        blocks.run(streamer, [0])
    assert blocks.run(streamer) == [1, 3]
    streamer.close()
    assert blocks.reads.count(1) <= 3
    assert blocks.reads.count(3) <= 3


def test_what_cannot_be_read_is_told_to_the_one_that_waits(blocks):
    blocks.weights[2].gone = True
    streamer = Streamer(blocks.units, blocks.lane)
    blocks.run(streamer, range(2))
    with pytest.raises(FileError, match="it is gone"):
        streamer.before(2)
    streamer.close()
    assert blocks.lane.closed
    blocks.weights[2].gone = False
    again = Streamer(blocks.units, blocks.lane)
    assert blocks.run(again) == [0, 1, 2, 3, 4]
    again.close()


def test_closing_leaves_neither_weights_nor_threads(blocks):
    before = threading.active_count()
    streamer = Streamer(blocks.units, blocks.lane)
    streamer.before(0)
    streamer.close()
    assert all(layer.packed is None for layer in blocks.layers)
    assert threading.active_count() == before
    assert blocks.lane.closed


def test_time_spent_waiting_is_counted(blocks):
    seconds = iter(range(100))
    streamer = Streamer(blocks.units, blocks.lane, clock=lambda: float(next(seconds)))
    blocks.run(streamer)
    assert streamer.waited == COUNT
    streamer.close()


def test_several_tensors_of_a_block_lie_apart():
    blocks = Blocks(())
    weights = [Stored(7, []), Stored(9, [])]
    layers = blocks.layers[:2]
    unit = Unit(0, tuple(zip(layers, weights, strict=True)))
    assert unit_bytes(unit) == 2 * ALIGNMENT
    streamer = Streamer([unit], blocks.lane)
    streamer.before(0)
    assert [float(layer(torch.ones(WIDTH))[0]) / WIDTH for layer in layers] == [7, 9]
    assert all(layer.packed.tensor.data_ptr() % ALIGNMENT == streamer_offset(blocks) for layer in layers)
    streamer.close()


def streamer_offset(blocks):
    return blocks.lane.buffers[0].data_ptr() % ALIGNMENT


def test_buffers_that_were_made_in_inference_mode_can_be_brought_to():
    blocks = Blocks()
    with torch.inference_mode():  # of the thread that computes; the one that reads has a mode of its own
        streamer = Streamer(blocks.units, blocks.lane)
        assert blocks.run(streamer) == list(range(COUNT))
        streamer.close()


def test_reads_that_fail_again_and_again_leave_the_ring_as_it_was():
    blocks = Blocks()
    streamer = Streamer(blocks.units, blocks.lane)
    assert blocks.run(streamer) == list(range(COUNT))
    for weight in blocks.weights.values():
        weight.gone = True
    for _ in range(5):
        with pytest.raises(FileError):
            blocks.run(streamer)
    for weight in blocks.weights.values():
        weight.gone = False
    for _ in range(2):  # reads that were asked for while they failed
        with contextlib.suppress(FileError):
            blocks.run(streamer)
    assert blocks.run(streamer) == list(range(COUNT))
    streamer.close()


class Moment:
    """A mark whose time is a number; None where its device is gone."""

    def __init__(self, at):
        self.at = at

    def seconds_to(self, other):
        if other.at is None:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return other.at - self.at


def test_what_is_computed_late_tells_by_marks_how_long_it_stood_still():
    blocks = Blocks()
    moments = iter(range(1000))
    blocks.lane.mark = lambda: Moment(next(moments))
    streamer = Streamer(blocks.units, blocks.lane)
    blocks.run(streamer)
    assert streamer.waited == COUNT  # one between the two marks of each block
    assert streamer.waited == COUNT
    streamer.close()


def test_marks_of_a_long_run_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(streaming, "MOST_STALLS", 2 * COUNT)
    blocks = Blocks()
    moments = itertools.count()
    blocks.lane.mark = lambda: Moment(next(moments))
    streamer = Streamer(blocks.units, blocks.lane)
    for _ in range(20):
        blocks.run(streamer)
        assert len(streamer._stalls) <= 2 * COUNT
    assert streamer.waited == 20 * COUNT
    streamer.close()


def test_a_device_that_tells_no_times_any_more_is_left_like_any_other():
    blocks = Blocks()
    moments = itertools.count()
    blocks.lane.mark = lambda: Moment(next(moments))
    module = torch.nn.Module()
    module.blocks = torch.nn.ModuleList(blocks.layers)
    flow = StreamedBlocks(module, [f"blocks.{place}" for place in range(COUNT)])
    flow.start(blocks.units, blocks.lane)
    blocks.run(flow.streamer)
    blocks.lane.mark = lambda: Moment(None)
    blocks.run(flow.streamer)
    assert flow.passed.waited <= 2 * COUNT
    flow.stop()
    assert flow.streamer is None
    assert blocks.lane.closed


def test_what_is_streamed_is_closed_though_what_passed_cannot_be_told(monkeypatch):
    blocks = Blocks()
    flow = StreamedBlocks(
        torch.nn.ModuleDict({f"b{n}": layer for n, layer in enumerate(blocks.layers)}), [f"b{n}" for n in range(COUNT)]
    )
    flow.start(blocks.units, blocks.lane)

    def gone(_):
        raise ValueError("no times")

    monkeypatch.setattr(Streamer, "waited", property(gone))
    with pytest.raises(ValueError, match="no times"):
        flow.stop()
    assert flow.streamer is None
    assert blocks.lane.closed


def test_other_devices_than_gpus_with_streams_get_copies():
    blocks = Blocks()
    streamer = Streamer(blocks.units, QueueLane(torch.device("cpu")))
    try:
        for _ in range(2):
            assert blocks.run(streamer) == [0, 1, 2, 3, 4]
    finally:
        streamer.close()


@pytest.mark.parametrize(("device", "kind"), [("cpu", CpuLane), ("mps", QueueLane), ("xpu", QueueLane)])
def test_every_kind_of_device_has_a_lane(device, kind):
    assert type(lane_for(torch.device(device))) is kind


def test_a_queued_lane_has_its_buffers_on_the_device():
    lane, reads = QueueLane(torch.device("meta")), []
    buffer = lane.buffer(16)
    lane.bring(buffer, 12, lambda piece: reads.append((piece.device.type, piece.numel())), None).wait()
    assert buffer.is_meta
    assert reads == [("cpu", 12)]
    lane.close()


@pytest.mark.parametrize(
    ("stored", "without", "kind"),
    [
        (torch.float8_e4m3fn, (), torch.float8_e4m3fn),
        (torch.float8_e4m3fn, ("cpu",), torch.uint8),
        (torch.int8, ("cpu",), torch.int8),
    ],
)
def test_where_there_is_no_fp8_it_stays_bytes_and_whole_numbers_stay_numbers(monkeypatch, stored, without, kind):
    monkeypatch.setattr(dtypes, "WITHOUT_FP8", without)
    piece = streaming._Piece("data", 4, 6, stored, torch.Size((2, 3)))
    view = piece.view_of(torch.arange(16, dtype=torch.uint8))
    assert (view.dtype, view.shape) == (kind, (2, 3))
    assert view.view(torch.uint8).flatten().tolist() == [4, 5, 6, 7, 8, 9]
