"""What is chosen for attention, what is told of it, and that torch's own takes over where another cannot go on."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from flux.cli import arguments
from flux.errors import NumericError, UserError
from flux.ops import attention_backends as backends
from flux.ops.attention import attention
from flux.ops.attention_backends import (
    BACKENDS,
    CHOICES,
    PLAIN,
    Attention,
    Backend,
    Case,
    choose_attention,
    until_finite,
)
from flux.pipelines.denoising import Hooks, denoise
from flux.pipelines.parts import open_transformer
from tests.guides import PROMPT, SIGMAS, noise
from tests.oracles import TOLERANCE, relative_error, rows
from tests.tiny import write_tiny

CPU = torch.device("cpu")
GPU = torch.device("cuda")
ON_CPU = Case(CPU, torch.float32, 128)
PACKAGES = {"sage": "sageattention", "flash-attn": "flash_attn"}


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    """Every package is looked for anew, and none is there."""
    backends._loaded.cache_clear()
    for package in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)
    yield
    backends._loaded.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a capability."""

    def of(*number):
        monkeypatch.setattr(backends, "capability", lambda device: number if device.startswith("cuda") else (0, 0))

    return of


@pytest.fixture
def install(monkeypatch):
    """Packages that compute attention by torch, and note how they were called."""
    calls = []

    def sageattn(q, k, v, tensor_layout, is_causal, sm_scale):
        assert (tensor_layout, is_causal) == ("HND", False)
        calls.append(("sage", tuple(q.shape)))
        return attention(q, k, v, scale=sm_scale)

    def flash_attn_func(q, k, v, softmax_scale):
        calls.append(("flash-attn", tuple(q.shape)))
        return attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=softmax_scale).transpose(1, 2)

    modules = {
        "sage": SimpleNamespace(sageattn=sageattn),
        "flash-attn": SimpleNamespace(flash_attn_func=flash_attn_func),
    }

    def install(*names):
        for name in names:
            monkeypatch.setitem(sys.modules, PACKAGES[name], modules[name])
        return calls

    return install


def inputs(length=6, width=64):
    return tuple(rows(2, 3, length, width, seed=seed) for seed in (1, 2, 3))


@pytest.mark.parametrize("name", [name for name, row in BACKENDS.items() if row.fault(ON_CPU) is None])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_backend_that_runs_on_a_cpu_gives_what_torchs_own_choice_gives(name, with_bias, scale):
    if BACKENDS[name].package is not None:
        pytest.skip("a package of GPUs")
    bias = rows(2, 1, 6, 6, seed=4) if with_bias else None
    chosen = choose_attention(name, ON_CPU)
    given = chosen(*inputs(), bias, scale=scale)
    assert chosen.backend.name == name  # it was not given up
    assert relative_error(given, attention(*inputs(), bias, scale=scale)) <= TOLERANCE


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_give_what_torchs_own_gives_and_leave_calls_with_a_bias_to_it(name, gpu, install):
    gpu(9, 0)
    calls = install(name)
    chosen = choose_attention(name, Case(GPU, torch.bfloat16, 128))
    assert relative_error(chosen(*inputs(), scale=0.3), attention(*inputs(), scale=0.3)) <= TOLERANCE
    assert calls == [(name, (2, 3, 6, 64) if name == "sage" else (2, 6, 3, 64))]
    bias = rows(2, 1, 6, 6, seed=4)
    assert torch.equal(chosen(*inputs(), bias), attention(*inputs(), bias))
    assert len(calls) == 1
    assert chosen.backend.name == name


@pytest.mark.parametrize(
    ("name", "number", "dtype", "width", "installed", "expected"),
    [
        ("auto", (9, 0), torch.bfloat16, 128, PACKAGES, "cudnn"),
        ("auto", (8, 9), torch.bfloat16, 128, PACKAGES, "flash-attn"),
        ("auto", (8, 9), torch.bfloat16, 128, ["sage"], "sdpa"),
        ("auto", (8, 0), torch.float16, 128, [], "sdpa"),
        ("auto", (9, 0), torch.float32, 128, PACKAGES, "sdpa"),
        ("auto", (9, 0), torch.bfloat16, 512, PACKAGES, "sdpa"),
        ("auto", (7, 5), torch.float16, 128, PACKAGES, "sdpa"),
        ("fast", (9, 0), torch.bfloat16, 128, PACKAGES, "sage"),
        ("fast", (8, 6), torch.float16, 64, ["sage"], "sage"),
        ("fast", (9, 0), torch.bfloat16, 128, [], "cudnn"),
        ("fast", (9, 0), torch.bfloat16, 80, PACKAGES, "cudnn"),
    ],
)
def test_the_first_that_runs_is_taken(gpu, install, name, number, dtype, width, installed, expected):
    gpu(*number)
    install(*installed)
    chosen = choose_attention(name, Case(GPU, dtype, width))
    assert chosen.backend is BACKENDS[expected]
    assert chosen.report.startswith(f"{expected} (")
    assert ("exact" in chosen.report) == (name == "auto")


@pytest.mark.parametrize("name", ["auto", "fast"])
def test_on_a_cpu_it_is_torchs_own_and_no_package_is_imported(name, monkeypatch):
    monkeypatch.setattr(backends, "importlib", SimpleNamespace(import_module=lambda _: pytest.fail("imported")))
    chosen = choose_attention(name, ON_CPU)
    assert chosen.is_plain
    assert torch.equal(chosen(*inputs()), attention(*inputs()))


def test_what_does_not_exist_is_answered_with_what_does():
    with pytest.raises(UserError, match="no attention 'xformers'; choose one of: auto, fast, sdpa, cudnn, flash"):
        choose_attention("xformers", ON_CPU)


def test_what_cannot_run_is_refused_with_the_reason(gpu, monkeypatch):
    with pytest.raises(UserError, match="by cudnn cannot run here: it needs an NVIDIA GPU of capability 8.0"):
        choose_attention("cudnn", ON_CPU)
    gpu(9, 0)
    with pytest.raises(UserError, match="it takes float16 and bfloat16, and not float32"):
        choose_attention("cudnn", Case(GPU, torch.float32, 128))
    with pytest.raises(UserError, match="it takes no heads of width 80"):
        choose_attention("sage", Case(GPU, torch.bfloat16, 80))
    monkeypatch.delitem(sys.modules, "sageattention")
    with pytest.raises(UserError, match="package sageattention is not installed; install sageattention, or choose"):
        choose_attention("sage", Case(GPU, torch.bfloat16, 128))


def test_a_package_that_cannot_be_imported_is_told_of_or_passed_over(gpu, monkeypatch):
    gpu(8, 9)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    with pytest.raises(UserError, match=r"package flash_attn cannot be used \(.*flash_attn_func"):
        choose_attention("flash-attn", Case(GPU, torch.bfloat16, 128))
    assert choose_attention("auto", Case(GPU, torch.bfloat16, 128)).is_plain


def injected(kernel, told=None, **row):
    backend = Backend(name="injected", what="a test's", load=lambda: kernel, **row)
    return Attention(backend, "asked for", kernel, None if told is None else told.append)


@pytest.mark.parametrize("error", [RuntimeError("no\nkernel"), TypeError("no kernel"), AssertionError("no kernel")])
def test_one_that_fails_is_left_for_torchs_own_which_is_told_once(error):
    told, calls = [], []

    def failing(*_, scale):
        calls.append(scale)
        raise error

    chosen = injected(failing, told)
    for _ in range(2):
        assert torch.equal(chosen(*inputs()), attention(*inputs()))
    assert told == ["attention by injected failed (no kernel): torch's own is used from here on"]
    assert len(calls) == 1
    assert chosen.report == "sdpa (torch's, by its own choice): injected failed (no kernel)"


def test_memory_that_runs_out_is_no_fault_of_it():
    def failing(*_, scale):
        raise torch.OutOfMemoryError("CUDA out of memory")

    chosen = injected(failing)
    with pytest.raises(torch.OutOfMemoryError):
        chosen(*inputs())
    assert chosen.backend.name == "injected"


def test_torchs_own_faults_are_raised():
    with pytest.raises(RuntimeError):
        choose_attention("auto", ON_CPU)(rows(1, 1, 2, 4, seed=1), rows(1, 1, 2, 5, seed=1), rows(1, 1, 2, 4, seed=1))


def test_what_is_finite_is_computed_once_and_with_torchs_own_nothing_is_looked_at():
    made, bad = [], torch.full((2,), torch.nan)

    def compute():
        made.append(1)
        return bad

    assert until_finite([attention, choose_attention("auto", ON_CPU)], compute) is bad
    good = torch.zeros(2)
    assert until_finite([injected(attention)], lambda: made.append(1) or good) is good
    assert len(made) == 2


def test_numbers_that_torchs_own_makes_no_better_are_the_models_fault():
    own, told = injected(attention), []
    own._tell = told.append
    bad = torch.full((2,), torch.nan)
    assert until_finite([own], lambda: bad) is bad
    assert not own.is_plain
    assert told == []


# In a run.


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny")).transformer


def run(path, **settings):
    return denoise(open_transformer(path, CPU, torch.float32), PROMPT, noise(), SIGMAS, guidance=3.0, **settings)


@pytest.fixture
def broken(monkeypatch):
    """A backend that gives NaN from some call on, chosen by its name."""
    calls = []

    def kernel(q, k, v, bias=None, *, scale=None):
        calls.append(len(calls))
        out = attention(q, k, v, bias, scale=scale)
        return out * torch.nan if len(calls) > 5 else out

    monkeypatch.setitem(BACKENDS, "broken", Backend(name="broken", what="a test's", load=lambda: kernel))
    return calls


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
def test_a_step_that_is_not_finite_is_repeated_with_torchs_own(path, broken, solver, compiled, monkeypatch):
    from flux.pipelines import compiled as compiling

    monkeypatch.setattr(compiling, "INDUCTOR", "eager")
    told = []
    given = run(path, attention="broken", solver_name=solver, hooks=Hooks(warn=told.append), compiled=compiled)
    assert relative_error(given, run(path, solver_name=solver)) < TOLERANCE
    assert len(broken) == 6  # two blocks a step: the third step was begun with it, and repeated without
    assert told == ["attention by broken gave numbers that are not finite: torch's own is used from here on"]


def test_numbers_that_are_not_finite_with_torchs_own_either_stop_the_run(tmp_path, broken):
    damaged = write_tiny(tmp_path, change=lambda tensors: tensors["img_in.weight"].fill_(torch.nan)).transformer
    told = []
    with pytest.raises(NumericError, match="step 1 of 4 gave numbers that are not finite"):
        run(damaged, attention="broken", hooks=Hooks(warn=told.append))
    assert told == []  # the fault is the model's


def test_a_run_with_what_is_not_there_is_refused_before_anything_is_loaded(path):
    part = open_transformer(path, CPU, torch.float32)
    with pytest.raises(UserError, match="no attention 'xformers'"):
        denoise(part, PROMPT, noise(), SIGMAS, attention="xformers", hooks=Hooks(progress=pytest.fail))


def test_the_command_line_lists_what_there_is():
    assert arguments.ATTENTIONS == CHOICES
    assert PLAIN.name in CHOICES
