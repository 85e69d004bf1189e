"""What recurs in schemas: categories, and inputs that several nodes share, defined once."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ..flux.adapters.guides import MAX_STRENGTH
from ..flux.memory.policy import AUTO, BUDGET, GIB, POLICIES, Policy
from ..flux.sampling.noise import SEEDS
from ..flux.sampling.schedules import MAX_STEPS, SCHEDULES
from ..flux.sampling.solvers import SOLVERS

__all__ = [
    "CROP",
    "ROOT",
    "batch_size",
    "budget",
    "cfg",
    "denoise",
    "dtype",
    "end",
    "guidance",
    "memory",
    "memory_policy",
    "negative_input",
    "negative_output",
    "policy",
    "schedule",
    "schema",
    "seed",
    "side",
    "solver",
    "start",
    "steps",
    "strength",
    "vae_input",
]

ROOT = "FLUX Foundry"
CROP = io.Custom("FLUXFOUNDRY_CROP")  # carries the engine's ``Crop``, ``Canvas`` or ``FittedReference``
DTYPES = ("auto", "bf16", "fp16", "fp32")
MAX_SIDE = 2048
MAX_BATCH = 64


def schema(**fields: object) -> io.Schema:
    """An ``io.Schema`` of the given fields, without those that an older host does not know (``search_aliases``)."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(**{name: value for name, value in fields.items() if name in known})


def seed() -> io.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=SEEDS - 1,
        control_after_generate=True,
        tooltip="Where the starting noise comes from: the same seed and settings give the same picture. Picture k of a "
        "batch is drawn from seed + k, so that it equals a run of its own with that seed.",
    )


def steps(tooltip: str = "") -> io.Input:
    return io.Int.Input(
        "steps",
        default=20,
        min=1,
        max=MAX_STEPS,
        tooltip="How many steps lead from noise to the picture. More is slower and finer. FLUX.1 [dev] takes 20 to 50, "
        f"[schnell] 4, the embedded model 16, its schnell 4.{tooltip}",
    )


def guidance(default: float, tooltip: str) -> io.Input:
    return io.Float.Input("guidance", default=default, min=0.0, max=100.0, step=0.1, round=0.001, tooltip=tooltip)


def schedule(tooltip: str = "") -> io.Input:
    return io.Combo.Input(
        "schedule",
        options=list(SCHEDULES),
        default="flux",
        tooltip="How the steps are spread between noise and picture. flux: as the model was trained, shifted by the "
        "picture's size; simple and beta: ComfyUI's schedules of those names with the same shift; linear: even steps "
        f"without a shift.{tooltip}",
    )


def solver() -> io.Input:
    return io.Combo.Input(
        "solver",
        options=list(SOLVERS),
        default="euler",
        tooltip="How a step is computed. euler: one model run a step, the reference; heun: two runs, finer at few "
        "steps; dpmpp_2m: one run, uses the step before; dpmpp_2m_snr: the same on the paper's time scale.",
    )


def denoise(tooltip: str = "") -> io.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="How much of the incoming latent to make anew: 1 starts from pure noise, 0.5 keeps the layout of a "
        f"picture, 0 changes nothing. Below 1 give an encoded picture, not an empty latent.{tooltip}",
    )


def dtype() -> io.Input:
    return io.Combo.Input(
        "dtype",
        options=list(DTYPES),
        default="auto",
        tooltip="Number format that the weights are kept in. auto: as the file has them, or what the device prefers; "
        "packed ones (fp8, GGUF, nf4, ...) stay packed and are unpacked layer by layer while they are used. bf16, fp16 "
        "and fp32 unpack everything when it is loaded; bf16 and fp16 take half of fp32's memory.",
    )


def cfg(tooltip: str) -> io.Input:
    return io.Float.Input(
        "cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01, optional=True, tooltip=tooltip
    )  # fmt: skip


def memory_policy(tooltip: str) -> io.Input:
    return io.Combo.Input("memory", options=[*POLICIES, BUDGET], default=AUTO, optional=True, tooltip=tooltip)


def memory(what: str) -> io.Input:
    return memory_policy(
        f"How much of {what} stays on the graphics card; the rest is streamed while it runs, which is slower "
        "and gives the same picture. auto: as much as ComfyUI finds room for. keep: all of it. balance: half of the "
        "blocks. save: none, the least memory. budget: as much as fits into the number of GiB below. ComfyUI may take "
        "more away when it needs room.",
    )


def budget() -> io.Input:
    return io.Float.Input(
        "budget",
        default=8.0,
        min=0.1,
        max=1024.0,
        step=0.1,
        round=0.001,
        optional=True,
        tooltip="GiB that it may take at most while it runs, what it computes with among them. Ignored unless memory "
        "is budget. Too small a number is answered with the least that would do.",
    )


def policy(memory: str, gib: float) -> Policy:
    """What the two inputs grant."""
    return Policy(BUDGET, int(gib * GIB)) if memory == BUDGET else Policy(memory)


def side(name: str, tooltip: str, default: int = 1024) -> io.Input:
    return io.Int.Input(name, default=default, min=16, max=MAX_SIDE, step=16, tooltip=tooltip)


def batch_size() -> io.Input:
    return io.Int.Input(
        "batch_size",
        default=1,
        min=1,
        max=MAX_BATCH,
        tooltip="How many pictures to make in one run. Memory grows with it.",
    )


def strength(tooltip: str) -> io.Input:
    return io.Float.Input("strength", default=1.0, min=0.0, max=MAX_STRENGTH, step=0.05, round=0.001, tooltip=tooltip)


def start(tooltip: str) -> io.Input:
    return io.Float.Input("start", default=0.0, min=0.0, max=1.0, step=0.01, round=0.001, tooltip=tooltip)


def end(tooltip: str) -> io.Input:
    return io.Float.Input("end", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001, tooltip=tooltip)


def vae_input() -> io.Input:
    return io.Vae.Input("vae", tooltip="The model's autoencoder, which encodes the picture.")


def negative_input() -> io.Input:
    return io.Conditioning.Input(
        "negative",
        optional=True,
        tooltip="What to stay away from, which gets the same. It takes effect only in a sampler whose cfg is not 1. "
        "Not connected: the prompt stands for it, so that cfg has no effect.",
    )


def negative_output(what: str) -> io.Output:
    return io.Conditioning.Output(
        display_name="negative",
        tooltip=f"The negative prompt with {what}: for a sampler's negative input. Without a negative prompt the same "
        "as positive.",
    )
