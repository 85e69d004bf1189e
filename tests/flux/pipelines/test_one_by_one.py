"""Several pictures on a CPU: each gets the bits that it gets alone, whatever guides it and however weights are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flux.adapters.guides import Reference, StyleTokens
from flux.memory.policy import Policy
from flux.models.flux1 import Flux1, RotaryAttention, SingleBlock
from flux.ops import host_memory
from flux.ops.host_memory import drop_spare
from flux.ops.packed import Linear, unpacked
from flux.pipelines.denoising import Guidance, prepared
from flux.pipelines.one_by_one import pictures_one_by_one
from flux.pipelines.parts import open_transformer
from flux.pipelines.planning import Job, plan_run, planned_of_spec
from flux.pipelines.step_cache import CachedSteps, StepCache
from flux.sampling.noise import draw_noise
from flux.specs.flux1 import FLUX1
from flux.weights.formats.base import DATA
from flux.weights.formats.floats import BF16
from flux.weights.packed import Packed, PackedPart
from flux.weights.renames import Piece, Recipe
from tests.guides import CELLS, PROMPT, SIGMAS
from tests.oracles import randomise, relative_error, rows
from tests.tiny import TINY, write_tiny

CPU = torch.device("cpu")
COUNT = 3
DEEP = replace(TINY, name="deep", double_blocks=3, single_blocks=8)
GUIDES = {
    "nothing": (),
    "reference": (Reference(latents=rows(1, 16, 2, 4, seed=4)),),
    "style that is weighed": (StyleTokens(tokens=rows(1, 5, TINY.context_width, seed=5), strength=0.5),),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    def in_bf16(tensors):
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.ndim > 1}

    return write_tiny(tmp_path_factory.mktemp("deep"), DEEP, in_bf16).transformer


def velocities(path, keep="packed", guides=(), limit=None, cached=None):
    """Of several pictures at once, and of each alone."""
    part = open_transformer(path, CPU, torch.float32, keep=keep)
    x = draw_noise((16, *CELLS), range(COUNT))
    guided = Guidance(guides=guides)
    with prepared(part, PROMPT, SIGMAS, guidance=3.0, guided=guided, limit=limit, cached=cached) as velocity:
        together = velocity(x, SIGMAS[1])
        if cached is not None:
            cached.begin()
        return together, torch.cat([velocity(one, SIGMAS[1]) for one in x.split(1)])


@pytest.mark.parametrize("keep", ["packed", "numbers"])
@pytest.mark.parametrize("guides", GUIDES.values(), ids=GUIDES)
@pytest.mark.parametrize("limit", [None, 0])
def test_every_picture_gets_the_bits_that_it_gets_alone(path, keep, guides, limit):
    together, alone = velocities(path, keep, guides, limit)
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], together[1])


def test_a_step_cache_sees_all_pictures(path):
    together, alone = velocities(path, cached=CachedSteps(StepCache(), SIGMAS))
    assert relative_error(together, alone) == 0


BIAS = rows(COUNT, 1, 7, 7, seed=3)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [None, BIAS, BIAS[:1], BIAS[0, 0]], ids=["none", "each", "one", "plain"])
def test_pictures_may_differ_in_everything_that_has_a_batch(monkeypatch, bias):
    model, head, real, runs = randomise(Flux1(TINY), 3), TINY.hidden // TINY.heads, SingleBlock.forward, []
    block, attend = model.single_blocks[0], RotaryAttention(bias)
    x, rotation = rows(COUNT, 7, TINY.hidden, seed=1), torch.ones(7, head // 2, dtype=torch.complex64)
    modulation = rows(COUNT, 3 * TINY.hidden, seed=2)
    batched = block(x, rotation, modulation, attend)

    def forward(own, x, *more):
        runs.append(len(x))
        return real(own, x, *more)

    monkeypatch.setattr(SingleBlock, "forward", forward)
    with pictures_one_by_one(model):
        single = block(x, rotation, modulation, attend)
    assert runs == [1] * COUNT
    assert relative_error(single, batched) < 1e-6
    assert "forward" not in vars(block)


@torch.inference_mode()
@pytest.mark.parametrize(("limit", "times"), [(None, 1), (0, COUNT)])
def test_weights_are_unpacked_once_where_nothing_is_streamed(path, monkeypatch, limit, times):
    part, unpackings = open_transformer(path, CPU, torch.float32, keep="packed"), []
    with prepared(part, PROMPT, SIGMAS, guidance=3.0, limit=limit) as velocity:
        layer, real = part.module.single_blocks[0].linear1, Packed.numbers

        def numbers(own, dtype):
            unpackings.extend([own] if own is layer.packed else [])
            return real(own, dtype)

        monkeypatch.setattr(Packed, "numbers", numbers)
        assert part.residency.streams == (limit == 0)
        velocity(draw_noise((16, *CELLS), range(COUNT)), SIGMAS[0])
    assert len(unpackings) == times


def fail(is_as_it_should_be):
    assert is_as_it_should_be
    raise ValueError("inside")


def test_a_layer_has_its_packed_weight_again_after_a_fault(path):
    part = open_transformer(path, CPU, torch.float32, keep="packed")
    with part.resident() as module:
        layer = module.single_blocks[0].linear1
        assert isinstance(layer, Linear)
        packed = layer.packed
        with pytest.raises(ValueError, match="inside"), unpacked([layer], torch.float32):
            fail(torch.equal(layer.packed.numbers(torch.float32), packed.numbers(torch.float32)))
        assert layer.packed is packed


@torch.inference_mode()
def test_numbers_of_all_layers_lie_in_memory_that_comes_back_as_a_whole(monkeypatch):
    """FLUX.1 has blocks of 0.9 GB in fp32; to be given that anew takes longer than unpacking it."""
    monkeypatch.setattr(host_memory, "HUGE_PAGES", 1)
    drop_spare()
    weights = [rows(n, 20, seed=n).bfloat16() for n in (30, 7)]
    layers = [Linear(20, len(weight)) for weight in weights]
    for layer, weight in zip(layers, weights, strict=True):
        part = PackedPart(BF16, tuple(weight.shape), {DATA: weight})
        layer.packed = Packed(part.shape, Recipe((Piece("weight"),)), {"weight": part})
    starts = []
    for _ in range(2):
        with unpacked(layers, torch.float32):
            numbers = [layer.packed.numbers(torch.float32) for layer in layers]
            for found, weight in zip(numbers, weights, strict=True):
                assert torch.equal(found, weight.float())
            starts.append([found.data_ptr() for found in numbers])
            del numbers, found
    assert starts[0] == starts[1]
    assert 0 <= starts[0][1] - starts[0][0] - 30 * 20 * 4 < host_memory.ALIGNMENT
    drop_spare()


def test_a_plan_has_the_activations_of_one_picture_and_both_matrices():
    spec = replace(FLUX1["flux1-dev"], double_blocks=2, single_blocks=2)
    planned = planned_of_spec(spec, torch.float32, CPU)
    jobs = [Job(width=512, height=512, batch=batch) for batch in (1, 4)]
    one, four = (
        plan_run([planned], job, Policy("keep"), device="cpu", available=1 << 40).stage("transformer") for job in jobs
    )
    assert four.activations < 2 * one.activations
    if planned.accounts.packable:  # not where a CPU multiplies what is stored
        squares = 24 - 7  # of a double block's matrices, beyond those of the largest one of all
        assert four.workspace - one.workspace == 4 * squares * spec.hidden**2
    on_a_card = replace(planned, one_by_one=False)
    [batched] = plan_run([on_a_card], jobs[1], Policy("keep"), device="cuda", available=1 << 40).stages
    assert batched.activations > 3 * one.activations
