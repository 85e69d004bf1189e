"""Memory that runs out during a run: it goes on with less, to the same bits, and stops only when nothing is left."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from flux.adapters import control_lora
from flux.adapters.guides import Channels
from flux.errors import ExhaustedError, UserError
from flux.memory.exhaustion import is_exhausted
from flux.memory.policy import read_policy
from flux.mini import files
from flux.models.autoencoder import Autoencoder
from flux.models.flux1 import Flux1
from flux.models.text.clip import ClipText
from flux.models.text.t5 import T5Encoder
from flux.models.vision.siglip import SiglipVision
from flux.pipelines import strips, text_to_image
from flux.pipelines.denoising import Denoiser, Guidance, Hooks, denoise
from flux.pipelines.fitting import what_would_fit
from flux.pipelines.parts import open_transformer, open_vision
from flux.pipelines.planning import planned_of_part
from flux.pipelines.stage_work import Job
from flux.pipelines.text_to_image import Request, generate
from flux.specs.vision import SIGLIP_MINI
from flux.weights.binding import Binding
from tests.guides import CELLS, PROMPT, SIGMAS, make_lora, noise
from tests.oracles import rows
from tests.tiny import TINY, write_module, write_tiny

CPU = torch.device("cpu")
DEEP = replace(TINY, name="deep", double_blocks=2, single_blocks=14)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("deep"), DEEP).transformer


def run(path, told=None, **settings):
    part = open_transformer(path, CPU, torch.float32, keep="numbers")
    hooks = Hooks(warn=None if told is None else told.append)
    return part, denoise(part, PROMPT, noise(), SIGMAS, guidance=3.0, hooks=hooks, **settings)


@pytest.fixture
def failing(monkeypatch):
    """Makes a module's method run out of memory at some of its calls."""

    def install(owner, name, calls, error=None):
        real, count = getattr(owner, name), iter(range(1_000_000))

        def forward(self, *arguments, **named):
            if next(count) in calls:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return real(self, *arguments, **named)

        monkeypatch.setattr(owner, name, forward)

    return install


@pytest.mark.parametrize("calls", [{0}, {2}, {0, 1}, {1, 2, 3}])
def test_a_run_goes_on_with_fewer_weights_in_memory(path, failing, calls):
    expected, told = run(path)[1], []
    failing(Flux1, "forward", calls)
    part, given = run(path, told)
    assert torch.equal(given, expected)
    assert len(told) == len(calls)
    streamed = [int(sentence.split(": ")[1].split(" of ")[0]) for sentence in told]
    assert streamed == sorted(set(streamed))
    assert "blocks are streamed from here on, and the step is repeated" in told[0]
    assert part.residency.resident_bytes == 0


def test_when_nothing_is_left_to_stream_the_run_stops_with_the_way_out(path, failing):
    told = []
    failing(Flux1, "forward", range(1000))
    with pytest.raises(UserError, match="memory ran out though all weights that can be streamed are.*smaller picture"):
        run(path, told)
    assert told[-1].startswith("memory ran out: 16 of 16 blocks")


@pytest.mark.parametrize(("free", "words"), [
    (1 << 40, r"; 896x576 would have fitted, with [\d.]+ GiB of the 1024.00 GiB that are free"),
    (1 << 20, r"; even 192x128 takes [\d.]+ MiB, and 1.0 MiB are free"),
])  # fmt: skip
def test_the_last_words_say_what_would_have_fitted(failing, monkeypatch, free, words):
    failing(Denoiser, "__call__", range(1000))
    monkeypatch.setattr("flux.pipelines.fitting.available_bytes", lambda device: free)
    with pytest.raises(ExhaustedError, match=words):
        generate(files.open_mini(), Request(prompt="a red circle", steps=2, width=1008, height=656))


def test_less_free_memory_fits_a_smaller_picture():
    model, sizes = files.open_mini(), []
    planned = [planned_of_part(part) for part in (model.transformer, model.text.t5, model.autoencoder)]
    for free in (1 << 30, 1 << 27):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("flux.pipelines.fitting.available_bytes", lambda device, free=free: free)
            sizes.append(int(what_would_fit(planned, Job(width=2048, height=2048), CPU).split("x")[0]))
    assert sizes[0] > sizes[1] > 0


@pytest.mark.parametrize(
    ("owner", "name", "calls", "told_of"),
    [
        (Binding, "numbers", {40}, "memory ran out while weights were loaded: "),
        (Flux1, "embed", {0}, " of 16 blocks are streamed from here on"),  # where tables are made
    ],
)
def test_what_does_not_fit_before_the_first_step_goes_on_with_fewer_weights(path, failing, owner, name, calls, told_of):
    expected, told = run(path)[1], []
    failing(owner, name, calls)
    part, given = run(path, told)
    assert torch.equal(given, expected)
    [sentence] = told
    assert told_of in sentence
    assert part.residency.resident_bytes == 0


def test_where_not_even_what_must_stay_fits_the_run_stops(path, failing):
    failing(Binding, "numbers", range(100_000))
    with pytest.raises(UserError, match=r"0\.00 GiB of them have to stay"):
        run(path)


def test_control_loras_that_do_not_fit_are_put_on_with_fewer_weights_in_memory(path, failing, monkeypatch):
    guided = Guidance(guides=[Channels(latents=rows(1, 16, *CELLS, seed=13), lora=make_lora(71, DEEP))])
    _, expected = run(path, guided=guided)
    told, real, calls = [], control_lora._moved, iter(range(100))

    def moved(*arguments):
        if next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments)

    monkeypatch.setattr(control_lora, "_moved", moved)
    _, given = run(path, told, guided=guided)
    assert torch.equal(given, expected)
    assert len(told) == 1


@pytest.mark.parametrize("encoder", [ClipText, T5Encoder])
def test_a_text_that_cannot_be_encoded_is_encoded_with_fewer_weights_in_memory(failing, encoder):
    request, told = Request(prompt="a red circle", steps=2), []
    [expected] = generate(files.open_mini(), request)
    failing(encoder, "forward", {0})
    [picture] = generate(files.open_mini(), request, Hooks(warn=told.append))
    [sentence] = told
    assert sentence.endswith("blocks are streamed from here on, and the pass is repeated")
    assert torch.equal(picture.pixels, expected.pixels)


def test_a_picture_that_cannot_be_seen_is_seen_with_fewer_weights_in_memory(failing, tmp_path):
    module = SiglipVision(SIGLIP_MINI)
    part = open_vision(write_module(tmp_path / "tower.safetensors", module, 7), CPU)
    views, told = torch.rand(1, 3, SIGLIP_MINI.side, SIGLIP_MINI.side), []
    with part.resident() as tower:
        expected = tower(views)
    failing(SiglipVision, "forward", {0})
    with part.resident() as tower:
        assert torch.equal(part.going_on(told.append)(partial(tower, views)), expected)
    assert len(told) == 1


@pytest.mark.parametrize(("policy", "alone"), [("keep", False), ("save", True)])
def test_the_transformer_makes_room_for_decoding_where_both_are_too_much(monkeypatch, policy, alone):
    model, beside, real = files.open_mini(), [], text_to_image.in_strips_if_need

    def decoded(*arguments):
        beside.append(model.transformer.residency.resident_bytes)
        return real(*arguments)

    plain = generate(files.open_mini(), Request(prompt="a red circle", steps=2, count=3))
    monkeypatch.setattr(text_to_image, "in_strips_if_need", decoded)
    drawn = generate(model, Request(prompt="a red circle", steps=2, count=3, memory=read_policy(policy)))
    assert [size > 0 for size in beside] == [not alone, not alone, False]
    for one, other in zip(drawn, plain, strict=True):
        assert int((one.pixels.int() - other.pixels.int()).abs().max()) <= 1


def test_where_decoding_has_no_room_beside_the_transformer_it_makes_room_and_comes_again(monkeypatch):
    request, told = Request(prompt="a red circle", steps=2, count=3, memory=read_policy("keep")), []
    expected = generate(files.open_mini(), request)
    model, real, beside = files.open_mini(), Autoencoder.decode, []

    def decode(*given):
        beside.append(model.transformer.residency.resident_bytes)
        if beside[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    monkeypatch.setattr(Autoencoder, "decode", decode)
    drawn = generate(model, request, Hooks(warn=told.append))
    assert [size > 0 for size in beside] == [True, False, True, False, False]
    assert [sentence.split(":")[1] for sentence in told] == [
        " the transformer makes room, and comes again afterwards"
    ] * 2
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(drawn, expected, strict=True))


def failing_but_in_plans(real):
    def call(module, given):
        if given.is_meta:
            return real(module, given)
        raise torch.OutOfMemoryError("CUDA out of memory")

    return call


@pytest.mark.parametrize("owner", ["decode", "encode"])
def test_a_picture_that_fits_in_strips_neither_ends_with_what_would_have_fitted(monkeypatch, owner):
    ways = (Autoencoder, owner), (strips, {"decode": "decode_in_strips", "encode": "moments_in_strips"}[owner])
    for place, name in ways:
        monkeypatch.setattr(place, name, failing_but_in_plans(getattr(place, name)))
    request = Request(prompt="a red circle", steps=2, image=torch.rand(1, 3, 128, 128))
    with pytest.raises(ExhaustedError, match=rf"{owner}d in strips.*would have fitted"):
        generate(files.open_mini(), request)


@pytest.mark.parametrize(
    ("error", "exhausted"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("no"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("backend raised: CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_it_is_told_from_other_faults(error, exhausted):
    assert is_exhausted(error) == exhausted


def test_other_faults_are_not_repeated(path, failing):
    failing(Flux1, "forward", {1}, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        run(path)


def test_a_picture_that_cannot_be_decoded_in_one_piece_is_decoded_in_strips(failing):
    request, told = Request(prompt="a red circle", steps=2), []
    [expected] = generate(files.open_mini(), request)
    failing(Autoencoder, "decode", {0})
    [picture] = generate(files.open_mini(), request, Hooks(warn=told.append))
    assert told == ["memory ran out while the picture was decoded in one piece: it is decoded in strips"]
    assert int((picture.pixels.int() - expected.pixels.int()).abs().max()) <= 1


def test_a_picture_that_cannot_be_encoded_in_one_piece_is_encoded_in_strips(failing):
    start = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    request, told = Request(prompt="a red circle", steps=4, image=start, denoise=0.5), []
    [expected] = generate(files.open_mini(), request)
    failing(Autoencoder, "encode", {0})
    [picture] = generate(files.open_mini(), request, Hooks(warn=told.append))
    assert told == ["memory ran out while the picture was encoded in one piece: it is encoded in strips"]
    assert int((picture.pixels.int() - expected.pixels.int()).abs().max()) <= 1
