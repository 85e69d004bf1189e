"""Tables of modulations against the model's own way to each of them."""

from __future__ import annotations

import pytest
import torch

from flux.models.flux1 import Flux1
from flux.pipelines.denoising import Denoiser, Engine, Hooks
from flux.pipelines.modulation_tables import tabulate
from flux.pipelines.parts import open_transformer
from flux.pipelines.prompts import EncodedPrompt
from tests.oracles import rows
from tests.tiny import TINY, write_module

TIMES = (1.0, 0.75, 0.3, 0.01)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def part(request, tmp_path):
    path = write_module(tmp_path / "model.safetensors", Flux1(TINY), seed=1)
    return open_transformer(path, torch.device("cpu"), request.param)


def vectors(part, batch):
    pooled = rows(batch, TINY.pooled_width, seed=2).to(part.dtype)
    guidance = torch.tensor([3.5] * batch)
    return [part.module.embed(torch.tensor([time] * batch), pooled, guidance) for time in TIMES]


def fields(modulations):
    return [*modulations.image, *modulations.text, *modulations.single, modulations.final]


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 2])
def test_a_table_equals_what_the_model_makes_of_each_vector(part, batch):
    with part.resident(without=tuple(part.module.modulation_layers())):
        moments = vectors(part, batch)
        table = tabulate(part.module, moments, part.residency.borrow)
    with part.resident() as model:
        direct = [model.modulate(moment) for moment in moments]
    assert len(table) == len(TIMES)
    for ahead, at_once in zip(table, direct, strict=True):
        assert len(fields(ahead)) == 2 * TINY.double_blocks + TINY.single_blocks + 1
        assert all(torch.equal(a, b) for a, b in zip(fields(ahead), fields(at_once), strict=True))
    assert not torch.equal(table[0].final, table[1].final)


@torch.inference_mode()
def test_a_time_that_was_not_tabulated_is_computed_with_weights_that_go_again(part):
    prompt = EncodedPrompt(rows(1, 5, TINY.context_width, seed=3), rows(1, TINY.pooled_width, seed=2))
    latents = rows(1, TINY.latent_channels, 4, 4, seed=4)
    with part.resident(without=tuple(part.module.modulation_layers())):
        ready, unready = (Denoiser(Engine(part), prompt, 3.5, Hooks()) for _ in range(2))
        ready.prepare(TIMES)
        before = part.residency.resident_bytes
        assert all(torch.equal(ready(latents, time), unready(latents, time)) for time in TIMES)
        assert part.residency.resident_bytes == before
    assert sorted(ready.table, reverse=True) == list(TIMES)
    assert unready.table == {}
