"""Nodes that make latents and turn them into pictures."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from .fields import ROOT, batch_size, schema, side
from .sizes import ASPECTS, EXACT, picture_size

__all__ = ["NODES"]

CATEGORY = f"{ROOT}/latents"
CELL = 8  # pixels of a latent cell along each side
CHANNELS = 16


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        only_exact = f"Used only with '{EXACT}'. Rounded to a multiple of 16."
        return schema(
            node_id="FluxFoundryEmptyLatent",
            display_name="FLUX Empty Latent",
            category=CATEGORY,
            description="An empty latent to draw on: its size from an aspect ratio and megapixels, or exact.",
            search_aliases=["empty latent image", "resolution", "aspect ratio", "size", "width height"],
            inputs=[
                io.Combo.Input(
                    "aspect",
                    options=list(ASPECTS),
                    default="1:1",
                    tooltip="Width to height of the picture. The embedded model is at home at 128x128.",
                ),
                io.Float.Input(
                    "megapixels",
                    default=1.0,
                    min=0.01,
                    max=4.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Area of an aspect preset: 1 is 1024x1024 at 1:1, FLUX.1's home; 0.1 to 2 work. No "
                    f"side gets longer than 2048. Ignored with 128x128 and '{EXACT}'.",
                ),
                side("width", f"Pixels across. {only_exact}"),
                side("height", f"Pixels down. {only_exact}"),
                batch_size(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="For FLUX Sampler, KSampler and others."),
                io.Int.Output(display_name="width", tooltip="Pixels across, as used."),
                io.Int.Output(display_name="height", tooltip="Pixels down, as used."),
            ],
        )

    @classmethod
    def execute(cls, aspect: str, megapixels: float, width: int, height: int, batch_size: int) -> io.NodeOutput:
        wide, high = picture_size(aspect, megapixels, width, height)
        if aspect == EXACT and (wide, high) != (width, height):
            from .bridge.progress import say

            say(f"{width} x {height} is not a multiple of 16: {wide} x {high} is used")
        samples = torch.zeros(batch_size, CHANNELS, high // CELL, wide // CELL)
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": CELL}, wide, high)


class Decode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryDecode",
            display_name="FLUX Decode",
            category=CATEGORY,
            description="Turns latents into pictures.",
            search_aliases=["vae decode", "latent to image"],
            inputs=[
                io.Vae.Input("vae", tooltip="The autoencoder of the model that made the latent."),
                io.Latent.Input("latent", tooltip="From FLUX Sampler or any other sampler."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The pictures, one for each entry of the latent.")],
        )

    @classmethod
    def execute(cls, vae: Any, latent: dict[str, Any]) -> io.NodeOutput:
        from .bridge.vae import decode_latent

        return io.NodeOutput(decode_latent(vae, latent))


NODES: list[type[io.ComfyNode]] = [EmptyLatent, Decode]
