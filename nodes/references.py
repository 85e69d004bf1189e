"""Nodes that give a model pictures to look at."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..flux.models.positions import LAYOUTS
from ..flux.preprocess.references import REFERENCE_FITS
from .fields import CROP, ROOT, end, schema, start, strength

__all__ = ["NODES"]

AUTO = "auto"


class Reference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryReference",
            display_name="FLUX Reference",
            category=f"{ROOT}/conditioning",
            description="Gives an editing model (FLUX.1 Kontext) a picture to look at. One behind another for several.",
            search_aliases=["kontext", "reference latent", "edit", "image edit", "reference image"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="The prompt: what to change ('make the circle green'), or what to make of the pictures. "
                    "References that it carries already stay.",
                ),
                io.Vae.Input("vae", tooltip="The model's autoencoder, which encodes the picture."),
                io.Image.Input(
                    "image",
                    tooltip="The picture to look at. Of a batch picture k is looked at by picture k of the latent; for "
                    "several references at once put several of these nodes one behind another.",
                ),
                strength(
                    "How much it is looked at: 1 as the model was trained, less keeps less of it, more clings to it; 0 "
                    "leaves it out. Other numbers than 1 need a MODEL of FLUX Foundry.",
                ),
                start(
                    "From when it is looked at, as a fraction of the run: 0 from the beginning, where the layout is "
                    "decided.",
                ),
                end("Until when, likewise: 1 to the end, where details are decided. More than start."),
                io.Combo.Input(
                    "layout",
                    options=[AUTO, *LAYOUTS],
                    default=AUTO,
                    tooltip="Where the model is told that references are, which matters with several. auto: its own "
                    "way, offset for FLUX.1. offset: side by side; index: one behind another; uxo: on a diagonal from "
                    "the picture's corner. The last FLUX Reference that is not auto counts for all.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(REFERENCE_FITS),
                    default=REFERENCE_FITS[0],
                    tooltip="How it is brought to sides that divide by 16. pad: no pixel moves, edges are repeated on "
                    "the right and below; kontext: resized to the nearest of the sizes that Kontext was trained on, "
                    "which changes its aspect a little; crop: cut evenly.",
                ),
                io.Float.Input(
                    "max_megapixels",
                    default=1.0,
                    min=0.01,
                    max=16.0,
                    step=0.01,
                    round=0.001,
                    tooltip="A larger picture is scaled down to so many megapixels (of 1024x1024), with its aspect "
                    "kept, and that is said; with fit pad FLUX Stitch scales the result back. More takes more time and "
                    "memory. Ignored by fit kontext.",
                ),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip="Where in the new picture the reference is seen: 1 is fully, 0 not at all. Not connected: "
                    "everywhere. Needs a MODEL of FLUX Foundry.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="The prompt with the picture: for a sampler, or a further node.",
                ),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="An empty latent of the picture's size on the grid: for a sampler, so that what it draws "
                    "is as large as the picture and lies where it lay.",
                ),
                CROP.Output(
                    display_name="crop",
                    tooltip="For FLUX Stitch, which cuts from the decoded picture what was added to reach the grid, "
                    "and with fit pad gives it the reference's own size.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        conditioning: Any,
        vae: Any,
        image: Any,
        strength: float,
        start: float,
        end: float,
        layout: str,
        fit: str,
        max_megapixels: float,
        region: Any = None,
    ) -> io.NodeOutput:
        from .bridge.references import add_reference

        referring, latent, crop = add_reference(
            conditioning,
            vae,
            image,
            strength=strength,
            region=region,
            start=start,
            end=end,
            layout=None if layout == AUTO else layout,
            fit=fit,
            megapixels=max_megapixels,
        )
        return io.NodeOutput(referring, latent, crop, ui=ui.PreviewImage(crop.picture, cls=cls))


NODES: list[type[io.ComfyNode]] = [Reference]
