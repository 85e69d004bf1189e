"""``python -m flux generate``: from options to pictures in files, in numbered steps."""

from __future__ import annotations

import argparse
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import UserError
from ..images import save_picture
from .arguments import DEVICES, DTYPES, NOISES
from .console import Bar, note, say
from .files import ModelFiles, model_files
from .output import Output

if TYPE_CHECKING:
    from ..pipelines.text_to_image import FluxModel, Request
    from .record import Clock, Record

__all__ = ["run"]

RANDOM_SEEDS = 2**32  # short enough to type again

Tell = Callable[[str], None]


def run(arguments: argparse.Namespace) -> int:
    """Draw what the options ask for; returns the exit code."""
    tell: Tell = (lambda _: None) if arguments.quiet else note
    # 1. What can be known without the engine, so that mistakes answer at once.
    began = time.monotonic()
    _check_words(arguments)
    output = Output(arguments.out, arguments.model, arguments.count, with_record=arguments.record)
    output.check()
    files = model_files(arguments)
    seed = secrets.randbelow(RANDOM_SEEDS) if arguments.seed is None else arguments.seed
    # 2. The engine, which brings torch.
    model, request, record, clock = _open(arguments, files, seed, began)
    if arguments.seed is None:
        tell(f"seed {seed} was drawn; --seed {seed} gives the same again")
    for remark in model.transformer.notes:
        tell(remark)
    # 3. Pictures, each written as soon as it is there.
    _draw(model, request, output, record, clock, Bar(arguments.quiet), tell)
    # 4. The record.
    if arguments.record:
        say(str(record.write(output.record_path(record.pictures[0][0]), clock.seconds)))
    return 0


def _open(
    arguments: argparse.Namespace, files: ModelFiles, seed: int, began: float
) -> tuple[FluxModel, Request, Record, Clock]:
    from .engine import open_model, request_of
    from .record import Clock, Record

    clock = Clock(began)
    request = request_of(arguments, seed)
    model = open_model(files, arguments.device, arguments.dtype, arguments.variant)
    clock.lap("opening")
    given = {role: getattr(arguments, role) for role in ("image", "mask")}
    return model, request, Record(files, model, {role: path for role, path in given.items() if path}), clock


def _draw(
    model: FluxModel, request: Request, output: Output, record: Record, clock: Clock, bar: Bar, tell: Tell
) -> None:
    from ..pipelines.denoising import Hooks
    from ..pipelines.text_to_image import generate_each

    def warn(sentence: str) -> None:
        record.notes.append(sentence)
        tell(sentence)

    def progress(stage: str, done: int, total: int) -> None:
        clock.lap(stage)
        bar.show(stage, done, total)

    with bar:
        for index, picture in enumerate(generate_each(model, request, Hooks(progress=progress, warn=warn))):
            path = output.path(index, picture.seed)
            save_picture(path, picture.pixels.numpy(), picture.settings)
            clock.lap("saving")
            record.add(path, picture)
            if request.count > 1:
                tell(f"{path.name} has seed {picture.seed}")
            say(str(path))


def _check_words(arguments: argparse.Namespace) -> None:
    """Refuse names that are not known, and text that is no text."""
    for option in ("prompt", "negative", "clip_prompt"):
        if not _is_text(getattr(arguments, option) or ""):
            raise UserError(f"the {option.replace('_', ' ')} is not valid UTF-8; check the terminal's encoding")
    if not arguments.out:
        raise UserError("--out is empty; give a file's name, or a folder's that ends in a slash")
    if arguments.dtype not in DTYPES:
        raise UserError(f"there is no dtype {arguments.dtype!r}; choose one of: {', '.join(DTYPES)}")
    if arguments.noise not in NOISES:
        raise UserError(f"there is no noise style {arguments.noise!r}; choose one of: {', '.join(NOISES)}")
    if arguments.device != "auto" and arguments.device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"there is no device {arguments.device!r}; choose one of: {DEVICES}")


def _is_text(words: str) -> bool:
    """Whether these are characters only; bytes that the terminal could not decode come as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in words)
