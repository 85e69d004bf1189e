"""Pictures in files: PNG, JPEG and WebP, written whole or not at all, with the settings that made them as text.

PNG carries two texts: "parameters" in the words of AUTOMATIC1111's web UI, which galleries and other tools read, and
"fluxfoundry", every setting as JSON. JPEG and WebP carry the same in EXIF: UserComment and ImageDescription.

Arrays: (H, W, 3) with bytes when written, with fp32 in 0..1 when read; masks (H, W).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from .errors import FileError, MissingFileError, UserError
from .version import VERSION

__all__ = [
    "FORMATS", "Origin", "check_output", "origin_of", "parameters_text", "read_mask", "read_picture", "read_settings",
    "save_picture", "write_whole",
]  # fmt: skip

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 4},  # the default, 6, takes twice as long for 1 % less
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95, "method": 4},
}
WEBP_MAX_SIDE = 16_383  # the format's own limit

PARAMETERS_KEY, SETTINGS_KEY = "parameters", "fluxfoundry"
USER_COMMENT_CODE = b"UNICODE\0"  # EXIF 2.3: the first 8 bytes name the encoding
MAX_EXIF_BYTES = 65_000  # a JPEG segment takes 65,533

WORDS_OF_SETTINGS = (  # ours, and AUTOMATIC1111's word for it
    ("steps", "Steps"),
    ("solver", "Sampler"),
    ("schedule", "Schedule type"),
    ("cfg", "CFG scale"),
    ("guidance", "Distilled CFG Scale"),
    ("seed", "Seed"),
    ("size", "Size"),
    ("model", "Model"),
    ("denoise", "Denoising strength"),
)
BYTE_MAX, SHORT_MAX = 255, 65_535
RGB_PROFILE, RGB_PROFILE_PLACE = b"RGB ", slice(16, 20)  # ICC.1:2022, 7.2.6: what numbers a profile is for
RAW_SHORTS = ";16"  # in Pillow's word for how a file holds its numbers
DEEP_FORMATS = ("PNG", "TIFF")  # in which that word means 16 bits a channel; in BMP it means 16 a pixel
DEEP_MODES = ("I", "F")
OPAQUE = 255
WHITE, BLACK = (255, 255, 255, 255), (0, 0, 0, 255)


def check_output(path: Path) -> None:
    """Refuse, before any work is done, a path that a picture cannot be written to. Creates nothing.

    Raises:
        UserError: The suffix is no picture format's, the path is a folder, or its folder cannot be written to.
    """
    if path.suffix.lower() not in FORMATS:
        shown = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise UserError(f"{path} has {shown}; name a picture that ends in {', '.join(FORMATS)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it")
    folder = next((parent for parent in path.absolute().parents if parent.exists()), Path.cwd())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{path} cannot be written, because {folder} does not take files ({error.strerror}); choose another place"
        ) from error


def save_picture(
    path: Path, pixels: NDArray[np.uint8], settings: Mapping[str, object], profile: bytes | None = None
) -> None:
    """Write a picture with its settings; the folder is made, an older file of that name is replaced.

    Args:
        path: Its suffix is one of ``FORMATS``.
        pixels: (H, W, 3).
        settings: Plain values.
        profile: ICC profile of the pixels; None for none, which is taken for sRGB.

    Raises:
        UserError: The path cannot be written to.
    """
    file_format = FORMATS.get(path.suffix.lower())
    if file_format is None:
        check_output(path)
    if file_format == "WEBP" and max(pixels.shape[:2]) > WEBP_MAX_SIDE:
        raise UserError(f"{path}: WebP takes at most {WEBP_MAX_SIDE} pixels a side; choose PNG")
    options = dict(SAVE_OPTIONS[str(file_format)])
    if file_format == "PNG":
        options["pnginfo"] = _png_texts(settings)
    else:
        options["exif"] = _exif(settings)
    if profile is not None:
        options["icc_profile"] = profile
    image = Image.fromarray(np.ascontiguousarray(pixels))
    write_whole(path, lambda file: image.save(file, format=file_format, **options))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that at its name there is the old one or the whole new one, never a part.

    Args:
        path: Its folder is made when it is not there.
        write: Given a file to write to.

    Raises:
        UserError: The path cannot be written to.
    """
    part = path.parent / f".{secrets.token_hex(PART_BYTES)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            write(file)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


PART_BYTES = 8  # of chance in the name of a file that is not whole yet


def read_picture(path: Path, ground: tuple[int, int, int, int] = WHITE) -> NDArray[np.float32]:
    """A picture (H, W, 3) in 0..1, upright, its first frame, on ``ground`` where it is transparent.

    Raises:
        UserError: There is no such file, or it is no picture.
    """
    image = _open(path)
    if image.mode.startswith("I"):  # 16 bits a pixel, grey
        return np.repeat(_unit(image, SHORT_MAX)[..., None], 3, axis=2)
    flat = Image.alpha_composite(Image.new("RGBA", image.size, ground), image.convert("RGBA"))
    return _unit(flat.convert("RGB"), BYTE_MAX)


def read_mask(path: Path) -> NDArray[np.float32]:
    """A mask (H, W) in 0..1 from a picture's brightness: white is 1; transparent counts as black.

    Raises:
        UserError: There is no such file, or it is no picture.
    """
    image = _open(path)
    if image.mode.startswith("I"):
        return _unit(image, SHORT_MAX)
    flat = Image.alpha_composite(Image.new("RGBA", image.size, BLACK), image.convert("RGBA"))
    return _unit(flat.convert("L"), BYTE_MAX)


@dataclass(frozen=True)
class Origin:
    """What a picture's file has and ``read_picture``'s numbers have not.

    Attributes:
        name: The file's.
        profile: Its ICC profile, where that is for RGB.
        transparent: Whether anything in it is.
        deep: Whether it has more than 8 bits a channel.
        other_profile: Whether it has an ICC profile for other than RGB.
    """

    name: str
    profile: bytes | None = None
    transparent: bool = False
    deep: bool = False
    other_profile: bool = False

    @property
    def losses(self) -> list[str]:
        """A sentence for everything that a picture written with ``profile`` lacks."""
        told = (
            (self.transparent, f"{self.name} is transparent in places: it is laid on white, and the result is not"),
            (self.deep, f"{self.name} has more than 8 bits a channel, and the result has 8"),
            (self.other_profile, f"the colour profile of {self.name} is left out, for it is not for RGB"),
        )
        return [sentence for true, sentence in told if true]


def origin_of(path: Path) -> Origin:
    """What a picture's numbers leave out.

    Raises:
        UserError: There is no such file, or it is no picture.
    """
    image = _open(path)
    with Image.open(path) as unread:  # only before it is read does it tell how the file holds its numbers
        deep = unread.mode.startswith(DEEP_MODES) or (unread.format in DEEP_FORMATS and RAW_SHORTS in _raw_mode(unread))
    profile = image.info.get("icc_profile") or None
    for_rgb = profile is not None and profile[RGB_PROFILE_PLACE] == RGB_PROFILE
    return Origin(
        name=path.name,
        profile=profile if for_rgb else None,
        transparent=not image.mode.startswith(DEEP_MODES) and _least_alpha(image) < OPAQUE,
        deep=deep,
        other_profile=profile is not None and not for_rgb,
    )


def _raw_mode(unread: Image.Image) -> str:
    """Pillow's word for how a file holds its numbers, as "RGB;16B"."""
    tiles = getattr(unread, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _least_alpha(image: Image.Image) -> int:
    extrema: Any = image.convert("RGBA").getchannel("A").getextrema()
    return int(extrema[0])


def _unit(image: Image.Image, top: int) -> NDArray[np.float32]:
    """An image's numbers in 0..1, where ``top`` is 1."""
    numbers: NDArray[np.float32] = np.asarray(image).astype(np.float32)
    numbers /= top
    return numbers.clip(0, 1)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that ``save_picture`` put into a file; empty when there are none."""
    image = _open(path)
    text = image.info.get(SETTINGS_KEY) or image.getexif().get(ExifTags.Base.ImageDescription)
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise MissingFileError(f"the picture {path} was not found; check the name and the folder")
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FileError(f"{path} cannot be read as a picture ({error}); choose a PNG, JPEG or WebP file") from error
    upright.info.update({key: value for key, value in image.info.items() if key == SETTINGS_KEY})
    return upright


def parameters_text(settings: Mapping[str, object]) -> str:
    """Settings in the form that AUTOMATIC1111's web UI writes: prompt, negative prompt, and a line of the rest."""
    facts = dict(settings)
    if "width" in facts and "height" in facts:
        facts["size"] = f"{facts['width']}x{facts['height']}"
    pairs = [f"{word}: {facts[ours]}" for ours, word in WORDS_OF_SETTINGS if facts.get(ours) is not None]
    lines = [str(facts.get("prompt", ""))]
    if facts.get("negative"):
        lines.append(f"Negative prompt: {facts['negative']}")
    lines.append(", ".join([*pairs, f"Version: FLUX Foundry {VERSION}"]))
    return "\n".join(lines)


def _png_texts(settings: Mapping[str, object]) -> PngImagePlugin.PngInfo:
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt(PARAMETERS_KEY, parameters_text(settings))
    texts.add_text(SETTINGS_KEY, json.dumps(settings))  # json escapes what is not ASCII, which a plain text chunk needs
    return texts


def _exif(settings: Mapping[str, object]) -> bytes:
    """As much of the settings as EXIF has room for: all, else without the list of sigmas, else without the prompt."""
    without_sigmas = {key: value for key, value in settings.items() if key != "sigmas"}
    without_texts = {k: v for k, v in without_sigmas.items() if k not in ("prompt", "negative", "clip_prompt")}
    for kept in (settings, without_sigmas, without_texts):
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = json.dumps(kept)
        exif[ExifTags.Base.Software] = f"FLUX Foundry {VERSION}"
        comment = USER_COMMENT_CODE + parameters_text(kept).encode("utf-16-be", "surrogatepass")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
        packed = exif.tobytes()
        if len(packed) <= MAX_EXIF_BYTES:
            break
    return packed
