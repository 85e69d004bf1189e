"""Our FLUX.1 transformer beside diffusers', on random weights of a middle size.

Time: both models in one process, their steps taken in turn, the ratio of the medians. Memory: each in a process of its
own that opens a weights file and runs four steps; what counts is how far the process's peak resident set grows.
``python -m benchmarks.transformer``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flux.models.flux1 import Conditions, Flux1
from flux.models.positions import image_ids, text_ids
from flux.pipelines.denoising import Denoiser, Engine, Hooks, denoise
from flux.pipelines.parts import open_transformer
from flux.pipelines.prompts import EncodedPrompt
from flux.specs.flux1 import FLUX1, Flux1Spec
from flux.weights.diffusers_folder import config_of

__all__ = ["MIDDLE", "main"]

MIDDLE = replace(
    FLUX1["flux1-dev"], name="flux1-middle", title="a middle-sized FLUX.1", hidden=1536, heads=12, double_blocks=4,
    single_blocks=8,
)  # fmt: skip
ROWS = COLUMNS = 32  # 1024 image tokens
TEXT_TOKENS = 256
REPEATS = 5
MEMORY_STEPS = 4
SCHEDULE_STEPS = 28  # over which the modulation table's cost is spread
GUIDANCE = 3.5
KIB = 1024
TIME_BAR, MEMORY_BAR = 1.00, 0.80
PEERS = ("fluxfoundry", "diffusers")


@dataclass(frozen=True)
class Inputs:
    """One set of inputs that both implementations get."""

    image: Tensor
    text: Tensor
    pooled: Tensor
    time: float = 0.5


def make_inputs(spec: Flux1Spec, dtype: torch.dtype) -> Inputs:
    """Random inputs of the benchmark's size."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    return Inputs(
        draw(1, ROWS * COLUMNS, spec.in_channels), draw(1, TEXT_TOKENS, spec.context_width), draw(1, spec.pooled_width)
    )


def write_random_weights(spec: Flux1Spec, folder: Path, dtype: torch.dtype) -> Path:
    """A file of random weights in Black Forest Labs' names, and the same for diffusers in a folder beside it."""
    from tests.oracles import flux1_to_diffusers  # the conversion that the parity tests prove

    torch.manual_seed(0)
    state = Flux1(spec).to(dtype).state_dict()
    ours = folder / "flux1-middle.safetensors"
    save_file(state, ours)
    theirs = folder / "diffusers"
    theirs.mkdir()
    converted = {k: v.contiguous() for k, v in flux1_to_diffusers(state).items()}
    save_file(converted, theirs / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (theirs / "config.json").write_text(json.dumps(config_of(spec)))
    return ours


def our_step(path: Path, inputs: Inputs, dtype: torch.dtype) -> tuple[Callable[[], Tensor], float]:
    """A step as our sampler runs it: modulations from a table, their weights not in memory.

    Returns:
        The step, and the seconds that its share of the table takes, which is made once for a whole schedule.
    """
    part = open_transformer(path, torch.device("cpu"), dtype)
    model = part.module
    part.residency.load(without=tuple(model.modulation_layers()))
    flow = Denoiser(Engine(part), EncodedPrompt(inputs.text.float(), inputs.pooled.float()), GUIDANCE, Hooks())
    start = time.perf_counter()
    flow.prepare([inputs.time * (1 - i / SCHEDULE_STEPS) for i in range(SCHEDULE_STEPS)])
    share = (time.perf_counter() - start) / SCHEDULE_STEPS
    conditions = Conditions(flow.prompt, text_ids(TEXT_TOKENS), image_ids(ROWS, COLUMNS))
    return lambda: model(inputs.image, conditions, flow.table[inputs.time]), share


def their_step(folder: Path, inputs: Inputs, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A step of diffusers' model, loaded as its users load it."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=dtype).eval()
    arguments = {
        "hidden_states": inputs.image,
        "encoder_hidden_states": inputs.text,
        "pooled_projections": inputs.pooled,
        "timestep": torch.tensor([inputs.time], dtype=dtype),
        "guidance": torch.tensor([GUIDANCE], dtype=dtype),
        "img_ids": image_ids(ROWS, COLUMNS),
        "txt_ids": text_ids(TEXT_TOKENS),
    }
    return lambda: model(**arguments, return_dict=False)[0]


@torch.inference_mode()
def compare_times(path: Path, dtype: torch.dtype) -> dict[str, float]:
    """Medians of both models' step in seconds, taken in turn, and their largest relative difference.

    Ours includes its share of the modulation table.
    """
    inputs = make_inputs(MIDDLE, dtype)
    ours, share = our_step(path, inputs, dtype)
    steps = {"fluxfoundry": ours, "diffusers": their_step(path.parent / "diffusers", inputs, dtype)}
    outputs = {name: step() for name, step in steps.items()}  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    difference = (outputs["fluxfoundry"] - outputs["diffusers"]).abs().max() / outputs["diffusers"].abs().max()
    medians["fluxfoundry"] += share
    return {**medians, "share": share, "difference": float(difference)}


def measure_memory(name: str, path: Path, dtype: torch.dtype) -> int:
    """Bytes by which this process's peak resident set grows while it opens the file and runs four steps."""
    if name == "diffusers":
        import diffusers  # noqa: F401 - imports are not what is measured
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
    inputs = make_inputs(MIDDLE, dtype)
    before = peak_resident()
    sigmas = [1 - i / MEMORY_STEPS for i in range(MEMORY_STEPS + 1)]
    if name == "fluxfoundry":
        part = open_transformer(path, torch.device("cpu"), dtype)
        noise = torch.randn(1, MIDDLE.latent_channels, 2 * ROWS, 2 * COLUMNS)
        prompt = EncodedPrompt(inputs.text.float(), inputs.pooled.float())
        denoise(part, prompt, noise, sigmas, guidance=GUIDANCE)
    else:
        with torch.inference_mode():
            step = their_step(path.parent / "diffusers", inputs, dtype)
            for _ in sigmas[1:]:
                step()
    return peak_resident() - before


def peak_resident() -> int:
    """Bytes of this process's peak resident set (Linux: a child's ``ru_maxrss`` would begin at its parent's)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * KIB


def compare_memory(path: Path, dtype: torch.dtype) -> dict[str, int]:
    """``measure_memory`` of each, in fresh processes."""
    grown = {}
    for name in PEERS:
        command = [sys.executable, "-m", "benchmarks.transformer", "--memory-of", name, "--file", str(path)]
        done = subprocess.run([*command, "--dtype", dtype_name(dtype)], capture_output=True, text=True, check=True)
        grown[name] = int(done.stdout.strip().splitlines()[-1])
    return grown


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(dtype: torch.dtype = torch.float32) -> str:
    """The comparison as Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_weights(MIDDLE, Path(folder), dtype)
        times, memory = compare_times(path, dtype), compare_memory(path, dtype)
    time_ratio = times["fluxfoundry"] / times["diffusers"]
    memory_ratio = memory["fluxfoundry"] / memory["diffusers"]
    mib = {name: grown / KIB**2 for name, grown in memory.items()}
    return "\n".join(
        (
            f"Hidden {MIDDLE.hidden}, {MIDDLE.double_blocks} + {MIDDLE.single_blocks} blocks, {ROWS * COLUMNS} + "
            f"{TEXT_TOKENS} tokens, {dtype_name(dtype)}, CPU, {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}; outputs differ by {times['difference']:.1e} of the largest value. Our step includes "
            f"{times['share']:.2f} s, its share of the modulations, which are made once for {SCHEDULE_STEPS} steps.",
            "",
            "| | FLUX Foundry | diffusers | ratio | bar |",
            "|---|---|---|---|---|",
            f"| step, median of {REPEATS} | {times['fluxfoundry']:.2f} s | {times['diffusers']:.2f} s "
            f"| **{time_ratio:.3f}** | ≤ {TIME_BAR:.2f} |",
            f"| growth of peak memory, load + {MEMORY_STEPS} steps | {mib['fluxfoundry']:.0f} MiB "
            f"| {mib['diffusers']:.0f} MiB | **{memory_ratio:.3f}** | ≤ {MEMORY_BAR:.2f} |",
        )
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or with ``--memory-of`` one process's figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformer", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--memory-of", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    if options.memory_of:
        sys.stdout.write(f"{measure_memory(options.memory_of, options.file, dtype)}\n")
    else:
        sys.stdout.write(f"{table(dtype)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
