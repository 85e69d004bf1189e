"""A run whose blocks are streamed gives the bits of one whose weights stay, under any limit, with all that guides."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from flux.errors import Cancelled, UserError
from flux.memory.policy import Policy, read_policy
from flux.memory.residency import Residency
from flux.mini import files
from flux.pipelines.denoising import Guidance, Hooks, denoise
from flux.pipelines.parts import open_clip, open_t5, open_transformer, open_vision
from flux.pipelines.prompts import EncodedPrompt
from flux.pipelines.text_to_image import Request, generate
from flux.specs.vision import SIGLIP_MINI
from tests.guides import NEGATIVE, PROMPT, SIGMAS, lora, make_lora, noise, reference
from tests.oracles import rows
from tests.tiny import TINY, write_tiny

CPU = torch.device("cpu")
DEEP = replace(TINY, name="deep", double_blocks=2, single_blocks=4)
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("deep"), DEEP).transformer


def opened(path, keep="numbers"):
    return open_transformer(path, CPU, torch.float32, keep=keep)


def run(part, limit=None, **settings):
    return denoise(part, PROMPT, noise(), SIGMAS, guidance=3.0, limit=limit, **settings)


def footprint(part, limit=None):
    return part.residency.accounts.footprint(tuple(part.module.modulation_layers()), limit)


@pytest.mark.parametrize("keep", ["numbers", "packed"])
@pytest.mark.parametrize("share", SHARES)
def test_the_bits_are_those_of_weights_that_stay(path, share, keep):
    part, seen = opened(path, keep), []
    limit = int(share * footprint(part).device_bytes)
    given = run(part, limit, hooks=Hooks(preview=lambda *_: seen.append(part.residency.resident_bytes)))
    assert torch.equal(given, run(opened(path)))
    expected = footprint(part, limit)
    assert set(seen) == {expected.device_bytes}
    assert expected.device_bytes <= max(limit, footprint(part, 0).device_bytes)
    assert (len(expected.blocks.streamed) > 0) == (share < 1)
    assert part.residency.resident_bytes == 0


@pytest.mark.parametrize("name", [row.transformer.name for row in (files.MINI, files.MINI_FILL, files.MINI_REDUX)])
def test_embedded_models_in_their_own_formats_are_streamed(name):
    path, spec = files.FOLDER / name, opened(files.FOLDER / name).spec
    prompt = EncodedPrompt(rows(1, 9, spec.context_width, seed=2), rows(1, spec.pooled_width, seed=3))
    drawn = [denoise(opened(path), prompt, noise(), SIGMAS, guidance=3.0, limit=limit) for limit in (None, 0)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("limit", [None, 0])
def test_control_loras_and_references_go_with_it(path, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.guides.LORAS", [make_lora(71, DEEP), make_lora(72, DEEP)])
        guided = Guidance(guides=[lora(), lora(1, strength=0.5), reference()])
    given = run(opened(path), limit, guided=guided)
    assert torch.equal(given, run(opened(path), guided=guided))
    assert not torch.equal(given, run(opened(path), guided=Guidance(guides=[reference()])))


def test_a_second_pass_with_another_prompt_is_streamed_too(path):
    whole, streamed = (run(opened(path), limit, negative=NEGATIVE, cfg=2.0) for limit in (None, 0))
    assert torch.equal(whole, streamed)


def test_a_run_that_is_cancelled_leaves_nothing_and_the_next_one_works(path):
    part, steps = opened(path), []
    hooks = Hooks(preview=lambda *_: steps.append(1), cancelled=lambda: len(steps) == 2)
    before = threading.active_count()
    with pytest.raises(Cancelled):
        run(part, 0, hooks=hooks)
    assert part.residency.resident_bytes == 0
    assert threading.active_count() == before
    assert torch.equal(run(part, 0), run(opened(path)))


def test_two_runs_at_once_do_not_disturb_each_other(path):
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: run(opened(path), 0), range(2)))
    assert torch.equal(*both)
    assert torch.equal(both[0], run(opened(path)))


ENCODERS = {  # and how many pieces a layer of theirs has
    "t5": (open_t5, files.MINI.t5, torch.arange(3, 12)[None], 2),
    "clip": (open_clip, files.MINI.clip, torch.arange(3, 12)[None], 1),
    "vision": (open_vision, files.SIGLIP_MINI_FILE, rows(2, 3, SIGLIP_MINI.side, SIGLIP_MINI.side, seed=3), 1),
}


@torch.inference_mode()
@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_are_streamed_layer_by_layer(kind):
    open_part, path, given, pieces = ENCODERS[kind]
    made = []
    for limit in (None, 0):
        part = open_part(path, CPU, torch.float32)
        with part.resident(limit=limit) as module:
            assert part.residency.resident_bytes == part.residency.accounts.footprint(limit=limit).device_bytes
            out = module(given)
            made.append(out if isinstance(out, torch.Tensor) else out[0])
        assert len(part.residency.accounts.footprint(limit=0).blocks.streamed) == pieces * part.spec.layers
    assert torch.equal(*made)


@pytest.mark.parametrize("policy", ["keep", "balance", "save", "0.05"])
def test_pictures_are_the_same_under_every_policy(policy):
    pictures = []
    for memory in (Policy(), read_policy(policy)):
        request = Request(prompt="a red circle", steps=3, seed=5, memory=memory)
        [picture] = generate(files.open_mini(), request)
        pictures.append(picture.pixels.int())
    assert int((pictures[0] - pictures[1]).abs().max()) <= 1  # in strips the last bit of a norm's statistics differs


def test_a_picture_that_is_encoded_and_decoded_in_strips_is_the_same():
    pictures = []
    for policy in ("keep", "save"):
        image = rows(1, 3, 64, 96, seed=8).clamp(0, 1)
        request = Request(prompt="a red circle", steps=4, denoise=0.5, image=image, memory=Policy(policy))
        [picture] = generate(files.open_mini(), request)
        pictures.append(picture.pixels.int())
    assert int((pictures[0] - pictures[1]).abs().max()) <= 1  # the last bit of a norm's statistics


def test_a_policy_streams_text_encoders_and_transformer(monkeypatch):
    limits = []
    load = Residency.load

    def told(own, without=(), watch=None, limit=None, tell=None):
        limits.append(limit)
        return load(own, without, watch, limit, tell)

    monkeypatch.setattr(Residency, "load", told)
    generate(files.open_mini(), Request(prompt="a red circle", steps=1, memory=Policy("save")))
    assert limits == [0, 0, 0, None]  # CLIP, T5, transformer; the autoencoder


def test_a_budget_below_the_least_is_refused_before_anything_is_loaded():
    with pytest.raises(UserError, match="a budget of 0.001 GiB is below the least"):
        generate(files.open_mini(), Request(prompt="a red circle", memory=read_policy("0.001")))
