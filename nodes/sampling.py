"""Nodes that plan the steps from noise to a latent, and take them."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..flux.errors import UserError
from ..flux.sampling.schedules import check_sigmas
from .fields import ROOT, cfg, denoise, guidance, schedule, schema, seed, side, solver, steps
from .sizes import image_tokens

__all__ = ["NODES"]

CATEGORY = f"{ROOT}/sampling"
WITHOUT_SIGMAS = " Ignored when sigmas are given."


class Schedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundrySchedule",
            display_name="FLUX Schedule",
            category=CATEGORY,
            description="Plans the times of a run, shifted by the picture's size as FLUX was trained.",
            search_aliases=["scheduler", "sigmas", "basic scheduler", "mu", "shift"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will run: it says whether its steps are shifted."),
                steps(),
                schedule(),
                denoise(),
                side("width", "Pixels across of the picture, which decide the shift. Ignored when a latent is given."),
                side("height", "Pixels down, likewise."),
                io.String.Input(
                    "explicit",
                    default="",
                    placeholder="1.0, 0.75, 0.5, 0.25, 0",
                    tooltip="Sigmas of your own, falling from at most 1 to 0, parted by commas or spaces. With any, "
                    "every other input is ignored.",
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="Its size decides the shift, in place of width and height."
                ),
                io.Float.Input(
                    "mu",
                    optional=True,
                    force_input=True,
                    min=-20.0,
                    max=20.0,
                    tooltip="A shift of your own: 0 none, 1.15 FLUX.1's at 1024x1024, more: more steps near noise. "
                    "Not connected: from the picture's size.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    display_name="sigmas",
                    tooltip="steps + 1 times, for FLUX Sampler or SamplerCustomAdvanced. None at denoise 0.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        steps: int,
        schedule: str,
        denoise: float,
        width: int,
        height: int,
        explicit: str,
        latent: dict[str, Any] | None = None,
        mu: float | None = None,
    ) -> io.NodeOutput:
        from .bridge.sampling import plan, tokens_of

        if explicit.strip():
            times = parse_sigmas(explicit)
        else:
            tokens = image_tokens(width, height) if latent is None else tokens_of(latent)
            times = plan(model, tokens, steps, schedule, denoise, mu)
        return io.NodeOutput(torch.tensor(times, dtype=torch.float32))


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundrySampler",
            display_name="FLUX Sampler",
            category=CATEGORY,
            description="Draws: takes a latent from noise to a picture that follows the conditioning.",
            search_aliases=["ksampler", "sampler custom", "denoise", "generate"],
            inputs=[
                io.Model.Input("model", tooltip="A FLUX model, from this pack's loaders or any other."),
                io.Conditioning.Input(
                    "positive", tooltip="What to draw: from FLUX Text Encode or any FLUX.1 text node."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="Where to draw: an empty latent, or an encoded picture with denoise below 1. A noise mask "
                    "in it is honoured, and what it keeps stays as it is.",
                ),
                seed(),
                steps(WITHOUT_SIGMAS),
                guidance(
                    0.0,
                    "How closely to follow the prompt, in place of what the conditioning carries. 0: what the "
                    "conditioning carries, which FLUX Text Encode and FluxGuidance set. Models without guidance "
                    "([schnell]) ignore it.",
                ),
                schedule(WITHOUT_SIGMAS),
                solver(),
                denoise(WITHOUT_SIGMAS),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to stay away from. It takes effect when cfg is not 1."
                ),
                cfg(
                    "Strength of the push from negative to positive: 1 is off and twice as fast; 2 to 4 is "
                    "usual for FLUX. Ignored without a negative.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Times of your own, from FLUX Schedule or any scheduler, in place of steps, schedule and "
                    "denoise.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The finished latent: for FLUX Decode or VAE Decode.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        latent: dict[str, Any],
        seed: int,
        steps: int,
        guidance: float,
        schedule: str,
        solver: str,
        denoise: float,
        negative: Any = None,
        cfg: float = 1.0,
        sigmas: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        from .bridge.sampling import Run, plan, sample, tokens_of

        times = plan(model, tokens_of(latent), steps, schedule, denoise) if sigmas is None else sigmas.tolist()
        run = Run(
            positive=positive, negative=negative, cfg=cfg, guidance=guidance, seed=seed, sigmas=times, solver=solver
        )
        return io.NodeOutput(sample(model, latent, run))


def parse_sigmas(text: str) -> list[float]:
    """Numbers parted by commas, semicolons or white space, checked to be sigmas.

    Raises:
        UserError: One is not a number, or they are no falling times in 0..1.
    """
    try:
        values = [float(word) for word in text.replace(",", " ").replace(";", " ").split()]
    except ValueError as error:
        raise UserError(f"explicit sigmas: {error}; write numbers like 1.0, 0.5, 0") from error
    return check_sigmas(values)


NODES: list[type[io.ComfyNode]] = [Schedule, Sampler]
