"""Training of the embedded guided models: what they are shown, and what a pull adds to what they learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from flux.mini import train_guided
from flux.mini.build import Builder
from flux.mini.loop import FlowRecipe
from flux.mini.train_guided import DRAWN_BATCHES, Trainee, cut_lora, train_variant
from flux.sampling.packing import pack
from flux.specs.flux1 import KONTEXT_MINI
from flux.training.flow import TextBatch, flow_targets, predict_velocity
from tests.training import set_format

STEP, SIZE = 3, 2
CLOSE = 1e-5


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    quiet = Builder(tmp_path_factory.mktemp("guided"), 0, "cpu", compiled=False, report=lambda line: None)
    return quiet.bench()


@pytest.mark.parametrize("task", ["fill", "canny", "depth", "edit"])
def test_a_batch_is_a_function_of_its_step_and_comes_again_with_other_noise(bench, task):
    trainee, twin = Trainee(task, bench, SIZE, "seed"), Trainee(task, bench, SIZE, "seed")
    batch, rng = trainee.at(STEP)
    same, same_rng = twin.at(STEP)
    assert torch.equal(batch.latents, same.latents)
    assert torch.equal(batch.text.tokens, same.text.tokens)
    again, other_rng = trainee.at(STEP + DRAWN_BATCHES)
    assert again is batch
    noise = rng.random()
    assert noise == same_rng.random() != other_rng.random()
    assert not torch.equal(trainee.at(STEP + 1)[0].text.tokens, batch.text.tokens)


@pytest.mark.parametrize("pull", [0.0, 0.5])
def test_a_pull_adds_what_the_prompt_changes_to_what_is_learnt(bench, tmp_path, monkeypatch, pull):
    losses = {}

    set_format(monkeypatch, torch.float32)
    monkeypatch.setattr(train_guided, "noised", lambda latents, rng: drawn(latents))

    def once(stage, model, loss_of, *rest):
        losses["made"] = float(loss_of(STEP).detach())
        losses["expected"] = expected_loss(model, rest[-1], bench, pull)
        return model

    monkeypatch.setattr(train_guided, "run_stage", once)
    start = Builder(tmp_path, 0, "cpu", compiled=False, report=lambda line: None)._text_model()
    recipe = FlowRecipe(steps=1, decay=1, batch=SIZE)
    train_variant(tmp_path, KONTEXT_MINI, start, bench, recipe, seed=1, report=lambda line: None, pull=pull)
    assert losses["made"] == pytest.approx(losses["expected"], rel=CLOSE)


def drawn(latents):
    """Noisy latents at one time, guidance, and packed targets."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    times = torch.full((len(latents),), 0.7)
    noisy, target = flow_targets(latents, noise, times)
    return noisy, times, torch.full((len(latents),), 3.0), pack(target)


def expected_loss(model, head, bench, pull):
    batch, _ = Trainee("edit", bench, SIZE, f"{KONTEXT_MINI.name}/1").at(STEP)
    noisy, times, guidance, target = drawn(batch.latents)
    seen = []
    tap = model.single_blocks[train_guided.TAPPED_BLOCK].register_forward_hook(
        lambda _m, _i, output: seen.append(output)
    )
    prompts = {"asked": batch.text, "nothing": bench.encoders.encode([""] * SIZE)}
    with torch.no_grad():
        asked, nothing = (
            predict_velocity(model, noisy, times, TextBatch(t.tokens, t.pooled), guidance, references=batch.references)
            for t in prompts.values()
        )
        answers = head.loss(seen[0][:, batch.text.tokens.shape[1] :], batch.labels)
    tap.remove()
    wanted = target + pull * (asked - nothing)
    return float(F.mse_loss(asked, wanted) + train_guided.ANSWERS_WEIGHT * answers)


def test_a_lora_is_cut_to_the_nearest_of_a_lower_rank_and_its_other_tensors_stay():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(6, 20, generator=generator), torch.randn(12, 6, generator=generator)
    bias, scale = torch.randn(12, generator=generator), torch.randn(8, generator=generator)
    whole = {"a.lora_A.weight": down, "a.lora_B.weight": up, "a.lora_B.bias": bias, "b.norm.scale": scale}
    cut = cut_lora(whole, 2)
    assert cut.keys() == whole.keys()
    assert cut["a.lora_A.weight"].shape == (2, 20)
    assert cut["a.lora_B.weight"].shape == (12, 2)
    left = np.linalg.svd((up @ down).numpy(), compute_uv=False)[2:]  # what the nearest one is off by
    error = (up @ down - cut["a.lora_B.weight"] @ cut["a.lora_A.weight"]).norm()
    assert float(error) == pytest.approx(float(np.linalg.norm(left)), rel=1e-4)
    assert torch.equal(cut["a.lora_B.bias"], bias)
    assert torch.equal(cut["b.norm.scale"], scale)
    again = cut_lora(whole, 6)
    torch.testing.assert_close(again["a.lora_B.weight"] @ again["a.lora_A.weight"], up @ down, rtol=1e-4, atol=1e-4)
