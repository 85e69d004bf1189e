"""Attention against its definition, written out."""

from __future__ import annotations

import math

import pytest
import torch

from flux.ops.attention import attention

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 5, 7, 8
SCALE = 1 / math.sqrt(WIDTH)


def rows(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs():
    return (
        rows(BATCH, HEADS, QUERIES, WIDTH, seed=1),
        rows(BATCH, HEADS, KEYS, WIDTH, seed=2),
        rows(BATCH, HEADS, KEYS, WIDTH, seed=3),
    )


def as_defined(q, k, v, bias=0.0, scale=SCALE):
    weights = (torch.einsum("bhld,bhsd->bhls", q, k) * scale + bias).exp()
    return torch.einsum("bhls,bhsd->bhld", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("scale", [None, 1.0, 0.05])
def test_attention_is_softmax_attention(scale):
    expected = as_defined(*inputs(), scale=SCALE if scale is None else scale)
    torch.testing.assert_close(attention(*inputs(), scale=scale), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(BATCH, HEADS, QUERIES, KEYS), (1, HEADS, QUERIES, KEYS), (BATCH, 1, 1, KEYS)])
def test_bias_is_added_to_the_scaled_logits(shape):
    bias = rows(*shape, seed=4)
    torch.testing.assert_close(attention(*inputs(), bias), as_defined(*inputs(), bias), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        attention(*inputs(), bias, scale=1.0), as_defined(*inputs(), bias, scale=1.0), rtol=1e-5, atol=1e-6
    )


def test_a_boolean_mask_lets_take_part_what_is_true():
    q, k, v = inputs()
    mask = torch.tensor([True, True, False, True, False, False, True]).expand(BATCH, 1, QUERIES, KEYS)
    kept = mask[0, 0, 0]
    expected = as_defined(q, k[:, :, kept], v[:, :, kept])
    torch.testing.assert_close(attention(q, k, v, mask), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_format_is_kept(dtype):
    assert attention(*(x.to(dtype) for x in inputs())).dtype == dtype


def test_gradients_flow():
    q, k, v = (x.requires_grad_() for x in inputs())
    attention(q, k, v).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, k, v))
