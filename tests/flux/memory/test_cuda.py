"""Streaming to a GPU: order, bits, and memory that was planned. Skipped without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import planned
from benchmarks.planned import Case
from benchmarks.random_weights import STORED, draw, open_random
from flux.memory.lanes import CudaLane, Stages
from flux.memory.streaming import Streamer, Unit
from flux.ops.packed import Linear
from flux.pipelines.denoising import Hooks, denoise
from flux.pipelines.prompts import EncodedPrompt
from flux.specs.flux1 import FLUX1
from tests.guides import PROMPT, SIGMAS, noise
from tests.tiny import TINY

pytestmark = pytest.mark.gpu

DEEP = replace(TINY, name="deep", hidden=512, heads=4, double_blocks=3, single_blocks=6)
WIDE = replace(FLUX1["flux1-dev"], name="wide", double_blocks=3, single_blocks=6)  # of real width
LONG = 20_000_000  # cycles that a card is kept busy: some 10 ms
PROMPT_OF_WIDE = EncodedPrompt(
    torch.zeros(1, WIDE.t5_length, WIDE.context_width), torch.zeros(1, WIDE.pooled_width)
)  # fmt: skip
BLOCKS, PASSES = 5, 4
WIDTH = 2048
CASES = (
    Case(512), Case(1024), Case(512, batch=4), Case(1024, policy="balance"), Case(1024, policy="save"),
    Case(512, references=1), Case(512, stored="fp8"), Case(1024, stored="fp8", policy="save"),
)  # fmt: skip


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda")


class Numbered:
    """A weight of one number, again and again."""

    def __init__(self, number, tensor=None):
        self.number = number
        self.tensor = torch.full((WIDTH, WIDTH), float(number), dtype=torch.bfloat16) if tensor is None else tensor
        self.nbytes, self.parameters = self.tensor.nbytes, self.tensor.numel()
        self.pieces, self.device = (self.nbytes,), self.tensor.device

    def packed(self, device=None):
        return self

    def tensors(self):
        return {"data": self.tensor}

    def with_tensors(self, tensors):
        return Numbered(self.number, tensors["data"])

    def read_into(self, targets):
        targets["data"].copy_(self.tensor.view(torch.uint8).flatten())

    def forget(self):
        pass

    def numbers(self, dtype):
        return self.tensor.to(dtype)

    def product(self, x, bias):
        return None


def no_pinned_memory(size):
    raise RuntimeError(f"no {size} bytes of pinned memory, for a test")


@pytest.mark.parametrize("pinned", [True, False])
def test_a_busy_card_finds_every_block_s_own_weights(device, pinned):
    """The card is far behind: what is brought must wait until what runs has been through with its buffer."""
    with torch.device("meta"):
        layers = [Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS)]
    units = [Unit(place, ((layers[place], Numbered(place + 1)),)) for place in range(BLOCKS)]
    lane, told, given = CudaLane(device), [], []
    if not pinned:
        lane._stages = Stages(CudaLane.STAGES, told.append, no_pinned_memory)
    streamer = Streamer(units, lane)
    x = torch.ones(1, WIDTH, dtype=torch.bfloat16, device=device)
    with torch.inference_mode():
        for _ in range(PASSES):
            for place in range(BLOCKS):
                streamer.before(place)
                torch.cuda._sleep(LONG)
                given.append(layers[place](x)[0, 0] / WIDTH)
                streamer.after(place)
    waited = streamer.waited
    streamer.close()
    assert torch.stack(given).tolist() == [float(place + 1) for place in range(BLOCKS)] * PASSES
    assert 0 <= waited < 1
    assert len(told) == (0 if pinned else 1)


@pytest.mark.parametrize("stored", STORED)
def test_streamed_weights_give_the_bits_of_those_that_stay(device, stored):
    weights = draw(DEEP, device, stored)

    def run(limit):
        part = open_random(DEEP, weights, device, torch.bfloat16)
        return denoise(part, PROMPT, noise(), SIGMAS, guidance=3.0, limit=limit)

    resident = run(None)
    whole = sum(own.nbytes for own in weights.values())
    for share in (0.75, 0.5, 0.25, 0.0):
        assert torch.equal(run(int(share * whole)), resident)


def test_a_card_gives_what_a_cpu_gives(device):
    weights = draw(DEEP, torch.device("cpu"))
    on = [open_random(DEEP, weights, place, torch.float32) for place in (device, torch.device("cpu"))]
    card, cpu = (denoise(part, PROMPT, noise(), SIGMAS, guidance=3.0) for part in on)
    assert (card - cpu).norm() <= 1e-3 * cpu.norm()  # TF32 may be on


def test_nothing_is_allocated_while_a_run_samples(device):
    part, seen = open_random(DEEP, draw(DEEP, device), device, torch.bfloat16), []

    def look(*_):
        ring = part.residency._flow.streamer._buffers
        taken = torch.cuda.memory_stats(device)
        seen.append(
            (torch.cuda.memory_allocated(device), taken["num_device_alloc"], *(buffer.data_ptr() for buffer in ring))
        )

    denoise(part, PROMPT, noise(), SIGMAS, guidance=3.0, limit=0, hooks=Hooks(preview=look))
    assert len(set(seen[1:])) == 1


def test_a_run_that_has_too_little_goes_on_with_what_it_has(device, wide):
    """A real failure of the allocator, for all that there may be is half of what the weights take."""

    def run(told):
        part = open_random(WIDE, wide["bf16"], device, torch.bfloat16)
        return denoise(part, PROMPT_OF_WIDE, noise(), SIGMAS, guidance=3.0, hooks=Hooks(warn=told.append))

    expected, told = run([]), []
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    some = sum(own.nbytes for own in wide["bf16"].values()) // 2 + torch.cuda.memory_allocated(device)
    torch.cuda.set_per_process_memory_fraction(some / total, device)
    try:
        given = run(told)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert torch.equal(given, expected)
    assert any("blocks are streamed" in sentence for sentence in told)


@pytest.fixture(scope="module")
def wide(device):
    planned.warm_up(device)
    return {stored: draw(WIDE, device, stored) for stored in STORED}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_takes_what_was_planned(device, wide, case):
    foreseen, taken = planned.compare(open_random(WIDE, wide[case.stored], device, torch.bfloat16), case)
    assert foreseen == pytest.approx(taken, rel=planned.BARS["cuda"])
