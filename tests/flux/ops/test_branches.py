"""Side branches of a linear layer: what they add, to a weight however it is stored, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import flux.ops.linear as linear_module
from flux.ops.packed import Linear, SideBranch
from tests.oracles import TOLERANCE, relative_error, rows

INPUTS, OUTPUTS, RANK = 48, 32, 4


def make_branch(seed, inputs=INPUTS, bias=True, **options):
    down, up = rows(RANK, inputs, seed=seed), rows(OUTPUTS, RANK, seed=seed + 1)
    return SideBranch(down, up, rows(OUTPUTS, seed=seed + 2) if bias else None, **options)


def expected_of(branch, x):
    """What it adds, in fp64 and by another way: the whole matrix first."""
    bias = 0 if branch.bias is None else branch.bias.double()
    return branch.strength * (x.double() @ (branch.up.double() @ branch.down.double()).T + bias)


class Packed:
    """A weight that is unpacked at use, or multiplied as it is."""

    nbytes = 0

    def __init__(self, weight, multiplies):
        self.weight, self.multiplies, self.seen = weight, multiplies, []

    def numbers(self, dtype):
        return self.weight.to(dtype)

    def product(self, x, bias):
        self.seen.append(tuple(x.shape))
        return F.linear(x, self.weight, bias) if self.multiplies else None


@pytest.mark.usefixtures("as_run")
@pytest.mark.parametrize("storage", ["numbers", "unpacked", "multiplied"])
@pytest.mark.parametrize("shape", [(INPUTS,), (3, INPUTS), (2, 5, INPUTS)])
def test_branches_add_up_beside_the_weight_however_it_is_stored(shape, storage):
    layer, x = Linear(INPUTS, OUTPUTS), rows(*shape, seed=1)
    plain = F.linear(x, layer.weight, layer.bias)
    if storage != "numbers":
        layer.packed = Packed(layer.weight.detach(), storage == "multiplied")
        layer.weight = torch.nn.Parameter(torch.empty(OUTPUTS, INPUTS, device="meta"))
    layer.branches = (make_branch(2, strength=0.7), make_branch(5, bias=False, strength=-1.5))
    expected = plain.double() + sum(expected_of(branch, x) for branch in layer.branches)
    assert relative_error(layer(x).detach(), expected.detach().float()) <= TOLERANCE


@pytest.mark.usefixtures("as_run")
def test_one_dnn_serves_large_branches_alike():
    layer, x = Linear(512, 512), rows(7, 512, seed=1)
    branch = SideBranch(rows(256, 512, seed=2), rows(512, 256, seed=3), rows(512, seed=4), strength=0.5)
    assert branch.down.numel() >= linear_module.SMALLEST
    plain = F.linear(x, layer.weight, layer.bias)
    layer.branches = (branch,)
    assert relative_error(layer(x).detach(), (plain + expected_of(branch, x)).detach().float()) <= TOLERANCE


@pytest.mark.usefixtures("as_run")
@pytest.mark.parametrize("packed", [False, True])
def test_a_wider_input_is_shared_out_by_columns(packed):
    layer, x = Linear(INPUTS, OUTPUTS), rows(2, 5, INPUTS + 20, seed=1)
    own = F.linear(x[..., :INPUTS], layer.weight, layer.bias)
    if packed:
        layer.packed = Packed(layer.weight.detach(), multiplies=True)
    columns = (slice(0, 10), slice(INPUTS + 10, INPUTS + 20))
    layer.branches = (make_branch(2, 20, columns=columns), make_branch(5, 20, columns=(slice(INPUTS, INPUTS + 20),)))
    taken = torch.cat((x[..., :10], x[..., -10:]), dim=-1)
    expected = own + expected_of(layer.branches[0], taken) + expected_of(layer.branches[1], x[..., -20:])
    assert relative_error(layer(x).detach(), expected.detach().float()) <= TOLERANCE
    if packed:
        assert layer.packed.seen == [(2, 5, INPUTS)]


@pytest.mark.usefixtures("as_run")
def test_a_strength_of_zero_gives_the_layer_itself_to_the_bit_whatever_the_branch_holds():
    layer, x = Linear(320, 256), rows(2, 9, 400, seed=1)
    plain = layer(x[..., :320].contiguous())
    broken = torch.full((RANK, 320), torch.nan)
    layer.branches = (SideBranch(broken, torch.zeros(256, RANK), columns=(slice(0, 320),), strength=0.0),)
    assert torch.equal(layer(x), plain)


def test_a_wider_input_without_branches_is_refused_as_ever():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Linear(INPUTS, OUTPUTS)(rows(2, INPUTS + 20, seed=1))


def test_a_layer_without_branches_keeps_nothing_of_them():
    layer = Linear(INPUTS, OUTPUTS)
    assert "branches" not in layer.__dict__
    layer.branches = (make_branch(1),)
    assert layer.state_dict().keys() == {"weight", "bias"}
    assert len(list(layer.parameters())) == 2
    del layer.branches
    assert layer.branches == ()


def test_inputs_are_not_written_to():
    layer, x = Linear(INPUTS, INPUTS, bias=False), rows(2, INPUTS, seed=1)
    layer.weight.data = torch.eye(INPUTS)
    layer.branches = (SideBranch(rows(RANK, INPUTS, seed=2), rows(INPUTS, RANK, seed=3)),)
    kept = x.clone()
    with torch.no_grad():
        assert not torch.equal(layer(x), x)
    assert torch.equal(x, kept)


def test_gradients_reach_the_branch_the_weight_and_the_input():
    layer, x = Linear(INPUTS, OUTPUTS), rows(3, INPUTS, seed=1).requires_grad_()
    branch = make_branch(2, strength=0.5)
    tensors = [tensor.requires_grad_() for tensor in (branch.down, branch.up, branch.bias)]
    layer.branches = (branch,)
    layer(x).sum().backward()
    ones = torch.ones(3, OUTPUTS)
    whole = layer.weight + 0.5 * branch.up @ branch.down
    assert relative_error(x.grad, (ones @ whole).detach()) <= TOLERANCE
    assert relative_error(layer.weight.grad, (ones.T @ x).detach()) <= TOLERANCE
    hidden = x @ branch.down.T
    expected = (0.5 * branch.up.T @ ones.T @ x, 0.5 * ones.T @ hidden, torch.full((OUTPUTS,), 1.5))
    for tensor, gradient in zip(tensors, expected, strict=True):
        assert relative_error(tensor.grad, gradient.detach()) <= TOLERANCE


def test_bf16_is_rounded_as_black_forest_labs_round_it():
    layer, x = Linear(INPUTS, OUTPUTS).bfloat16(), rows(3, INPUTS, seed=1).bfloat16()
    branch = make_branch(2)
    branch = SideBranch(branch.down.bfloat16(), branch.up.bfloat16(), branch.bias.bfloat16())
    layer.branches = (branch,)
    update = F.linear(F.linear(x, branch.down), branch.up, branch.bias)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias) + update)
