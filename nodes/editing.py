"""Nodes that prepare pictures to be painted into, and put what was painted back without touching the rest."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .fields import CROP, MAX_SIDE, ROOT, schema

__all__ = ["NODES"]

CATEGORY = f"{ROOT}/editing"

# What the engine names likewise, written out so that a start of ComfyUI does not wait for OpenCV.
MAX_CONTEXT, MAX_GROW, MAX_BLUR = 100.0, 512, 256.0
ANCHORS = ("center", "left", "right", "top", "bottom")
FILLS = ("grey", "edge")

BY_SIDES = "off"
ASPECTS: dict[str, tuple[int, int]] = {
    f"{across}:{down}": (across, down)
    for across, down in (
        (1, 1), (4, 3), (3, 2), (16, 9), (21, 9), (3, 4), (2, 3), (9, 16), (9, 21),
    )
}  # fmt: skip
MAX_ADDED = 4096
MAX_FEATHER = 256


class InpaintCrop(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryInpaintCrop",
            display_name="FLUX Inpaint Crop",
            category=CATEGORY,
            description="Cuts out what surrounds a mask, at the size that the model paints best. FLUX Stitch puts what "
            "was painted back, and all else stays bit for bit as it was.",
            search_aliases=["crop and stitch", "inpaint", "mask crop", "context", "masked only"],
            has_intermediate_output=True,
            inputs=[
                io.Image.Input("image", tooltip="The picture, of any size."),
                io.Mask.Input(
                    "mask",
                    tooltip="White where the picture is to change, grey partly, black where it is kept exactly. One "
                    "for all pictures, or one each; resized to the picture if of another size.",
                ),
                io.Int.Input(
                    "side",
                    default=1024,
                    min=0,
                    max=MAX_SIDE,
                    step=16,
                    tooltip="The crop is resized until its area is that of a square with this side, in pixels: 1024 "
                    "is FLUX.1's home, 128 the embedded model's. More is finer and slower. 0 keeps the picture's "
                    "scale.",
                ),
                io.Float.Input(
                    "context",
                    default=1.5,
                    min=1.0,
                    max=MAX_CONTEXT,
                    step=0.1,
                    round=0.01,
                    tooltip="How many times larger than the mask's box the crop is: 1 is tight; more shows the model "
                    "more of what is around, at less detail; 100 takes the whole picture.",
                ),
                io.Int.Input(
                    "min_context",
                    default=32,
                    min=0,
                    max=MAX_SIDE,
                    tooltip="How many pixels of surroundings the crop has at least on each side, for small masks. 0 "
                    "leaves it to context.",
                ),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=-MAX_GROW,
                    max=MAX_GROW,
                    tooltip="Pixels by which the mask is widened in every direction, to cover shadows and edges; less "
                    "than 0 shrinks it, 0 leaves it.",
                ),
                io.Float.Input(
                    "blur",
                    default=0.0,
                    min=0.0,
                    max=MAX_BLUR,
                    step=0.5,
                    round=0.01,
                    tooltip="How soft the seam is, in pixels. All of it lies inside the mask, so that what the mask "
                    "keeps stays exact; give grow as much to make up for it. 0 is a hard seam.",
                ),
                io.Boolean.Input(
                    "fill_holes",
                    default=False,
                    tooltip="Whether to paint also what the mask encloses, as after drawing only an outline.",
                ),
                io.Boolean.Input(
                    "invert", default=False, tooltip="Whether to paint what the mask keeps, and keep the rest."
                ),
                io.Int.Input(
                    "multiple",
                    default=16,
                    min=8,
                    max=128,
                    step=8,
                    tooltip="What the crop's sides divide by, in pixels: 16 for FLUX; more only if another node asks "
                    "for it.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The crop: for FLUX Fill, or any other way to paint."),
                io.Mask.Output(display_name="mask", tooltip="What to paint of the crop, at its size."),
                CROP.Output(display_name="crop", tooltip="For FLUX Stitch: the whole picture, and where the crop was."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Any,
        mask: Any,
        side: int,
        context: float,
        min_context: int,
        grow: int,
        blur: float,
        fill_holes: bool,
        invert: bool,
        multiple: int,
    ) -> io.NodeOutput:
        from ..flux.editing.inpaint import CropOptions
        from ..flux.editing.masks import MaskOptions
        from .bridge.filling import cut_out, tinted

        options = MaskOptions(invert=invert, fill_holes=fill_holes, grow=grow, blur=blur)
        asked = CropOptions(context=context, min_context=min_context, side=side, multiple=multiple, mask=options)
        crop = cut_out(image, mask, asked)
        preview = ui.PreviewImage(tinted(crop.picture, crop.mask), cls=cls)
        return io.NodeOutput(crop.picture, crop.mask, crop, ui=preview)


class Stitch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryStitch",
            display_name="FLUX Stitch",
            category=CATEGORY,
            description="Puts what was painted back into the picture: bit for bit the original where the mask was "
            "black. Also finishes FLUX Outpaint, and cuts a FLUX Reference's result to its size.",
            search_aliases=["paste", "composite", "uncrop", "crop and stitch", "inpaint"],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="What was painted, at the crop's size. Several for one original give several pictures.",
                ),
                CROP.Input("crop", tooltip="From FLUX Inpaint Crop, FLUX Outpaint or FLUX Reference."),
                io.Float.Input(
                    "colour_match",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How far the painted colours are matched, in mean and spread, to the original's next to "
                    "the mask, against a visible shift: 1 fully, 0 not at all. What was kept is never changed.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The whole picture, at its own size; of FLUX Outpaint the grown one.",
                )
            ],
        )

    @classmethod
    def execute(cls, image: Any, crop: Any, colour_match: float) -> io.NodeOutput:
        from .bridge.filling import put_back

        return io.NodeOutput(put_back(image, crop, colour_match))


class Outpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        only_sides = f"Ignored unless aspect is '{BY_SIDES}'."
        return schema(
            node_id="FluxFoundryOutpaint",
            display_name="FLUX Outpaint",
            category=CATEGORY,
            description="Lays a picture on a larger canvas, whose new area a Fill model paints. FLUX Stitch finishes "
            "it: the picture itself stays bit for bit as it was.",
            search_aliases=["pad image for outpainting", "uncrop", "extend", "expand canvas", "aspect ratio"],
            has_intermediate_output=True,
            inputs=[
                io.Image.Input(
                    "image", tooltip="The picture, of any size. Nothing of it is cut off, moved or resized."
                ),
                *(
                    io.Int.Input(
                        side,
                        default=64,
                        min=0,
                        max=MAX_ADDED,
                        tooltip=f"Pixels to add {where}; 0 adds none. {only_sides}",
                    )
                    for side, where in (
                        ("left", "on the left"),
                        ("right", "on the right"),
                        ("top", "above"),
                        ("bottom", "below"),
                    )
                ),
                io.Combo.Input(
                    "aspect",
                    options=[BY_SIDES, *ASPECTS],
                    default=BY_SIDES,
                    tooltip=f"Width to height that the picture grows to, by as little as that takes. {BY_SIDES}: it "
                    "grows by left, right, top and bottom.",
                ),
                io.Combo.Input(
                    "anchor",
                    options=list(ANCHORS),
                    default=ANCHORS[0],
                    tooltip="Where the picture stands on a canvas of the aspect: at 'left' all that is new in width "
                    f"is on its right. Ignored if aspect is '{BY_SIDES}'.",
                ),
                io.Int.Input(
                    "feather",
                    default=0,
                    min=0,
                    max=MAX_FEATHER,
                    tooltip="How soft the seam is, in pixels to each side of it: the model paints over so many inside "
                    "the picture, to go on from it, and what is new fades in over as many. Nothing of it changes the "
                    "picture. 0 is a hard seam; 8 to 32 hide most.",
                ),
                io.Combo.Input(
                    "fill",
                    options=list(FILLS),
                    default=FILLS[0],
                    tooltip="What the new area shows before it is painted. grey: as Fill models know it; edge: the "
                    "picture's edge drawn outwards, for other models at a denoise below 1. Makes no difference "
                    "behind FLUX Fill.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The canvas: for FLUX Fill, or any other way to paint."),
                io.Mask.Output(display_name="mask", tooltip="What to paint of the canvas."),
                CROP.Output(
                    display_name="crop",
                    tooltip="For FLUX Stitch: the picture, and where it stands. It also cuts off the up to 15 pixels "
                    "that the canvas is larger so that its sides divide by 16.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Any,
        left: int,
        right: int,
        top: int,
        bottom: int,
        aspect: str,
        anchor: str,
        feather: int,
        fill: str,
    ) -> io.NodeOutput:
        from .bridge.filling import lay_out, tinted

        sides = {"left": left, "right": right, "top": top, "bottom": bottom}
        canvas = lay_out(image, sides, ASPECTS.get(aspect), anchor=anchor, feather=feather, fill=fill)
        preview = ui.PreviewImage(tinted(canvas.picture, canvas.mask), cls=cls)
        return io.NodeOutput(canvas.picture, canvas.mask, canvas, ui=preview)


NODES: list[type[io.ComfyNode]] = [InpaintCrop, Stitch, Outpaint]
