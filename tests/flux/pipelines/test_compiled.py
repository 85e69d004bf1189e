"""Compiled blocks: how often they are compiled, and that they give what the blocks themselves give."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from flux.errors import Cancelled, UserError
from flux.mini import files
from flux.models import flux1
from flux.models.flux1 import Flux1, RotaryAttention
from flux.pipelines import compiled
from flux.pipelines.compiled import compiled_blocks
from flux.pipelines.denoising import Guidance, Hooks, denoise
from flux.pipelines.parts import open_transformer
from flux.pipelines.prompts import EncodedPrompt
from flux.pipelines.step_cache import CachedSteps, StepCache
from flux.pipelines.text_to_image import Request, generate
from flux.sampling.noise import draw_noise
from flux.sampling.schedules import flux_schedule
from tests.guides import CELLS, CLOSE, NEGATIVE, PROMPT, SIGMAS, lora, make_lora, reference, style
from tests.oracles import relative_error, rows
from tests.stored import suffix_of, write_stored
from tests.tiny import TINY, write_tiny

CPU = torch.device("cpu")
DEEP = replace(TINY, name="deep", double_blocks=2, single_blocks=3)
KINDS = 2  # of blocks: double and single


class Counting:
    """A compiler that leaves graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "_compilations", {})
    monkeypatch.setattr(compiled, "_faults", {})


@pytest.fixture
def counting(monkeypatch, nothing_compiled):
    own = Counting()
    monkeypatch.setattr(compiled, "INDUCTOR", own)
    return own


@pytest.fixture
def same_products(monkeypatch):
    """Uncompiled blocks compute as compiled ones do: the layout of memory and the way of a norm decide the last bit."""
    monkeypatch.setattr(flux1, "_copies", lambda: True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("deep"), DEEP).transformer


@pytest.fixture(autouse=True)
def deep_loras(monkeypatch):
    monkeypatch.setattr("tests.guides.LORAS", LORAS)


LORAS = [make_lora(71, DEEP), make_lora(72, DEEP)]


def opened(path, keep="numbers", dtype=torch.float32):
    return open_transformer(path, CPU, dtype, keep=keep)


def prompt(n):
    """A prompt, each of another length."""
    return EncodedPrompt(rows(1, 5 + 4 * n, DEEP.context_width, seed=n), rows(1, DEEP.pooled_width, seed=50 + n))


def run(part, words=PROMPT, seed=1, cells=CELLS, batch=1, **settings):
    noise = draw_noise((DEEP.latent_channels, *cells), [seed + index for index in range(batch)])
    return denoise(part, words, noise, SIGMAS, guidance=3.0, **settings)


STORAGES = {
    "fp32": ("numbers", torch.float32, None),
    "bf16": ("numbers", torch.bfloat16, None),
    "half streamed": ("numbers", torch.float32, 0.5),
    "fp8 streamed": ("packed", torch.float32, 0.0),
    "gguf:Q4_K": ("packed", torch.float32, None),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.usefixtures("same_products")
def test_five_prompts_three_seeds_and_two_strengths_are_compiled_once(path, tmp_path, counting, storage):
    keep, dtype, share = STORAGES[storage]
    kind = storage.partition(" ")[0]
    if kind.startswith(("fp8", "gguf")):
        path = write_stored(tmp_path / f"deep{suffix_of(kind)}", load_file(path), kind)
    part = opened(path, keep, dtype)
    footprint = part.residency.accounts.footprint(tuple(part.module.modulation_layers()))
    limit = None if share is None else int(share * footprint.device_bytes)
    run(part, prompt(0), limit=limit, compiled=True)
    assert counting.graphs == KINDS
    drawn = []
    for n in range(5):
        for seed in range(3):
            for strength in (0.4, 1.0):
                guided = Guidance(guides=[lora(strength=strength)])
                drawn.append(run(part, prompt(n), seed, limit=limit, guided=guided, compiled=True))
    assert counting.graphs == KINDS
    assert len({drawn.sum().item() for drawn in drawn}) == len(drawn)
    expected = run(part, prompt(4), 2, limit=limit, guided=guided)
    assert torch.equal(drawn[-1], expected)


@pytest.mark.usefixtures("same_products")
def test_sizes_share_a_compilation(path, counting):
    part = opened(path)
    for cells in (CELLS, (8, 8), (2, 4), CELLS):
        assert torch.equal(run(part, cells=cells, compiled=True), run(part, cells=cells))
    assert counting.graphs == KINDS


def test_as_many_text_tokens_as_image_tokens_are_taken_for_no_rule(path, counting):
    part, words = opened(path), prompt(0)
    assert words.tokens.shape[1] == 5
    run(part, prompt(1), cells=(6, 6), compiled=True)  # nine of both
    run(part, words, cells=(6, 6), compiled=True)
    assert counting.graphs == KINDS


def test_sizes_get_compilations_of_their_own_if_that_is_asked(path, counting):
    part = opened(path)
    with part.resident() as model, torch.inference_mode():
        block = model.single_blocks[0]
        for dynamic, graphs in ((False, 3), (True, 4)):
            for length in (7, 9, 12, 7, 9):
                given = rows(1, length, 128, seed=length), torch.polar(torch.ones(length, 64), rows(length, 64, seed=1))
                with compiled_blocks(model, dynamic=dynamic):
                    compiled_one = block(*given, rows(1, 384, seed=2), RotaryAttention())
                assert relative_error(compiled_one, block(*given, rows(1, 384, seed=2), RotaryAttention())) < CLOSE
            assert counting.graphs == graphs


@pytest.mark.usefixtures("same_products")
def test_batches_second_passes_references_and_styles_give_the_same_bits(path, counting):
    part = opened(path)
    for settings in (
        {"batch": 2},
        {"negative": NEGATIVE, "cfg": 2.0},
        {"guided": Guidance(guides=[reference(), reference(seed=17, strength=0.5), style()])},
        {"guided": Guidance(guides=[lora(), lora(1, strength=0.3, start=0.5)])},
        {"tables": False},
        {"attention": "math"},
    ):
        assert torch.equal(run(part, **settings, compiled=True), run(part, **settings)), settings
    assert counting.graphs == KINDS  # several pictures run one after the other, on a CPU


def test_several_pictures_at_once_are_compiled_by_themselves(path, counting):
    part = opened(path)
    with part.resident() as model, torch.inference_mode():
        block = model.single_blocks[0]
        for count in (1, 2, 1, 2):
            rotation = torch.polar(torch.ones(7, 64), rows(7, 64, seed=1))
            given = rows(count, 7, 128, seed=1), rotation, rows(count, 384, seed=2), RotaryAttention()
            with compiled_blocks(model):
                compiled_one = block(*given)
            assert relative_error(compiled_one, block(*given)) < CLOSE
    assert counting.graphs == 2


@pytest.mark.usefixtures("same_products")
def test_steps_that_are_skipped_are_the_same_ones(path, counting):
    part, sigmas = opened(path), flux_schedule(12, 0.6)
    drawn, skipped = [], []
    for is_compiled in (False, True):
        cached = CachedSteps(StepCache(threshold=1.0, warmup=2), sigmas)
        start = draw_noise((DEEP.latent_channels, *CELLS), [1])
        drawn.append(denoise(part, PROMPT, start, sigmas, guidance=3.0, cached=cached, compiled=is_compiled))
        skipped.append(cached.skipped)
    assert torch.equal(*drawn)
    assert skipped[0] == skipped[1]
    assert skipped[0].blocks > 0
    assert counting.graphs == KINDS


def test_uncompiled_blocks_are_near_for_all_that_they_lay_out_otherwise(path, counting):
    assert relative_error(run(opened(path), compiled=True), run(opened(path))) < CLOSE


def test_models_of_the_same_sizes_share_compilations(path, tmp_path, counting):
    for copy in (path, shutil.copy(path, tmp_path / "copy.safetensors")):
        run(opened(copy), compiled=True)
    assert counting.graphs == KINDS


def test_nothing_of_it_stays_on_the_blocks(path, counting):
    part = opened(path)
    blocks = [*part.module.double_blocks, *part.module.single_blocks]
    with compiled_blocks(part.module):
        with compiled_blocks(part.module, dynamic=False):
            pass
        assert all("forward" in block.__dict__ for block in blocks)
    assert not any("forward" in block.__dict__ for block in blocks)
    hooks = Hooks(cancelled=iter([False] * 60 + [True]).__next__)
    with pytest.raises(Cancelled):
        run(part, compiled=True, hooks=hooks)
    assert not any("forward" in block.__dict__ for block in blocks)


def test_an_attention_of_somebody_elses_and_training_are_not_compiled(path, counting):
    part, calls = opened(path), []

    def other(q, k, v, rotation):
        calls.append(len(q))
        return RotaryAttention()(q, k, v, rotation)

    given = rows(1, 7, 128, seed=1), torch.polar(torch.ones(7, 64), rows(7, 64, seed=1)), rows(1, 384, seed=2)
    with part.resident() as model, compiled_blocks(model):
        block = model.single_blocks[0]
        with torch.inference_mode():
            theirs = block(*given, other)
        x = given[0].clone().requires_grad_()
        trained = block(x, *given[1:], RotaryAttention())
        trained.sum().backward()
    assert calls == [1]
    assert x.grad is not None
    assert counting.graphs == 0
    assert relative_error(theirs, trained.detach()) < CLOSE


class Broken:
    """A compiler that is none."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *_):
        self.calls += 1
        raise RuntimeError("No working C++ compiler found: cl\nand much more")


def test_where_nothing_can_be_compiled_the_run_says_so_once_and_goes_on(path, monkeypatch, nothing_compiled):
    broken, told, part = Broken(), [], opened(path)
    monkeypatch.setattr(compiled, "INDUCTOR", broken)
    expected = run(part)
    for times in (1, 2):
        assert torch.equal(run(part, compiled=True, hooks=Hooks(warn=told.append)), expected)
        assert len(told) == times
        assert broken.calls == 1
    assert "No working C++ compiler found: cl" in told[0]
    assert "much more" not in told[0]
    assert told[0].endswith("torch.compile needs a C++ compiler, and Triton on a GPU")


@pytest.mark.parametrize("limit", [None, 0])
def test_memory_that_runs_out_in_a_compiled_block_is_answered_as_in_any_other(path, counting, monkeypatch, limit):
    part, told = opened(path), []
    expected, count = run(part), iter(range(1_000_000))
    layer = type(part.module.double_blocks[0].img_attn.qkv)
    product = layer.forward

    def forward(own, x):
        if own.out_features == DEEP.mlp_width and next(count) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return product(own, x)

    monkeypatch.setattr(layer, "forward", forward)
    if limit == 0:
        with pytest.raises(UserError, match="memory ran out though all weights"):
            run(part, compiled=True, limit=limit)
        return
    given = run(part, compiled=True, hooks=Hooks(warn=told.append))
    assert relative_error(given, expected) < CLOSE
    assert [sentence.partition(":")[0] for sentence in told] == ["memory ran out"]


def test_a_fault_of_a_layer_is_its_own(path, counting, monkeypatch):
    part = opened(path)

    def forward(*_):
        raise ValueError("a layer's own")

    monkeypatch.setattr(type(part.module.double_blocks[0].img_attn.qkv), "forward", forward)
    given = rows(1, 7, 128, seed=1), torch.polar(torch.ones(7, 64), rows(7, 64, seed=1)), rows(1, 384, seed=2)
    with part.resident() as model, compiled_blocks(model), torch.inference_mode():
        block = model.single_blocks[0]
        with pytest.raises(ValueError, match="a layer's own"):
            block(*given, RotaryAttention())


def test_pictures_of_the_embedded_model(counting):
    model = files.open_mini()
    for words, steps in (("a red circle", 2), ("two blue squares on a white background", 3)):
        request = Request(prompt=words, steps=steps, seed=4)
        [plain] = generate(model, request)
        [picture] = generate(model, replace(request, compiled=True))
        assert int((picture.pixels.int() - plain.pixels.int()).abs().max()) <= 1
        assert (plain.settings.get("compiled"), picture.settings["compiled"]) == (None, True)
    assert counting.graphs == KINDS


@pytest.mark.usefixtures("nothing_compiled")
def test_torchs_own_compiler_gives_the_same_but_for_rounding(path):
    if not _has_compiler():
        pytest.skip("no C++ compiler here, which torch's needs on a CPU")
    part, told = opened(path), []
    torch._dynamo.utils.counters.clear()
    for n, cells in ((0, CELLS), (1, (6, 6)), (2, CELLS)):
        guides = [lora(strength=0.5)] if cells == CELLS else []
        settings = {"cells": cells, "guided": Guidance(guides=guides), "limit": 0}
        given = run(part, prompt(n), compiled=True, hooks=Hooks(warn=told.append), **settings)
        assert relative_error(given, run(part, prompt(n), **settings)) < CLOSE
    assert told == []
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == KINDS


def _has_compiler():
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return shutil.which(get_cpp_compiler()) is not None
    except RuntimeError:
        return False


def test_the_model_is_the_engines(path):
    """What is compiled is of the model's own classes, so that a new kind of block does not go by unnoticed."""
    model = Flux1(TINY)
    assert {type(block) for block in (*model.double_blocks, *model.single_blocks)} == set(compiled.TOKENS)
