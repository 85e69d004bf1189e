"""The catalogue of known models."""

from __future__ import annotations

import json
import re

import pytest

from flux.cli.models import PARTS_INSIDE, catalogue
from flux.cli.purposes import EMBEDDED
from flux.specs.autoencoder import AUTOENCODERS
from flux.specs.flux1 import FLUX1
from flux.specs.releases import FILE_NAMES
from flux.specs.text import CLIP_TEXT, T5_ENCODERS
from flux.specs.vision import REDUXES, VISION_TOWERS
from flux.version import VERSION
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def facts():
    return catalogue()


def test_every_model_and_every_part_that_one_needs_is_listed(facts):
    assert {row["name"] for row in facts["models"]} == set(FLUX1)
    parts = {row["name"] for row in facts["parts"]}
    assert parts == set(FILE_NAMES) == {*CLIP_TEXT, *T5_ENCODERS, *AUTOENCODERS, *VISION_TOWERS, *REDUXES}
    assert all({*row["text_encoders"], row["autoencoder"]} <= parts for row in facts["models"])


def test_sizes_are_counted_from_the_specs(facts):
    rows = {row["name"]: row for row in facts["models"]}
    assert rows["flux1-dev"]["parameters"] == 11_901_408_320
    assert rows["flux1-dev"]["bf16_bytes"] == 23_802_816_640
    assert (rows["flux1-schnell"]["steps"], rows["flux1-schnell"]["guidance"]) == (4, None)
    assert [name for name, row in rows.items() if row["embedded"]] == list(EMBEDDED)
    assert [name for name, row in rows.items() if not row["draws_from_text"]] == [
        "flux1-fill-dev", "flux1-depth-dev", "flux1-canny-dev", "flux1-fill-mini", "flux1-canny-mini",
        "flux1-depth-mini",
    ]  # fmt: skip


def test_the_table_says_what_each_needs(flux):
    said = flux("models")
    assert (said.code, said.err) == (0, [])
    (dev,) = (line for line in said.out if line.startswith("flux1-dev "))
    for words in (
        "flux1-dev.safetensors",
        "11.90B",
        "23.8 GB",
        "28",
        "3.5",
        "clip-l, t5xxl, flux1-ae",
        "Non-Commercial",
    ):
        assert words in dev
    assert sum("inside the pack" in line for line in said.out) == len(EMBEDDED) + len(PARTS_INSIDE) == 12
    for line in (
        "`fill` and `outpaint` take flux1-fill-dev, flux1-fill-mini",
        "`edit` takes flux1-kontext-dev, flux1-kontext-mini",
        "`redux` takes flux1-schnell, flux1-dev, flux1-krea-dev, flux1-mini-redux",
    ):
        assert line in said.out


def test_json_is_the_catalogue(flux, facts):
    assert json.loads("\n".join(flux("models", "--json").out)) == facts


def test_the_version_is_the_project_s(flux):
    assert re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1] == VERSION
    assert flux("--version").out == [f"FLUX Foundry {VERSION}"]


def test_the_project_and_the_manager_install_the_same():
    """ComfyUI-Manager reads requirements.txt, pip reads pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)[1]
    assert re.findall(r'"(.+)"', listed) == (ROOT / "requirements.txt").read_text().split()
