"""Nodes that leave out work which a step before did already."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..flux.pipelines.step_cache import MOST, StepCache
from .fields import ROOT, schema

__all__ = ["NODES"]


class StepCaching(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        usual = StepCache()
        return schema(
            node_id="FluxFoundryStepCache",
            display_name="FLUX Step Cache",
            category=f"{ROOT}/sampling",
            description="Makes runs of many steps faster: a step in which little would change takes over what the step "
            "before did, at a small loss. The sampler's node shows what was skipped.",
            search_aliases=["first block cache", "teacache", "easycache", "wavespeed", "speed up", "skip steps"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Load FLUX Model or Load FLUX (embedded), with LoRAs or without; or of FLUX Combine. "
                    "Models for few steps ([schnell]) are refused: they change at every step.",
                ),
                io.Float.Input(
                    "threshold",
                    default=usual.threshold,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="How much the first block's work may have changed, as a share, for the other blocks to be "
                    "skipped. 0.08 to 0.12 is usual for FLUX.1 [dev]; more is faster and less exact; 0 skips nothing.",
                ),
                io.Int.Input(
                    "max_skips",
                    default=usual.max_skips,
                    min=1,
                    max=MOST,
                    tooltip="At most so many steps are skipped one after the other (heun: model runs). Less is more "
                    "exact.",
                ),
                io.Int.Input(
                    "warmup",
                    default=usual.warmup,
                    min=1,
                    max=MOST,
                    tooltip="So many steps at the start are never skipped: they decide the layout. Nor is the last "
                    "one.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model that skips steps: for FLUX Sampler, KSampler and every other sampler, in runs "
                    "of more than 8 steps.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, threshold: float, max_skips: int, warmup: int) -> io.NodeOutput:
        from .bridge.step_cache import put_step_cache

        settings = StepCache(threshold=threshold, max_skips=max_skips, warmup=warmup)
        return io.NodeOutput(put_step_cache(model, settings))


NODES: list[type[io.ComfyNode]] = [StepCaching]
