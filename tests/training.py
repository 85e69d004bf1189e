"""What tests of the embedded model's trainers share: tiny models, interruptions, and comparing what came of them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from flux.mini.files import FOLDER
from flux.ops import dtypes
from flux.specs.autoencoder import MINI as MINI_AUTOENCODER
from flux.specs.flux1 import MINI
from flux.specs.text import CLIP_MINI, T5_MINI
from flux.training.checkpoints import load_checkpoint

TOKENIZER = FOLDER / "tokenizer.json"
FORMATS = [torch.float32, torch.bfloat16]
TINY = replace(MINI, context_width=12, pooled_width=10, hidden=32, axes=(4, 6, 6), double_blocks=1, single_blocks=2)
TINY_SCHNELL = replace(TINY, guidance_embedding=False)
TINY_AUTOENCODER = replace(MINI_AUTOENCODER, base_channels=8, channel_multipliers=(1, 1, 1, 1), norm_groups=2)
TINY_T5 = replace(T5_MINI, width=32, heads=2, head_width=16, mlp_width=32, layers=1)
TINY_CLIP = replace(CLIP_MINI, width=32, mlp_width=32, layers=1)


class Interruption(Exception):  # noqa: N818 - not an error
    """What ends a run from outside."""


def set_format(monkeypatch, dtype):
    monkeypatch.setattr(dtypes, "_fast_dtype", lambda kind: dtype)  # whoever asks, under whatever name


@contextmanager
def interruption(monkeypatch, owner, name, call):
    """Runs the block until a function is called for the given time, counted from 0, and stops it there."""
    original = getattr(owner, name)
    calls = iter(range(1_000_000))

    def counted(*args, **kwargs):
        if next(calls) == call:
            raise Interruption
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(Interruption):
            yield


def assert_equal_checkpoints(one, other):
    (tensors, meta), (others, other_meta) = load_checkpoint(one), load_checkpoint(other)
    assert meta == other_meta
    assert tensors.keys() == others.keys()
    different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not different


def assert_equal_models(one, other):
    for (name, mine), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
