"""A tiny model on disk, and the command line called in this process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux.cli.main import main
from flux.models.flux1 import Flux1
from flux.models.redux import Redux
from flux.models.vision.siglip import SiglipVision
from flux.specs.vision import REDUX_MINI, SIGLIP_MINI
from tests.tiny import TINY, write_module, write_tiny

TAKES = {
    "fill": 384,
    "canny": 128,
    "depth": 128,
    "kontext": 64,
}  # input channels, by the word that files are named with


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: list[str]
    err: list[str]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@dataclass(frozen=True)
class GuidedFiles:
    """Tiny models that pictures guide, by what they do, and what reads pictures for Redux."""

    models: dict[str, Path]
    redux: Path
    vision: Path


@pytest.fixture(scope="session")
def guided(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided")
    return GuidedFiles(
        {
            kind: write_module(folder / f"tiny-{kind}.safetensors", Flux1(replace(TINY, in_channels=channels)), 7)
            for kind, channels in TAKES.items()
        },
        write_module(folder / "redux.safetensors", Redux(REDUX_MINI), 8),
        write_module(folder / "siglip.safetensors", SiglipVision(SIGLIP_MINI), 9),
    )


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


@pytest.fixture
def guide(flux, tiny, guided):
    """A command that a picture guides, with the tiny model of a kind, 2 steps and seed 5, unless told otherwise."""

    def call(kind, *words, **changes):
        options = {
            "model": guided.models.get(kind, tiny.transformer), "clip": tiny.clip, "t5": tiny.t5,
            "vae": tiny.autoencoder, "tokenizers": tiny.tokenizer, "steps": 2, "seed": 5,
        } | changes  # fmt: skip
        pairs = [(f"--{key.replace('_', '-')}", value) for key, value in options.items() if value is not None]
        return flux(*words, *(word for pair in pairs for word in pair))

    return call


@pytest.fixture
def picture(tmp_path):
    """Writes a picture of random bytes, and gives its path and its bytes."""

    def make(width, height, name="picture.png", seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return tmp_path / name, pixels

    return make


@pytest.fixture
def mask(tmp_path):
    """Writes a mask, white in a box of left, top, right and bottom."""

    def make(width, height, box, name="mask.png"):
        plane = np.zeros((height, width), np.uint8)
        plane[box[1] : box[3], box[0] : box[2]] = 255
        Image.fromarray(plane).save(tmp_path / name)
        return tmp_path / name

    return make
