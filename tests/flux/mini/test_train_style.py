"""Training of the embedded Redux: what its tokens have to say, and where."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

from flux.adapters.attending import gather
from flux.adapters.guides import StyleTokens
from flux.mini import train_style as train_style_module
from flux.mini.build import Builder
from flux.mini.examples import scene_example
from flux.mini.files import MINI as MINI_FILES
from flux.mini.language import Request, Wanted, phrase, random_request, text_of
from flux.mini.loop import FlowRecipe
from flux.mini.scenes import Item, Scene, draw, lay_out
from flux.mini.train_style import (
    GROUND,
    Listener,
    Style,
    cells_of,
    start_tower,
    train_style,
    train_words,
    vision_view,
    words_of,
)
from flux.models.flux1 import Flux1
from flux.specs.flux1 import MINI
from flux.specs.vision import SIGLIP_MINI
from flux.training.flow import predict_velocity
from tests.oracles import rows

GRID = 8
STEPS = 80
KEPT_STRONGLY = 30.0  # so that it shows within a few steps


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("style")
    return Builder(folder, 0, "cpu", compiled=False, report=lambda line: None).bench()


def test_cells_are_of_the_object_that_covers_their_middle():
    left = Item("circle", "red", 40.0, 64.0, 20.0)
    right = Item("square", "blue", 104.0, 24.0, 12.0)
    cells = torch.tensor(cells_of(Scene(128, 128, "white", (left, right)), GRID)).reshape(GRID, GRID)
    assert cells[4, 2] == 0
    assert cells[1, 6] == 1
    assert cells[7, 7] == cells[0, 0] == GROUND
    assert set(cells.flatten().tolist()) == {GROUND, 0, 1}
    assert cells_of(Scene(128, 128, "white", ()), GRID) == [GROUND] * GRID**2


def test_cells_of_an_object_say_its_words_and_all_others_the_rest(bench):
    request = Request(objects=(Wanted("circle", "red"), Wanted("square", "blue")), background="green")
    scene = lay_out(request, random.Random(1))
    [words] = words_of([(request, scene)], bench, GRID)
    sentence = text_of(phrase(request, random.Random("words")))
    whole = bench.encoders.encode([sentence]).tokens[0]
    said = [int((whole - word).abs().sum(-1).argmin()) for word in words]
    assert torch.equal(words, whole[said])
    cells = cells_of(scene, GRID)
    groups = [{column for column, cell in zip(said, cells, strict=True) if cell == item} for item in (GROUND, 0, 1)]
    assert all(groups)
    assert not groups[0] & groups[1] | groups[1] & groups[2] | groups[0] & groups[2]


@pytest.mark.parametrize("seed", range(20))
def test_every_scene_can_be_said(bench, seed):
    seen = [scene_example(random.Random(seed), (128, 128), sign_share=0.0)]
    words = words_of(seen, bench, SIGLIP_MINI.grid)
    assert words.shape[:2] == (1, SIGLIP_MINI.grid**2)
    assert bool(torch.isfinite(words).all())


@torch.inference_mode()
def test_a_tower_begins_with_patches_whose_directions_vary_alike_and_neighbours_that_are():
    torch.manual_seed(0)
    style, rng = Style(), random.Random(0)
    pictures = [draw(scene_example(rng, (128, 128), sign_share=0.0)[1]) for _ in range(64)]
    views = torch.stack([vision_view(picture) for picture in pictures])
    before = spread(style, views)
    start_tower(style, views)
    after = spread(style, views)
    assert before[-10] < 1e-2 * before[-1]  # all but a few directions see next to nothing
    assert after[-10] > 0.9
    assert after[-1] < 1.1
    places = style.tower.vision_model.embeddings.position_embedding.weight
    apart = torch.cdist(places, places).reshape(*[SIGLIP_MINI.grid] * 4)[4, 4]
    assert apart[4, 5] < apart[4, 6] < apart[4, 8]
    assert apart[3, 4] < apart[2, 4] < apart[0, 4]


def spread(style, views):
    """Variances of what the tower sees of patches along its principal directions, least first."""
    seen = style.tower.vision_model.embeddings.patch_embedding(views).flatten(2).movedim(1, -1).flatten(0, 1)
    return torch.linalg.eigvalsh(torch.cov(seen.T.double()))


def test_training_gets_nearer_to_the_words_and_goes_on_where_it_stopped(bench, tmp_path):
    told, recipe = [], FlowRecipe(steps=STEPS, decay=10, batch=16)
    trained = train_words(tmp_path, bench, recipe, seed=0, report=told.append)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in told]
    assert losses[-1] < 0.96 * losses[0]
    again = train_words(tmp_path, bench, recipe, seed=0, report=told.append)
    assert told[-1].endswith(f"resumed at step {STEPS}")
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), trained.state_dict().values(), strict=True)
    )


@pytest.fixture(scope="module")
def listeners(bench, tmp_path_factory):
    """What training starts from, what it reaches where prompts count much, and where they count nothing."""
    folder, recipe = tmp_path_factory.mktemp("listeners"), FlowRecipe(steps=20, decay=10, batch=8, learning_rate=5e-4)
    reached = []
    for weight in (KEPT_STRONGLY, 0.0):
        own = folder / str(weight)
        own.mkdir()
        torch.manual_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_style_module, "KEPT_WEIGHT", weight)
            reached.append(train_style(own, started().text, started(), bench, recipe, seed=0, report=lambda line: None))
    return started(), *reached


def started():
    torch.manual_seed(2)
    model = Flux1(MINI)
    model.load_state_dict({key: value.float() for key, value in load_file(MINI_FILES.transformer).items()})
    return Listener(model, Style())


def test_training_moves_tower_adapter_and_text_model(listeners):
    start, reached, _ = listeners
    for name in ("text.double_blocks.0.img_mlp.0.weight", "style.redux.redux_up.weight"):
        assert not torch.equal(reached.state_dict()[name], start.state_dict()[name])
    tower = [key for key in start.state_dict() if key.startswith("style.tower.") and key.endswith("weight")]
    assert all(not torch.equal(reached.state_dict()[key], start.state_dict()[key]) for key in tower)


def test_the_text_model_keeps_what_it_does_with_prompts(listeners, bench):
    start, kept, free = listeners
    assert prompted(kept, start, bench) < 0.8 * prompted(free, start, bench)


@torch.inference_mode()
def prompted(listener, start, bench):
    """How far apart two text models predict, for prompts alone."""
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(8, 16, 16, 16, generator=generator)
    text = bench.encoders.encode(
        [text_of(phrase(random_request(random.Random(i)), random.Random(i))) for i in range(8)]
    )
    times, guidance = torch.linspace(0.2, 1, 8), torch.full((8,), 3.0)
    return float(
        (predict_velocity(listener.text, noisy, times, text, guidance)
         - predict_velocity(start.text, noisy, times, text, guidance)).square().mean()
    )  # fmt: skip


def test_tokens_are_weighed_as_in_a_run_and_left_out_where_they_do_not_count():
    keep = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    before, grid = 4, (2, 3)
    whole = train_style_module._weighed(keep, 1.0, before, grid)
    assert whole.shape == (2, 1, 1, 13)
    assert (whole != 0).nonzero().tolist() == [[0, 0, 0, 5]]
    half = train_style_module._weighed(keep, 0.5, before, grid)
    assert half.shape == (2, 1, 13, 13)
    tokens = rows(1, 3, 8, seed=1)
    guide = StyleTokens(tokens=tokens, strength=0.5)
    run = gather(rows(1, before, 8, seed=2), [guide], (4, 6)).bias
    assert torch.equal(half[1:], run)
    assert torch.equal(half[:1], run + whole[:1])
