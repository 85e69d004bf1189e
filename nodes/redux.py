"""Nodes that take over what pictures show: FLUX.1 Redux."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..flux.preprocess.vision import MAX_TILES, VIEWS
from .bridge.paths import STYLE_MODELS, VISION_TOWERS
from .bridge.styles import STRENGTH_MODES
from .fields import ROOT, budget, end, memory, policy, schema, start, strength
from .loading import AUTO, CATEGORY, file_combo

__all__ = ["NODES"]

MAX_DETAIL = 64
MAX_TOKENS = 4096


class LoadRedux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryLoadRedux",
            display_name="Load FLUX Redux",
            category=CATEGORY,
            description="Loads FLUX.1 Redux, which makes pictures into prompts, with the vision tower that it takes.",
            search_aliases=["style model loader", "clip vision loader", "siglip", "image prompt", "ip adapter"],
            inputs=[
                file_combo(
                    "redux",
                    STYLE_MODELS,
                    "The Redux adapter in ComfyUI's style_models folder (flux1-redux-dev.safetensors).",
                ),
                file_combo(
                    "vision_tower",
                    VISION_TOWERS,
                    "The SigLIP vision tower in ComfyUI's clip_vision folder (sigclip_vision_patch14_384.safetensors). "
                    "It sees the pictures for Redux, which takes no other.",
                ),
                memory("the vision tower"),
                budget(),
            ],
            outputs=[
                io.StyleModel.Output(
                    display_name="style_model",
                    tooltip="Redux, for FLUX Redux, Apply Style Model and every other node that takes a STYLE_MODEL.",
                ),
                io.ClipVision.Output(
                    display_name="clip_vision",
                    tooltip="The vision tower, for FLUX Redux, CLIP Vision Encode and every other node that takes a "
                    "CLIP_VISION.",
                ),
            ],
        )

    @classmethod
    def execute(cls, redux: str, vision_tower: str, memory: str = AUTO, budget: float = 0.0) -> io.NodeOutput:
        from .bridge.preflight import show_loaded
        from .bridge.vision import load_redux

        paths = STYLE_MODELS.resolve(redux), VISION_TOWERS.resolve(vision_tower)
        style_model, clip_vision = load_redux(*map(str, paths), policy(memory, budget))
        show_loaded(style_model.given, clip_vision.given)
        return io.NodeOutput(style_model, clip_vision)


class Redux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryRedux",
            display_name="FLUX Redux",
            category=f"{ROOT}/conditioning",
            description="Adds what pictures show to a prompt: their style, colours and things. Several pictures and "
            "several of these nodes add up, in any order.",
            search_aliases=["style transfer", "apply style model", "image prompt", "variation", "reference image"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="The prompt, from FLUX Text Encode or CLIP Text Encode; or what another FLUX Redux or "
                    "Apply Style Model made of it. An empty prompt leaves the say to the pictures.",
                ),
                io.StyleModel.Input(
                    "style_model", tooltip="Redux: from Load FLUX Redux, or ComfyUI's Load Style Model."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The SigLIP tower that Redux takes: from Load FLUX Redux, or ComfyUI's Load CLIP Vision.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="What to take over. Each picture of a batch is a reference of its own with this strength, "
                    "as if each had its own FLUX Redux. Any size and aspect; see fit.",
                ),
                strength(
                    "How much of the pictures is taken over: 1 is what Redux was trained for and mostly "
                    "outweighs the prompt; 0.2 to 0.6 leaves the prompt a say; above 1 is stiffer. 0 adds nothing "
                    "(with 'tokens': tokens of zeros, which still take some attention).",
                ),
                io.Combo.Input(
                    "strength_mode",
                    options=list(STRENGTH_MODES),
                    default=STRENGTH_MODES[0],
                    tooltip="What strength acts on. attention: how much the picture and the prompt look at the tokens "
                    "(its logarithm is added to the attention, as Apply Style Model's attn_bias), even and "
                    "predictable, at some speed. tokens: the tokens themselves are multiplied (as its multiply), which "
                    "costs nothing and acts less evenly. Both are the same at 1.",
                ),
                io.Int.Input(
                    "detail",
                    default=0,
                    min=0,
                    max=MAX_DETAIL,
                    tooltip="Tokens along each side of the grid that a picture becomes: neighbours are averaged. Fewer "
                    "carry over the mood and less of the layout, and run faster: 9 is medium, 3 loose, 1 a single "
                    "token. 0 takes all: 27 of the real tower, 9 of the embedded one.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=0,
                    min=0,
                    max=MAX_TOKENS,
                    tooltip="The most tokens that a picture may have: those most alike are merged, wherever they are, "
                    "after detail. Fewer run faster and keep what stands out. 0 merges none; ignored where there are "
                    "no more.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(VIEWS),
                    default=VIEWS[0],
                    tooltip="How the square vision tower sees a picture that is not square. stretch: all of it, made "
                    "square, as Redux was trained. crop: its middle. pad: all of it in shape, with empty bands that "
                    f"take no part. tiled: in up to {MAX_TILES} squares along its long side, with as many times the "
                    "tokens. Square pictures are the same in all.",
                ),
                start(
                    "From when it acts, as a fraction of the run: 0 from the first step. Later leaves the "
                    "layout to the prompt.",
                ),
                end(
                    "Until when it acts, as a fraction of the run: 1 to the last step. Earlier leaves fine "
                    "things to the prompt. It has to be larger than start.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What of the picture is taken over: white all of it, grey less, black nothing. One for all "
                    "pictures, or one each; stretched over the picture if of another size. Open: everything.",
                ),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip="Where in the output it acts: white fully, grey less, black not at all. One for all "
                    "pictures, or one each. Exact where it has the output's size, else stretched to it. Open: "
                    "everywhere.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="The prompt with the pictures: for a sampler's positive input, or for another FLUX Redux.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        conditioning: Any,
        style_model: Any,
        clip_vision: Any,
        image: Any,
        strength: float,
        strength_mode: str,
        detail: int,
        max_tokens: int,
        fit: str,
        start: float,
        end: float,
        mask: Any = None,
        region: Any = None,
    ) -> io.NodeOutput:
        from .bridge.redux import Taking, apply_redux

        taking = Taking(
            strength=strength,
            mode=strength_mode,
            detail=detail,
            most=max_tokens,
            fit=fit,
            mask=mask,
            region=region,
            start=start,
            end=end,
        )
        styled, seen = apply_redux(conditioning, style_model, clip_vision, image, taking)
        return io.NodeOutput(styled, ui=None if seen is None else ui.PreviewImage(seen, cls=cls))


NODES: list[type[io.ComfyNode]] = [LoadRedux, Redux]
