"""One engine alone in its process: it opens a FLUX.1 file, takes a schedule's first steps, and further ones when asked.

``python -m benchmarks.engines NAME FILE`` imports nothing of the other engines. It says JSON, line by line, on what was
its standard output: that the first step is done, and when; after ``STEPS`` steps by how much the peak of its resident
memory has grown since before it opened the file; then what each further step took, one for each line that it is given.
ComfyUI is found through ``COMFYUI_PATH``, and runs in the Python that this was started with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from .machine import peak_resident

__all__ = [
    "CELL", "DIFFUSERS_FOLDER", "DTYPES", "ENGINES", "GUIDANCE", "INPUTS", "PATCH", "SCHEDULE", "STEPS", "from_tokens",
    "main", "to_tokens",
]  # fmt: skip

INPUTS = "inputs.pt"  # beside the file
DIFFUSERS_FOLDER = "diffusers"  # the same weights, as diffusers has them
DTYPES = ("float32", "bfloat16")
STEPS = 4
SCHEDULE = tuple(1 - index / 28 for index in range(29))
TIME = SCHEDULE[1]  # of every further step
GUIDANCE = 3.5
CELL = 8  # pixels along a latent cell's side
PATCH = 2  # latent cells along a token's side

Inputs = dict[str, Tensor]  # "noise" (B, C, h, w), "text" (1, T, width) and "pooled" (1, width), all fp32


@dataclass(frozen=True)
class Opened:
    """A model that is ready.

    Attributes:
        step: Gives the velocity (B, C, h, w) at a time of the schedule.
        tables: Seconds that went into what is made once for the whole schedule.
        held: What is open as long as steps are taken.
    """

    step: Callable[[float], Tensor]
    tables: float = 0.0
    held: ExitStack = field(default_factory=ExitStack)


Open = Callable[[Path, Inputs], Opened]


def our_engine(options: argparse.Namespace) -> Open:
    """Our engine, as the command line runs it."""
    from flux.memory.policy import read_policy
    from flux.pipelines.denoising import Hooks, prepared
    from flux.pipelines.parts import open_transformer
    from flux.pipelines.planning import Job, grant
    from flux.pipelines.prompts import EncodedPrompt

    def opened(path: Path, inputs: Inputs) -> Opened:
        part = open_transformer(path, torch.device("cpu"), getattr(torch, options.dtype), keep=options.keep)
        batch, _, rows, columns = inputs["noise"].shape
        job = Job(width=CELL * columns, height=CELL * rows, batch=batch, steps=len(SCHEDULE) - 1)
        told = [time.perf_counter()]
        ready = prepared(
            part, EncodedPrompt(inputs["text"], inputs["pooled"]), SCHEDULE, guidance=GUIDANCE,
            limit=grant([part], job, read_policy(options.policy)).limits.get("transformer"),
            hooks=Hooks(progress=lambda *_: told.append(time.perf_counter())),
        )  # fmt: skip
        held = ExitStack()
        velocity = held.enter_context(ready)
        tables = time.perf_counter() - told[-1]  # which are made when all weights are there

        @torch.inference_mode()
        def step(sigma: float) -> Tensor:
            return velocity(inputs["noise"], sigma)

        return Opened(step, tables, held)

    return opened


def diffusers_engine(options: argparse.Namespace) -> Open:
    """The model of diffusers, loaded as its users load it."""
    from diffusers import FluxTransformer2DModel

    dtype = getattr(torch, options.dtype)

    def opened(path: Path, inputs: Inputs) -> Opened:
        model = FluxTransformer2DModel.from_pretrained(path.parent / DIFFUSERS_FOLDER, torch_dtype=dtype).eval()
        batch, _, rows, columns = inputs["noise"].shape
        places = torch.cartesian_prod(torch.arange(rows // PATCH), torch.arange(columns // PATCH))
        arguments = {
            "hidden_states": to_tokens(inputs["noise"]).to(dtype),
            "encoder_hidden_states": inputs["text"].expand(batch, -1, -1).to(dtype),
            "pooled_projections": inputs["pooled"].expand(batch, -1).to(dtype),
            "guidance": torch.full((batch,), GUIDANCE, dtype=dtype),
            "img_ids": torch.nn.functional.pad(places, (1, 0)).to(dtype),
            "txt_ids": torch.zeros(inputs["text"].shape[1], 3, dtype=dtype),
        }

        @torch.inference_mode()
        def step(sigma: float) -> Tensor:
            tokens = model(**arguments, timestep=torch.full((batch,), sigma, dtype=dtype), return_dict=False)[0]
            return from_tokens(tokens.float(), rows, columns)

        return Opened(step)

    return opened


def comfyui_engine(options: argparse.Namespace) -> Open:
    """ComfyUI's own FLUX on the CPU, loaded as its node for diffusion models loads it; of the host nothing else."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = [sys.argv[0], "--cpu", *(["--bf16-unet"] if options.dtype == "bfloat16" else ["--fp32-unet"])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management
    import comfy.sd

    dtype = getattr(torch, options.dtype)

    def opened(path: Path, inputs: Inputs) -> Opened:
        patcher = comfy.sd.load_diffusion_model(str(path))
        comfy.model_management.load_models_gpu([patcher])
        model, batch = patcher.model.diffusion_model, len(inputs["noise"])
        noise, text = inputs["noise"].to(dtype), inputs["text"].expand(batch, -1, -1).to(dtype)
        pooled, guidance = inputs["pooled"].expand(batch, -1).to(dtype), torch.full((batch,), GUIDANCE)

        @torch.inference_mode()
        def step(sigma: float) -> Tensor:
            return model(noise, torch.full((batch,), sigma), text, pooled, guidance).float()

        return Opened(step)

    return opened


ENGINES: dict[str, Callable[[argparse.Namespace], Open]] = {
    "fluxfoundry": our_engine, "diffusers": diffusers_engine, "comfyui": comfyui_engine,
}  # fmt: skip


def to_tokens(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) to tokens (B, h w / 4, 4 C), a square of four cells each."""
    batch, channels, rows, columns = latents.shape
    cut = latents.view(batch, channels, rows // PATCH, PATCH, columns // PATCH, PATCH)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns // PATCH**2, channels * PATCH**2)


def from_tokens(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Latents (B, C, rows, columns) of ``to_tokens``."""
    cut = tokens.view(len(tokens), rows // PATCH, columns // PATCH, -1, PATCH, PATCH)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, rows, columns)


def serve(options: argparse.Namespace, told: TextIO) -> None:
    """Open the file, take steps, and tell of them; see the module."""

    def tell(**found: Any) -> None:
        told.write(json.dumps(found) + "\n")
        told.flush()

    inputs = torch.load(options.file.parent / INPUTS)
    open_file = ENGINES[options.name](options)  # what is imported is not what grows
    before = peak_resident()
    opened = open_file(options.file, inputs)
    output = opened.step(SCHEDULE[0])
    tell(done=time.monotonic(), tables=opened.tables)
    for sigma in SCHEDULE[1:STEPS]:
        opened.step(sigma)
    grown = peak_resident() - before
    if options.output:
        torch.save(output, options.output)
    tell(grown=grown, threads=torch.get_num_threads(), torch=torch.__version__)
    for _ in sys.stdin:
        start = time.perf_counter()
        opened.step(TIME)
        tell(seconds=time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> int:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("name", choices=ENGINES)
    parser.add_argument("file", type=Path, help=f"with {INPUTS} beside it, and for diffusers {DIFFUSERS_FOLDER}")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of products (default: %(default)s)")
    parser.add_argument("--policy", default="auto", help="of ours (default: %(default)s)")
    parser.add_argument("--keep", default="auto", help="of ours (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where the first step's result is put")
    options = parser.parse_args(arguments)
    told = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries say things too
    serve(options, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
