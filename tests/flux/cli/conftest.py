"""A tiny model on disk, and the command line called in this process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from flux.cli.main import main
from tests.tiny import write_tiny


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: list[str]
    err: list[str]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def flux(capfd, monkeypatch):
    monkeypatch.delenv("FLUXFOUNDRY_DEBUG", raising=False)

    def call(*words):
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Said(code, out.splitlines(), err.splitlines())

    return call


@pytest.fixture
def draw(flux, tiny):
    """``generate`` with the tiny model, 32 pixels, 2 steps and seed 5, unless told otherwise."""

    def call(*words, prompt="a red circle", **changes):
        options = {
            "model": tiny.transformer, "clip": tiny.clip, "t5": tiny.t5, "vae": tiny.autoencoder,
            "tokenizers": tiny.tokenizer, "width": 32, "height": 32, "steps": 2, "seed": 5,
        } | changes  # fmt: skip
        pairs = [(f"--{key}", value) for key, value in options.items() if value is not None]
        return flux("generate", prompt, *(word for pair in pairs for word in pair), *words)

    return call
