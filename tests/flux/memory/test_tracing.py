"""What a computation would allocate, counted without memory: against sums by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from flux.memory.tracing import trace
from flux.models.autoencoder import AttentionBlock

MIB = 1 << 20


def peak(run, module=None):
    return trace(module or nn.Module(), run).peak


def test_what_is_there_at_once_is_counted_and_what_has_gone_is_not():
    def prepare():
        x = torch.empty(MIB)

        def run():
            y = x * 2  # 4 MiB
            y = y * 2  # another 4 while the first is there
            del y
            return x * 2

        return run

    assert peak(prepare) == 8 * MIB


def test_views_and_what_is_done_in_place_take_nothing():
    def prepare():
        x = torch.empty(MIB)

        def run():
            y = x + 1
            y.view(2, -1).t().mul_(3)
            return y[::2]

        return run

    assert peak(prepare) == 4 * MIB


def test_what_is_given_and_weights_are_not_counted():
    with torch.device("meta"):
        layer = nn.Linear(1024, 256)

    def prepare():
        x = torch.empty(8, 1024)
        return lambda: layer(x)

    assert peak(prepare, layer) == 8 * 256 * 4


def test_views_of_what_is_given_take_nothing():
    def prepare():
        x = torch.empty(MIB)
        return lambda: x.view(2, -1)[0].add(1)

    assert peak(prepare) == 2 * MIB


def test_attention_takes_its_result_alone():
    def prepare():
        q = torch.empty(1, 2, 1024, 64)
        return lambda: F.scaled_dot_product_attention(q, q, q)

    assert peak(prepare) == 2 * 1024 * 64 * 4


def test_operations_of_products_and_attention_are_counted():
    with torch.device("meta"):
        layer = nn.Linear(64, 32)

    def prepare():
        x = torch.empty(10, 64)
        q = torch.empty(1, 2, 100, 16)
        return lambda: (layer(x), F.scaled_dot_product_attention(q, q, q))

    assert trace(layer, prepare).operations == 2 * 10 * 64 * 32 + 4 * 2 * 100 * 100 * 16


def test_only_what_is_run_counts_and_again_the_same():
    def prepare():
        x = torch.empty(MIB) * 3
        return lambda: x * 2

    assert [peak(prepare), peak(prepare)] == [4 * MIB, 4 * MIB]


def test_attention_that_no_fused_kernel_takes_is_counted_with_its_logits():
    apart = torch.empty(1, 2, 8, 16, device="meta").transpose(2, 3)  # a position's 8 numbers are 16 apart
    assert peak(lambda: lambda: F.scaled_dot_product_attention(apart, apart, apart)) >= 2 * 16 * 16 * 4


def test_convolutions_work_on_a_copy():
    conv = nn.Conv2d(3, 8, 3, padding=1, device="meta")
    pixels = torch.empty(1, 3, 32, 32, device="meta")
    assert trace(conv, lambda: lambda: conv(pixels)).peak == 2 * 8 * 32 * 32 * 4


def test_the_autoencoder_asks_for_attention_that_is_fused():
    block = AttentionBlock(32, 8)
    assert all(own.stride(-1) == 1 for own in block.heads(torch.randn(1, 32, 6, 5)))
