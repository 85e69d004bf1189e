"""The commands' options. Names of solvers and noises are written out here, so that help needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Protocol

__all__ = [
    "ATTENTIONS",
    "DEVICES",
    "DTYPES",
    "NOISES",
    "SCHEDULERS",
    "SOLVERS",
    "Commands",
    "Group",
    "add_convert",
    "add_demo",
    "add_generate",
    "add_inspect",
    "add_models",
    "add_plan",
    "add_prompts",
    "add_shared",
    "add_size",
    "numbers",
]

SOLVERS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_snr")
SCHEDULERS = ("flux", "simple", "beta", "linear")
NOISES = ("comfyui", "bfl", "diffusers")
DTYPES = ("auto", "fp32", "bf16", "fp16")
ATTENTIONS = ("auto", "fast", "sdpa", "cudnn", "flash", "efficient", "math", "flash-attn", "sage")
FORMATS = (
    "fp32", "bf16", "fp16", "fp8", "fp8-row", "mxfp8", "nvfp4", "int8", "int8-row", "nf4",
    "gguf:F32", "gguf:BF16", "gguf:F16", "gguf:Q8_0", "gguf:Q6_K", "gguf:Q5_K", "gguf:Q4_K", "gguf:Q3_K", "gguf:Q2_K",
    "gguf:Q5_1", "gguf:Q5_0", "gguf:Q4_1", "gguf:Q4_0", "gguf:IQ4_NL",
)  # fmt: skip
LAYOUTS = ("bfl", "diffusers")
PARTS = ("transformer", "autoencoder", "clip", "t5")
POLICIES = "auto, keep (all weights stay), balance (half are streamed), save (all are), or GiB that a stage may take"
DEVICES = "auto, cpu, cuda, cuda:0, cuda:1 ..."

EXAMPLES = """\
examples:
  python -m flux generate "a red circle on the left and a blue square on the right" --seed 7 --out a.png
  python -m flux generate "a green star" --model mini-schnell --count 3 --out stars/star.webp
  python -m flux generate "a cat" --model flux1-dev.safetensors --clip clip_l.safetensors \\
      --t5 t5xxl_fp16.safetensors --vae ae.safetensors --tokenizers tokenizers/
"""


CONVERT_EXAMPLES = """\
examples:
  python -m flux convert flux1-dev.safetensors flux1-dev-fp8.safetensors --to fp8
  python -m flux convert flux1-dev.safetensors flux1-dev-Q4_K.gguf --to gguf:Q4_K
  python -m flux convert FLUX.1-dev/transformer flux1-dev.safetensors --to bfl
  python -m flux convert flux1-dev.safetensors FLUX.1-dev/transformer --to diffusers
"""


PLAN_EXAMPLES = """\
examples:
  python -m flux plan flux1-dev --width 1024 --height 1024
  python -m flux plan flux1-dev --device cuda --memory 12 --policy auto
  python -m flux plan flux1-dev-Q4_K.gguf t5xxl_fp8_e4m3fn.safetensors --policy 6 --json
"""


class Commands(Protocol):
    """What ``add_subparsers`` gives."""

    def add_parser(self, name: str, **kwargs: Any) -> argparse.ArgumentParser: ...


def add_generate(commands: Commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="draw pictures from a prompt",
        description="Draw pictures from a prompt. Paths of what was written go to stdout, one a line.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw; may be empty")
    add_size(parser.add_argument_group("size"))
    add_shared(parser, "mini or mini-schnell, which are inside the pack, or a transformer's .safetensors or .gguf file")
    _add_start(parser.add_argument_group("starting from a picture"))


def add_shared(parser: argparse.ArgumentParser, models: str) -> None:
    """The options of every command that draws; ``models`` says which models it takes."""
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no notes")
    _add_model(parser.add_argument_group("model"), models)
    _add_output(parser.add_argument_group("output"))
    _add_picture(parser.add_argument_group("picture"))
    _add_sampling(parser.add_argument_group("sampling"))


def add_inspect(commands: Commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="say what model files are",
        description="Say what model files are from their headers alone; no tensor is read. One file is told in full, "
        "several in a table.",
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", type=Path,
        help="a .safetensors or .gguf file, the .index.json of a model in several files, or a folder of models",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="a JSON list in place of text")


def add_convert(commands: Commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a model in another format or layout",
        description="Write a model in another format or layout, tensor by tensor: memory for a few times its largest "
        "tensor is enough.",
        epilog=CONVERT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="what `inspect` takes")
    parser.add_argument(
        "target",
        metavar="DST",
        type=Path,
        help="the new file: .gguf for GGUF, else .safetensors; for diffusers' layout also a folder, which gets a "
        "config.json",
    )
    parser.add_argument(
        "--to", required=True, metavar="FORMAT[,LAYOUT]",
        help=f"a format ({', '.join(FORMATS)}), a layout ({', '.join(LAYOUTS)}), or both with a comma between; a "
        "layout alone keeps what tensors are stored in, where it can",
    )  # fmt: skip
    parser.add_argument("--part", choices=PARTS, help="of an all-in-one file (default: the transformer if it has one)")
    parser.add_argument("--variant", metavar="NAME", help="what the transformer is, where its tensors cannot tell")
    parser.add_argument("--replace", action="store_true", help="replace DST if it is there")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no notes")


def add_models(commands: Commands) -> None:
    parser = commands.add_parser(
        "models",
        help="list the known models and what each needs",
        description="List the known models, their defaults, and the files that each needs.",
    )
    parser.add_argument("--json", action="store_true", help="JSON in place of a table")


def add_plan(commands: Commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="say what a run will take, stage by stage, before it begins",
        description="Say what a run will take, stage by stage: weights that stay and that are streamed, activations, "
        "the peak, and seconds. Only headers are read; a known model needs no file at all.",
        epilog=PLAN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models", metavar="NAME|FILE", nargs="+",
        help="a known model (`models` lists them), or files: a transformer, and what goes with it; what is not "
        "given is planned as it is released, in bf16",
    )  # fmt: skip
    parser.add_argument("--width", type=int, metavar="PIXELS", help="default: the model's own size")
    parser.add_argument("--height", type=int, metavar="PIXELS")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures at once (default: 1)")
    parser.add_argument(
        "--count", type=int, default=1, metavar="N",
        help="pictures one after the other, as `generate --count` draws them: the transformer stays where it has room",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, metavar="N", help="default: the model's own number")
    parser.add_argument("--negative", action="store_true", help="with a negative prompt: two passes a step")
    parser.add_argument(
        "--reference", action="append", default=[], metavar="WxH",
        help="a picture of this size that the model looks at; may be repeated",
    )  # fmt: skip
    parser.add_argument("--redux", type=int, default=0, metavar="N", help="pictures that Redux takes over (default: 0)")
    parser.add_argument(
        "--beside", action="append", default=[], metavar="NAME|FILE",
        help="what the run has beside its transformer: a control LoRA, or a control model of its own; may be repeated",
    )  # fmt: skip
    parser.add_argument("--step-cache", action="store_true", help="with a step cache, which keeps what a step did")
    parser.add_argument("--from-picture", action="store_true", help="a picture is encoded: to start from, fill, follow")
    parser.add_argument(
        "--policy", default="auto", metavar="POLICY",
        help=f"{POLICIES} (default: auto)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=f"{DEVICES}; it need not be here")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the numbers that are computed with")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="free memory to plan for (default: what is free on the device)"
    )
    parser.add_argument("--json", action="store_true", help="JSON in place of a table")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw it, as a .png")


def add_prompts(commands: Commands) -> None:
    parser = commands.add_parser(
        "prompts",
        help="list or clear what --prompt-cache keeps",
        description="List what --prompt-cache keeps in a folder: embeddings of prompts, not their words. Removing them "
        "costs no more than encoding them again.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the one that --prompt-cache named")
    parser.add_argument("--clear", action="store_true", help="remove them; other files in the folder stay")
    parser.add_argument("--json", action="store_true", help="JSON in place of text")


def add_demo(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="draw a dozen pictures with the embedded models",
        description="Draw a dozen pictures with the embedded models, and a sheet of them all; nothing is downloaded.",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("out/demo"), help="default: %(default)s")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


class Group(Protocol):
    """What ``add_argument_group`` gives."""

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action: ...


def _add_model(group: Group, models: str) -> None:
    group.add_argument("--model", default="mini", metavar="NAME|FILE", help=f"{models} (default: mini)")
    group.add_argument(
        "--variant",
        metavar="NAME",
        help="what the transformer is where its tensors cannot tell, as flux1-kontext-dev (`models` lists the names)",
    )
    group.add_argument("--clip", type=Path, metavar="FILE", help="the model's CLIP text encoder")
    group.add_argument("--t5", type=Path, metavar="FILE", help="its T5 text encoder")
    group.add_argument("--vae", type=Path, metavar="FILE", help="its autoencoder")
    group.add_argument(
        "--tokenizers",
        type=Path,
        metavar="FOLDER",
        help="holds CLIP's vocab.json and merges.txt and T5's tokenizer.json, or the release's folders tokenizer and "
        "tokenizer_2; files that no option names are looked for beside the transformer",
    )
    group.add_argument("--device", default="auto", help=f"{DEVICES} (default: cuda where there is one)")
    group.add_argument(
        "--dtype", default="auto", help=f"{', '.join(DTYPES)}: numbers that weights become (default: auto)"
    )
    group.add_argument("--policy", default="auto", metavar="POLICY", help=f"memory: {POLICIES} (default: auto)")
    group.add_argument(
        "--prompt-cache", type=Path, metavar="FOLDER",
        help="keep what the text encoders make of prompts in files there, and do not load them for what is kept "
        "(`prompts` lists and clears it)",
    )  # fmt: skip
    group.add_argument(
        "--attention", default="auto", metavar="NAME",
        help=f"what computes the transformer's attention: {', '.join(ATTENTIONS)} (default: auto, the fastest that "
        "rounds no more than needed; fast also takes sage, which rounds to 8 bits)",
    )  # fmt: skip
    group.add_argument(
        "--compile", action="store_true",
        help="compile the transformer's blocks first, once for all pictures; meant for GPUs, for on a CPU steps hardly "
        "get faster",
    )  # fmt: skip


def _add_output(group: Group) -> None:
    group.add_argument(
        "--out",
        metavar="FILE|FOLDER",
        default=".",
        help="a .png, .jpg or .webp file, replaced if it is there; several pictures become FILE-1, FILE-2 ...; in a "
        "folder, names are made from model and seed and nothing is replaced (default: the current folder)",
    )
    group.add_argument(
        "--record", action="store_true", help="write versions, hashes, settings and times as JSON beside"
    )
    group.add_argument(
        "--report", action="store_true", help="say what memory and time each stage took, beside what was planned"
    )


def add_size(group: Group, default: str = "the model's") -> None:
    """The picture's size, where a command leaves it open."""
    group.add_argument("--width", type=int, metavar="PIXELS", help=f"rounded to a multiple of 16 (default: {default})")
    group.add_argument("--height", type=int, metavar="PIXELS", help="likewise")


def _add_picture(group: Group) -> None:
    group.add_argument(
        "--seed",
        type=int,
        help="of the first picture, 0 to 2^64-1, of which the low 32 bits count; the next count up (default: random)",
    )
    group.add_argument("--count", type=int, default=1, help="how many pictures (default: 1)")
    group.add_argument("--negative", metavar="PROMPT", help="what to stay away from; turns --cfg 3 on")
    group.add_argument("--clip-prompt", metavar="PROMPT", help="a prompt of its own for CLIP")


def _add_sampling(group: Group) -> None:
    group.add_argument("--steps", type=int, help="default: the model's")
    group.add_argument("--guidance", type=float, help="strength of distilled guidance (default: the model's)")
    group.add_argument("--cfg", type=float, help="true classifier-free guidance, two passes a step; 1 is off")
    group.add_argument("--scheduler", default="flux", help=f"{', '.join(SCHEDULERS)} (default: flux)")
    group.add_argument("--solver", default="euler", help=f"{', '.join(SOLVERS)} (default: euler)")
    group.add_argument("--mu", type=float, help="shift of the schedule (default: from the size)")
    group.add_argument(
        "--sigmas", type=numbers, metavar="1,...,0", help="explicit falling times in place of steps and scheduler"
    )
    group.add_argument("--noise", default="comfyui", help=f"whose noise: {', '.join(NOISES)} (default: comfyui)")
    group.add_argument(
        "--step-cache", type=float, metavar="THRESHOLD",
        help="skip most of a step whose first block changed by less than this share, as 0.1; more is faster and less "
        "exact; for runs of more than 8 steps",
    )  # fmt: skip
    group.add_argument(
        "--step-cache-skips", type=int, metavar="N", help="at most so many one after the other (default: 3)"
    )
    group.add_argument("--step-cache-warmup", type=int, metavar="N", help="never the first so many steps (default: 4)")


def _add_start(group: Group) -> None:
    group.add_argument("--image", type=Path, metavar="FILE", help="a picture to start from")
    group.add_argument("--denoise", type=float, default=1.0, help="how much of it to change, 0 to 1 (default: 1)")
    group.add_argument("--mask", type=Path, metavar="FILE", help="white where the picture may change")


def numbers(text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers with commas, as 1,0.5") from None
