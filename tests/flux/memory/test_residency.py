"""Weights come and go by prefix, and every move says how many bytes it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flux.errors import FileError
from flux.memory.residency import Residency
from flux.ops.layers import on_meta

WEIGHTS = {
    "stored.a.weight": torch.arange(12.0).view(3, 4),
    "stored.a.bias": torch.arange(3.0),
    "stored.ab.weight": torch.ones(2, 3),
}
BYTES_A, BYTES_AB = (12 + 3) * 4, 6 * 4


class Two(nn.Module):
    """Two layers, the name of one beginning with the other's."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.ab = nn.Linear(3, 2, bias=False)


def bound(weights=WEIGHTS, dtype=torch.float32):
    with on_meta():
        module = Two()
    names = {name.removeprefix("stored."): name for name in weights}
    reads = []

    def read(name):
        reads.append(name)
        return weights[name]

    residency = Residency(module, names, read, device=torch.device("cpu"), dtype=dtype, label="two.safetensors")
    return module, residency, reads


def test_nothing_is_read_before_it_is_loaded():
    module, residency, reads = bound()
    assert residency.resident_bytes == 0
    assert reads == []
    assert all(parameter.is_meta for parameter in module.parameters())


def test_load_brings_every_weight_once_and_says_its_bytes():
    module, residency, reads = bound()
    assert residency.load() == BYTES_A + BYTES_AB == residency.resident_bytes
    assert residency.load() == 0
    assert sorted(reads) == sorted(WEIGHTS)
    assert torch.equal(module.a.weight, WEIGHTS["stored.a.weight"])
    assert torch.equal(module.a(torch.ones(4)), torch.tensor([6.0, 23.0, 40.0]))


def test_load_leaves_out_whole_prefixes_only():
    module, residency, _ = bound()
    assert residency.load(without=("a",)) == BYTES_AB
    assert module.a.weight.is_meta
    assert not module.ab.weight.is_meta


def test_release_lets_go_of_prefixes_or_of_all():
    module, residency, _ = bound()
    residency.load()
    assert residency.release(("ab",)) == BYTES_AB
    assert residency.resident_bytes == BYTES_A
    assert residency.release() == BYTES_A
    assert residency.release() == 0
    assert module.a.weight.is_meta
    assert module.a.weight.shape == (3, 4)


def test_borrow_gives_back_what_was_absent_even_after_an_error():
    module, residency, _ = bound()

    def fail():
        with residency.borrow("a"):
            assert residency.resident_bytes == BYTES_A
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert residency.resident_bytes == 0
    assert module.a.bias.is_meta


def test_borrow_keeps_what_was_there_before():
    _, residency, _ = bound()
    residency.load(without=("ab",))
    with residency.borrow("a"):
        pass
    assert residency.resident_bytes == BYTES_A


def test_weights_take_the_dtype_asked_for_and_keep_it_when_released():
    module, residency, _ = bound(dtype=torch.bfloat16)
    assert residency.load() == (BYTES_A + BYTES_AB) // 2
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    residency.release()
    assert residency.load() == (BYTES_A + BYTES_AB) // 2


def test_parameters_need_no_gradient():
    module, residency, _ = bound()
    residency.load()
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_tensor_of_another_shape_is_named():
    _, residency, _ = bound({**WEIGHTS, "stored.a.bias": torch.zeros(5)})
    with pytest.raises(
        FileError, match=r"two\.safetensors: tensor stored\.a\.bias has shape \(5,\), \(3,\) was expected"
    ):
        residency.load()
