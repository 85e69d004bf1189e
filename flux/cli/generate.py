"""``python -m flux generate``, and every other command that draws: from options to pictures in files."""

from __future__ import annotations

import argparse
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MissingFileError, UserError
from ..images import save_picture
from .arguments import ATTENTIONS, DEVICES, DTYPES, NOISES
from .console import Bar, note, say, say_beside
from .files import model_files
from .output import Output
from .purposes import purpose_of

if TYPE_CHECKING:
    from ..pipelines.hooks import Hooks
    from ..pipelines.text_to_image import Picture
    from .engine import Job
    from .record import Clock, Record

__all__ = ["run"]

RANDOM_SEEDS = 2**32  # short enough to type again
PICTURES = ("image", "mask", "reference", "region")  # options that name them

Tell = Callable[[str], None]


def run(arguments: argparse.Namespace) -> int:
    """Draw what the options of any command that draws ask for; returns the exit code."""
    notes: list[str] = []

    def tell(sentence: str) -> None:
        if not arguments.quiet:
            note(sentence)

    def warn(sentence: str) -> None:
        notes.append(sentence)
        tell(sentence)

    # 1. What can be known without the engine, so that mistakes answer at once.
    began = time.monotonic()
    purpose = purpose_of(arguments)
    _check_words(arguments)
    output = Output(arguments.out, purpose.resolve(arguments.model), arguments.count, with_record=arguments.record)
    output.check()
    given = _given_pictures(arguments)
    files = model_files(arguments, purpose)
    seed = secrets.randbelow(RANDOM_SEEDS) if arguments.seed is None else arguments.seed
    # 2. The engine, which brings torch.
    from ..memory.metering import Meter
    from ..memory.report import RunReport
    from ..pipelines.denoising import attention_of
    from ..pipelines.hooks import Hooks
    from ..pipelines.plan_text import report_lines
    from ..pipelines.text_to_image import plan_of
    from .engine import make_job
    from .record import Clock, Record

    clock = Clock(began)
    job = make_job(arguments, files, seed, warn)
    clock.lap("opening")
    if arguments.seed is None:
        tell(f"seed {seed} was drawn; --seed {seed} gives the same again")
    for remark in job.model.transformer.notes:
        tell(remark)
    attention = attention_of(job.model.transformer, job.request.attention)
    if not attention.is_plain:
        tell(f"attention by {attention.report}")
    # 3. Pictures, each written as soon as it is there.
    record = Record(files, job.model, {**given, **job.files}, notes, attention.report)
    hooks = Hooks(warn=warn, tell=tell, meter=job.meter)
    plan = plan_of(job.model, job.request, job.before) if arguments.report else None
    _draw(job, output, record, clock, Bar(arguments.quiet), hooks, tell)
    # 4. What it took, and the record.
    if isinstance(hooks.meter, Meter):
        record.memory = RunReport(plan, hooks.meter.stages)
        say_beside("\n".join(report_lines(record.memory)))
    if arguments.record:
        say(str(record.write(output.record_path(record.pictures[0][0]), clock.seconds)))
    return 0


def _draw(job: Job, output: Output, record: Record, clock: Clock, bar: Bar, hooks: Hooks, tell: Tell) -> None:
    from ..pipelines.text_to_image import generate_each

    def progress(stage: str, done: int, total: int) -> None:
        clock.lap(stage)
        bar.show(stage, done, total)

    with bar:
        for index, drawn in enumerate(generate_each(job.model, job.request, replace(hooks, progress=progress))):
            picture = _finished(drawn, job)
            if job.finish is not None:
                clock.lap("finishing")
            path = output.path(index, picture.seed)
            save_picture(path, picture.pixels.numpy(), picture.settings, job.profile)
            clock.lap("saving")
            record.add(path, picture)
            if job.request.count > 1:
                tell(f"{path.name} has seed {picture.seed}")
            say(str(path))


def _finished(picture: Picture, job: Job) -> Picture:
    """A picture as it is written, with all its settings."""
    settings = {**picture.settings, **job.facts}
    if job.finish is None:
        return replace(picture, settings=settings)
    pixels = job.finish(picture.pixels)
    height, width = pixels.shape[:2]
    if pixels.shape != picture.pixels.shape:
        settings |= {"width": width, "height": height, "drawn_size": list(picture.pixels.shape[1::-1])}
    return replace(picture, pixels=pixels, settings=settings)


def _given_pictures(arguments: argparse.Namespace) -> dict[str, Path]:
    """The pictures that options name, by what they are for.

    Raises:
        MissingFileError: One is not there.
    """
    found: dict[str, Path] = {}
    for role in PICTURES:
        value = getattr(arguments, role, None)
        paths = value if isinstance(value, list) else [value] if value is not None else []
        found |= {role if len(paths) == 1 else f"{role} {index + 1}": path for index, path in enumerate(paths)}
    for path in found.values():
        if not path.is_file():
            raise MissingFileError(f"the picture {path} was not found; check the name and the folder")
    return found


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
    if arguments.attention not in ATTENTIONS:
        raise UserError(f"there is no attention {arguments.attention!r}; choose one of: {', '.join(ATTENTIONS)}")
    if arguments.device != "auto" and arguments.device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"there is no device {arguments.device!r}; choose one of: {DEVICES}")


def _is_text(words: str) -> bool:
    """Whether these are characters only; bytes that the terminal could not decode come as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in words)
