"""``demo``: pictures and a sheet of them, the chain of guided models among them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.checker import find_blobs
from flux.cli import demo
from flux.cli.sheet import GAP, GROUND, MARGIN
from flux.images import read_settings
from flux.mini import files

CHAIN = ["chain-2-fill", "chain-3-redux", "chain-4-redux", "chain-5-edit"]
SIDE = 128


@pytest.fixture
def shots(monkeypatch, tiny, guided):
    """The demo with three shots, on tiny models."""
    own = {"autoencoder": tiny.autoencoder, "clip": tiny.clip, "t5": tiny.t5}
    for name, path in {
        "MINI": tiny.transformer, "MINI_SCHNELL": tiny.transformer, "MINI_FILL": guided.models["fill"],
        "MINI_KONTEXT": guided.models["kontext"], "MINI_REDUX": tiny.transformer,
    }.items():  # fmt: skip
        monkeypatch.setattr(files, name, files.MiniFiles(path, **own))
    monkeypatch.setattr(files, "REDUX_MINI_FILE", guided.redux)
    monkeypatch.setattr(files, "SIGLIP_MINI_FILE", guided.vision)
    monkeypatch.setattr(demo, "SHOTS", demo.SHOTS[:3])
    return [shot.name for shot in demo.SHOTS]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_the_chain_goes_from_text_over_fill_and_redux_to_an_edit(flux, shots, tmp_path):
    said = flux("demo", "--out", tmp_path)
    assert (said.code, said.err) == (0, [])
    names = [*shots, "from-picture", *CHAIN]
    assert [line.split("  ")[0] for line in said.out[:-2]] == [str(tmp_path / f"{name}.png") for name in names]
    assert said.out[-2] == str(tmp_path / "sheet.png")
    assert said.out[-1].startswith(f"{len(names)} pictures in ")
    models = [read_settings(tmp_path / f"{name}.png")["model_file"] for name in CHAIN]
    assert models == ["tiny-fill.safetensors", "tiny.safetensors", "tiny.safetensors", "tiny-kontext.safetensors"]
    first, filled = pixels(tmp_path / f"{shots[0]}.png"), pixels(tmp_path / "chain-2-fill.png")
    left, top, right, bottom = demo.HOLE
    kept = np.ones((SIDE, SIDE), bool)
    kept[top:bottom, left:right] = False
    assert np.array_equal(first[kept], filled[kept])
    assert not np.array_equal(first[~kept], filled[~kept])


def test_the_sheet_shows_the_chain_above_the_other_pictures(flux, shots, tmp_path):
    assert flux("demo", "--out", tmp_path).code == 0
    sheet = pixels(tmp_path / "sheet.png")
    places = [MARGIN + index * (SIDE + GAP) for index in range(6)]
    shown = [sheet[MARGIN : MARGIN + SIDE, left : left + SIDE] for left in places]
    for index, name in ((0, shots[0]), *zip((2, 3, 4, 5), CHAIN, strict=True)):
        assert np.array_equal(shown[index], pixels(tmp_path / f"{name}.png"))
    gaps = [sheet[MARGIN : MARGIN + SIDE, left - GAP : left] for left in places[1:]]
    assert [bool((gap != GROUND).any()) for gap in gaps] == [True, True, True, False, True]
    below = sheet[-MARGIN - SIDE : -MARGIN]
    for left, name in zip(places, shots, strict=False):
        assert np.array_equal(below[:, left : left + SIDE], pixels(tmp_path / f"{name}.png"))


def test_the_embedded_models_draw_the_chain(flux, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "SHOTS", demo.SHOTS[:1])
    assert flux("demo", "--out", tmp_path).code == 0
    filled, varied = {("red", "circle"), ("yellow", "star")}, {("green", "circle"), ("yellow", "star")}
    for name, things in zip(CHAIN, (filled, filled, filled, varied), strict=True):
        assert {(blob.colour, blob.shape) for blob in find_blobs(pixels(tmp_path / f"{name}.png"))} == things
