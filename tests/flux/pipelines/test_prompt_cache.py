"""A prompt that was encoded before is not encoded again, gives the same bits, and needs no encoder in memory."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from flux.errors import NumericError
from flux.memory.residency import Residency
from flux.mini import files
from flux.pipelines.prompt_cache import MemoryStore, PromptCache, encoder_key, text_key
from flux.pipelines.prompt_folder import Cleared, FolderStore, kept_files
from flux.pipelines.prompts import open_text_encoders
from flux.pipelines.text_to_image import FluxModel, Request, generate
from flux.weights.readers.stamps import FileStamp, fingerprint
from tests.tiny import TOKENIZER, write_tiny

CPU = torch.device("cpu")
TEXT = "a red circle"


@pytest.fixture
def loads(monkeypatch):
    """The specs' names of parts whose weights were loaded."""
    loaded, load = [], Residency.load

    def told(own, *arguments, **named):
        loaded.append(own.module.spec.name)
        return load(own, *arguments, **named)

    monkeypatch.setattr(Residency, "load", told)
    return loaded


def encoders(cache, clip=files.MINI.clip, t5=files.MINI.t5, dtype=None):
    return open_text_encoders(clip, t5, TOKENIZER, TOKENIZER, CPU, dtype, cache=cache)


def equal(one, other):
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.pooled, other.pooled)


def test_what_was_encoded_before_is_the_same_to_the_bit_and_loads_nothing(loads):
    fresh = encoders(None).encode(TEXT)
    cache = PromptCache(MemoryStore())
    first = encoders(cache).encode(TEXT)
    assert equal(first, fresh)
    loads.clear()
    assert equal(encoders(cache).encode(TEXT), fresh)
    assert loads == []
    assert (cache.found, cache.made) == (2, 2)


def test_a_whole_run_of_known_prompts_loads_no_encoder(loads, tmp_path):
    request = Request(prompt=TEXT, negative="a star", steps=1)
    model = files.open_mini()
    [expected] = generate(model, request)
    for _ in range(2):
        loads.clear()
        cached = FluxModel(model.transformer, encoders(PromptCache(FolderStore(tmp_path))), model.autoencoder)
        [picture] = generate(cached, request)
        assert torch.equal(picture.pixels, expected.pixels)
    assert loads == ["flux1-mini", "flux1-mini-ae"]


def test_only_the_encoder_that_reads_something_new_is_loaded(loads):
    own = encoders(PromptCache(MemoryStore()))
    own.encode(TEXT, clip_prompt="a star")
    for given, needed in (
        ({"prompt": TEXT, "clip_prompt": "a ring"}, ["clip-mini"]),
        ({"prompt": "a ring", "clip_prompt": "a ring"}, ["t5-mini"]),
        ({"prompt": "a ring"}, []),
        ({"prompt": "a ring", "length": 40}, ["t5-mini"]),
    ):
        loads.clear()
        made = own.encode(**given)
        assert loads == needed
        assert equal(made, encoders(None).encode(**given))


def test_of_several_prompts_only_new_ones_are_encoded_and_each_once():
    cache = PromptCache(MemoryStore())
    encoders(cache).encode(TEXT)
    texts = [("a star", None), (TEXT, None), ("a star", None), ("", None)]
    made = encoders(cache).encode_all(texts)
    assert all(equal(*both) for both in zip(made, encoders(None).encode_all(texts), strict=True))
    assert (cache.found, cache.made) == (2, 2 + 4)


def test_a_change_of_what_was_given_out_does_not_reach_the_cache():
    cache = PromptCache(MemoryStore())
    fresh = encoders(None).encode(TEXT)
    for _ in range(3):
        made = encoders(cache).encode(TEXT)
        assert equal(made, fresh)
        with torch.inference_mode():
            made.tokens.zero_()
            made.pooled.zero_()


def test_what_is_kept_is_like_any_tensor_though_it_was_made_in_inference_mode():
    cache = PromptCache(MemoryStore())
    with torch.inference_mode():
        encoders(cache).encode(TEXT)
    kept = next(iter(cache._stores[0]._entries.values()))["embedding"]
    assert not kept.is_inference()


def test_another_file_dtype_tokenizer_length_or_encoder_is_another_key(tmp_path):
    cache = PromptCache(MemoryStore())
    encoders(cache).encode(TEXT)
    other = write_tiny(tmp_path)
    for changed in ({"t5": other.t5}, {"clip": other.clip}, {"dtype": torch.bfloat16}):
        cache.found = 0
        made = encoders(cache, **changed).encode(TEXT)
        assert cache.found == (0 if "dtype" in changed else 1)
        assert equal(made, encoders(None, **changed).encode(TEXT))


def test_a_file_that_is_replaced_gets_a_key_of_its_own_and_never_takes_the_old_ones(tmp_path, loads):
    (tmp_path / "new").mkdir()
    path = shutil.copy(files.MINI.t5, tmp_path / "t5.safetensors")
    cache = PromptCache(MemoryStore())
    early = encoders(cache, t5=path)
    before = early.encode(TEXT)
    os.replace(write_tiny(tmp_path / "new").t5, path)
    again = encoders(cache, t5=path).encode(TEXT)
    assert not torch.equal(before.tokens, again.tokens)
    fingerprint.cache_clear()
    loads.clear()
    assert equal(early.encode(TEXT), before)  # from the old file, which it still holds, and not kept as the new one's
    assert loads == ["t5-mini"]
    assert equal(encoders(cache, t5=path).encode(TEXT), again)


def test_numbers_that_are_not_finite_are_not_kept(tmp_path):
    tiny = write_tiny(tmp_path)

    def broken(module, ids):
        return torch.full((1, 9, 128), torch.nan)

    with pytest.MonkeyPatch.context() as patch:
        store = FolderStore(tmp_path / "kept")
        model = files.open_mini()
        model = FluxModel(model.transformer, encoders(PromptCache(store), t5=tiny.t5), model.autoencoder)
        patch.setattr("flux.models.text.t5.T5Encoder.forward", broken)
        with pytest.raises(NumericError, match="text encoders gave numbers that are not finite"):
            generate(model, Request(prompt=TEXT, steps=1))
    assert [entry.about for entry in kept_files(store.folder)] == ["clip-mini"]


def test_a_damaged_file_in_the_folder_is_encoded_again_and_told(tmp_path, loads):
    told = []
    fresh = encoders(PromptCache(FolderStore(tmp_path))).encode(TEXT)
    for entry in kept_files(tmp_path):
        os.truncate(entry.path, 100)
    loads.clear()
    assert equal(encoders(PromptCache(FolderStore(tmp_path, tell=told.append))).encode(TEXT), fresh)
    assert len(loads) == len(told) == 2


def test_memory_lets_go_of_what_was_not_used_for_longest():
    store = MemoryStore(3 * 40)
    for name in "abc":
        store.put(name, {"x": torch.ones(10)})
    store.get("a")
    store.put("d", {"x": torch.ones(10)})
    assert [name for name in "abcd" if store.get(name)] == ["a", "c", "d"]
    assert store.nbytes == 3 * 40
    store.put("e", {"x": torch.ones(100)})  # more than all may be
    assert store.get("e") is None
    assert store.clear() == Cleared(3, 3 * 40)
    assert store.nbytes == 0


def test_what_is_put_twice_is_counted_once():
    store = MemoryStore()
    for value in (1.0, 2.0):
        store.put("a", {"x": torch.full((10,), value)})
    assert store.nbytes == 40
    assert float(store.get("a")["x"][0]) == 2.0


def test_a_slower_store_fills_the_faster_ones(tmp_path):
    slow, fast = FolderStore(tmp_path), MemoryStore()
    slow.put("a" * 64, {"x": torch.ones(3)})
    cache = PromptCache(fast, slow)
    assert cache.get("a" * 64) is not None
    assert fast.get("a" * 64) is not None


def test_keys_tell_what_computes_and_what_is_read():
    assert encoder_key("t5", {}, CPU, torch.float32) != encoder_key("t5", {}, CPU, torch.bfloat16)
    assert encoder_key("t5", {}, CPU, torch.float32) != encoder_key("clip", {}, CPU, torch.float32)
    gone = {files.MINI.t5 / "absent": FileStamp(0, 0, 0, 0)}
    assert encoder_key("t5", gone, CPU, torch.float32) is None
    assert len({text_key("a", [1, 2]), text_key("a", [12]), text_key("a", [2, 1]), text_key("b", [1, 2])}) == 4
