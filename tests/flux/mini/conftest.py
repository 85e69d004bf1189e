"""Trainers with tiny models."""

from __future__ import annotations

import itertools

import pytest
import torch

from flux.mini import train_autoencoder, train_flow, train_text
from flux.mini.train_text import TextRecipe, train_text_encoders
from tests.training import (
    TINY,
    TINY_AUTOENCODER,
    TINY_CLIP,
    TINY_SCHNELL,
    TINY_T5,
    TOKENIZER,
    set_format,
)


@pytest.fixture
def tiny(monkeypatch):
    """Tiny models in one number format on every machine; the global random state is given back."""
    set_format(monkeypatch, torch.float32)
    monkeypatch.setattr(train_autoencoder, "MINI", TINY_AUTOENCODER)
    monkeypatch.setattr(train_autoencoder, "EVENING_BATCHES", 2)
    monkeypatch.setattr(train_text, "T5_MINI", TINY_T5)
    monkeypatch.setattr(train_text, "CLIP_MINI", TINY_CLIP)
    monkeypatch.setattr(train_flow, "MINI", TINY)
    monkeypatch.setattr(train_flow, "MINI_SCHNELL", TINY_SCHNELL)
    with torch.random.fork_rng():
        yield


@pytest.fixture
def run_text(tmp_path):
    """Trains from a checkpoint of the given name, or of a new one each time."""
    names = itertools.count()

    def run(steps, seed=0, report=lambda line: None, name=None, **recipe):
        checkpoint = tmp_path / f"{name or next(names)}.safetensors"
        return train_text_encoders(
            checkpoint, TOKENIZER, TextRecipe(steps=steps, batch=8, **recipe), seed=seed, report=report
        )

    return run
