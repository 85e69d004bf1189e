"""``redux``: pictures are read by a vision tower, and each is taken over as strongly as is asked."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from flux.images import read_settings
from flux.memory.residency import Residency
from flux.models.redux import Redux
from flux.ops.layers import on_meta
from flux.specs.vision import REDUX
from tests.tiny import write_header_only


@pytest.fixture
def redux(guide, guided, tmp_path):
    """What ``redux`` draws of 32 pixels a side, and its settings."""

    def call(*words, name="a.png", code=0, **changes):
        files = {"redux": guided.redux, "vision": guided.vision, "width": 32, "height": 32} | changes
        said = guide("text", "redux", *words, "--out", tmp_path / name, **files)
        assert said.code == code, said.err
        return said if code else (np.asarray(Image.open(tmp_path / name)), read_settings(tmp_path / name))

    return call


@pytest.fixture
def two(picture):
    return [picture(40, 40, f"{seed}.png", seed)[0] for seed in (1, 2)]


def test_each_picture_makes_another_one_and_they_join(redux, two):
    drawn = [redux(*paths)[0].tobytes() for paths in ([two[0]], [two[1]], two)]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("mode", ["attention", "tokens"])
def test_strength_weighs_each_picture(redux, two, mode):
    words = ("--strength-mode", mode)
    full, settings = redux(*two, *words)
    assert settings["strengths"] == [1.0, 1.0]
    for strength in ("0.5", "1,0.2"):
        other, settings = redux(*two, "--strength", strength, *words)
        assert not np.array_equal(full, other)
    assert settings["strengths"] == [1.0, 0.2]
    kinds = {"attention": [1.0, 0.2], "tokens": [1.0, 1.0]}[mode]
    assert [one["strength"] for one in settings["inputs"]] == kinds


def test_without_strength_there_is_only_the_prompt(redux, two, guide, tmp_path):
    words = ("--prompt", "a red circle", "--strength", "0")
    drawn = [redux(path, *words)[0] for path in two]
    guide("text", "generate", "a red circle", "--out", tmp_path / "plain.png", width=32, height=32)
    plain = np.asarray(Image.open(tmp_path / "plain.png"))
    assert np.array_equal(drawn[0], plain)
    assert np.array_equal(drawn[1], plain)


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        ((), 81),
        (("--fit", "crop"), 81),
        (("--fit", "pad"), 81),
        (("--fit", "tiled"), 162),
        (("--grid", "3"), 9),
        (("--tokens", "20"), 20),
        (("--fit", "tiled", "--grid", "2", "--tokens", "5"), 5),
    ],
)
def test_tokens_are_as_many_as_asked(redux, picture, words, tokens):
    path, _ = picture(80, 40)
    _, settings = redux(path, *words)
    assert settings["style_tokens"] == [tokens]


def test_a_mask_takes_over_a_part_and_one_of_all_takes_all(redux, picture, mask):
    path, _ = picture(36, 36)
    drawn = [redux(path)[0]] + [redux(path, "--mask", mask(36, 36, (0, 0, right, 36)))[0] for right in (12, 36)]
    assert not np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], drawn[2])


def test_settings_and_record_name_every_file(redux, guided, two, tmp_path):
    _, settings = redux(*two, "--prompt", "a star", "--start", "0.1", "--record")
    expected = {
        "command": "redux", "images": ["1.png", "2.png"], "prompt": "a star", "fit": "stretch",
        "redux": "redux.safetensors", "vision": "siglip.safetensors", "strength_mode": "attention",
    }  # fmt: skip
    assert expected.items() <= settings.items()
    files = {file["role"]: file["sha256"] for file in json.loads((tmp_path / "a.json").read_text())["files"]}
    given = {"image 1": two[0], "image 2": two[1], "redux": guided.redux, "vision": guided.vision}
    for role, path in given.items():
        assert files[role] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--strength", "1,1,1"), "--strength has 3 numbers for 2 pictures"),
        (("--strength", "much"), "'much' is not a list of numbers"),
        (("--strength", "3"), "the strength is 3"),
        (("--strength", "3", "--strength-mode", "tokens"), "scale is 3"),
        (("--grid", "28"), "a grid of 9x9 tokens cannot become 28x28"),
        (("--tokens", "0"), "0 tokens cannot be left"),
        (("--mask", "mask.png"), "mask.png was not found"),
        (("--start", "1", "--end", "0"), "starts at 1 and ends at 0"),
        (("--fit", "squash"), "invalid choice: 'squash'"),
    ],
)
def test_styles_that_cannot_be(redux, two, tmp_path, words, says):
    said = redux(*two, "--quiet", *words, code=2)
    assert (said.out, len(said.err)) == ([], 1)
    assert says in said.err[0]
    assert not (tmp_path / "a.png").exists()


def test_one_mask_does_not_belong_to_two_pictures(redux, two, mask):
    said = redux(*two, "--mask", mask(40, 40, (0, 0, 9, 9)), code=2)
    assert "--mask is of a single IMAGE, and several were given" in said.err[-1]


def test_an_adapter_without_its_tower_or_of_another_family_is_named(redux, guided, tiny, two, tmp_path):
    with on_meta():
        shapes = {name: tuple(p.shape) for name, p in Redux(REDUX).named_parameters()}
    real = write_header_only(tmp_path / "flux1-redux-dev.safetensors", shapes)
    cases = [
        ({"redux": real}, "SigLIP so400m"),
        ({"vision": tiny.clip}, "clip.safetensors"),
        ({"redux": guided.vision}, "siglip.safetensors"),
        ({"redux": tmp_path / "none.safetensors"}, "none.safetensors"),
        ({"redux": real, "vision": None}, "sigclip_vision_patch14_384.safetensors (--vision"),
    ]
    for changes, says in cases:
        said = redux(two[0], "--quiet", code=2, **changes)
        assert len(said.err) == 1
        assert says in said.err[0], said.err


def test_a_policy_streams_the_vision_tower(redux, two, monkeypatch):
    limits, load = {}, Residency.load

    def told(own, without=(), watch=None, limit=None, tell=None):
        limits[type(own.module).__name__] = limit
        return load(own, without, watch, limit, tell)

    monkeypatch.setattr(Residency, "load", told)
    drawn = [redux(*two, "--policy", policy)[0].astype(int) for policy in ("keep", "save")]
    assert limits["SiglipVision"] == limits["Flux1"] == 0
    assert np.abs(drawn[0] - drawn[1]).max() <= 1  # the last bit of a norm's statistics, in strips


def test_a_budget_below_what_the_tower_needs_is_refused(redux, two):
    said = redux(*two, "--policy", "0.0005", code=2)
    assert "a budget of 0.0005 GiB is below the least that this takes, 0.01 GiB; raise it" in said.err[-1]


def test_a_report_has_the_vision_tower_beside_its_plan(redux, two, tmp_path):
    redux(*two, "--report", "--record")
    stages = json.loads((tmp_path / "a.json").read_text())["memory"]["stages"]
    assert len(stages["vision"]["taken"]["pass_seconds"]) == 2  # a view of each picture
    assert stages["vision"]["planned"]["resident_bytes"] == stages["vision"]["taken"]["resident_bytes"] > 0
