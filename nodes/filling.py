"""Nodes that give a Fill model a picture to paint into, and the inputs of nodes that act for a time."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..flux.pipelines.guided import ROUNDINGS
from .fields import ROOT, end, negative_input, negative_output, schema, start, strength, vae_input

__all__ = ["CATEGORY", "NODES", "end", "negative_input", "negative_output", "start", "strength", "vae_input"]

CATEGORY = f"{ROOT}/conditioning"


class Fill(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryFill",
            display_name="FLUX Fill",
            category=CATEGORY,
            description="Gives a Fill model (FLUX.1 Fill) a picture and a mask of what to paint in it.",
            search_aliases=["inpaint", "outpaint", "inpaint model conditioning", "flux fill", "mask"],
            inputs=[
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt: what to paint there, or what the whole picture shows. FLUX.1 Fill takes "
                    "guidance 30. Controls and references that it carries stay.",
                ),
                vae_input(),
                io.Image.Input(
                    "image",
                    tooltip="The picture, best from FLUX Inpaint Crop or FLUX Outpaint, at a size that the model "
                    "paints well. Of another one whose sides do not divide by 8 the middle is taken.",
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="White where the picture is painted anew, grey partly, black where it is kept. One for all "
                    "pictures, or one each; resized to the picture if of another size.",
                ),
                strength(
                    "How much of each step sees the picture: 1 as the model was trained, less is freer and the "
                    "surroundings count less, more clings to them; 0 leaves the picture out. Other numbers than 1 "
                    "take a second model run a step, in which all of the picture is hidden by grey."
                ),
                start("From when the picture is seen, as a fraction of the run: 0 from the first step."),
                end(
                    "Until when it is seen, as a fraction of the run: 1 to the last step. It has to be larger than "
                    "start."
                ),
                io.Combo.Input(
                    "rounding",
                    options=list(ROUNDINGS),
                    default=ROUNDINGS[0],
                    tooltip="How the grey of a soft mask is taken; the same in all for a mask of black and white. "
                    "soft: as it is (Black Forest Labs). hidden: pixels are hidden fully or not at all, and the model "
                    "sees the soft mask (ComfyUI's InpaintModelConditioning). binary: black or white throughout "
                    "(diffusers).",
                ),
                io.Boolean.Input(
                    "noise_mask",
                    default=False,
                    tooltip="Whether the sampler also holds the latent where the mask is black. Off: the model paints "
                    "the whole picture and mostly keeps the rest, which FLUX Stitch makes exact; seams are softer. On: "
                    "as with ComfyUI's noise masks, and also models without Fill paint inside the mask only.",
                ),
                negative_input(),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip="White where in the new picture the picture with its hole is seen; elsewhere all is drawn "
                    "anew, as from a picture that is hidden as a whole. Not connected: everywhere. It is stretched to "
                    "the new picture.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive",
                    tooltip="The prompt with the picture and the mask: for a sampler's positive input.",
                ),
                negative_output("the picture and the mask"),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The encoded picture, for a sampler: at denoise 1 only its size and the noise mask count, "
                    "below 1 the run goes on from it.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive: Any,
        vae: Any,
        image: Any,
        mask: Any,
        strength: float,
        start: float,
        end: float,
        rounding: str,
        noise_mask: bool,
        negative: Any = None,
        region: Any = None,
    ) -> io.NodeOutput:
        from .bridge.filling import add_hole

        *outputs, seen = add_hole(
            positive,
            negative,
            vae,
            image,
            mask,
            strength=strength,
            start=start,
            end=end,
            rounding=rounding,
            noise_mask=noise_mask,
            region=region,
        )
        return io.NodeOutput(*outputs, ui=ui.PreviewImage(seen, cls=cls))


NODES: list[type[io.ComfyNode]] = [Fill]
