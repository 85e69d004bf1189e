"""The product with weights: the same numbers by either way, and a gradient where one is wanted."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import flux.ops.linear as module
from flux.ops.linear import linear
from flux.ops.packed import Linear

TOLERANCE = 2e-6  # of the largest output; two ways of summing some hundreds of fp32 products


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The inputs' shapes that oneDNN was given."""
    real, seen = module._find_one_dnn(), []

    def recorded(x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(x.shape)
        return real(x, *rest)

    if real is None:
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(module, "_one_dnn", recorded)
    monkeypatch.setattr(module, "_one_dnn_rows", module.ANY_ROWS)
    return seen


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
def test_torch_still_has_the_function():
    assert module._find_one_dnn() is not None


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch was built without MKL")
@pytest.mark.parametrize(("rows", "times"), [(1, 0), (16, 1), (256, 1), (300, 0)])
def test_on_intels_processors_products_of_many_rows_are_left_to_intels_library(calls, monkeypatch, rows, times):
    monkeypatch.setattr(module, "_one_dnn_rows", module._rows_for_one_dnn("GenuineIntel"))
    x, weight = torch.randn(1, rows, 256), torch.randn(512, 256)
    with torch.no_grad():
        out, expected = linear(x, weight), F.linear(x, weight)
    assert len(calls) == times
    assert (out - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_on_others_one_dnn_takes_all():
    assert module._rows_for_one_dnn("AuthenticAMD") == module._rows_for_one_dnn("") == module.ANY_ROWS


def test_who_made_the_processor_is_read_from_the_system(monkeypatch, tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Some AMD-like name\n")
    monkeypatch.setattr(module, "CPU_INFO", told)
    assert module._maker() == "GenuineIntel"
    told.write_text("CPU implementer\t: 0x41\n")
    assert module._maker() == ""
    monkeypatch.setattr(module, "CPU_INFO", tmp_path / "none")
    monkeypatch.setattr(module.platform, "processor", lambda: "Intel64 Family 6, GenuineIntel")
    assert module._maker() == "Intel64 Family 6, GenuineIntel"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (1, 300, 256)])
def test_one_dnn_gives_torchs_numbers(calls, shape, bias):
    layer = Linear(256, 512, bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        out, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    assert len(calls) == 1
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_inputs_that_are_views_keep_their_order(calls):
    weight, wide = torch.randn(512, 256), torch.randn(2, 20, 1024)
    with torch.inference_mode():
        for x in (wide[..., 512:768], wide[..., :256].transpose(0, 1)):
            expected = F.linear(x.contiguous(), weight)
            assert (linear(x, weight) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert len(calls) == 2


def test_a_function_that_torch_changed_is_not_used(monkeypatch):
    def changed(*_):
        raise TypeError("no such signature")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", changed, raising=False)
    assert module._find_one_dnn() is None
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, *_: x)
    assert module._find_one_dnn() is None


def test_inputs_that_do_not_fit_are_torchs_to_refuse(calls):
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(4, 300), torch.randn(512, 256))
    assert calls == []


def test_gradients_flow(calls):
    layer, x = Linear(256, 512), torch.randn(4, 256, requires_grad=True)
    layer(x).sum().backward()
    assert calls == []
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(4, -1), atol=1e-5)


@torch.no_grad()
def test_torchs_own_serves_what_one_dnn_should_not_get(calls):
    linear(torch.randn(4, 64), torch.randn(64, 64))  # small
    linear(torch.randn(4, 256, dtype=torch.float64), torch.randn(512, 256, dtype=torch.float64))
    assert linear(torch.randn(0, 256), torch.randn(512, 256)).shape == (0, 512)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(4, 256), torch.randn(512, 256)).dtype == torch.bfloat16
    assert calls == []


@pytest.fixture
def paged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of results that were put into large pages, however small, with torch's own product."""
    real, seen = module.in_large_pages, []

    def recorded(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        seen.append(shape)
        return real(shape, dtype)

    monkeypatch.setattr(module, "_one_dnn", None)
    monkeypatch.setattr(module, "LARGE_RESULT", 0)
    monkeypatch.setattr(module, "in_large_pages", recorded)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (1, 300, 256)])
def test_large_results_are_the_same_in_large_pages(paged, shape, bias):
    layer, x = Linear(256, 512, bias=bias), torch.randn(shape)
    with torch.inference_mode():
        out, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    assert paged == [(x.numel() // 256, 512)]
    assert torch.equal(out, expected)


def test_views_as_inputs_are_taken_in_their_order(paged):
    wide, weight = torch.randn(2, 20, 1024), torch.randn(512, 256)
    with torch.inference_mode():
        out, expected = linear(wide[..., 512:768], weight), F.linear(wide[..., 512:768].contiguous(), weight)
    assert len(paged) == 1
    assert (out - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_only_large_results_outside_of_training_are(paged, monkeypatch):
    layer, x = Linear(256, 512), torch.randn(4, 256)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    monkeypatch.setattr(module, "LARGE_RESULT", 4 * 512 * 4)
    with torch.inference_mode():
        layer(x)
    assert paged == []
