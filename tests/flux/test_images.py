"""Pictures are written whole or not at all, and say what made them."""

from __future__ import annotations

import json
import os
import stat
import struct

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from flux.errors import FileError, MissingFileError, UserError
from flux.images import (
    FORMATS,
    check_output,
    origin_of,
    parameters_text,
    read_mask,
    read_picture,
    read_settings,
    save_picture,
    write_whole,
)

SETTINGS = {
    "prompt": 'a red circle, the word "ÄÖ☂" — 日本',
    "negative": "blue",
    "model": "flux1-mini",
    "width": 32,
    "height": 16,
    "steps": 4,
    "cfg": 3.0,
    "guidance": None,
    "seed": 2**64 - 1,
    "solver": "euler",
    "schedule": "flux",
    "denoise": 1.0,
    "sigmas": [1.0, 0.5, 0.0],
}
SUFFIXES = sorted(FORMATS)


def gradient():
    rows, columns = np.mgrid[0:16, 0:32]
    return np.stack((rows * 8, columns * 8, rows + columns), axis=-1).astype(np.uint8)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_comes_back_with_its_settings(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    save_picture(path, gradient(), SETTINGS)
    assert read_settings(path) == SETTINGS
    difference = np.abs(read_picture(path) * 255 - gradient())
    assert difference.max() <= (0 if suffix == ".png" else 24)
    assert Image.open(path).format == FORMATS[suffix]


def test_upper_case_suffixes_are_formats_too(tmp_path):
    save_picture(tmp_path / "a.PNG", gradient(), SETTINGS)
    assert Image.open(tmp_path / "a.PNG").format == "PNG"


def test_png_carries_the_words_that_other_tools_read(tmp_path):
    save_picture(tmp_path / "a.png", gradient(), SETTINGS)
    texts = Image.open(tmp_path / "a.png").info
    assert json.loads(texts["fluxfoundry"]) == SETTINGS
    lines = texts["parameters"].split("\n")
    assert lines[0] == SETTINGS["prompt"]
    assert lines[1] == "Negative prompt: blue"
    assert lines[2].startswith(
        "Steps: 4, Sampler: euler, Schedule type: flux, CFG scale: 3.0, Seed: 18446744073709551615, "
    )
    assert "Size: 32x16, Model: flux1-mini" in lines[2]


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_jpeg_and_webp_carry_them_as_exif_user_comment(tmp_path, suffix):
    save_picture(tmp_path / f"a{suffix}", gradient(), SETTINGS)
    comment = Image.open(tmp_path / f"a{suffix}").getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == parameters_text(SETTINGS)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_settings_too_long_for_a_format_lose_their_longest_part_and_not_the_picture(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    save_picture(path, gradient(), SETTINGS | {"sigmas": [0.123456] * 10_000})
    assert read_settings(path)["prompt"] == SETTINGS["prompt"]
    save_picture(path, gradient(), SETTINGS | {"prompt": "long " * 30_000})
    assert read_settings(path)["seed"] == SETTINGS["seed"]


def test_the_folder_is_made_and_an_older_file_replaced(tmp_path):
    path = tmp_path / "deep" / "er" / "a.png"
    save_picture(path, gradient(), SETTINGS)
    save_picture(path, 255 - gradient(), SETTINGS)
    assert np.array_equal(np.asarray(Image.open(path)), 255 - gradient())
    assert os.listdir(path.parent) == ["a.png"]


def test_a_picture_has_the_rights_of_any_new_file(tmp_path):
    save_picture(tmp_path / "a.png", gradient(), SETTINGS)
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(os.stat(tmp_path / "a.png").st_mode) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_what_stops_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, stop):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def half(file):
        file.write(b"half a pict")
        raise stop

    with pytest.raises(stop):
        write_whole(path, half)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path):
    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"a\.png cannot be written: No space left on device"):
        write_whole(tmp_path / "a.png", full)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.gif", "the suffix '.gif'; name a picture that ends in .png, .jpg, .jpeg, .webp"),
        ("a", "no suffix"),
        ("folder.png", "is a folder"),
        ("file/a.png", "does not take files"),
    ],
)
def test_an_output_that_cannot_be_is_refused_ahead(tmp_path, name, words):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        check_output(tmp_path / name)
    assert words in str(caught.value)


def test_checking_an_output_makes_nothing(tmp_path):
    check_output(tmp_path / "not" / "there" / "a.png")
    assert os.listdir(tmp_path) == []


def test_a_side_beyond_webp_is_refused(tmp_path):
    with pytest.raises(UserError, match="choose PNG"):
        save_picture(tmp_path / "a.webp", np.zeros((1, 20_000, 3), np.uint8), SETTINGS)
    assert os.listdir(tmp_path) == []


def test_transparent_is_white_in_pictures_and_black_in_masks(tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 255, 0, 0))
    image.save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").tolist() == [[[1, 0, 0], [1, 1, 1]]]
    assert read_mask(tmp_path / "a.png")[0].tolist() == pytest.approx([76 / 255, 0])


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "YCbCr", "I;16", "RGBA"])
def test_every_mode_is_read_as_three_channels(tmp_path, mode):
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    white = 65_535 if mode == "I;16" else 255
    image = (
        Image.new(mode, (3, 2), white)
        if mode in ("L", "I;16", "1")
        else Image.new("RGB", (3, 2), "white").convert(mode)
    )
    image.save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read_picture(tmp_path / f"a.{suffix}"), np.ones((2, 3, 3), np.float32))
    assert np.array_equal(read_mask(tmp_path / f"a.{suffix}"), np.ones((2, 3), np.float32))


def test_a_photo_is_turned_upright(tmp_path):
    image, exif = Image.fromarray(gradient()), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # lies on its left side
    image.save(tmp_path / "a.png", exif=exif)
    assert read_picture(tmp_path / "a.png").shape == (32, 16, 3)


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(FileError, match=r"a\.png cannot be read as a picture"):
        read_picture(tmp_path / "a.png")
    save_picture(tmp_path / "b.png", gradient(), {})
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match=r"b\.png cannot be read as a picture"):
        read_picture(tmp_path / "b.png")
    with pytest.raises(MissingFileError, match="was not found"):
        read_picture(tmp_path / "c.png")


def test_a_picture_of_another_program_has_no_settings(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    assert read_settings(tmp_path / "a.png") == {}


def profile_of(space):
    """An ICC profile; of a space that Pillow makes none for, only its header says that it is for that."""
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return made[:16] + space + made[20:]


def write_shorts(path, channels):
    """A PNG of 16 bits a channel, which OpenCV writes and Pillow does not."""
    pixels = np.random.default_rng(0).integers(0, 65_536, (4, 5, channels), dtype=np.uint16)
    assert cv2.imwrite(str(path), pixels)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_profile_that_is_given_is_in_the_file_and_without_one_there_is_none(tmp_path, suffix):
    path, profile = tmp_path / f"a{suffix}", profile_of(b"RGB ")
    save_picture(path, gradient(), SETTINGS, profile)
    assert Image.open(path).info["icc_profile"] == profile == origin_of(path).profile
    assert read_settings(path) == SETTINGS
    save_picture(path, gradient(), SETTINGS)
    assert "icc_profile" not in Image.open(path).info
    assert origin_of(path).profile is None


def test_a_profile_for_other_numbers_than_the_results_is_left_out_and_told_of(tmp_path):
    path = tmp_path / "grey.png"
    Image.new("L", (4, 4), 99).save(path, icc_profile=profile_of(b"GRAY"))
    assert origin_of(path).profile is None
    assert origin_of(path).losses == ["the colour profile of grey.png is left out, for it is not for RGB"]


@pytest.mark.parametrize(("mode", "colour", "lost"), [
    ("RGB", (1, 2, 3), False), ("L", 9, False), ("RGBA", (1, 2, 3, 255), False), ("RGBA", (1, 2, 3, 254), True),
    ("LA", (9, 0), True), ("LA", (9, 255), False),
])  # fmt: skip
def test_transparency_is_told_of_where_there_is_some(tmp_path, mode, colour, lost):
    path = tmp_path / "a.png"
    Image.new(mode, (4, 4), colour).save(path)
    told = ["a.png is transparent in places: it is laid on white, and the result is not"]
    assert origin_of(path).losses == (told if lost else [])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_a_channel_are_told_of(tmp_path, channels):
    write_shorts(tmp_path / "a.png", channels)
    assert "a.png has more than 8 bits a channel, and the result has 8" in origin_of(tmp_path / "a.png").losses
    assert origin_of(tmp_path / "a.png").transparent == (channels == 4)


def test_16_bits_a_pixel_are_no_16_bits_a_channel(tmp_path):
    """A BMP of 5, 6 and 5 bits."""
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 70, 0, 0, 66, 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    (tmp_path / "a.bmp").write_bytes(header + struct.pack("<IIIHH", 0xF800, 0x07E0, 0x001F, 0xF800, 0x001F))
    assert read_picture(tmp_path / "a.bmp").tolist() == [[[1, 0, 0], [0, 0, 1]]]
    assert origin_of(tmp_path / "a.bmp").losses == []
