"""What decoders take on an accelerator beside the numbers, counted on the meta device, where they go the same way."""

from __future__ import annotations

import pytest
import torch

from flux.memory.tracing import Tracer
from flux.weights.formats import chunks, gguf_blocks
from flux.weights.formats.written import WRITTEN

CHUNK = 1 << 12  # numbers; a hundredth of the matrix
SHAPE = 512, 1024
OF_A_CHUNK = 16  # bytes for each of its numbers, at most: indices, codes and planes of them, fp32
OF_SCALES = 1 / 8  # of the numbers' own bytes, in fp32


@pytest.mark.parametrize("name", WRITTEN)
def test_beside_the_numbers_a_chunk_of_them_is_made_and_their_scales(monkeypatch, name):
    monkeypatch.setattr(chunks, "DEVICE_CHUNK", CHUNK)
    monkeypatch.setattr(gguf_blocks, "DEVICE_RUN", CHUNK)
    row, generator = WRITTEN[name], torch.Generator().manual_seed(0)
    stored = row.encode(torch.randn(SHAPE, generator=generator))
    parts = {role: tensor.to("meta") for role, tensor in stored.items()}
    with Tracer() as tracer:
        numbers = row.row.decode(parts, SHAPE, torch.bfloat16)
    assert (numbers.device.type, numbers.shape, numbers.dtype) == ("meta", SHAPE, torch.bfloat16)
    assert tracer.peak <= (1 + OF_SCALES) * numbers.nbytes + OF_A_CHUNK * CHUNK
