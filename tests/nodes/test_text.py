"""FLUX Text Encode asks our CLIP once for each prompt, and never takes what another CLIP would have given."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

GIVEN = (SimpleNamespace(found=SimpleNamespace(spec=SimpleNamespace(name="clip-mini"))),)
BOTH = "memory and disk"


class Clip:
    """The host's CLIP around encoders that count how often they are asked."""

    def __init__(self, path: Path | None, stamp_of: Callable[[int], Any] | None) -> None:
        self.asked, self.apply_hooks_to_conds = 0, None
        self.cond_stage_model = SimpleNamespace(dtypes={torch.float32}, given=GIVEN)
        if path is not None:
            with path.open("rb") as file:
                self.cond_stage_model.stamps = {path: stamp_of(file.fileno())}
        self.patcher = SimpleNamespace(
            patches={}, patches_uuid=uuid.uuid4(), load_device=torch.device("cpu"), wrappers={},
            object_patches={"manual_cast_dtype": torch.float32}, forced_hooks=None, hook_patches={}, injections={},
            weight_wrapper_patches={},
        )  # fmt: skip

    def tokenize(self, text: str, **_: object) -> dict:
        ids = [(ord(letter), 1.0) for letter in text]
        return {"l": [ids], "t5xxl": [ids]}

    def encode_from_tokens_scheduled(self, tokens: dict, add_dict: dict) -> list:
        self.asked += 1
        read = torch.tensor([[float(number) for number, _ in tokens["t5xxl"][0]]])
        pooled = torch.tensor([[float(number) for number, _ in tokens["l"][0]]])
        return [[read[..., None] + 1, {"pooled_output": pooled, "fluxfoundry_encoders": GIVEN, **add_dict}]]


@pytest.fixture
def bridge(load):
    prompts = load("nodes.bridge.prompts")
    yield prompts
    prompts.clear(memory=True, disk=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "t5.safetensors"
    file.write_bytes(os.urandom(100))
    return file


@pytest.fixture
def ours(load, bridge, path):
    stamp_of = load("flux.weights.readers.stamps").stamp_of
    return lambda own=path: Clip(own, stamp_of)


@pytest.fixture
def encode(run, bridge):
    def call(clip: Clip, prompt: str = "a star", **inputs: object) -> tuple:
        return run("text", "TextEncode", clip=clip, prompt=prompt, guidance=3.5, **inputs)

    return call


def same(one: list, other: list) -> bool:
    [[text, facts]], [[text_2, facts_2]] = one, other
    pooled, pooled_2 = facts["pooled_output"], facts_2["pooled_output"]
    rest, rest_2 = ({k: v for k, v in own.items() if k != "pooled_output"} for own in (facts, facts_2))
    return torch.equal(text, text_2) and torch.equal(pooled, pooled_2) and rest == rest_2


def test_a_prompt_that_comes_again_is_not_encoded_and_gives_the_same(encode, ours) -> None:
    first, second = ours(), ours()
    made, again = encode(first), encode(second)
    assert (first.asked, second.asked) == (2, 0)  # the prompt and the empty negative one
    assert all(same(*both) for both in zip(made, again, strict=True))
    assert again[0][0][1]["guidance"] == 3.5


def test_prompts_guidances_and_texts_of_each_encoder_are_told_apart(encode, ours, run) -> None:
    clip = ours()
    for count, given in enumerate(({}, {"prompt": "b"}, {"t5_prompt": "c"}, {"clip_prompt": "c"}), 2):
        encode(clip, **{"negative": "", **given})
        assert clip.asked == count
    [positive, _] = run("text", "TextEncode", clip=clip, prompt="b", guidance=1.0)
    assert clip.asked == count
    assert positive[0][1]["guidance"] == 1.0


def test_what_a_later_node_changes_does_not_come_back(encode, ours) -> None:
    clip = ours()
    before = encode(clip)[0][0][0].clone()
    for _ in range(2):
        [[text, facts]] = encode(clip)[0]
        assert torch.equal(text, before)
        text.zero_()
        facts["pooled_output"].zero_()


def test_off_asks_every_time_and_keeps_nothing(encode, ours, bridge) -> None:
    clip = ours()
    for _ in range(2):
        encode(clip, cache="off")
    assert clip.asked == 4
    assert bridge.clear(memory=True, disk=False) == "memory: there was nothing"


def test_another_loaders_clip_is_always_asked(encode, ours) -> None:
    clip = ours(None)
    for _ in range(2):
        encode(clip)
    assert clip.asked == 4


def test_patches_are_told_apart_and_stay_in_memory(encode, ours, bridge) -> None:
    plain, patched = ours(), ours()
    patched.patcher.patches = {"weight": ["a lora"]}
    encode(plain, cache=BOTH)
    for _ in range(2):
        encode(patched, cache=BOTH)
    assert patched.asked == 2
    assert len(list(bridge.folder().iterdir())) == 2  # the plain one's
    patched.patcher.patches_uuid = uuid.uuid4()
    encode(patched, cache=BOTH)
    assert patched.asked == 4


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("", "apply_hooks_to_conds", object()),
        ("patcher", "forced_hooks", object()),
        ("patcher", "hook_patches", {"a": 1}),
        ("patcher", "injections", {"a": [1]}),
        ("patcher", "weight_wrapper_patches", {"a": [1]}),
        ("patcher", "wrappers", {"apply_model": {None: [print]}}),
        ("patcher", "object_patches", {"clip_l": object()}),
    ],
)
def test_what_may_change_an_encoder_in_other_ways_is_never_kept(encode, ours, place, name, value) -> None:
    encode(ours())
    clip = ours()
    setattr(getattr(clip, place) if place else clip, name, value)
    for _ in range(2):
        encode(clip)
    assert clip.asked == 4


def test_an_embedding_among_the_tokens_is_never_kept(bridge, ours) -> None:
    clip = ours()
    tokens = {"l": [[(1, 1.0)]], "t5xxl": [[(torch.zeros(4), 1.0)]]}
    clip.encode_from_tokens_scheduled = lambda tokens, add_dict: "encoded"
    for _ in range(2):
        assert bridge.encode_tokens(clip, tokens, {}, kept=True, on_disk=False) == "encoded"
    assert bridge.clear(memory=True, disk=False) == "memory: there was nothing"


def test_disk_outlives_memory_and_is_read_by_who_asks_for_it(encode, ours, bridge) -> None:
    encode(ours(), cache=BOTH)
    bridge.clear(memory=True, disk=False)
    memory_only, both, after = ours(), ours(), ours()
    made = encode(both, cache=BOTH)
    assert both.asked == 0
    assert same(made[0], encode(after)[0])  # memory was filled from disk
    assert after.asked == 0
    bridge.clear(memory=True, disk=False)
    encode(memory_only)
    assert memory_only.asked == 2


def test_another_file_under_the_same_name_is_another_encoder(encode, ours, path) -> None:
    encode(ours())
    path.write_bytes(os.urandom(100))
    os.utime(path, (1, 1))
    clip = ours()
    encode(clip)
    assert clip.asked == 2


def test_encoders_whose_file_was_replaced_since_are_not_kept(encode, ours, path) -> None:
    clip = ours()
    path.write_bytes(os.urandom(100))
    os.utime(path, (1, 1))
    for _ in range(2):
        encode(clip)
    assert clip.asked == 4


def test_clearing_says_what_was_cleared_and_where(run, encode, ours, bridge) -> None:
    encode(ours(), cache=BOTH)
    [report] = run("text", "ClearPromptCache", where="memory and disk")
    memory, disk = report.splitlines()
    assert memory.startswith("memory: prompts cleared: 2, ")
    assert disk.startswith("disk: prompts cleared: 2, ")
    assert disk.endswith(f", in {bridge.folder()}")
    clip = ours()
    encode(clip, cache=BOTH)
    assert clip.asked == 2
    assert run("text", "ClearPromptCache", where="memory")[0].startswith("memory: prompts cleared: 2")
    assert run("text", "ClearPromptCache", where="disk")[0].startswith("disk: prompts cleared: 2")
    nothing = f"memory: there was nothing\ndisk: there was nothing, in {bridge.folder()}"
    assert run("text", "ClearPromptCache", where="memory and disk") == (nothing,)


def test_the_clearing_node_runs_every_time(load) -> None:
    node = load("nodes.text").ClearPromptCache
    first, second = ([node.fingerprint_inputs(where="memory")] for _ in range(2))
    assert first != second  # as the host compares them: in a list, where the same object counts as equal
