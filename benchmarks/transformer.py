"""Our FLUX.1 transformer beside diffusers' and ComfyUI's own, on random weights of a middle size, stored in bf16.

Each engine runs in processes of its own (``engines``), which are begun in turn, round after round: what counts is the
time from a process's start to the end of its first step, and how far the peak of its resident memory grows over loading
and four steps. Those of the last round stay, and take further steps in turn. So whatever else a machine does meets all
engines alike. ComfyUI is there where ``COMFYUI_PATH`` names it; it runs in the Python of ``COMFYUI_PYTHON``, and beside
it ours in the same one. ``python -m benchmarks.transformer``; some 16 GB of memory are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flux.models.flux1 import Flux1
from flux.ops.dtypes import fast_dtype
from flux.specs.flux1 import FLUX1, Flux1Spec
from flux.weights.diffusers_folder import CONFIG, WEIGHTS, config_of

from .engines import DIFFUSERS_FOLDER, DTYPES, GUIDANCE, INPUTS, PATCH, SCHEDULE, STEPS
from .machine import UNLIKE_USERS, processor
from .report import Report, verdict

__all__ = [
    "GUIDANCE",
    "MIDDLE",
    "Measured",
    "Runner",
    "main",
    "make_inputs",
    "measure",
    "runners",
    "table",
    "write_files",
]

MIDDLE = replace(
    FLUX1["flux1-dev"], name="flux1-middle", title="a middle-sized FLUX.1", hidden=1536, heads=12, double_blocks=4,
    single_blocks=8,
)  # fmt: skip
ROWS = COLUMNS = 32  # 1024 image tokens
TEXT_TOKENS = 256
ROUNDS, REPEATS = 5, 21  # processes of each engine, and further steps of each of the last ones
TIME_BAR, MEMORY_BAR, START_BAR = 0.98, 0.50, 0.70
MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent
OURS, DIFFUSERS, COMFYUI = "fluxfoundry", "diffusers", "comfyui"
TITLES = {OURS: "FLUX Foundry", DIFFUSERS: "diffusers", COMFYUI: "ComfyUI"}


def make_inputs(spec: Flux1Spec, batch: int = 1) -> dict[str, Tensor]:
    """Random inputs of the benchmark's size, in fp32; see ``engines.Inputs``."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "noise": (batch, spec.latent_channels, PATCH * ROWS, PATCH * COLUMNS),
        "text": (1, TEXT_TOKENS, spec.context_width),
        "pooled": (1, spec.pooled_width),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_files(spec: Flux1Spec, folder: Path) -> Path:
    """A file of random weights in Black Forest Labs' names; beside it the same for diffusers, and the inputs."""
    from tests.oracles import flux1_to_diffusers  # the conversion that the parity tests prove

    torch.manual_seed(0)
    state = Flux1(spec).bfloat16().state_dict()
    ours = folder / f"{spec.name}.safetensors"
    save_file(state, ours)
    theirs = folder / DIFFUSERS_FOLDER
    theirs.mkdir()
    converted = {name: tensor.contiguous() for name, tensor in flux1_to_diffusers(state).items()}
    save_file(converted, theirs / WEIGHTS, metadata={"format": "pt"})
    (theirs / CONFIG).write_text(json.dumps(config_of(spec)))
    torch.save(make_inputs(spec), folder / INPUTS)
    return ours


@dataclass(frozen=True)
class Runner:
    """An engine, the Python that it runs in, and arguments for ``benchmarks.engines``."""

    engine: str
    python: str = sys.executable
    arguments: tuple[str, ...] = ()


def runners() -> dict[str, tuple[Runner, Runner]]:
    """Ours and the peer, by the peer's name; those that are at hand."""
    found = {DIFFUSERS: (Runner(OURS), Runner(DIFFUSERS))}
    if os.environ.get("COMFYUI_PATH"):
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        found[COMFYUI] = (Runner(OURS, python), Runner(COMFYUI, python))
    return found


class Running:
    """A runner's process; it ends at the end of a ``with`` block.

    Attributes:
        began: When it was started, by the system's clock.
    """

    def __init__(self, runner: Runner, path: Path, output: Path) -> None:
        command = [runner.python, "-m", "benchmarks.engines", runner.engine, str(path), "--output", str(output)]
        environment = {name: value for name, value in os.environ.items() if name not in UNLIKE_USERS}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.began = time.monotonic()
        self._process = subprocess.Popen(
            [*command, *runner.arguments], cwd=ROOT, env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def read(self) -> dict[str, Any]:
        """The next that it says.

        Raises:
            RuntimeError: It ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"an engine's process ended: {self._errors.read()[-2000:]}")
        return dict(json.loads(line))

    def step(self) -> float:
        """Seconds of one more step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        return float(self.read()["seconds"])


@dataclass
class Measured:
    """What was measured of a runner: seconds and bytes, and the first step's result."""

    starts: list[float] = field(default_factory=list)
    grown: list[int] = field(default_factory=list)
    tables: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    torch: str = ""
    threads: int = 0
    output: Tensor | None = None

    @property
    def start(self) -> float:
        """Median from a process's start to the end of its first step."""
        return statistics.median(self.starts)

    @property
    def memory(self) -> float:
        """Median growth of the peak of resident memory."""
        return statistics.median(self.grown)

    @property
    def whole_steps(self) -> list[float]:
        """Every step, with its share of what is made once for a schedule."""
        share = statistics.median(self.tables) / (len(SCHEDULE) - 1)
        return [step + share for step in self.steps]

    @property
    def step(self) -> float:
        """Median of ``whole_steps``."""
        return statistics.median(self.whole_steps)


def measure(
    path: Path, engines: Sequence[Runner], rounds: int = ROUNDS, repeats: int = REPEATS
) -> dict[Runner, Measured]:
    """Run every engine in turn, ``rounds`` times; then have each take ``repeats`` further steps, in turn."""
    found = {runner: Measured() for runner in engines}
    output = path.parent / "output.pt"
    with ExitStack() as staying:
        for index in range(rounds):
            running = {}
            for runner, own in found.items():
                with ExitStack() as passing:
                    stack = staying if index == rounds - 1 else passing
                    running[runner] = stack.enter_context(Running(runner, path, output))
                    _first_steps(running[runner], own)
                    own.output = torch.load(output) if repeats and stack is staying else own.output
        for turn in range(repeats):
            for runner, own in list(found.items())[:: -1 if turn % 2 else 1]:
                own.steps.append(running[runner].step())
    return found


def _first_steps(running: Running, own: Measured) -> None:
    first, rest = running.read(), running.read()
    own.starts.append(first["done"] - running.began)
    own.tables.append(first["tables"])
    own.grown.append(rest["grown"])
    own.torch, own.threads = rest["torch"], rest["threads"]


@dataclass(frozen=True)
class Comparison:
    """One figure of ours beside a peer's, and the most that the one may be of the other.

    Attributes:
        turns: Of what was taken in turn the ratio in every turn, of which the median counts: what a machine does beside
            slows neighbours alike.
    """

    what: str
    ours: float
    theirs: float
    bar: float
    unit: str = "s"
    turns: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        return statistics.median(self.turns) if self.turns else self.ours / self.theirs

    def row(self, peer: str) -> str:
        digits = 0 if self.unit == "MiB" else 2
        own, other = (f"{value:.{digits}f} {self.unit}" for value in (self.ours, self.theirs))
        return (
            f"| {TITLES[peer]} | {self.what} | {own} | {other} | **{self.ratio:.3f}** | ≤ {self.bar:.2f} "
            f"| {verdict(self.ratio <= self.bar)} |"
        )


def compare(ours: Measured, theirs: Measured) -> tuple[Comparison, ...]:
    """Every figure that has a bar."""
    turns = tuple(own / other for own, other in zip(ours.whole_steps, theirs.whole_steps, strict=True))
    return (
        Comparison("step", ours.step, theirs.step, TIME_BAR, turns=turns),
        Comparison(
            f"growth of peak memory, load + {STEPS} steps", ours.memory / MIB, theirs.memory / MIB, MEMORY_BAR, "MiB"
        ),
        Comparison("process start to the end of the first step", ours.start, theirs.start, START_BAR),
    )


def difference(ours: Measured, theirs: Measured) -> float:
    """The largest between the first step's results, of the largest value."""
    assert ours.output is not None
    assert theirs.output is not None
    return float((ours.output - theirs.output).abs().max() / theirs.output.abs().max())


def table(
    dtype: str = DTYPES[0], rounds: int = ROUNDS, repeats: int = REPEATS, arguments: Sequence[str] = ()
) -> Report:
    """The comparison with every peer that is at hand.

    Args:
        dtype: That all engines compute in.
        rounds: Processes of each.
        repeats: Steps of each.
        arguments: Further ones for our engine.
    """
    pairs = {
        peer: tuple(
            replace(runner, arguments=("--dtype", dtype, *(arguments if runner.engine == OURS else ())))
            for runner in pair
        )
        for peer, pair in runners().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = write_files(MIDDLE, Path(folder))
        found = measure(path, [runner for pair in pairs.values() for runner in pair], rounds, repeats)
    rows, data, notes = [], [], []
    for peer, (ours, theirs) in pairs.items():
        own, other = found[ours], found[theirs]
        off = difference(own, other)
        notes.append(f"{TITLES[peer]} in torch {other.torch}, its output differs by {off:.1e} of the largest value")
        for one in compare(own, other):
            rows.append(one.row(peer))
            data.append({"peer": peer, "torch": other.torch, **vars(one), "ratio": one.ratio, "difference": off})
    share = statistics.median(own.tables) / (len(SCHEDULE) - 1)
    text = (
        f"Hidden {MIDDLE.hidden}, {MIDDLE.double_blocks} + {MIDDLE.single_blocks} blocks stored in bf16, "
        f"{ROWS * COLUMNS} + {TEXT_TOKENS} tokens, all in {dtype}, {processor()}, {own.threads} threads; steps are "
        f"medians of {repeats} in turn, and so is the ratio of two in the same turn; the others are medians of {rounds}"
        f" processes of each engine, begun in turn. {'; '.join(notes)}. Our step "
        f"includes {share:.2f} s, its share of the modulations, which are made once for {len(SCHEDULE) - 1} "
        f"steps. (Asked for no type, ours takes {dtype_name(fast_dtype('cpu'))} on this processor.)"
    )
    head = ("| beside | | FLUX Foundry | peer | ratio | bar | |", "|---|---|---|---|---|---|---|")
    return Report("\n".join((text, "", *head, *rows)), {"dtype": dtype, "rows": data})


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformer", description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="default: %(default)s")
    parser.add_argument("--ours", nargs="*", default=[], help="arguments of benchmarks.engines for our engine alone")
    options = parser.parse_args(arguments)
    report = table(options.dtype, options.rounds, options.repeats, options.ours)
    sys.stdout.write(f"{report.text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
