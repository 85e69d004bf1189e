"""Opens files that it is told of, one after another, in a process that may die: ``Worker`` starts it and asks it.

What is measured of a file's memory, and why that is sound. Before the first file every seed was opened, so that what is
loaded or cached once is there; the process's address space then is the baseline. While a file is open the kernel
holds the address space (RLIMIT_AS) to that baseline, the file's size and 64 MB. Address space bounds memory of every
kind from above: Python's, torch's and NumPy's, touched or not, and maps of the file itself. What goes beyond fails, and
counts as a failure even where it was caught and told as something else, as the exception's causes are looked through.
Nothing hides in memory that was freed before: the process keeps one heap, whose room at the baseline is a few MB. What
is printed besides is the largest resident memory above the baseline's (VmHWM, reset at the baseline), over all files so
far, for it only tells how near the bound was. Only Linux has all of this; elsewhere memory is not measured.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import gc
import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch

from flux.errors import FluxFoundryError
from flux.weights.checkpoints import read_parts
from flux.weights.readers.gguf import ARRAY, GgufFile, LongArray
from flux.weights.sources import open_checkpoint

from .seeds import READERS, seeds

try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = ["FAILURES", "HANG", "Result", "Worker", "examine", "open_all"]

ROOT = Path(__file__).resolve().parents[2]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # to clear_refs: VmHWM becomes what is resident now
ALLOWANCE = 64 << 20  # bytes that a file may cost beyond its size
HANG = 5.0  # seconds
STARTING = 120.0  # seconds to import torch on a busy machine
LONGEST_SENTENCE = 1_500  # characters: a few names of the longest that are read, and words
OPENED, REFUSED, CRASH, MEMORY, MESSAGE, DIED, HUNG = "opened refused crash memory message died hang".split()
FAILURES = (CRASH, MEMORY, MESSAGE, DIED, HUNG)
DEFAULT_TARGET = "tests.fuzz.worker:open_all"

Target = Callable[[Path], None]


@dataclass(frozen=True)
class Result:
    """What became of a file.

    Attributes:
        outcome: "opened", "refused", or a word of ``FAILURES``.
        text: The message.
        seconds: It took.
        peak: The most resident memory above the baseline so far, in bytes; 0 where that is not known.
    """

    outcome: str
    text: str = ""
    seconds: float = 0.0
    peak: int = 0


def open_all(path: Path) -> None:
    """Open a checkpoint as the engine does, tell what it is, make numbers of its tensors, read a GGUF file's arrays."""
    checkpoint = open_checkpoint(path)
    assert checkpoint.nbytes >= 0
    read_parts(checkpoint)
    for source in checkpoint.values():
        numbers = source.numbers(torch.float32)
        assert tuple(numbers.shape) == source.shape
        assert numbers.dtype == torch.float32
    if checkpoint.is_gguf:
        file = GgufFile(path)
        for key, value in file.fields.items():
            if isinstance(value, LongArray) and value.kind != ARRAY:  # arrays in arrays are passed over, never read
                file.array(key)


def examine(path: Path, target: Target = open_all) -> Result:
    """Open one file; whatever comes of it is a result."""
    start = time.perf_counter()
    outcome, text = _attempt(path, target)
    return Result(outcome, text, time.perf_counter() - start)


def _attempt(path: Path, target: Target) -> tuple[str, str]:
    try:
        target(path)
    except FluxFoundryError as error:
        if _wants_memory(error):
            return MEMORY, f"refused for want of memory: {error}"
        return (REFUSED if _is_a_sentence(str(error), path) else MESSAGE), str(error)
    except BaseException as error:  # noqa: BLE001 - any other is what is looked for
        return (MEMORY if _wants_memory(error) else CRASH), f"{type(error).__name__}: {str(error)[:300]}{_place(error)}"
    return OPENED, ""


def _is_a_sentence(message: str, path: Path) -> bool:
    """One line that can be printed and names the file, or one of the folder's."""
    names = [path.name, *(file.name for file in path.glob("*"))] if path.is_dir() else [path.name]
    return message.isprintable() and len(message) <= LONGEST_SENTENCE and any(name in message for name in names)


def _wants_memory(error: BaseException | None) -> bool:
    """Whether an exception, or what it came of, is that memory was not given."""
    if error is None:
        return False
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # torch's
        return True
    return _wants_memory(error.__cause__ or error.__context__)


def _place(error: BaseException) -> str:
    """Where it was raised."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else f" ({Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno})"


def _status(field: str) -> int:
    """A size of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


class _Memory:
    """This process's memory against its baseline, which is taken now."""

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()
        self.is_known = resource is not None and STATUS.exists()
        if self.is_known:
            with contextlib.suppress(OSError):  # then the peak begins at the warming up's
                CLEAR.write_text(RESET_PEAK)
            self.space, self.resident = _status("VmSize"), _status("VmRSS")

    @contextlib.contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Hold the address space to the baseline, ``size`` and the allowance."""
        if not self.is_known:
            yield
            return
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (self.space + size + ALLOWANCE, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

    def peak(self) -> int:
        return max(0, _status("VmHWM") - self.resident) if self.is_known else 0


def serve(target: Target, questions: Iterable[str], answers: IO[str]) -> None:
    """Answer each line, a path in JSON, by a line of ``Result``; before the first one, by an empty line when ready."""
    _warm_up(target)
    memory = _Memory()
    print(file=answers, flush=True)
    for line in questions:
        path = Path(json.loads(line))
        size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else (path,)))
        with memory.held(size):
            result = examine(path, target)
        fields = asdict(result) | {"peak": memory.peak()}
        print(json.dumps(fields), file=answers, flush=True)


def _warm_up(target: Target) -> None:
    for reader in READERS:
        for seed in seeds(reader):
            with tempfile.TemporaryDirectory() as folder:
                for name, data in seed.files.items():
                    Path(folder, name).write_bytes(data)
                with contextlib.suppress(Exception):
                    target(Path(folder, seed.opened))


class Worker:
    """The process, started again whenever it is gone.

    Args:
        target: What it does with a path: "module:function".
        patience: Seconds that a file may take.
    """

    def __init__(self, target: str = DEFAULT_TARGET, patience: float = HANG) -> None:
        self.target, self.patience = target, patience
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._peak = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def examine(self, path: Path) -> Result:
        """Have one file opened."""
        process = self._process or self._start()
        start = time.perf_counter()
        assert process.stdin is not None
        process.stdin.write(json.dumps(str(path)) + "\n")
        process.stdin.flush()
        try:
            answer = self._answers.get(timeout=self.patience)
        except queue.Empty:
            self._end()
            return Result(HUNG, f"nothing came of it in {self.patience:g} s", time.perf_counter() - start, self._peak)
        if not answer:
            self._end()
            return Result(DIED, f"the process ended with {process.returncode}", time.perf_counter() - start, self._peak)
        result = Result(**json.loads(answer))
        self._peak = max(self._peak, result.peak)
        return result

    def _start(self) -> subprocess.Popen[str]:
        # One heap and one thread: a second arena would reserve 64 MB of address space that is never used.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        own = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment = {**inherited, **own}  # memory that glibc was told to keep would count for the next file
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", self.target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self._answers = queue.Queue()
        threading.Thread(target=_pass_on, args=(process, self._answers), daemon=True).start()
        if self._answers.get(timeout=STARTING) is None:
            raise RuntimeError("the process that opens files ended before the first one")
        return process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _pass_on(process: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
    """Lines of the process, and None at its end."""
    assert process.stdout is not None
    with contextlib.suppress(ValueError):  # it was closed meanwhile
        for line in process.stdout:
            answers.put(line)
    answers.put(None)


def main() -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    module, _, function = sys.argv[1].partition(":")
    serve(getattr(importlib.import_module(module), function), sys.stdin, sys.stdout)


if __name__ == "__main__":
    main()
