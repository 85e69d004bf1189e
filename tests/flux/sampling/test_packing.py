"""Packing against diffusers' FluxPipeline, and odd sizes against the wrap that ComfyUI pads with."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from flux.sampling.packing import crop, pack, pad_to_patch, token_grid, unpack


def counted(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize(("batch", "channels", "h", "w"), [(1, 16, 4, 6), (2, 16, 6, 2), (3, 1, 2, 2), (1, 32, 8, 4)])
def test_packing_is_diffusers_packing_and_comes_back(batch: int, channels: int, h: int, w: int) -> None:
    latent = counted(batch, channels, h, w)
    tokens = pack(latent)
    assert tokens.shape == (batch, h * w // 4, 4 * channels)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latent, batch, channels, h, w))
    assert torch.equal(unpack(tokens, h, w), latent)
    assert torch.equal(unpack(tokens, h, w), FluxPipeline._unpack_latents(tokens, h * 8, w * 8, 8))


def test_a_tokens_channels_are_channel_then_patch_row_then_patch_column() -> None:
    latent = counted(1, 16, 4, 6)
    tokens = pack(latent)
    row, column, channel, patch_row, patch_column = 1, 2, 5, 1, 0
    token = tokens[0, row * 3 + column]
    assert token[channel * 4 + patch_row * 2 + patch_column] == latent[0, channel, row * 2 + patch_row, column * 2]


@pytest.mark.parametrize(("h", "w"), [(4, 6), (5, 6), (4, 7), (5, 7), (1, 1)])
def test_odd_sizes_are_padded_from_the_opposite_edge_and_cut_back(h: int, w: int) -> None:
    latent = counted(2, 3, h, w)
    padded, size = pad_to_patch(latent)
    rows, columns = token_grid(h, w)
    assert padded.shape == (2, 3, rows * 2, columns * 2)
    assert size == (h, w)
    expected = latent[:, :, [i % h for i in range(rows * 2)]][..., [i % w for i in range(columns * 2)]]
    assert torch.equal(padded, expected)
    assert torch.equal(crop(padded, size), latent)
    assert torch.equal(unpack(pack(padded), h, w), latent)


def test_even_sizes_are_not_copied() -> None:
    latent = counted(1, 16, 4, 6)
    assert pad_to_patch(latent)[0] is latent


def test_the_grid_counts_tokens_not_cells() -> None:
    assert token_grid(128, 96) == (64, 48)
    assert token_grid(127, 95) == (64, 48)


def test_an_odd_latent_is_not_packed_by_mistake() -> None:
    with pytest.raises(Exception, match="can't divide"):
        pack(counted(1, 16, 5, 4))
