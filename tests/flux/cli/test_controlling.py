"""``control``: what the model is shown of a picture, and which model is shown it."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from flux.cli.controlling import run_as_trained
from flux.images import read_settings
from flux.specs.flux1 import FLUX1


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def seen(guide, tmp_path):
    """What the model is shown by ``control``, and what was drawn."""

    def call(kind, path, *words, name="a", **changes):
        out, shown = tmp_path / f"{name}.png", tmp_path / f"{name}-seen.png"
        said = guide(kind, "control", path, "a house", "--out", out, "--save-control", shown, *words, **changes)
        assert said.code == 0, said.err
        assert said.out[:2] == [str(shown), str(out)]
        return pixels(shown), pixels(out)

    return call


def test_edges_are_those_of_opencv_at_the_thresholds_that_are_asked_for(seen, picture):
    path, before = picture(48, 32)
    for words, low, high in (((), 50, 200), (("--low", "300", "--high", "900"), 300, 900)):
        shown, _ = seen("canny", path, "--type", "canny", *words)
        assert np.array_equal(shown, np.repeat(cv2.Canny(before, low, high)[..., None], 3, axis=2))


def test_thresholds_can_come_from_the_picture(seen, picture):
    path, _ = picture(48, 32)
    fixed, _ = seen("canny", path, "--type", "canny")
    shown, _ = seen("canny", path, "--type", "canny", "--auto")
    assert not np.array_equal(shown, fixed)
    assert set(np.unique(shown)) == {0, 255}


@pytest.mark.parametrize(
    ("kind", "words"), [("canny", ("--type", "canny", "--ready")), ("depth", ("--type", "depth")),
                        ("depth", ("--type", "image"))]
)  # fmt: skip
def test_a_picture_that_is_a_control_already_is_shown_as_it_is(seen, picture, kind, words):
    path, before = picture(48, 32)
    shown, _ = seen(kind, path, *words)
    assert np.array_equal(shown, before)


def test_a_depth_picture_can_be_turned_over(seen, picture):
    path, before = picture(48, 32)
    shown, _ = seen("depth", path, "--type", "depth", "--invert")
    assert np.array_equal(shown, 255 - before)


def test_a_photo_is_looked_at_by_a_depth_model(seen, picture, tmp_path, monkeypatch):
    class Estimator:
        def estimate(self, image):
            return image[..., 0] * 3 + 1

    folder = tmp_path / "depth"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_text(name)
    monkeypatch.setattr("flux.cli.controlling.open_depth", lambda path, device: Estimator() if path == folder else None)
    path, before = picture(48, 32)
    shown, _ = seen("depth", path, "--type", "depth", "--depth-model", folder, "--record")
    red = before[..., 0].astype(float)
    expected = (red - red.min()) / (red.max() - red.min()) * 255
    assert np.abs(shown[..., 0] - expected).max() <= 0.51
    files = {file["role"]: file["sha256"] for file in json.loads((tmp_path / "a.json").read_text())["files"]}
    assert {role for role in files if "depth" in role} == {"depth model config.json", "depth model model.safetensors"}
    assert files["depth model config.json"] == hashlib.sha256(b"config.json").hexdigest()


def test_the_control_decides_the_picture_and_strength_how_much(seen, picture):
    one, two = (picture(32, 32, f"{seed}.png", seed)[0] for seed in (0, 1))
    drawn = [seen("canny", path, "--type", "canny")[1] for path in (one, two)]
    assert not np.array_equal(*drawn)
    weak = [seen("canny", path, "--type", "canny", "--strength", "0")[1] for path in (one, two)]
    assert np.array_equal(*weak)
    half = seen("canny", one, "--type", "canny", "--end", "0.5")[1]
    assert not np.array_equal(half, drawn[0])


@pytest.mark.parametrize(
    ("words", "size"),
    [((), (48, 32)), (("--width", "96"), (96, 64)), (("--height", "64"), (96, 64)),
     (("--width", "64", "--height", "64"), (64, 64))],
)  # fmt: skip
def test_the_size_is_the_picture_s_unless_asked_for(seen, picture, words, size):
    path, _ = picture(48, 32)
    shown, drawn = seen("canny", path, "--type", "canny", *words)
    assert shown.shape[1::-1] == drawn.shape[1::-1] == size


def test_another_aspect_is_told_of_and_fitted_as_asked(guide, picture, tmp_path):
    path, _ = picture(64, 32)
    drawn = []
    for fit, words in (("stretch", "it is stretched"), ("crop", "is cut off"), ("pad", "bands are added")):
        said = guide(
            "depth", "control", path, "x", "--type", "depth", "--fit", fit, "--out", tmp_path / "a.png",
            width=32, height=32,
        )  # fmt: skip
        assert any(words in line for line in said.err), said.err
        drawn.append(pixels(tmp_path / "a.png").tobytes())
    assert len(set(drawn)) == 3


def test_settings_and_record_tell_of_the_control(guide, picture, tmp_path):
    path, _ = picture(32, 32)
    said = guide(
        "canny", "control", path, "x", "--type", "canny", "--strength", "0.5", "--start", "0.2", "--record",
        "--out", tmp_path / "a.png",
    )  # fmt: skip
    assert said.code == 0
    settings = read_settings(tmp_path / "a.png")
    expected = {"command": "control", "type": "canny", "image": "picture.png", "thresholds": [50.0, 200.0]}
    assert expected.items() <= settings.items()
    assert settings["inputs"] == [{"kind": "control", "strength": 0.5, "start": 0.2, "end": 1.0}]
    record = json.loads((tmp_path / "a.json").read_text())
    assert {"image"} <= {file["role"] for file in record["files"]}


def test_a_region_is_neither_everywhere_nor_nowhere(seen, picture, mask):
    path, _ = picture(64, 64)
    everywhere = seen("canny", path, "--type", "canny")[1]
    none = seen("canny", path, "--type", "canny", "--strength", "0")[1]
    left = seen("canny", path, "--type", "canny", "--region", mask(64, 64, (0, 0, 32, 64)))[1]
    assert not np.array_equal(left, everywhere)
    assert not np.array_equal(left, none)


def test_a_region_that_is_black_everywhere_is_refused(guide, picture, mask, tmp_path):
    path, _ = picture(32, 32)
    black = mask(32, 32, (0, 0, 0, 0))
    said = guide("canny", "control", path, "x", "--type", "canny", "--region", black, "--out", tmp_path / "a.png")
    assert said.code != 0
    assert said.out == []
    assert "error: the region is black everywhere" in said.err[-1]


@pytest.mark.parametrize(
    ("kind", "words", "says"),
    [
        ("canny", (), "the following arguments are required: --type"),
        ("canny", ("--type", "pose"), "invalid choice: 'pose'"),
        ("depth", ("--type", "depth", "--low", "5"), "--low is of --type canny, not of depth"),
        ("canny", ("--type", "canny", "--invert"), "--invert is of --type depth, not of canny"),
        ("canny", ("--type", "canny", "--depth-scale", "bfl"), "--depth-scale is of --type depth, not of canny"),
        ("depth", ("--type", "depth", "--depth-scale", "bfl"), "--depth-scale is of what --depth-model finds"),
        ("canny", ("--type", "canny", "--ready", "--auto"), "--ready says that IMAGE is edges already"),
        ("canny", ("--type", "canny", "--auto", "--high", "5"), "--auto chooses both thresholds"),
        ("canny", ("--type", "canny", "--low", "300"), "the low threshold (300) is above the high one (200)"),
        ("depth", ("--type", "depth", "--ready", "--depth-model", "x"), "--depth-model looks for it"),
        ("depth", ("--type", "depth", "--depth-model", "nowhere"), "the folder nowhere was not found"),
        ("canny", ("--type", "canny", "--save-control", "edges.bmp"), "the suffix '.bmp'"),
        ("canny", ("--type", "canny", "--strength", "2.5"), "the strength is 2.5"),
        ("canny", ("--type", "canny", "--start", "0.9", "--end", "0.1"), "starts at 0.9 and ends at 0.1"),
        ("canny", ("--type", "canny", "--region", "none.png"), "none.png was not found"),
        ("canny", ("--type", "canny", "--width", "0"), "pixels"),
    ],
)
def test_controls_that_cannot_be(guide, picture, tmp_path, kind, words, says):
    path, _ = picture(32, 32)
    said = guide(kind, "control", path, "x", "--quiet", "--out", tmp_path / "a.png", *words)
    assert (said.code, said.out, len(said.err)) == (2, [], 1), said.err
    assert says in said.err[0]
    assert not (tmp_path / "a.png").exists()


def test_a_lora_goes_onto_a_text_model_and_is_in_the_record(guide, picture, tmp_path, monkeypatch):
    opened = []

    def burst(path):
        opened.append(path)
        raise torch.OutOfMemoryError("far enough")

    monkeypatch.setattr("flux.cli.controlling.read_control_lora", burst)
    path, _ = picture(32, 32)
    for name in ("lora.safetensors", "mini"):
        said = guide("text", "control", path, "x", "--type", "depth", "--lora", name, "--out", tmp_path / "a.png")
        assert "ran out of memory" in said.err[-1]
    assert [file.name for file in opened] == ["lora.safetensors", "flux1-depth-mini-lora.safetensors"]
    said = guide("text", "control", path, "x", "--type", "image", "--lora", "mini", "--out", tmp_path / "a.png")
    assert "the embedded control LoRAs follow canny and depth; give --lora a file" in said.err[-1]


@pytest.fixture
def warnings(guide, tmp_path):
    """What ``control`` notes of a picture with these levels (H, W) or (H, W, 3)."""

    def call(kind, levels, *words):
        path = tmp_path / "given.png"
        Image.fromarray(levels).save(path)
        said = guide(kind, "control", path, "x", "--type", kind, *words, "--out", tmp_path / "a.png", steps=1)
        assert said.code == 0, said.err
        return [line for line in said.err if line.startswith("note: ") and "given.png" in line]

    return call


def levels(*shape):
    return np.random.default_rng(3).integers(1, 255, shape, dtype=np.uint8)


def test_a_photo_in_place_of_depth_is_told_of_unless_it_is_said_to_be_depth(warnings):
    (line,) = warnings("depth", levels(32, 32, 3))
    assert "given.png has colours, so that it is no depth picture: give --depth-model" in line
    assert warnings("depth", levels(32, 32, 3), "--ready") == warnings("depth", levels(32, 32)) == []


def test_edges_in_place_of_a_photo_are_told_of_unless_they_are_said_to_be_edges(warnings):
    edges = np.where(levels(32, 32) > 200, 255, 0).astype(np.uint8)
    (line,) = warnings("canny", edges)
    assert "given.png is black and white, as edges are: if it is edges already, say so with --ready" in line
    assert warnings("canny", edges, "--ready") == warnings("canny", levels(32, 32, 3)) == []


@pytest.mark.parametrize(
    ("words", "advice"),
    [((), "lower the thresholds with --low and --high, or let --auto choose them"),
     (("--auto",), "give --low and --high, or another picture"), (("--ready",), "leave --ready out, which finds them")],
)  # fmt: skip
def test_a_picture_without_edges_is_told_of_once(warnings, words, advice):
    (line,) = warnings("canny", np.zeros((32, 32), np.uint8), *words)
    assert "there are no edges in given.png" in line
    assert line.endswith(advice)


@pytest.mark.parametrize(
    ("words", "ground", "told"),
    [(("--type", "depth"), 0, "laid on black"), (("--type", "canny", "--ready"), 0, "laid on black"),
     (("--type", "canny"), 255, "laid on white")],
)  # fmt: skip
def test_transparent_places_of_a_control_are_black_and_those_of_a_photo_white(guide, tmp_path, words, ground, told):
    rgba = np.zeros((32, 48, 4), np.uint8)
    rgba[8:24, 8:24] = 200, 200, 200, 255
    Image.fromarray(rgba).save(tmp_path / "cut out.png")
    shown = tmp_path / "seen.png"
    said = guide(words[1], "control", tmp_path / "cut out.png", "x", *words, "--save-control", shown,
                 "--out", tmp_path / "a.png")  # fmt: skip
    assert said.code == 0
    assert f"cut out.png is transparent in places: it is {told}" in "\n".join(said.err)
    if "--ready" in words or words[1] == "depth":
        assert set(np.unique(pixels(shown))) == {ground, 200}
    else:
        flat = np.full((32, 48, 3), ground, np.uint8)
        flat[8:24, 8:24] = 200
        assert np.array_equal(pixels(shown)[..., 0], cv2.Canny(flat, 50, 200))


@pytest.mark.parametrize("size", [("--width", "100000"), ("--height", "0"), ("--height", "-16"), ("--width", "9000")])
def test_a_size_that_no_picture_has_is_refused_before_anything_is_made(guide, picture, tmp_path, size):
    path, _ = picture(64, 64)
    shown = tmp_path / "seen.png"
    said = guide("canny", "control", path, "x", "--type", "canny", *size, "--save-control", shown,
                 "--out", tmp_path / "a.png")  # fmt: skip
    assert said.code != 0
    assert f"is {size[1]}; give 16 to 8192 pixels" in said.err[-1]
    assert not shown.exists()


def test_with_a_lora_it_runs_as_the_full_model_that_follows_the_same():
    asked = {"type": "depth", "guidance": None, "steps": None, "sigmas": None}
    for changes, expected in (
        ({}, (10.0, 50)), ({"type": "canny"}, (30.0, 50)), ({"type": "image"}, (None, None)),
        ({"guidance": 4.0, "steps": 8}, (4.0, 8)), ({"sigmas": [1.0, 0.0]}, (10.0, None)),
    ):  # fmt: skip
        arguments = Namespace(**{**asked, **changes})
        run_as_trained(arguments, FLUX1["flux1-dev"])
        assert (arguments.guidance, arguments.steps) == expected
    mini = Namespace(**asked)
    run_as_trained(mini, FLUX1["flux1-mini"])
    assert (mini.guidance, mini.steps) == (3.0, 16)
