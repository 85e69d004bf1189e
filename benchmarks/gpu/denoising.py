"""Whole runs beside diffusers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flux.pipelines.compiled import compiled_blocks
from flux.pipelines.denoising import walk
from flux.weights.diffusers_folder import config_of
from flux.weights.formats.base import DATA

from ..engines import PATCH, from_tokens, to_tokens
from .bench import Bench, ready
from .found import Bar, Found

__all__ = ["DIFFUSERS", "DIFFUSERS_COMPILED", "ENGINES", "FOUNDRY", "FOUNDRY_COMPILED", "FOUNDRY_FP8", "denoising"]

GB = 1e9
ROOM = 0.9  # of the card's memory that engines which run in turn may take together
FOUNDRY, FOUNDRY_FP8 = "FLUX Foundry", "FLUX Foundry, fp8"
FOUNDRY_COMPILED, FOUNDRY_FP8_COMPILED = "FLUX Foundry, compiled", "FLUX Foundry, fp8, compiled"
DIFFUSERS, DIFFUSERS_COMPILED = "diffusers", "diffusers, compiled"


@dataclass(frozen=True)
class Denoises:
    """An engine that is ready to denoise.

    Attributes:
        run: From noise to latents (B, C, h, w), on the CPU.
        once: Seconds that it took besides, for each prompt and schedule.
    """

    run: Callable[[], Tensor]
    once: float = 0.0


@contextmanager
def our_denoising(bench: Bench, stored: str, *, compiled: bool = False) -> Iterator[Denoises]:
    """Ours, with weights stored so."""
    noise, part = bench.noise(bench.size.side), bench.part(stored)
    blocks = compiled_blocks(part.module, backend=bench.compiler, tell=_not_compiled) if compiled else nullcontext()
    with ready(bench, part) as run, blocks:
        yield Denoises(lambda: walk(run.velocity, noise, bench.sigmas(), device=bench.device), run.tables)


def _not_compiled(reason: str) -> None:
    """What did not compile is not to pass for it."""
    raise RuntimeError(reason)


@contextmanager
def their_denoising(bench: Bench, *, compiled: bool) -> Iterator[Denoises]:
    """The model of diffusers with our weights and steps; compiled by blocks, as its documentation advises."""
    model = diffusers_model(bench)
    if compiled:
        compile_blocks = getattr(model, "compile_repeated_blocks", model.compile)
        compile_blocks(fullgraph=True, backend=bench.compiler)
    noise, sigmas, given = bench.noise(bench.size.side), bench.sigmas(), partial(torch.full, (1,), device=bench.device)
    rows, columns = noise.shape[-2:]
    prompt, spec = bench.prompt(), bench.size.spec
    places = torch.cartesian_prod(torch.arange(rows // PATCH), torch.arange(columns // PATCH))
    arguments = {
        "encoder_hidden_states": prompt.tokens.to(bench.device, bench.dtype),
        "pooled_projections": prompt.pooled.to(bench.device, bench.dtype),
        "guidance": given(spec.guidance, dtype=torch.float32),
        "img_ids": torch.nn.functional.pad(places, (1, 0)).to(bench.device, bench.dtype),
        "txt_ids": torch.zeros(spec.t5_length, 3, device=bench.device, dtype=bench.dtype),
    }

    @torch.inference_mode()
    def run() -> Tensor:
        x = to_tokens(noise.to(bench.device))
        for sigma, following in pairwise(sigmas):
            velocity = model(
                hidden_states=x.to(bench.dtype),
                timestep=given(sigma, dtype=bench.dtype),
                return_dict=False,
                **arguments,
            )[0]
            x = x + (following - sigma) * velocity
        return from_tokens(x, rows, columns).cpu()

    yield Denoises(run)


def diffusers_model(bench: Bench) -> Any:
    """The model of diffusers with our weights, on the device."""
    from diffusers import FluxTransformer2DModel

    from tests.oracles import flux1_to_diffusers  # the conversion that the parity tests prove

    config = {name: value for name, value in (config_of(bench.size.spec) or {}).items() if not name.startswith("_")}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    ours = {name: next(iter(own.kept.parts.values())).stored[DATA] for name, own in bench.weights().items()}
    model.load_state_dict(flux1_to_diffusers(ours), assign=True)
    return model.to(bench.device, bench.dtype).eval().requires_grad_(False)


ENGINES: dict[str, Callable[[Bench], AbstractContextManager[Denoises]]] = {
    FOUNDRY: lambda bench: our_denoising(bench, "bf16"),
    FOUNDRY_FP8: lambda bench: our_denoising(bench, "fp8"),
    FOUNDRY_COMPILED: lambda bench: our_denoising(bench, "bf16", compiled=True),
    FOUNDRY_FP8_COMPILED: lambda bench: our_denoising(bench, "fp8", compiled=True),
    DIFFUSERS: lambda bench: their_denoising(bench, compiled=False),
    DIFFUSERS_COMPILED: lambda bench: their_denoising(bench, compiled=True),
}
"""What denoises, in the order of the table."""

OURS = {FOUNDRY: "bf16", FOUNDRY_FP8: "fp8", FOUNDRY_COMPILED: "bf16", FOUNDRY_FP8_COMPILED: "fp8"}  # as stored

DENOISE_BARS = (
    ("FLUX Foundry of diffusers, both compiled", FOUNDRY_COMPILED, DIFFUSERS_COMPILED, 0.90),
    ("fp8 of bf16, both compiled", FOUNDRY_FP8_COMPILED, FOUNDRY_COMPILED, 0.70),
)
RESIDENT_BAR = ("GB of weights and tables of FLUX.1 [dev] in bf16 that stay", FOUNDRY, 17.4)
SECONDS_BARS = {"H200": ("FLUX Foundry, compiled, in seconds on an H200", FOUNDRY_COMPILED, 3.4)}  # by a card's name


@dataclass
class Denoised:
    """What an engine took: seconds of whole runs, and bytes."""

    once: float
    resident: int
    peak: int
    output: Tensor
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) + self.once


def denoising(bench: Bench) -> Found:
    """Whole runs of every engine: in turn where they fit together, else one engine after the other."""
    found, notes = dict[str, Denoised](), list[str]()
    for group in _groups(bench):
        _in_turn(bench, group, found, notes)
    operations = bench.size.steps * bench.plan(bench.part(), bench.size.side).operations
    rows = [
        {
            "engine": name,
            "seconds": own.median,
            "of which once a prompt": own.once,
            "a step": statistics.median(own.seconds) / bench.size.steps,
            "of the bf16 roofline": operations / bench.rate / own.median,
            "resident": own.resident,
            "peak": own.peak,
            "difference": _difference(own.output, next(iter(found.values())).output),
        }
        for name, own in found.items()
    ]
    bars = [
        Bar(what, found[one].median / found[other].median if {one, other} <= set(found) else None, most)
        for what, one, other, most in DENOISE_BARS
    ]
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else ""
    bars += [
        Bar(what, found[one].median if one in found else None, most)
        for word, (what, one, most) in SECONDS_BARS.items()
        if word in name
    ]
    what, one, most = RESIDENT_BAR
    if bench.is_judged:
        bars.append(Bar(what, found[one].resident / GB if one in found else None, most))
    return Found(rows, bars, notes)


def _in_turn(bench: Bench, group: Sequence[str], found: dict[str, Denoised], notes: list[str]) -> None:
    """Have engines that are there at once denoise one after the other, again and again; all are gone at the end.

    One that fails is noted, and the others go on.
    """
    with ExitStack() as held:
        engines = {}
        for name in group:
            engine = _try(held, bench, name, found, notes)
            if engine is not None:
                engines[name] = engine
        for _ in range(bench.repeats):
            for name, engine in engines.items():
                found[name].seconds.append(bench.timed(engine.run))


def _try(held: ExitStack, bench: Bench, name: str, found: dict[str, Denoised], notes: list[str]) -> Denoises | None:
    try:
        return _enter(held, bench, name, found)
    except Exception as error:  # noqa: BLE001 - whatever a peer or a compiler raises
        notes.append(f"{name} failed: {type(error).__name__}: {error}")
        return None


def _enter(held: ExitStack, bench: Bench, name: str, found: dict[str, Denoised]) -> Denoises:
    """An engine, warm; what it takes is noted."""
    before = bench.begin_peak()
    engine = held.enter_context(ENGINES[name](bench))
    resident = bench.allocated() - before
    output = engine.run()
    found[name] = Denoised(engine.once, resident, bench.peak() - before, output)
    return engine


def _groups(bench: Bench) -> list[list[str]]:
    """Engines that are there at once."""
    if bench.device.type != "cuda":
        return [list(ENGINES)]
    needed = sum(_bytes_of(bench, name) for name in ENGINES)
    total = torch.cuda.get_device_properties(bench.device).total_memory
    return [list(ENGINES)] if needed <= ROOM * total else [[name] for name in ENGINES]


def _bytes_of(bench: Bench, name: str) -> int:
    """That an engine's weights take."""
    if name not in OURS:
        return sum(own.nbytes for own in bench.weights().values())
    part = bench.part(OURS[name])
    return part.residency.accounts.footprint(tuple(part.module.modulation_layers())).device_bytes


def _difference(one: Tensor, other: Tensor) -> float:
    """The norm of what differs, of the norm."""
    return float((one - other).norm() / other.norm())
