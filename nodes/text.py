"""Nodes that turn prompts into CONDITIONING."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .fields import ROOT, guidance, schema

__all__ = ["NODES"]


class TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryTextEncode",
            display_name="FLUX Text Encode",
            category=f"{ROOT}/conditioning",
            description="Turns a prompt, and what to stay away from, into conditioning for FLUX.",
            search_aliases=["prompt", "clip text encode", "flux guidance", "negative prompt"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="FLUX.1's text encoders: from Load FLUX Text Encoders, or DualCLIPLoader with type flux.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to draw. (words:1.2) weighs words more, below 1 less. May be empty.",
                ),
                guidance(
                    3.5,
                    "How closely the picture follows the prompt; samplers read it beside the text: "
                    "3.5 for FLUX.1 [dev], 3 for the embedded model; less is freer, more is stiffer. Models "
                    "without guidance ([schnell]) ignore it.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    optional=True,
                    tooltip="What to stay away from. It takes effect only in a sampler whose cfg is not 1, "
                    "at twice the time.",
                ),
                io.String.Input(
                    "clip_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    optional=True,
                    tooltip="Another prompt for CLIP-L alone, which sets the overall style. Empty: the prompt.",
                ),
                io.String.Input(
                    "t5_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    optional=True,
                    tooltip="Another prompt for T5 alone, which the picture follows word by word. Empty: the prompt.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt, with its guidance: for a sampler's positive input."
                ),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The negative prompt: for a sampler's negative input. An empty text where none was given.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, clip: Any, prompt: str, guidance: float, negative: str = "", clip_prompt: str = "", t5_prompt: str = ""
    ) -> io.NodeOutput:
        from .bridge.conditioning import encode

        positive = encode(clip, clip_prompt.strip() or prompt, t5_prompt.strip() or prompt, guidance)
        return io.NodeOutput(positive, encode(clip, negative, negative, guidance))


NODES: list[type[io.ComfyNode]] = [TextEncode]
