"""A weight that stays as it is stored gives the same numbers, rows and products as one that is unpacked."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flux.ops.packed import Embedding, Linear
from flux.weights.binding import Binding
from flux.weights.formats.written import WRITTEN
from flux.weights.renames import Piece, Recipe, Reshape
from flux.weights.sources import open_checkpoint
from tests.stored import suffix_of, write_stored

ROWS, COLUMNS = 48, 512
WEIGHTS = {
    name: torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(n)) * 0.05
    for n, name in enumerate(("q.weight", "k.weight"))
}


@pytest.fixture
def sources(tmp_path):
    def opened(kind):
        return open_checkpoint(write_stored(tmp_path / f"x{suffix_of(kind)}", WEIGHTS, kind))

    return opened


def bound(sources, *pieces, shape=(ROWS, COLUMNS), shares=(1,), reshape=Reshape.KEEP):
    recipe = Recipe(pieces, shares, reshape)
    return Binding(shape, recipe, {name: sources[name] for name in recipe.sources})


@pytest.mark.parametrize("kind", WRITTEN)
def test_packed_numbers_are_the_numbers(sources, kind):
    binding = bound(sources(kind), Piece("q.weight"))
    packed = binding.packed()
    assert packed.shape == (ROWS, COLUMNS)
    assert packed.formats == (WRITTEN[kind].row,) or packed.formats[0].name == WRITTEN[kind].row.name
    assert packed.nbytes == binding.nbytes
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(packed.numbers(dtype), binding.numbers(dtype))


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_weight_that_was_read_into_other_memory_is_the_same(sources, kind):
    opened = sources(kind)
    bindings = [bound(opened, Piece("q.weight"))]
    if not opened["q.weight"].format.pads:  # such tensors are neither joined nor cut
        both = (Piece("q.weight"), Piece("k.weight"))
        bindings.append(bound(opened, *both, shape=(2 * ROWS, COLUMNS), shares=(1, 1)))
        bindings.append(bound(opened, Piece("q.weight", 1, 2, 2), Piece("q.weight", 0, 1, 2), shares=(1, 1)))
    for binding in bindings:
        packed = binding.packed()
        memory = {name: torch.zeros(tensor.nbytes, dtype=torch.uint8) for name, tensor in packed.tensors().items()}
        binding.read_into(memory)
        views = {name: memory[name].view(tensor.dtype).view(tensor.shape) for name, tensor in packed.tensors().items()}
        moved = packed.with_tensors(views)
        assert torch.equal(moved.numbers(torch.float32), binding.numbers(torch.float32))


@pytest.mark.parametrize("kind", ["bf16", "fp8", "nf4", "gguf:Q4_K"])
def test_joined_cut_and_swapped_weights_stay_packed_too(sources, kind):
    opened = sources(kind)
    q, k = (opened[name].numbers(torch.float32) for name in WEIGHTS)
    joined = bound(opened, Piece("q.weight"), Piece("k.weight"), shape=(2 * ROWS, COLUMNS), shares=(1, 1))
    assert torch.equal(joined.packed().numbers(torch.float32), torch.cat((q, k)))
    assert sorted(joined.packed().tensors())[0].startswith("0.")
    cut = bound(opened, Piece("q.weight", 1, 2, 3), shape=(ROWS // 3, COLUMNS))
    assert torch.equal(cut.packed().numbers(torch.float32), q[16:32])
    swapped = bound(opened, Piece("q.weight", 1, 2, 2), Piece("q.weight", 0, 1, 2), shares=(1, 1))
    assert torch.equal(swapped.packed().numbers(torch.float32), torch.cat((q[24:], q[:24])))


@pytest.mark.parametrize("kind", WRITTEN)
def test_stored_tensors_can_be_exchanged_for_copies_elsewhere(sources, kind):
    packed = bound(sources(kind), Piece("q.weight")).packed()
    copies = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    moved = packed.with_tensors(copies)
    assert torch.equal(moved.numbers(torch.float32), packed.numbers(torch.float32))
    assert moved.tensors()["data"] is copies["data"]


@pytest.mark.parametrize("kind", WRITTEN)
def test_rows_are_those_of_the_numbers(sources, kind):
    packed = bound(sources(kind), Piece("k.weight")).packed()
    places = torch.tensor([47, 0, 5, 5])
    assert torch.equal(packed.rows(places, torch.float32), packed.numbers(torch.float32)[places])


@pytest.mark.parametrize("kind", ["bf16", "fp8", "mxfp8", "nvfp4", "int8-row", "nf4", "gguf:Q6_K"])
def test_layers_with_packed_weights_compute_what_layers_with_numbers_do(sources, kind):
    packed = bound(sources(kind), Piece("q.weight")).packed()
    numbers = packed.numbers(torch.float32)
    linear = Linear(COLUMNS, ROWS, device="meta")
    linear.bias = torch.nn.Parameter(torch.arange(float(ROWS)))
    linear.packed = packed
    x = torch.randn(2, 5, COLUMNS)
    assert torch.allclose(linear(x), F.linear(x, numbers, linear.bias), atol=1e-5)
    table = Embedding(ROWS, COLUMNS, device="meta")
    table.packed = packed
    ids = torch.tensor([[1, 47], [0, 0]])
    assert torch.equal(table(ids), numbers[ids])


def test_a_packed_weight_on_its_device_is_itself(sources):
    packed = bound(sources("fp8"), Piece("q.weight")).packed()
    assert packed.to(torch.device("cpu")) is packed
    assert packed.to(torch.device("meta")).device == torch.device("meta")


def test_nothing_of_a_mapped_file_is_copied_to_keep_it_packed(sources):
    binding = bound(sources("fp8"), Piece("q.weight"))
    assert binding.packed().tensors()["data"].data_ptr() == binding.packed().tensors()["data"].data_ptr()
