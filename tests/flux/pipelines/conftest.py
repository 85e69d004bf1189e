"""Tiny models of every task, shared by the tests of guided generation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flux.models.flux1 import Flux1
from flux.pipelines.parts import open_transformer
from tests.tiny import TINY, write_module

CHANNELS = {"draw": 64, "canny": 128, "depth": 128, "fill": 384}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided")
    return {
        task: write_module(folder / f"tiny-{task}.safetensors", Flux1(replace(TINY, in_channels=channels)), seed)
        for seed, (task, channels) in enumerate(CHANNELS.items())
    }


@pytest.fixture(scope="module")
def parts(files):
    return {task: open_transformer(path, torch.device("cpu"), torch.float32) for task, path in files.items()}
