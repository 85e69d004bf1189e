"""What compiling brings: a middle-sized FLUX.1's step as it is and compiled, and how long compiling takes.

``python -m benchmarks.compiled``. All in one process, steps taken in turn. Torch's compiler begins with nothing on the
disk. Beside it, what the look at every step's latents costs, which finds numbers that are not finite.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux.models.flux1 import Flux1
from flux.pipelines.compiled import compiled_blocks
from flux.pipelines.denoising import Denoiser, Engine, Hooks
from flux.pipelines.parts import Part, open_transformer
from flux.pipelines.prompts import EncodedPrompt
from flux.sampling.noise import draw_noise

from .machine import processor
from .random_files import write_random
from .report import Report
from .transformer import COLUMNS, GUIDANCE, MIDDLE, ROWS, TEXT_TOKENS, make_inputs

__all__ = ["CASES", "Case", "main", "table"]

REPEATS = 5
TIME = 0.5  # of the flow
TOKEN = 2  # latent cells along a token's side
PROMPTS, SEEDS, SIZES = 5, 3, ((4, 4), (6, 4))  # of further passes; sizes in tokens
CACHE = "TORCHINDUCTOR_CACHE_DIR"  # what torch calls the folder of what it compiled
LOOKS = 1000
LATENT = (1, 16, 128, 128)  # of a picture of 1024x1024


@dataclass(frozen=True)
class Case:
    """How a model's weights are stored, and where they are.

    Attributes:
        name: In the table.
        stored: In the file, as ``random_files.FORMATS`` names it.
        keep: In memory, as ``parts.KEEPS`` names it.
        share: Of the blocks' weights that is granted room; the others are streamed.
    """

    name: str
    stored: str
    keep: str
    share: float


CASES = (
    Case("fp32, all in memory", "bf16", "numbers", 1.0),
    Case("fp8, all in memory and unpacked at use", "fp8", "packed", 1.0),
    Case("fp8, half of the blocks streamed", "fp8", "packed", 0.5),
)


class _Model:
    """A loaded transformer, and its steps."""

    def __init__(self, case: Case, folder: Path) -> None:
        path = folder / f"{case.stored}.safetensors"
        if not path.exists():
            write_random(path, lambda: Flux1(MIDDLE), "flux1-bfl", case.stored, MIDDLE.title)
        self.part: Part[Any, Any] = open_transformer(path, torch.device("cpu"), torch.float32, keep=case.keep)
        apart = tuple(self.part.module.modulation_layers())
        whole = self.part.residency.accounts.footprint(apart)
        limit = None if case.share == 1 else int(whole.others + case.share * (whole.device_bytes - whole.others))
        self.part.residency.load(without=apart, limit=limit)
        inputs = make_inputs(MIDDLE)
        self._step = self._of(inputs["text"], inputs["pooled"], (ROWS, COLUMNS), 0)

    def _of(self, text: Tensor, pooled: Tensor, size: tuple[int, int], seed: int) -> Callable[[], Tensor]:
        flow = Denoiser(Engine(self.part), EncodedPrompt(text, pooled), GUIDANCE, Hooks())
        flow.prepare([TIME])
        noise = draw_noise((MIDDLE.latent_channels, TOKEN * size[0], TOKEN * size[1]), [seed])
        return lambda: flow(noise, TIME)

    def plain(self) -> Tensor:
        return self._step()

    def compiled(self) -> Tensor:
        with compiled_blocks(self.part.module, tell=_refuse):
            return self._step()

    def others(self) -> None:
        """Compiled steps of other prompts, each of another length, with other seeds and sizes."""
        generator = torch.Generator().manual_seed(1)
        for prompt in range(PROMPTS):
            text = torch.randn(1, 16 + 8 * prompt, MIDDLE.context_width, generator=generator)
            pooled = torch.randn(1, MIDDLE.pooled_width, generator=generator)
            for seed in range(SEEDS):
                for size in SIZES:
                    step = self._of(text, pooled, size, seed)
                    with compiled_blocks(self.part.module, tell=_refuse):
                        step()


def _refuse(sentence: str) -> None:
    raise RuntimeError(sentence)


@contextmanager
def _nothing_on_the_disk() -> Iterator[None]:
    before = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[CACHE]
            else:
                os.environ[CACHE] = before


def _graphs() -> int:
    """Compiled in this process so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _measured(case: Case, folder: Path, repeats: int) -> dict[str, Any]:
    """The figures of a row."""
    model, before = _Model(case, folder), _graphs()
    plain = model.plain()
    first = _seconds(model.compiled)
    difference = float((model.compiled() - plain).abs().max() / plain.abs().max())
    seconds: dict[str, list[float]] = {"plain": [], "compiled": []}
    for _ in range(repeats):
        seconds["plain"].append(_seconds(model.plain))
        seconds["compiled"].append(_seconds(model.compiled))
    model.others()
    graphs = _graphs() - before
    model.part.residency.release()
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    return {
        **asdict(case),
        "seconds": medians["plain"],
        "compiled_seconds": medians["compiled"],
        "ratio": medians["compiled"] / medians["plain"],
        "compiling_seconds": max(0.0, first - medians["compiled"]),
        "compilations": graphs,
        "difference": difference,
    }


def _row(one: Mapping[str, Any]) -> str:
    return (
        f"| {one['name']} | {one['seconds']:.2f} s | {one['compiled_seconds']:.2f} s | **{one['ratio']:.3f}** "
        f"| {one['compiling_seconds']:.1f} s | {one['compilations']} | {one['difference']:.0e} |"
    )


def _look() -> float:
    """Seconds that it takes to see that the latents of a step are finite."""
    latent = torch.randn(LATENT, generator=torch.Generator().manual_seed(0))
    return statistics.median(_seconds(lambda: bool(torch.isfinite(latent).all())) for _ in range(LOOKS))


@torch.inference_mode()
def table(repeats: int = REPEATS, cases: tuple[Case, ...] = CASES) -> Report:
    """Steps as they are and compiled."""
    with tempfile.TemporaryDirectory() as folder, _nothing_on_the_disk():
        rows = [_measured(case, Path(folder), repeats) for case in cases]
    look = _look()
    text = "\n".join(
        (
            f"Hidden {MIDDLE.hidden}, {MIDDLE.double_blocks} + {MIDDLE.single_blocks} blocks, {ROWS * COLUMNS} + "
            f"{TEXT_TOKENS} tokens in fp32, {processor()}, {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}; median of {repeats}. Compilations are those of the steps that are timed and of "
            f"{PROMPTS * SEEDS * len(SIZES)} further ones, of {PROMPTS} prompts of other lengths, {SEEDS} seeds and "
            f"{len(SIZES)} sizes; the second and third row use those of the first.",
            "",
            "| weights | step | compiled | ratio | compiling took | compilations | outputs differ by |",
            "|---|---|---|---|---|---|---|",
            *map(_row, rows),
            "",
            f"To see whether the latents of a 1024x1024 picture are finite takes {look * 1e6:.0f} µs a step.",
        )
    )
    return Report(text, {"repeats": repeats, "look_seconds": look, "rows": rows})


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    sys.stdout.write(f"{table(parser.parse_args(arguments).repeats)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
