"""The options of commands that a picture guides. Names are written out here, so that help needs no torch."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from .arguments import Commands, Group, add_shared, add_size, numbers

__all__ = [
    "ANCHORS", "CONTROL_FITS", "CONTROL_TYPES", "DEPTH_SCALES", "LAYOUTS", "REFERENCE_FITS", "ROUNDINGS",
    "STRENGTH_MODES", "VIEWS", "add_control", "add_edit", "add_fill", "add_outpaint", "add_redux",
]  # fmt: skip

ROUNDINGS = ("soft", "hidden", "binary")
ANCHORS = ("center", "left", "right", "top", "bottom")
CONTROL_TYPES = ("canny", "depth", "image")
CONTROL_FITS = ("stretch", "crop", "pad")
DEPTH_SCALES = ("minmax", "bfl")
VIEWS = ("stretch", "crop", "pad", "tiled")
STRENGTH_MODES = ("attention", "tokens")
REFERENCE_FITS = ("pad", "kontext", "crop")
LAYOUTS = ("offset", "index", "uxo")

HELP_WIDTH = 80
FILL_MODELS = "fill-mini, which is inside the pack and what mini is here, or the file of FLUX.1 Fill"
FILL_EXAMPLES = """\
examples:
  python -m flux fill room.png sofa-mask.png "a green velvet sofa" --out new-room.png
  python -m flux fill photo.png mask.png "" --grow 8 --blur 4 --out photo-without.png
  python -m flux fill photo.png mask.png "a lighthouse" --model flux1-fill-dev.safetensors --out a.png

Where the mask is black, the picture leaves as it came in, to the bit; so write PNG.
"""
OUTPAINT_EXAMPLES = """\
examples:
  python -m flux outpaint photo.png "a wide beach" --left 64 --right 64 --out wide.png
  python -m flux outpaint photo.png "a wide beach" --aspect 16:9 --feather 8 --out wide.png

The picture itself leaves as it came in, to the bit; so write PNG.
"""
CONTROL_EXAMPLES = """\
examples:
  python -m flux control photo.png "a house in the snow" --type canny --save-control edges.png --out a.png
  python -m flux control edges.png "a house in the snow" --type canny --ready --out a.png
  python -m flux control depth.png "a robot" --type depth --model flux1-depth-dev.safetensors --out a.png
  python -m flux control photo.png "a robot" --type depth --depth-model Depth-Anything-V2-Small-hf/ \\
      --model flux1-dev.safetensors --lora flux1-depth-dev-lora.safetensors --strength 0.8 --out a.png
"""
REDUX_EXAMPLES = """\
examples:
  python -m flux redux picture.png --count 3 --out variation.png
  python -m flux redux picture.png --prompt "a black background" --strength 0.6 --out a.png
  python -m flux redux one.png two.png --strength 1,0.4 --out both.png
  python -m flux redux photo.jpg --model flux1-dev.safetensors --redux flux1-redux-dev.safetensors \\
      --vision sigclip_vision_patch14_384.safetensors --fit tiled --out a.png
"""
EDIT_EXAMPLES = """\
examples:
  python -m flux edit picture.png "make the circle green" --out a.png
  python -m flux edit room.png "put the lamp on the table" --reference lamp.png --layout index --out a.png
  python -m flux edit photo.png "make it winter" --model flux1-kontext-dev.safetensors --out winter.png

The result has the picture's size, and nothing in it is shifted.
"""


def add_fill(commands: Commands) -> None:
    parser = _command(commands, "fill", "IMAGE MASK PROMPT", "paint a part of a picture anew",
        "Paint what a mask marks in a picture. What surrounds the mask is cut out, painted at the size that the model "
        "is used to, and stitched back.", FILL_EXAMPLES,
    )  # fmt: skip
    _add_image(parser, "the picture")
    parser.add_argument("mask", metavar="MASK", type=Path, help="a picture, white where IMAGE is painted anew")
    _add_prompt(parser, "what to paint there, or what the whole shows; may be empty")
    mask = parser.add_argument_group("mask")
    mask.add_argument("--invert", action="store_true", help="paint anew what is black in it")
    mask.add_argument("--fill-holes", action="store_true", help="paint anew also what it encloses")
    mask.add_argument("--grow", type=int, default=0, metavar="PIXELS", help="widen it; below 0 shrinks it (default: 0)")
    mask.add_argument(
        "--blur", type=float, default=0.0, metavar="PIXELS",
        help="how soft the seam is, all within the mask (default: 0)",
    )  # fmt: skip
    mask.add_argument(
        "--rounding", choices=ROUNDINGS, default=ROUNDINGS[0],
        help="how soft masks are shown to the model: as they are (Black Forest Labs), rounded for what is hidden "
        "(ComfyUI), or rounded throughout (diffusers) (default: soft)",
    )  # fmt: skip
    crop = parser.add_argument_group("crop")
    crop.add_argument(
        "--context", type=float, default=1.5, metavar="FACTOR",
        help="how much of the surroundings is cut out with the mask; 1 is tight (default: 1.5)",
    )  # fmt: skip
    crop.add_argument("--side", type=int, metavar="PIXELS", help="of the crop as it is painted (default: the model's)")
    crop.add_argument("--no-crop", action="store_true", help="paint the whole picture at its own size")
    crop.add_argument(
        "--colour-match", type=float, default=0.0, metavar="SHARE",
        help="how far what was painted is given the colours around the mask, 0 to 1 (default: 0)",
    )  # fmt: skip
    guide = parser.add_argument_group("guide")
    _add_strength(guide)
    _add_denoise(guide, "what is there already is changed")
    add_shared(parser, FILL_MODELS)


def add_outpaint(commands: Commands) -> None:
    parser = _command(commands, "outpaint", "IMAGE PROMPT", "make a picture larger and paint what is around it",
        "Make a picture larger, by sides or to an aspect, and paint what is new.", OUTPAINT_EXAMPLES,
    )  # fmt: skip
    _add_image(parser, "the picture")
    _add_prompt(parser, "what the larger picture shows; may be empty")
    sides = parser.add_argument_group("sides")
    for name in ("left", "right", "top", "bottom"):
        sides.add_argument(f"--{name}", type=int, default=0, metavar="PIXELS", help="to add there (default: 0)")
    sides.add_argument("--aspect", type=_aspect, metavar="W:H", help="to grow to, as 16:9, in place of pixels")
    sides.add_argument(
        "--anchor", choices=ANCHORS, default=ANCHORS[0], help="where the picture stands then (default: center)"
    )
    sides.add_argument(
        "--feather", type=int, default=0, metavar="PIXELS",
        help="how soft the seam is; nothing of it changes the picture itself (default: 0)",
    )  # fmt: skip
    _add_strength(parser.add_argument_group("guide"))
    add_shared(parser, FILL_MODELS)


def add_control(commands: Commands) -> None:
    parser = _command(commands, "control", "IMAGE PROMPT --type {canny,depth,image}",
        "follow the edges or the depth of a picture",
        "Draw a picture that follows the edges or the depth of another one.", CONTROL_EXAMPLES,
    )  # fmt: skip
    _add_image(
        parser,
        "canny: a photo, whose edges are found; depth: a depth picture, bright where near, or a photo with "
        "--depth-model; image: a control picture as it is",
    )
    _add_prompt(parser, "what to draw; may be empty")
    control = parser.add_argument_group("control")
    control.add_argument("--type", choices=CONTROL_TYPES, required=True, help="what is followed")
    control.add_argument("--ready", action="store_true", help="IMAGE is edges or depth already; nothing is looked for")
    control.add_argument("--low", type=float, help="of canny: the threshold where edges end (default: 50)")
    control.add_argument("--high", type=float, help="of canny: the threshold where edges begin (default: 200)")
    control.add_argument("--auto", action="store_true", help="of canny: thresholds from the picture itself")
    control.add_argument(
        "--depth-model", type=Path, metavar="FOLDER", help="a depth model in transformers' format, to look at a photo"
    )
    control.add_argument(
        "--depth-scale", choices=DEPTH_SCALES,
        help="of --depth-model: stretched to black and white, or as Black Forest Labs' (default: minmax)",
    )  # fmt: skip
    control.add_argument("--invert", action="store_true", help="the depth picture is bright where things are far")
    control.add_argument(
        "--fit", choices=CONTROL_FITS, default=CONTROL_FITS[0],
        help="of an IMAGE of another aspect than the result (default: stretch)",
    )  # fmt: skip
    control.add_argument("--save-control", type=Path, metavar="FILE", help="write what the model will see, too")
    control.add_argument(
        "--lora", metavar="FILE",
        help="a control LoRA, which makes a text-to-image model follow, by default with steps and guidance of the full "
        "model of that type (FLUX.1's: 50, and 30 for canny, 10 for depth); mini is the embedded one",
    )  # fmt: skip
    guide = parser.add_argument_group("guide")
    _add_strength(guide)
    _add_region(guide)
    add_size(parser.add_argument_group("size"), "IMAGE's")
    add_shared(
        parser,
        "canny-mini or depth-mini, which are inside the pack and of which mini is the one of that type, the file of "
        "FLUX.1 Canny or Depth, or with --lora that of FLUX.1 [dev]",
    )


def add_redux(commands: Commands) -> None:
    parser = _command(commands, "redux", "IMAGE [IMAGE ...]", "draw what pictures show, in other ways",
        "Draw pictures of what other pictures show: variations of one or of several, with or without a prompt.",
        REDUX_EXAMPLES,
    )  # fmt: skip
    parser.add_argument("image", metavar="IMAGE", nargs="+", type=Path, help="what to take over")
    parser.add_argument("--prompt", default="", help="what else to draw (default: nothing)")
    redux = parser.add_argument_group("redux")
    _add_strengths(redux, "how much is taken over, 0 to 2: one for all, or one for each IMAGE with commas (default: 1)")
    redux.add_argument(
        "--strength-mode", choices=STRENGTH_MODES, default=STRENGTH_MODES[0],
        help="what strength weighs: how much the pictures are looked at, or their tokens (default: attention)",
    )  # fmt: skip
    _add_times(redux)
    _add_region(redux)
    redux.add_argument("--mask", type=Path, metavar="FILE", help="white where IMAGE is taken over; of a single one")
    redux.add_argument(
        "--fit", choices=VIEWS, default=VIEWS[0],
        help="how a picture that is not square is seen; tiled sees all of it in squares (default: stretch)",
    )  # fmt: skip
    redux.add_argument(
        "--grid", type=int, metavar="N", help="average each picture to NxN tokens: fewer tell less of where things are"
    )
    redux.add_argument(
        "--tokens", type=int, metavar="N", help="merge each picture's most alike tokens until N are left"
    )
    redux.add_argument("--redux", type=Path, metavar="FILE", help="the Redux adapter (default: found as encoders are)")
    redux.add_argument("--vision", type=Path, metavar="FILE", help="its SigLIP vision tower (default: likewise)")
    add_size(parser.add_argument_group("size"))
    add_shared(
        parser,
        "redux-mini, which is inside the pack and what mini is here, or the file of a text-to-image model, as FLUX.1 "
        "[dev]",
    )


def add_edit(commands: Commands) -> None:
    parser = _command(commands, "edit", "IMAGE PROMPT", "change a picture by instruction",
        "Change a picture as a sentence says, with other pictures to look at or without.", EDIT_EXAMPLES,
    )  # fmt: skip
    _add_image(parser, "the picture")
    _add_prompt(parser, 'what to change, as "make the circle green"')
    references = parser.add_argument_group("references")
    references.add_argument(
        "--reference", metavar="IMAGE", type=Path, action="append", default=[],
        help="another picture to look at; may be given several times",
    )  # fmt: skip
    _add_strengths(
        references, "how much pictures are looked at, 0 to 2: one for all, or one for each with commas, IMAGE's first "
        "(default: 1)",
    )  # fmt: skip
    _add_times(references)
    _add_region(references)
    _add_denoise(references, "IMAGE is changed")
    references.add_argument(
        "--layout", choices=LAYOUTS, default=LAYOUTS[0], help="where several stand for the model (default: offset)"
    )
    references.add_argument(
        "--fit", choices=REFERENCE_FITS, default=REFERENCE_FITS[0],
        help="pad keeps every pixel where it is; kontext stretches to one of Black Forest Labs' sizes, crop cuts to "
        "the grid, and the result has that size (default: pad)",
    )  # fmt: skip
    references.add_argument(
        "--budget", type=float, metavar="MEGAPIXELS",
        help="a larger picture is scaled down for the model; not with --fit kontext (default: 1.05, or less for the "
        "embedded model)",
    )  # fmt: skip
    add_shared(parser, "kontext-mini, which is inside the pack and what mini is here, or the file of FLUX.1 Kontext")


def _command(
    commands: Commands, name: str, takes: str, says: str, description: str, examples: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=says,
        usage=f"python -m flux {name} {takes} [options]",
        description=textwrap.fill(f"{description} Paths of what was written go to stdout, one a line.", HELP_WIDTH),
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_image(parser: argparse.ArgumentParser, says: str) -> None:
    parser.add_argument("image", metavar="IMAGE", type=Path, help=says)


def _add_prompt(parser: argparse.ArgumentParser, says: str) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help=says)


def _add_strength(group: Group) -> None:
    group.add_argument(
        "--strength", type=float, default=1.0,
        help="0 to 2, 1 is what the model was trained for; others may take a second pass a step (default: 1)",
    )  # fmt: skip
    _add_times(group)


def _add_strengths(group: Group, says: str) -> None:
    group.add_argument("--strength", type=numbers, default=[1.0], metavar="S[,S...]", help=says)


def _add_times(group: Group) -> None:
    group.add_argument("--start", type=float, default=0.0, help="when it begins, as a fraction of the run (default: 0)")
    group.add_argument("--end", type=float, default=1.0, help="when it ends, likewise (default: 1)")


def _add_denoise(group: Group, says: str) -> None:
    group.add_argument(
        "--denoise", type=float, default=1.0, help=f"how much {says}, 0 to 1; 1 begins with noise alone (default: 1)"
    )


def _add_region(group: Group) -> None:
    group.add_argument("--region", type=Path, metavar="FILE", help="a mask, white where in the result it acts")


def _aspect(text: str) -> tuple[float, float]:
    width, colon, height = text.partition(":")
    try:
        return float(width), float(height) if colon else 1.0
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no aspect; give two numbers with a colon, as 16:9") from None
