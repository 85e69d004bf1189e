"""``fill`` and ``outpaint``: what is new is painted, and everything else has the bytes that it had."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image, ImageCms

from flux.images import read_settings


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize(
    ("size", "box", "words"),
    [
        ((67, 45), (30, 10, 41, 22), ()),
        ((67, 45), (0, 0, 9, 9), ("--grow", "3", "--blur", "2")),
        ((150, 300), (20, 200, 90, 260), ("--context", "2", "--side", "64", "--rounding", "binary")),
        ((40, 40), (10, 10, 20, 20), ("--no-crop", "--colour-match", "1")),
        ((33, 31), (5, 5, 30, 30), ("--strength", "0.5", "--end", "0.6")),
    ],
)
def test_only_what_the_mask_marks_is_painted(guide, picture, mask, tmp_path, size, box, words):
    path, before = picture(*size)
    hole = mask(*size, box)
    said = guide("fill", "fill", path, hole, "a red circle", "--out", tmp_path / "a.png", *words)
    assert (said.code, said.out) == (0, [str(tmp_path / "a.png")]), said.err
    after, inside = pixels(tmp_path / "a.png"), pixels(hole) > 0
    grown = 3 if "--grow" in words else 0
    rows, columns = (slice(max(0, low - grown), high + grown) for low, high in ((box[1], box[3]), (box[0], box[2])))
    kept = np.ones_like(inside)
    kept[rows, columns] = False
    assert after.shape == before.shape
    assert np.array_equal(after[kept], before[kept])
    assert np.mean(np.abs(after[inside].astype(int) - before[inside])) > 10


def test_inverted_the_rest_is_painted(guide, picture, mask, tmp_path):
    path, before = picture(48, 48)
    hole = mask(48, 48, (8, 8, 40, 40))
    assert guide("fill", "fill", path, hole, "x", "--invert", "--out", tmp_path / "a.png").code == 0
    after, inside = pixels(tmp_path / "a.png"), pixels(hole) > 0
    assert np.array_equal(after[inside], before[inside])
    assert not np.array_equal(after[~inside], before[~inside])


def test_the_less_is_denoised_the_more_is_left_of_what_was_there(guide, picture, mask, tmp_path):
    path, _ = picture(48, 48)
    hole, drawn = mask(48, 48, (8, 8, 40, 40)), []
    for share in ("0", "0.3", "1"):
        out = tmp_path / f"{share}.png"
        assert guide("fill", "fill", path, hole, "x", "--no-crop", "--denoise", share, "--out", out).code == 0
        drawn.append(pixels(out).astype(int))
    apart = [np.abs(one - drawn[0]).mean() for one in drawn]
    assert 0 == apart[0] < apart[1] < apart[2]
    assert read_settings(tmp_path / "0.3.png")["denoise"] == 0.3


def test_settings_tell_what_was_painted_and_the_record_names_every_file(guide, guided, picture, mask, tmp_path):
    path, _ = picture(64, 40)
    hole = mask(64, 40, (30, 10, 41, 22))
    said = guide(
        "fill", "fill", path, hole, "a star", "--blur", "1", "--record", "--count", "2", "--out", tmp_path / "a.png"
    )
    assert said.out == [str(tmp_path / name) for name in ("a-1.png", "a-2.png", "a.json")]
    settings = read_settings(tmp_path / "a-2.png")
    expected = {
        "prompt": "a star", "command": "fill", "image": "picture.png", "mask": "mask.png", "blur": 1.0, "grow": 0,
        "rounding": "soft", "width": 64, "height": 40, "seed": 6, "model_file": "tiny-fill.safetensors",
    }  # fmt: skip
    assert expected.items() <= settings.items()
    assert settings["inputs"] == [{"kind": "fill", "strength": 1.0}]
    left, top, width, height = settings["crop"]
    assert left <= 30 < 41 <= left + width
    assert top <= 10 < 22 <= top + height
    files = {file["role"]: file["sha256"] for file in json.loads((tmp_path / "a.json").read_text())["files"]}
    for role, file in {"image": path, "mask": hole, "transformer": guided.models["fill"]}.items():
        assert files[role] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_masks_that_look_like_mistakes_are_told_of(guide, picture, mask, tmp_path):
    path, _ = picture(48, 48)
    ring = np.full((48, 48), 255, np.uint8)
    ring[18:30, 18:30] = 0
    Image.fromarray(ring).save(tmp_path / "ring.png")
    cases = {
        mask(48, 48, (0, 0, 48, 48), "all.png"): "covers the whole picture",
        mask(24, 48, (4, 4, 20, 40), "other.png"): "is of another size than the picture",
        tmp_path / "ring.png": "invert the mask",
    }
    for hole, words in cases.items():
        said = guide("fill", "fill", path, hole, "x", "--out", tmp_path / "a.png", "--record")
        assert said.code == 0
        assert any(words in line for line in said.err), said.err
        assert any(words in line for line in json.loads((tmp_path / "a.json").read_text())["notes"])


def test_a_format_that_changes_what_was_kept_is_told_of(guide, picture, mask, tmp_path):
    path, _ = picture(32, 32)
    said = guide("fill", "fill", path, mask(32, 32, (8, 8, 16, 16)), "x", "--out", tmp_path / "a.jpg")
    assert "note: a.jpg changes what was to be kept a little; a .png keeps it to the bit" in said.err


@pytest.mark.parametrize(
    ("words", "size", "place"),
    [
        (("--left", "20"), (60, 31), (0, 20)),
        (("--right", "16", "--bottom", "17", "--feather", "4"), (56, 48), (0, 0)),
        (("--aspect", "2:1"), (62, 31), (0, 11)),
        (("--aspect", "1:2", "--anchor", "bottom"), (40, 80), (49, 0)),
    ],
)
def test_a_picture_grows_and_keeps_its_bytes(guide, picture, tmp_path, words, size, place):
    path, before = picture(40, 31)
    said = guide("fill", "outpaint", path, "a beach", "--out", tmp_path / "a.png", *words)
    assert said.code == 0, said.err
    after = pixels(tmp_path / "a.png")
    top, left = place
    assert after.shape[1::-1] == size
    assert np.array_equal(after[top : top + 31, left : left + 40], before)
    settings = read_settings(tmp_path / "a.png")
    assert (settings["width"], settings["height"]) == size
    assert settings["command"] == "outpaint"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "no side is to grow"),
        (("--left", "-5"), "-5 pixels are to be added at the left"),
        (("--left", "16", "--aspect", "16:9"), "--aspect and pixels for sides were given"),
        (("--aspect", "wide"), "'wide' is no aspect; give two numbers with a colon, as 16:9"),
        (("--aspect", "0:9"), "the aspect is 0:9"),
        (("--aspect", "40:31"), "there is nothing to add"),
        (("--left", "16", "--feather", "400"), "a feather of 400 pixels does not fit"),
        (("--left", "20000"), "the canvas would be"),
        (("--left", "16", "--strength", "3"), "the strength is 3; give a number from 0 to 2"),
    ],
)
def test_growing_that_cannot_be(guide, picture, tmp_path, words, says):
    path, _ = picture(40, 31)
    said = guide("fill", "outpaint", path, "x", "--quiet", "--out", tmp_path / "a.png", *words)
    assert (said.code, said.out, len(said.err)) == (2, [], 1), said.err
    assert says in said.err[0]
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--grow", "9999"), "the mask is to grow by 9999 pixels"),
        (("--grow", "-20"), "nothing is left of the mask"),
        (("--blur", "-1"), "the mask's blur is -1 pixels"),
        (("--context", "0.5"), "the context factor is 0.5"),
        (("--side", "4"), "the crop's side is 4 pixels"),
        (("--side", "64", "--no-crop"), "--side is of a crop"),
        (("--colour-match", "2"), "--colour-match is 2; give a number from 0 to 1"),
        (("--rounding", "hard"), "invalid choice: 'hard'"),
        (("--strength", "-0.1"), "the strength is -0.1"),
        (("--start", "0.5", "--end", "0.5"), "starts at 0.5 and ends at 0.5"),
    ],
)
def test_filling_that_cannot_be(guide, picture, mask, tmp_path, words, says):
    path, _ = picture(40, 40)
    hole = mask(40, 40, (10, 10, 20, 20))
    said = guide("fill", "fill", path, hole, "x", "--quiet", "--out", tmp_path / "a.png", *words)
    assert (said.code, said.out, len(said.err)) == (2, [], 1), said.err
    assert says in said.err[0]
    assert not (tmp_path / "a.png").exists()


def test_an_empty_mask_and_pictures_that_are_not_there(guide, picture, mask, tmp_path):
    path, _ = picture(40, 40)
    cases = [
        ((path, mask(40, 40, (0, 0, 0, 0))), "the mask is empty, so there is nothing to repaint"),
        ((path, tmp_path / "none.png"), "none.png was not found; check the name and the folder"),
        ((tmp_path / "none.png", path), "none.png was not found"),
    ]
    for words, says in cases:
        said = guide("fill", "fill", *words, "x", "--out", tmp_path / "a.png")
        assert (said.code, said.out) == (2, [])
        assert says in said.err[-1]


@pytest.mark.parametrize("command", ["fill", "outpaint"])
def test_the_profile_stays_and_what_is_lost_of_a_picture_is_told(guide, mask, tmp_path, command):
    path, out = tmp_path / "photo.png", tmp_path / "a.png"
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(levels).save(path, icc_profile=profile)
    words = (mask(32, 32, (0, 0, 16, 32)), "x") if command == "fill" else ("x", "--right", "16")
    said = guide("fill", command, path, *words, "--out", out)
    assert said.code == 0, said.err
    assert Image.open(out).info["icc_profile"] == profile
    assert [line for line in said.err if "photo.png" in line] == [
        "note: photo.png is transparent in places: it is laid on white, and the result is not"
    ]
    on_white = Image.alpha_composite(Image.new("RGBA", (32, 32), "white"), Image.fromarray(levels))
    kept = slice(16, 32) if command == "fill" else slice(0, 32)
    assert np.array_equal(pixels(out)[:, kept], np.asarray(on_white)[:, kept, :3])


@pytest.mark.parametrize("share", ["2", "-0.1", "nan"])
def test_a_share_that_is_none_is_refused(guide, picture, mask, tmp_path, share):
    path, hole = picture(48, 48)[0], mask(48, 48, (8, 8, 40, 40))
    said = guide("fill", "fill", path, hole, "x", f"--denoise={share}", "--out", tmp_path / "a.png")
    assert said.code != 0
    assert any(f"Denoise is {float(share)}" in line for line in said.err)
    assert not (tmp_path / "a.png").exists()
