"""Nodes that make a model faster before it runs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .fields import ROOT, schema

__all__ = ["NODES"]


class Compile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryCompile",
            display_name="FLUX Compile",
            category=f"{ROOT}/model",
            description="Compiles the model's blocks with torch.compile, when they first run. Other prompts, seeds, "
            "LoRAs and strengths compile nothing anew. Meant for GPUs: on a CPU steps hardly get faster.",
            search_aliases=["torch.compile", "inductor", "triton", "speed", "faster"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Load FLUX Model, with LoRAs or without, however its weights are stored. LoRAs may "
                    "also come behind this node.",
                ),
                io.Boolean.Input(
                    "dynamic",
                    default=True,
                    tooltip="On: all sizes of pictures share one compilation. Off: each size is compiled by itself, "
                    "when it first comes, which may be a little faster; for those who keep to one size.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model, which compiles when it first runs: for any sampler. Pictures differ from those "
                    "of the uncompiled model by rounding.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, dynamic: bool) -> io.NodeOutput:
        from .bridge.compiling import with_compiled_blocks

        return io.NodeOutput(with_compiled_blocks(model, dynamic=dynamic))


NODES: list[type[io.ComfyNode]] = [Compile]
