"""Nodes that let several models draw one picture."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .fields import ROOT, schema

__all__ = ["NODES"]


class Combine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryCombine",
            display_name="FLUX Combine",
            category=f"{ROOT}/conditioning",
            description="Lets two models draw one picture together, as FLUX.1 Depth and FLUX.1 Canny, or Fill and "
            "Depth: every step is the weighted mean of what both predict.",
            search_aliases=["depth and canny", "two models", "blend predictions", "mixture", "multi control"],
            inputs=[
                io.Model.Input(
                    "model_1",
                    tooltip="From Load FLUX Model, with LoRAs or without. Its schedule and what acts on whole "
                    "predictions hold for both.",
                ),
                io.Conditioning.Input(
                    "conditioning_1",
                    tooltip="What the first model is given: a prompt, with its control picture or hole.",
                ),
                io.Model.Input(
                    "model_2",
                    tooltip="A further model of the same family, likewise. Both are in memory at once. The same one as "
                    "model_1 blends two prompts.",
                ),
                io.Conditioning.Input("conditioning_2", tooltip="What the second model is given, likewise."),
                io.Float.Input(
                    "balance",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The second model's share: 0 only the first draws, 0.5 both alike, 1 only the second. "
                    "Between, a step takes as long as one of each. Where the second's control or hole does not act "
                    "(by its strength, time or region), the first draws alone.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="Both models: for FLUX Sampler, KSampler and every other sampler."
                ),
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="Both prompts: for the positive input of that sampler."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model_1: Any, conditioning_1: Any, model_2: Any, conditioning_2: Any, balance: float
    ) -> io.NodeOutput:
        from .bridge.experts import combine

        return io.NodeOutput(*combine(model_1, conditioning_1, model_2, conditioning_2, balance))


NODES: list[type[io.ComfyNode]] = [Combine]
