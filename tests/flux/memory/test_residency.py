"""Weights come and go by prefix, and every move says how many bytes it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flux.memory.residency import Residency
from flux.ops.layers import on_meta
from flux.ops.packed import Embedding, Linear
from tests import whole

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
        self.a = Linear(4, 3)
        self.ab = nn.Linear(3, 2, bias=False)


class Stored(whole.Stored):
    """A weight that is stored as bytes, each for a whole number."""

    def __init__(self, name, tensor, reads):
        super().__init__(tensor)
        self.name, self.reads = name, reads

    @property
    def nbytes(self):
        return self.tensor.numel()

    def numbers(self, dtype, device=None):
        self.reads.append(self.name)
        return self.tensor.to(device, dtype)

    def forget(self):
        self.forgotten = True

    def packed(self, device=None):
        self.reads.append(self.name)
        return Bytes(self.tensor.to(device, torch.uint8))


class Bytes:
    """What ``Stored.packed`` gives."""

    def __init__(self, tensor):
        self.tensor, self.nbytes, self.unpacked = tensor, tensor.nbytes, 0
        self.device = tensor.device

    def numbers(self, dtype):
        self.unpacked += 1
        return self.tensor.to(dtype)

    def rows(self, places, dtype):
        return self.tensor[places].to(dtype)

    def product(self, x, bias):
        return None


def bound(weights=WEIGHTS, dtype=torch.float32, packed=False, build=Two):
    with on_meta():
        module = build()
    reads = []
    sources = {name.removeprefix("stored."): Stored(name, tensor, reads) for name, tensor in weights.items()}
    residency = Residency(module, sources, device=torch.device("cpu"), dtype=dtype, keeps_packed=packed)
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


def test_packed_weights_take_what_they_take_in_the_file():
    module, residency, reads = bound(packed=True)
    assert residency.load() == 12 + 3 * 4 + BYTES_AB == residency.resident_bytes
    assert sorted(reads) == sorted(WEIGHTS)
    assert module.a.weight.is_meta
    assert module.a.packed.unpacked == 0
    assert torch.equal(module.a(torch.ones(4)), torch.tensor([6.0, 23.0, 40.0]))
    assert module.a.packed.unpacked == 1


def test_only_layers_that_unpack_at_use_get_packed_weights():
    module, residency, _ = bound(packed=True)
    residency.load()
    assert not module.ab.weight.is_meta
    assert torch.equal(module.ab(torch.ones(3)), torch.tensor([3.0, 3.0]))


def test_packed_weights_go_like_others():
    module, residency, _ = bound(packed=True)
    brought = residency.load()
    assert residency.release(("a",)) == 12 + 12
    assert module.a.packed is None
    assert residency.load() == 12 + 12
    assert residency.release() == brought
    assert residency.resident_bytes == 0
    assert module.a.weight.shape == (3, 4)


def test_borrowed_weights_are_numbers_for_they_are_used_again_and_again():
    module, residency, _ = bound(packed=True)
    with residency.borrow("a"):
        assert module.a.packed is None
        assert residency.resident_bytes == BYTES_A
    assert module.a.weight.is_meta


def test_what_takes_no_less_packed_comes_as_numbers():
    module, residency, _ = bound(packed=True, dtype=torch.uint8)
    residency.load()
    assert module.a.packed is None


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = Embedding(4, 3)


def test_a_packed_table_gives_the_rows_that_are_asked_for_in_the_modules_dtype():
    table = torch.arange(12.0).view(4, 3)
    module, residency, _ = bound({"table.weight": table}, packed=True, build=Words, dtype=torch.bfloat16)
    residency.load()
    rows = module.table(torch.tensor([[3, 0], [1, 1]]))
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows.float(), table[torch.tensor([[3, 0], [1, 1]])])
