"""Retrain everything that the embedded model consists of: ``python -m flux.mini``.

Stages run in order and resume from their checkpoints; a stage that is done is skipped. Each says how long it took.
The guided stages can share their batches among processes: on a CPU with two cores,
``OMP_NUM_THREADS=1 python -m torch.distributed.run --nproc-per-node 2 -m flux.mini --stage style`` takes a third less
time than one process.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from ..training import parallel
from .build import FLOW_STAGES, GUIDED_STAGES, STAGES, Builder

__all__ = ["main"]

SEED_APART = 1_000_000  # between processes that train together


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that are asked for, and say how long each took."""
    parser = argparse.ArgumentParser(prog="python -m flux.mini", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("out/mini"), help="where checkpoints go (default: %(default)s)"
    )
    parser.add_argument("--stage", choices=STAGES, action="append", help="run only this stage; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device",
        help="where the transformers and the autoencoder train: cpu, cuda, ... (default: cuda where there is one); the "
        "small text encoders and the encoding of latents stay on the CPU",
    )
    parser.add_argument(
        "--from-shipped",
        action="store_true",
        help="go on from the weights that ship instead of from nothing: the base, or --stage style",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformer's training step (needs a C++ compiler)"
    )
    parser.add_argument("--install", action="store_true", help="put the finished weights in place of the shipped ones")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    stages = options.stage or (FLOW_STAGES if options.from_shipped else STAGES)
    parallel.join()
    if parallel.size() > 1 and not set(stages) <= set(GUIDED_STAGES):
        parser.error(f"several processes can share only the stages {', '.join(GUIDED_STAGES)}; name them by --stage")
    first = parallel.rank() == 0
    builder = Builder(
        options.folder,
        options.seed + SEED_APART * parallel.rank(),
        device,
        compiled=options.compile,
        report=_say if first else _say_nothing,
        from_shipped=options.from_shipped,
    )
    began = time.monotonic()
    for stage in stages:
        start = time.monotonic()
        builder.run(stage)
        builder.report(f"{stage}: done in {(time.monotonic() - start) / 60:.1f} minutes")
    if options.install and first:
        if not set(stages) <= set(GUIDED_STAGES):
            builder.install()
        builder.install_guided()
    builder.report(f"all: {(time.monotonic() - began) / 60:.1f} minutes")
    return 0


def _say_nothing(line: str) -> None:
    """Of several processes the first one tells."""


def _say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
