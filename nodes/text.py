"""Nodes that turn prompts into CONDITIONING, and let go of what is kept of them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .fields import ROOT, guidance, schema

__all__ = ["NODES"]

MEMORY, DISK, BOTH, OFF = "memory", "disk", "memory and disk", "off"


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
                io.Combo.Input(
                    "cache",
                    options=[MEMORY, BOTH, OFF],
                    default=MEMORY,
                    optional=True,
                    tooltip="Where encoded prompts are kept, so that a prompt that comes again, also in another graph, "
                    "needs no text encoder: in memory until ComfyUI ends (up to 256 MB), or on disk as well (up to "
                    "4 GB, in ComfyUI's user folder). It acts with encoders that FLUX Foundry loaded.",
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
        cls,
        clip: Any,
        prompt: str,
        guidance: float,
        negative: str = "",
        clip_prompt: str = "",
        t5_prompt: str = "",
        cache: str = MEMORY,
    ) -> io.NodeOutput:
        from .bridge.conditioning import encode

        keeping = {"kept": cache != OFF, "on_disk": cache == BOTH}
        positive = encode(clip, clip_prompt.strip() or prompt, t5_prompt.strip() or prompt, guidance, **keeping)
        return io.NodeOutput(positive, encode(clip, negative, negative, guidance, **keeping))


class ClearPromptCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryClearPromptCache",
            display_name="FLUX Clear Prompt Cache",
            category=f"{ROOT}/conditioning",
            description="Lets go of the encoded prompts that FLUX Text Encode keeps, and tells how many there were.",
            search_aliases=["prompt cache", "clear cache", "free memory", "embeddings"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "where",
                    options=[BOTH, MEMORY, DISK],
                    default=BOTH,
                    tooltip="What to clear: what is kept in memory, the files in ComfyUI's user folder, or both. "
                    "Nothing else is removed, and a prompt that is needed again is encoded again.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="report",
                    tooltip="What was cleared, a line for memory and one for disk: for nodes that show or save text.",
                ),
            ],
        )

    @classmethod
    def execute(cls, where: str) -> io.NodeOutput:
        from .bridge.progress import show
        from .bridge.prompts import clear

        report = clear(memory=where != DISK, disk=where != MEMORY)
        show(report)
        return io.NodeOutput(report, ui=ui.PreviewText(report))

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        """Runs every time: a new NaN is unlike any other, while one and the same is like itself within a tuple."""
        return float("nan")


NODES: list[type[io.ComfyNode]] = [TextEncode, ClearPromptCache]
