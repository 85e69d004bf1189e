"""``python -m flux convert``: a model file to another format or layout."""

from __future__ import annotations

import argparse
import time

from ..pipelines.describe import human_bytes
from ..pipelines.modules import parameter_shapes
from ..weights.convert import convert, describe_formats
from .console import Bar, note, say

__all__ = ["run"]


def run(arguments: argparse.Namespace) -> int:
    """Write the file that is asked for; returns the exit code."""
    began = time.monotonic()
    with Bar(arguments.quiet) as bar:
        done = convert(
            arguments.source, arguments.target, arguments.to,
            part=arguments.part, variant=arguments.variant, replace=arguments.replace,
            expected=parameter_shapes,
            watch=lambda place, count, _: bar.show("converting", place, count),
        )  # fmt: skip
    if not arguments.quiet:
        note(
            f"{done.title} in {done.layout}: {describe_formats(done.outcome.formats)}, "
            f"{human_bytes(done.outcome.nbytes)}, in {time.monotonic() - began:.1f} s"
        )
    say(str(done.path))
    return 0
