"""Muon: its matrices against the iteration's polynomial on singular values, all else against torch's AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flux.training import muon
from flux.training.checkpoints import pack_optimizer, unpack_optimizer
from flux.training.muon import Muon, orthogonalised, split_parameters

FORMATS = [torch.float32, torch.bfloat16]


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch):
    """One format on every machine; tests of the other set it themselves."""
    monkeypatch.setattr(muon, "fast_dtype", lambda device: torch.float32)


def spread_matrix(height, width, seed=0):
    """A matrix whose singular values fall from 1 to 1/10."""
    u, _, v = torch.linalg.svd(rows(height, width, seed=seed), full_matrices=False)
    return u @ torch.diag(torch.linspace(1, 0.1, min(height, width))) @ v


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", [(8, 8), (64, 16), (16, 64), (40, 56), (1, 9), (9, 1)])
def test_singular_values_come_near_one(shape, dtype, monkeypatch):
    monkeypatch.setattr(muon, "fast_dtype", lambda device: dtype)
    out = orthogonalised(spread_matrix(*shape))
    values = torch.linalg.svdvals(out)
    assert out.shape == shape
    assert out.dtype == torch.float32
    assert float(values.min()) >= 0.66
    assert float(values.max()) <= 1.22


@pytest.mark.parametrize("shape", [(8, 8), (24, 10), (10, 24)])
@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_orthogonalising_is_the_quintic_on_singular_values(shape, iterations):
    matrix = rows(*shape)
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(iterations):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(
        orthogonalised(matrix, iterations).double(), u @ torch.diag(values) @ v, rtol=1e-4, atol=1e-5
    )


def test_orthogonalising_does_not_see_the_size_of_a_matrix():
    matrix = spread_matrix(12, 20)
    for factor in (1e-3, 1e4):
        torch.testing.assert_close(orthogonalised(matrix * factor), orthogonalised(matrix), rtol=1e-3, atol=1e-4)


def test_several_matrices_are_each_made_orthogonal():
    stack = torch.stack([spread_matrix(6, 9, seed) * 10**seed for seed in range(3)])
    for one, out in zip(stack, orthogonalised(stack), strict=True):
        torch.testing.assert_close(out, orthogonalised(one), rtol=1e-4, atol=1e-5)


def test_a_zero_matrix_stays_zero():
    assert not orthogonalised(torch.zeros(4, 6)).any()


def test_parameters_are_split_by_name_and_shape():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    matrices, rest = split_parameters(model, lambda name, p: p.ndim == 2 and name != "2.weight")
    assert matrices["orthogonal"] is True
    assert rest["orthogonal"] is False
    assert [tuple(p.shape) for p in matrices["params"]] == [(3, 4)]
    assert len(rest["params"]) == 5


def matrix_group(parameter):
    return [{"params": [parameter], "orthogonal": True}]


def test_a_step_is_nesterov_momentum_orthogonalised_and_scaled():
    start, gradients = rows(6, 10, seed=1), [rows(6, 10, seed=seed) for seed in (2, 3, 4)]
    parameter = nn.Parameter(start.clone())
    optimizer = Muon(matrix_group(parameter), 0.1, momentum=0.9, weight_decay=0.05)
    expected, momentum = start.clone(), torch.zeros(6, 10)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        update = orthogonalised(0.1 * gradient + 0.9 * momentum)
        expected = expected * (1 - 0.1 * 0.05) - 0.1 * 0.2 * 10**0.5 * update
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(parameter.grad, gradient)


def test_updates_have_the_size_of_adams():
    """Root mean square 0.2, whatever the shape: what AdamW's updates typically have."""
    for shape in ((64, 64), (32, 128), (128, 32)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = spread_matrix(*shape)
        Muon(matrix_group(parameter), 1.0).step()
        assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


def test_convolutions_count_as_matrices_of_their_first_dimension():
    flat, conv = nn.Parameter(torch.zeros(8, 36)), nn.Parameter(torch.zeros(8, 4, 3, 3))
    gradient = rows(8, 36)
    flat.grad, conv.grad = gradient, gradient.view(8, 4, 3, 3).to(memory_format=torch.channels_last)
    for parameter in (flat, conv):
        Muon(matrix_group(parameter), 0.1).step()
    torch.testing.assert_close(conv.detach().reshape(8, 36), flat.detach())


@pytest.mark.parametrize("dtype", FORMATS)
def test_muon_descends_a_quadratic(dtype, monkeypatch):
    monkeypatch.setattr(muon, "fast_dtype", lambda device: dtype)
    goal, parameter = rows(12, 20, seed=1), nn.Parameter(torch.zeros(12, 20))
    optimizer = Muon(matrix_group(parameter), 0.15)
    losses = []
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.15 * (1 - step / 200)
        optimizer.zero_grad()
        loss = (parameter - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[50] < 0.5 * losses[0]
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_other_group_is_torchs_adamw(decay):
    starts = [rows(5, 3, seed=1), rows(7, seed=2), rows(2, 3, 3, 3, seed=3)]
    mine, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    ours = Muon([{"params": mine, "orthogonal": False}], 3e-3, betas=(0.8, 0.95), weight_decay=decay)
    adam = torch.optim.AdamW(theirs, 3e-3, betas=(0.8, 0.95), eps=1e-8, weight_decay=decay)
    for step in range(20):
        for group in (*ours.param_groups, *adam.param_groups):
            group["lr"] = 3e-3 / (1 + step)
        for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            one.grad = rows(*one.shape, seed=100 * step + index) * 10.0 ** (index - 1)
            other.grad = one.grad.clone()
        ours.step()
        adam.step()
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_parameter_that_gets_its_first_gradient_late_is_treated_as_adamw_does():
    """Adam's bias correction counts each parameter's own steps."""
    mine, theirs = ([nn.Parameter(torch.ones(4)) for _ in range(2)] for _ in range(2))
    ours = Muon([{"params": mine, "orthogonal": False}], 1e-2)
    adam = torch.optim.AdamW(theirs, 1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0)
    for step in range(6):
        for index in range(2):
            gradient = rows(4, seed=10 * step + index) if step >= 3 * index else None
            mine[index].grad = gradient
            theirs[index].grad = None if gradient is None else gradient.clone()
        ours.step()
        adam.step()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_parameters_without_a_gradient_stay_as_they_are():
    still = [nn.Parameter(rows(3, 4)), nn.Parameter(rows(5))]
    optimizer = Muon(
        [{"params": [still[0]], "orthogonal": True}, {"params": [still[1]], "orthogonal": False}], 0.1, weight_decay=0.5
    )
    optimizer.step()
    assert torch.equal(still[0], rows(3, 4))
    assert torch.equal(still[1], rows(5))
    assert pack_optimizer(optimizer, "") == {}


def test_a_closure_is_run_with_gradients_and_its_loss_returned():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = Muon([{"params": [parameter], "orthogonal": False}], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert float(parameter.detach().max()) < 1


def learner(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(24, 4)).to(
        memory_format=torch.channels_last
    )
    return model, Muon(split_parameters(model, lambda _, p: p.ndim > 1), 0.02, weight_decay=0.01)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(rows(2, 3, 4, 4, seed=step)).square().sum().backward()
        optimizer.step()


def test_a_resumed_optimizer_goes_on_bit_for_bit():
    whole, optimizer = learner(0)
    train(whole, optimizer, range(8))

    half, optimizer = learner(0)
    train(half, optimizer, range(4))
    saved = {k: v.clone() for k, v in pack_optimizer(optimizer, "optimizer.").items()}
    weights = {k: v.clone() for k, v in half.state_dict().items()}

    resumed, optimizer = learner(1)
    resumed.load_state_dict(weights)
    unpack_optimizer(optimizer, saved | {"model.weight": torch.zeros(1)}, "optimizer.")
    train(resumed, optimizer, range(4, 8))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
