"""Nodes that let a picture follow the edges or the depth of another one, and that find those."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..flux.preprocess.control import FITS
from ..flux.preprocess.depth import EXAMPLE, NORMALISATIONS
from .bridge.depth import depth_folder, depth_models
from .fields import ROOT, end, negative_input, negative_output, schema, start, strength, vae_input
from .filling import CATEGORY

__all__ = ["NODES"]

PREPARING = f"{ROOT}/preprocessing"
MAX_SLOT = 4

# What the engine and the bridge name likewise, written out so that a start of ComfyUI does not wait for OpenCV.
KINDS = ("canny", "depth", "image")
LOW, HIGH, MAX_THRESHOLD = 50.0, 200.0, 2040.0


def thresholds(when: str = "") -> list[io.Input]:
    """What counts as an edge."""
    scale = "on OpenCV's scale, on which a step of one of 255 levels counts 4"
    return [
        io.Float.Input(
            "low",
            default=LOW,
            min=0.0,
            max=MAX_THRESHOLD,
            step=5.0,
            round=0.1,
            tooltip=f"Down to what contrast an edge is followed once it began, {scale}: less gives longer edges. "
            f"FLUX.1 Canny was trained with 50.{when} Ignored if automatic is on.",
        ),
        io.Float.Input(
            "high",
            default=HIGH,
            min=0.0,
            max=MAX_THRESHOLD,
            step=5.0,
            round=0.1,
            tooltip=f"From what contrast an edge begins, {scale}: less gives more edges, more only the strongest; not "
            f"below low. FLUX.1 Canny was trained with 200.{when} Ignored if automatic is on.",
        ),
        io.Boolean.Input(
            "automatic",
            default=False,
            tooltip="Whether each picture chooses both thresholds by its own contrasts (Otsu's method), for flat, dark "
            f"or foggy ones.{when}",
        ),
    ]


class Control(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryControl",
            display_name="FLUX Control",
            category=CATEGORY,
            description="Gives a control model (FLUX.1 Canny, Depth) or a control LoRA a picture to follow. One behind "
            "another for several, each with its slot.",
            search_aliases=["canny", "depth", "controlnet", "instruct pix2pix conditioning", "structure"],
            has_intermediate_output=True,
            inputs=[
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt: what to draw. FLUX.1 Canny takes guidance 30, Depth 10. What it carries "
                    "already stays: holes, references, controls in other slots.",
                ),
                vae_input(),
                io.Image.Input(
                    "image",
                    tooltip="The picture that is followed; see kind. Of a batch picture k is followed by picture k of "
                    "the latent.",
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default=KINDS[0],
                    tooltip="What image is. canny: a photo, whose edges are found. depth: a depth picture, bright "
                    "where near, as it is (from FLUX Depth or any other depth node). image: edges or another control "
                    "picture, as it is.",
                ),
                *thresholds(" Used with kind canny only."),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default=FITS[0],
                    tooltip="How an image of another aspect than the latent is brought to its size. stretch: all of "
                    "it, with its shapes changed; crop: its middle; pad: all of it in shape, its edge repeated beside "
                    "it. Ignored where the aspect is the same.",
                ),
                strength(
                    "How much of each step follows the control: 1 as the model was trained, less is freer, more is "
                    "stiffer, 0 leaves it out. Other numbers than 1 take a second model run a step; a control LoRA has "
                    "a strength of its own in Load FLUX Control LoRA, which costs nothing: leave this one at 1 then, "
                    "for the LoRA stays on the model, and what is left out here is drawn from an empty picture."
                ),
                start(
                    "From when it is followed, as a fraction of the run: 0 from the first step, where the layout is "
                    "decided."
                ),
                end(
                    "Until when it is followed, as a fraction of the run: 1 to the last step; 0.3 to 0.6 leaves "
                    "details to the prompt. It has to be larger than start."
                ),
                io.Int.Input(
                    "slot",
                    default=1,
                    min=1,
                    max=MAX_SLOT,
                    tooltip="Which control of the model takes the picture: 1 for FLUX.1 Canny and Depth and for the "
                    "first Load FLUX Control LoRA, 2 for the second, and so on.",
                ),
                negative_input(),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="What is drawn on: it gives the size and the number of pictures, and goes through as it "
                    "is, with its noise mask. Not connected: an empty one of the image's own size, at multiples of 16.",
                ),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip="Where in the drawn picture the control is followed: white fully, grey less, black not at "
                    "all; one mask. It takes a second model run a step. Not connected: everywhere.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive",
                    tooltip="The prompt with the control: for a sampler's positive input, or a further node.",
                ),
                negative_output("the control"),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The latent that came in, unchanged; else an empty one of the control's size: for a "
                    "sampler.",
                ),
                io.Image.Output(
                    display_name="image", tooltip="What the model will see: edges or depth at the drawn size."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive: Any,
        vae: Any,
        image: Any,
        kind: str,
        low: float,
        high: float,
        automatic: bool,
        fit: str,
        strength: float,
        start: float,
        end: float,
        slot: int,
        negative: Any = None,
        latent: Any = None,
        region: Any = None,
    ) -> io.NodeOutput:
        from .bridge.control import Edges, add_control, control_picture

        seen = control_picture(image, kind, latent, fit, Edges(low=low, high=high, automatic=automatic))
        added = add_control(
            positive,
            negative,
            vae,
            seen,
            strength=strength,
            start=start,
            end=end,
            slot=slot,
            region=region,
            latent=latent,
        )
        return io.NodeOutput(*added, seen, ui=ui.PreviewImage(seen, cls=cls))


class Canny(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryCanny",
            display_name="FLUX Canny",
            category=PREPARING,
            description="Finds a picture's edges by OpenCV's Canny, as the FLUX.1 Canny models were trained with them.",
            search_aliases=["edge detection", "canny edge", "lineart", "preprocessor"],
            has_intermediate_output=True,
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="A photo or drawing. Best at the size that will be drawn, for edges get lost when they "
                    "are resized; FLUX Control with kind canny sees to that itself.",
                ),
                *thresholds(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="White edges on black, at the picture's size: for FLUX Control with kind image.",
                )
            ],
        )

    @classmethod
    def execute(cls, image: Any, low: float, high: float, automatic: bool) -> io.NodeOutput:
        from .bridge.control import Edges, edges_of

        edges = edges_of(image, Edges(low=low, high=high, automatic=automatic))
        return io.NodeOutput(edges, ui=ui.PreviewImage(edges, cls=cls))


class Depth(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryDepth",
            display_name="FLUX Depth",
            category=PREPARING,
            description="Estimates a picture's depth by a depth model on this machine. Any other depth node's picture "
            "does as well for FLUX Control.",
            search_aliases=["depth anything", "depth map", "midas", "preprocessor"],
            has_intermediate_output=True,
            inputs=[
                io.Image.Input("image", tooltip="A photo. Each picture of a batch is looked at by itself."),
                io.Combo.Input(
                    "model",
                    options=depth_models(),
                    tooltip=f"A folder in ComfyUI's models/depth with a depth model in transformers' format, such as "
                    f"{EXAMPLE}: config.json, preprocessor_config.json and model.safetensors. Nothing is downloaded; "
                    "other places go into extra_model_paths.yaml as depth.",
                ),
                io.Combo.Input(
                    "normalisation",
                    options=list(NORMALISATIONS),
                    default=NORMALISATIONS[0],
                    tooltip="minmax: stretched from black to white for each picture, as most depth nodes do; bfl: the "
                    "model's numbers / 255, unstretched, as Black Forest Labs' own code shows them to FLUX.1 Depth; "
                    "none: the model's numbers, for other nodes.",
                ),
                io.Boolean.Input(
                    "invert",
                    default=False,
                    tooltip="Whether to turn near and far over. FLUX takes near as bright, and so it is without this "
                    "for common models.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="Depth at the picture's size, bright where near: for FLUX Control with kind depth.",
                )
            ],
        )

    @classmethod
    def execute(cls, image: Any, model: str, normalisation: str, invert: bool) -> io.NodeOutput:
        from .bridge.control import depth_of

        depth = depth_of(image, depth_folder(model), normalisation, invert)
        return io.NodeOutput(depth, ui=ui.PreviewImage(depth, cls=cls))


NODES: list[type[io.ComfyNode]] = [Control, Canny, Depth]
