"""``edit``: a picture is changed by a sentence, and keeps its size."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from flux.images import read_settings


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def edit(guide, tmp_path):
    """What ``edit`` makes, its settings, and what was said."""

    def call(*words, kind="kontext", name="a.png", **changes):
        said = guide(kind, "edit", words[0], "make it green", *words[1:], "--out", tmp_path / name, **changes)
        assert said.code == 0, said.err
        return pixels(tmp_path / name), read_settings(tmp_path / name), said.err

    return call


@pytest.mark.parametrize("size", [(32, 32), (45, 31), (17, 60), (5, 9)])
def test_the_result_has_the_picture_s_size(edit, picture, size):
    path, _ = picture(*size)
    drawn, settings, _ = edit(path)
    assert drawn.shape[1::-1] == size
    assert (settings["width"], settings["height"]) == size


def test_the_picture_and_what_it_is_shown_beside_decide(edit, picture):
    one, two = (picture(32, 32, f"{seed}.png", seed)[0] for seed in (0, 1))
    other, _ = picture(20, 45, "other.png", 2)
    drawn = [
        edit(one), edit(two), edit(one, "--reference", two), edit(one, "--reference", two, "--reference", other),
        edit(one, "--reference", two, "--layout", "index"), edit(one, "--reference", two, "--layout", "uxo"),
        edit(one, "--reference", two, "--strength", "1,0.3"), edit(one, "--strength", "0"),
    ]  # fmt: skip
    assert len({pixels.tobytes() for pixels, _, _ in drawn}) == len(drawn)


def test_the_less_is_denoised_the_more_of_the_picture_is_left(edit, picture):
    path, before = picture(32, 32)
    drawn = [edit(path, "--denoise", share) for share in ("0", "0.3", "1")]
    assert [settings["denoise"] for _, settings, _ in drawn] == [0, 0.3, 1]
    apart = [np.abs(pixels.astype(int) - drawn[0][0]).mean() for pixels, _, _ in drawn]
    assert 0 == apart[0] < apart[1] < apart[2]


def test_a_reference_of_no_strength_is_none(edit, picture):
    one, two = (picture(32, 32, f"{seed}.png", seed)[0] for seed in (0, 1))
    assert np.array_equal(edit(one)[0], edit(one, "--reference", two, "--strength", "1,0")[0])


def test_a_picture_beyond_the_budget_is_scaled_and_told_of_and_comes_back_at_its_size(edit, picture):
    path, _ = picture(60, 40)
    drawn, settings, said = edit(path, "--budget", "0.001")
    assert drawn.shape == (40, 60, 3)
    assert settings["drawn_size"] == [48, 32]
    text = "\n".join(said)
    assert "the reference (60x40) has more pixels than its budget of 1000: it is scaled to 38x25" in text
    assert "the result is scaled back to the picture's size, 60x40" in text


@pytest.mark.parametrize(("fit", "size"), [("crop", (32, 16)), ("pad", (45, 31))])
def test_it_is_fitted_as_asked(edit, picture, fit, size):
    path, _ = picture(45, 31)
    assert edit(path, "--fit", fit)[0].shape[1::-1] == size


def test_settings_and_record_name_every_picture(edit, picture, tmp_path):
    one, two = (picture(32, 32, f"{seed}.png", seed)[0] for seed in (0, 1))
    _, settings, _ = edit(one, "--reference", two, "--strength", "1,0.5", "--layout", "index", "--record")
    expected = {"command": "edit", "images": ["0.png", "1.png"], "fit": "pad", "layout": "index"}
    assert expected.items() <= settings.items()
    assert settings["inputs"] == [{"kind": "reference", "strength": 1.0}, {"kind": "reference", "strength": 0.5}]
    files = {file["role"]: file["sha256"] for file in json.loads((tmp_path / "a.json").read_text())["files"]}
    for role, path in (("image", one), ("reference", two)):
        assert files[role] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_that_was_not_trained_to_edit_is_told_of(edit, picture):
    path, _ = picture(32, 32)
    _, _, said = edit(path, kind="text")
    assert any(
        "was not trained to look at references; choose FLUX.1 Kontext (or kontext-mini)" in line for line in said
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--strength", "1,1"), "--strength has 2 numbers for 1 picture; give one for all"),
        (("--strength", "-1"), "the strength is -1"),
        (("--budget", "0"), "the budget is 0 megapixels"),
        (("--budget", "1", "--fit", "kontext"), "--fit kontext has sizes of its own"),
        (("--budget", "nan"), "the budget is nan megapixels"),
        (("--budget", "0.0001"), "a budget of 100 pixels does not hold one token"),
        (("--reference", "none.png"), "none.png was not found"),
        (("--layout", "pile"), "invalid choice: 'pile'"),
        (("--start", "0.4", "--end", "0.4"), "starts at 0.4 and ends at 0.4"),
    ],
)
def test_edits_that_cannot_be(guide, picture, tmp_path, words, says):
    path, _ = picture(32, 32)
    said = guide("kontext", "edit", path, "x", "--quiet", "--out", tmp_path / "a.png", *words)
    assert (said.code, said.out, len(said.err)) == (2, [], 1), said.err
    assert says in said.err[0]
    assert not (tmp_path / "a.png").exists()


def test_a_picture_that_is_none(guide, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    said = guide("kontext", "edit", tmp_path / "bad.png", "x", "--out", tmp_path / "a.png")
    assert (said.code, said.out) == (2, [])
    assert "bad.png cannot be read as a picture" in said.err[-1]
