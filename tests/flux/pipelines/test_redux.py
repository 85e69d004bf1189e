"""Pictures become style tokens as transformers and diffusers make them; fewer, weighed and scaled on demand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import load_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from flux.errors import Cancelled, MismatchError, NumericError, UserError
from flux.models.redux import Redux
from flux.models.vision.siglip import SiglipVision
from flux.pipelines.parts import open_redux, open_transformer, open_vision
from flux.pipelines.redux import (
    ReduxEncoder,
    ReduxPicture,
    ReduxTokens,
    combine_bfl,
    combine_diffusers,
    encode_redux,
    open_redux_encoder,
    style_guide,
)
from flux.preprocess.vision import VisionViews, merge_tokens, reduce_grid
from flux.specs.vision import REDUX_MINI, SIGLIP_MINI, SIGLIP_SO400M
from tests.oracles import TOLERANCE, relative_error, rows
from tests.tiny import TINY, write_header_only, write_module, write_tiny

CPU = torch.device("cpu")
SIDE, GRID, WIDTH = SIGLIP_MINI.side, SIGLIP_MINI.grid, REDUX_MINI.text_width
PROMPT = 7  # tokens
POOLED = 24


def spread(tensors):
    """Norms and biases that are not what they would be without them."""
    generator = torch.Generator().manual_seed(9)
    for tensor in tensors.values():
        tensor += 0.05 * torch.randn(tensor.shape, generator=generator)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("redux")
    return (
        write_module(folder / "tower.safetensors", SiglipVision(SIGLIP_MINI), 1, spread),
        write_module(folder / "redux.safetensors", Redux(REDUX_MINI), 2, spread),
    )


@pytest.fixture
def encoder(files):
    return open_redux_encoder(*files, CPU)


@pytest.fixture(scope="module")
def oracle(files):
    """transformers' tower and diffusers' adapter with the same weights."""
    spec = SIGLIP_MINI
    config = SiglipVisionConfig(
        hidden_size=spec.width, intermediate_size=spec.mlp_width, num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads, image_size=spec.side, patch_size=spec.patch, vision_use_head=False,
    )  # fmt: skip
    tower, adapter = SiglipVisionModel(config).eval(), ReduxImageEncoder(REDUX_MINI.vision_width, WIDTH).eval()
    state = {name.removeprefix("vision_model."): tensor for name, tensor in load_file(files[0]).items()}
    kept = tower.state_dict().keys()
    prefix = "" if next(iter(kept)).startswith("embeddings.") else "vision_model."
    tower.load_state_dict({prefix + name: tensor for name, tensor in state.items()})
    adapter.load_state_dict(load_file(files[1]))
    return tower, adapter


def views_of(count=1, weights=None, seed=3):
    return VisionViews(rows(count, 3, SIDE, SIDE, seed=seed).clamp(-1, 1), weights)


def whole(encoder, views):
    """All tokens of views (T, g * g, D)."""
    return encoder.encode(ReduxPicture(views=views)).tokens.view(len(views.pixels), GRID**2, WIDTH)


# What comes out.


@torch.no_grad()
def test_tokens_are_transformers_and_diffusers(encoder, oracle):
    tower, adapter = oracle
    views = views_of(2)
    theirs = adapter(tower(views.pixels).last_hidden_state).image_embeds
    found = encoder.encode(ReduxPicture(views=views))
    assert found.tokens.shape == (1, 2 * GRID**2, WIDTH)
    assert found.weights is None
    assert relative_error(found.tokens, theirs.reshape(1, -1, WIDTH)) <= TOLERANCE


def test_several_views_stand_one_after_another_and_each_is_as_it_is_alone(encoder):
    views = views_of(3)
    together = encoder.encode(ReduxPicture(views=views)).tokens.chunk(3, dim=1)
    for own, pixels in zip(together, views.pixels, strict=True):
        assert torch.equal(own, encoder.encode(ReduxPicture(views=VisionViews(pixels[None], None))).tokens)


def test_several_pictures_give_what_each_gives_alone(encoder):
    pictures = [ReduxPicture(views=views_of(seed=1)), ReduxPicture(views=views_of(2, seed=2), grid=3)]
    for one, own in zip(encoder.encode_all(pictures), pictures, strict=True):
        assert torch.equal(one.tokens, encoder.encode(own).tokens)


def test_no_picture_gives_no_tokens(encoder):
    assert encoder.encode_all([]) == []


@torch.inference_mode()
def test_a_tower_that_is_streamed_gives_the_same_tokens(encoder):
    pictures, held = [ReduxPicture(views=views_of())] * 2, []
    [expected, _] = encoder.encode_all(pictures)
    watch = lambda *_: held.append(encoder.tower.residency.limit)  # noqa: E731
    for limit in (0, encoder.tower.residency.accounts.footprint().device_bytes // 2):
        for made in encoder.encode_all(pictures, limits={"vision": limit}, watch=watch):
            assert torch.equal(made.tokens, expected.tokens)
        assert limit in held
    assert encoder.tower.residency.resident_bytes == 0


def test_a_grid_averages_every_view_and_its_weights(encoder):
    weights = rows(2, GRID**2, seed=4).sigmoid()
    views = views_of(2, weights)
    found = encoder.encode(ReduxPicture(views=views, grid=3))
    tokens, means = reduce_grid(whole(encoder, views), weights, 3)
    assert found.tokens.shape == (1, 2 * 9, WIDTH)
    assert torch.equal(found.tokens, tokens.reshape(1, -1, WIDTH))
    assert torch.equal(found.weights, means.flatten())


def test_tokens_are_merged_over_all_views_after_the_grid(encoder):
    views = views_of(2)
    found = encoder.encode(ReduxPicture(views=views, grid=3, tokens=5))
    coarse = encoder.encode(ReduxPicture(views=views, grid=3)).tokens
    assert found.tokens.shape == (1, 5, WIDTH)
    assert torch.equal(found.tokens, merge_tokens(coarse, None, 5)[0])


def test_merged_tokens_have_merged_weights(encoder):
    weights = torch.ones(1, GRID**2)
    weights[:, ::3] = 0
    found = encoder.encode(ReduxPicture(views=views_of(1, weights), tokens=20))
    assert (found.tokens.shape, found.weights.shape) == ((1, 20, WIDTH), (20,))
    assert torch.equal(found.weights, torch.ones(20))


def test_more_tokens_than_there_are_change_nothing(encoder):
    views = views_of()
    assert torch.equal(encoder.encode(ReduxPicture(views=views, tokens=10_000)).tokens[0], whole(encoder, views)[0])


def test_a_scale_multiplies_tokens_and_leaves_weights(encoder):
    views = views_of(1, torch.full((1, GRID**2), 0.25))
    one, half = (encoder.encode(ReduxPicture(views=views, scale=scale)) for scale in (1.0, 0.5))
    assert torch.equal(half.tokens, 0.5 * one.tokens)
    assert torch.equal(half.weights, one.weights)


@pytest.mark.parametrize("scale", [-0.1, 2.1, float("nan"), float("inf")])
def test_a_scale_outside_its_range_is_refused(scale):
    with pytest.raises(UserError, match="the tokens' scale is .*; give a number from 0 to 2"):
        ReduxPicture(views=views_of(), scale=scale)


@pytest.mark.parametrize(("wanted", "words"), [({"grid": 10}, "from 1 to 9"), ({"tokens": 0}, "from 1 on")])
def test_what_the_tower_cannot_give_is_refused(encoder, wanted, words):
    with pytest.raises(UserError, match=words):
        encoder.encode(ReduxPicture(views=views_of(), **wanted))


def test_the_function_is_the_encoder_s_way(encoder):
    views = views_of()
    found = encode_redux(encoder.tower, encoder.redux, views, grid=4, tokens=9, scale=0.7)
    same = encoder.encode(ReduxPicture(views=views, grid=4, tokens=9, scale=0.7))
    assert torch.equal(found.tokens, same.tokens)


def test_a_guide_carries_tokens_weights_and_when_and_where_they_act(encoder):
    found, region = encoder.encode(ReduxPicture(views=views_of())), torch.ones(1, 1, 4, 4)
    guide = style_guide(found, strength=0.5, region=region, start=0.25, end=0.75)
    assert guide.tokens is found.tokens
    assert (guide.strength, guide.start, guide.end, guide.weights) == (0.5, 0.25, 0.75, None)
    assert guide.region is region
    assert style_guide(ReduxTokens(found.tokens, torch.ones(81))).weights.shape == (81,)


# Memory, and what goes wrong.


def test_each_part_is_in_memory_only_while_it_is_used(encoder):
    seen = []

    def watch(done, total):
        seen.append((encoder.tower.residency.resident_bytes > 0, encoder.redux.residency.resident_bytes > 0))

    encoder.encode_all([ReduxPicture(views=views_of())] * 2, watch=watch)
    assert (True, False) in seen
    assert (False, True) in seen
    assert (True, True) not in seen
    assert seen.count((False, False)) == 2  # each is brought in once for both pictures
    assert encoder.tower.residency.resident_bytes == encoder.redux.residency.resident_bytes == 0


def test_a_watch_may_stop_it_and_nothing_stays(encoder):
    def watch(done, total):
        if done == 5:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        encoder.encode(ReduxPicture(views=views_of()), watch=watch)
    assert encoder.tower.residency.resident_bytes == 0


@pytest.mark.parametrize("spoiled", [0, 1])
def test_numbers_that_are_not_finite_are_told_with_both_files(tmp_path, files, spoiled):
    paths = list(files)

    def spoil(tensors):
        next(iter(tensors.values()))[0] = float("nan")

    module = (SiglipVision(SIGLIP_MINI), Redux(REDUX_MINI))[spoiled]
    paths[spoiled] = write_module(tmp_path / "spoiled.safetensors", module, 1, spoil)
    names = " or ".join(path.name for path in paths)
    with pytest.raises(NumericError, match=f"not finite; {names} is damaged"):
        open_redux_encoder(*paths, CPU).encode(ReduxPicture(views=views_of()))


def test_without_a_tower_it_is_said_which_is_needed_and_what_lies_beside(files):
    with pytest.raises(MismatchError) as caught:
        open_redux_encoder(None, files[1], CPU)
    assert str(caught.value) == (
        "redux.safetensors is Foundry Mini's Redux adapter (image prompts), which needs Foundry Mini's SigLIP vision "
        "tower, and there is none; of your files these fit: tower.safetensors"
    )


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ({}, "the SigLIP so400m vision tower (patch 14, 384 pixels)"),
        ({"width": 768, "layers": 12, "patch": 16, "side": 224}, "the SigLIP base vision tower (patch 16, 224 pixels)"),
    ],
)
def test_another_tower_is_refused_with_the_one_that_fits(tmp_path, files, sizes, found):
    with torch.device("meta"):
        module = SiglipVision(replace(SIGLIP_SO400M, **sizes))
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    other = write_header_only(tmp_path / "other.safetensors", shapes)
    with pytest.raises(MismatchError) as caught:
        open_redux_encoder(other, files[1], CPU)
    assert f"other.safetensors is {found}, but redux.safetensors is Foundry Mini's Redux adapter" in str(caught.value)
    assert "which takes Foundry Mini's SigLIP vision tower: 128 wide, not" in str(caught.value)
    assert str(caught.value).endswith("; of your files these fit: tower.safetensors")


def test_parts_that_were_opened_apart_are_checked_too(tmp_path, files):
    with torch.device("meta"):
        module = SiglipVision(SIGLIP_SO400M)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    other = write_header_only(tmp_path / "other.safetensors", shapes)
    with pytest.raises(MismatchError, match=r"other\.safetensors is the SigLIP so400m"):
        ReduxEncoder(open_vision(other, CPU, torch.bfloat16), open_redux(files[1], CPU))


def test_a_model_of_other_text_tokens_is_refused_at_once(tmp_path, files):
    fitting = open_transformer(write_tiny(tmp_path).transformer, CPU).given
    open_redux_encoder(*files, CPU, transformer=fitting)
    (tmp_path / "other").mkdir()
    spec = replace(TINY, context_width=64)
    other = open_transformer(write_tiny(tmp_path / "other", spec).transformer, CPU).given
    with pytest.raises(MismatchError, match="whose text tokens are 64 wide, not 192"):
        open_redux_encoder(*files, CPU, transformer=other)


# Joining with a prompt.


@pytest.fixture(scope="module")
def pipeline(oracle):
    """diffusers' FluxPriorRedux; a text encoder is there so that it takes prompts that are encoded already."""
    tower, adapter = oracle
    config = CLIPTextConfig(
        vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    processor = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    pipe = FluxPriorReduxPipeline(tower, processor, adapter, text_encoder=CLIPTextModel(config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scales", [(1.0,), (0.6,), (0.75, 0.25), (1.0, 1.0), (0.5, 0.0, 1.5)])
@pytest.mark.parametrize("pooled_scales", [None, (0.3, 0.8, 1.1)])
def test_the_sum_is_what_diffusers_prior_gives(encoder, pipeline, scales, pooled_scales):
    count = len(scales)
    pooled_scales = None if pooled_scales is None else pooled_scales[:count]
    pictures = (rows(count, 3, 40, 50, seed=5).sigmoid() * 255).to(torch.uint8)
    prompt, pooled = rows(count, PROMPT, WIDTH, seed=6), rows(count, POOLED, seed=7)
    theirs = pipeline(
        image=list(pictures),
        prompt_embeds=prompt.clone(),
        pooled_prompt_embeds=pooled.clone(),
        prompt_embeds_scale=list(scales),
        pooled_prompt_embeds_scale=1.0 if pooled_scales is None else list(pooled_scales),
    )
    pixels = pipeline.feature_extractor(images=list(pictures), return_tensors="pt").pixel_values
    views = [VisionViews(own[None], None) for own in pixels]
    encoded = [found.tokens for found in encoder.encode_all([ReduxPicture(views=own) for own in views])]
    found = combine_diffusers(prompt, pooled, encoded, scales, pooled_scales)
    assert relative_error(found[0], theirs.prompt_embeds) <= TOLERANCE
    assert relative_error(found[1], theirs.pooled_prompt_embeds) <= TOLERANCE


def test_one_prompt_serves_every_picture_of_a_sum():
    prompt, pooled = rows(1, PROMPT, 8, seed=1), rows(1, POOLED, seed=2)
    pictures = [rows(1, 4, 8, seed=3), rows(1, 4, 8, seed=4)]
    tokens, vector = combine_diffusers(prompt, pooled, pictures, [0.25, 0.75])
    assert torch.allclose(tokens[:, :PROMPT], prompt, atol=1e-6)
    assert torch.allclose(tokens[:, PROMPT:], 0.25 * pictures[0] + 0.75 * pictures[1], atol=1e-6)
    assert torch.allclose(vector, 2 * pooled)  # diffusers' own default scales of 1


def test_appending_puts_pictures_behind_the_prompt_as_black_forest_labs_does():
    """``txt = cat((txt, img_embeds), dim=-2)`` with one picture; nothing else changes."""
    prompt, pooled, pictures = rows(1, PROMPT, 8, seed=1), rows(1, POOLED, seed=2), [rows(1, 4, 8, seed=3)]
    tokens, vector = combine_bfl(prompt, pooled, pictures, [1.0])
    assert torch.equal(tokens, torch.cat((prompt, pictures[0]), dim=-2))
    assert torch.equal(vector, pooled)
    assert torch.equal(tokens, combine_diffusers(prompt, pooled, pictures, [1.0])[0])


def test_appended_pictures_may_differ_in_number_and_scale_and_leave_the_prompt_alone():
    prompt, pooled = rows(1, PROMPT, 8, seed=1), rows(1, POOLED, seed=2)
    pictures = [rows(1, 4, 8, seed=3), rows(1, 9, 8, seed=4)]
    tokens, vector = combine_bfl(prompt, pooled, pictures, [0.5, 2.0])
    assert torch.equal(tokens, torch.cat([prompt, 0.5 * pictures[0], 2 * pictures[1]], dim=1))
    assert torch.equal(vector, pooled)


@pytest.mark.parametrize(
    ("sizes", "words"), [((4, 9), "pictures with 4 and 9 tokens have no sum"), ((), "pictures with no tokens")]
)
def test_pictures_that_have_no_sum_are_told_so(sizes, words):
    pictures = [rows(1, size, 8, seed=size) for size in sizes]
    with pytest.raises(UserError, match=words):
        combine_diffusers(rows(1, PROMPT, 8, seed=1), rows(1, POOLED, seed=2), pictures, [1.0] * len(sizes))
