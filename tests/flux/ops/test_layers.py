"""Modules on the meta device take no memory, and no initialisation."""

from __future__ import annotations

import torch
from torch import nn

from flux.ops.layers import on_meta


def test_modules_built_on_meta_have_their_shapes_and_no_memory():
    with on_meta():
        module = nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 6), nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    assert all(parameter.is_meta for parameter in module.parameters())
    assert [tuple(parameter.shape) for parameter in module.parameters()][:3] == [(4, 3), (4,), (5, 6)]


def test_modules_built_after_it_are_initialised_again():
    with on_meta():
        pass
    torch.manual_seed(0)
    linear = nn.Linear(3, 4)
    assert not linear.weight.is_meta
    assert linear.weight.std() > 0
