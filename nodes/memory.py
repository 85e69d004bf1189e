"""Nodes that say what a run will take, and what it took."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..flux.adapters.channels import CELL
from ..flux.memory.policy import BUDGET, GIB, POLICIES
from .fields import MAX_BATCH, ROOT, budget, cfg, policy, schema, side, steps

__all__ = ["NODES"]

CATEGORY = f"{ROOT}/memory"
AS_LOADED = "as loaded"


class MemoryPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryMemoryPlan",
            display_name="FLUX Memory Plan",
            category=CATEGORY,
            description="Says what a run will take, stage by stage, before it begins: weights that stay and that are "
            "streamed, what is computed with, the peak, and the time. Nothing is loaded for it.",
            search_aliases=["vram", "memory estimate", "how much memory", "offload", "lowvram", "budget"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A model from Load FLUX Model or Load FLUX (embedded)."),
                side("width", "Pixels across of the picture. Ignored when a latent is given."),
                side("height", "Pixels down, likewise."),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=MAX_BATCH,
                    tooltip="Pictures at once. Ignored when a latent is given.",
                ),
                steps(" More steps take more time, and no more memory to speak of."),
                io.Combo.Input(
                    "memory",
                    options=[AS_LOADED, *POLICIES, BUDGET],
                    default=AS_LOADED,
                    tooltip="Under which policy to plan. as loaded: what the loaders were told. The others: as if "
                    "every loader had been told that, to try it out before you load anything again.",
                ),
                budget(),
                io.Clip.Input("clip", optional=True, tooltip="The text encoders, to be in the plan."),
                io.Vae.Input("vae", optional=True, tooltip="The autoencoder, to be in the plan."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="Redux's vision tower, to be in the plan."),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="What will guide the run: references and Redux's tokens in it take memory and time, too.",
                ),
                io.Latent.Input("latent", optional=True, tooltip="Its size and number, in place of the above."),
                cfg(
                    "The sampler's. With any but 1 ComfyUI runs the negative prompt beside the other one, "
                    "which takes twice as much at once.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The plan as lines of text."),
                io.Image.Output(
                    display_name="picture",
                    tooltip="A bar for each stage, of what takes its memory, with a line at what there is.",
                ),
                io.Float.Output(display_name="peak", tooltip="GiB that the largest stage takes."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        width: int,
        height: int,
        batch_size: int,
        steps: int,
        memory: str,
        budget: float = 0.0,
        clip: Any = None,
        vae: Any = None,
        clip_vision: Any = None,
        conditioning: Any = None,
        latent: dict[str, Any] | None = None,
        cfg: float = 1.0,
    ) -> io.NodeOutput:
        from .bridge.planning import job_of, parts_of, plan_graph, shown
        from .bridge.progress import show

        if latent is not None:
            batch_size, _, rows, columns = latent["samples"].shape
            cell = latent.get("downscale_ratio_spacial") or CELL
            width, height = columns * cell, rows * cell
        granted = None if memory == AS_LOADED else policy(memory, budget)
        parts = parts_of(model, clip, vae, clip_vision, granted)
        sees, both = clip_vision is not None, cfg != 1.0
        job = job_of(model, (width, height), batch_size, steps, conditioning, sees=sees, both=both)
        text, plan = plan_graph(parts, job, granted, model.load_device)
        picture = shown(plan)
        show(_sentences(text))
        return io.NodeOutput(text, picture, plan.peak_bytes / GIB, ui=ui.PreviewImage(picture, cls=cls))


class MemoryReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryMemoryReport",
            display_name="FLUX Memory Report",
            category=CATEGORY,
            description="Says after a run what each stage took beside what was planned: memory, time of each step, and "
            "time lost waiting for streamed weights.",
            search_aliases=["vram", "memory used", "benchmark", "how long", "speed", "profile"],
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The finished picture, which is only waited for: connect what comes last, so that every "
                    "stage before it is in the report.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="Plan and fact of every stage, as lines of text."),
                io.Image.Output(
                    display_name="picture", tooltip="The plan's bars, with a thin bar below each of what was taken."
                ),
            ],
        )

    @classmethod
    def execute(cls, image: Any) -> io.NodeOutput:
        from .bridge.planning import report, shown
        from .bridge.progress import show

        text, found = report(cls.hidden.prompt or {})
        picture = shown(found.plan, found.taken)
        show(_sentences(text))
        return io.NodeOutput(text, picture, ui=ui.PreviewImage(picture, cls=cls))


def _sentences(text: str) -> str:
    """What stands below a table, for a node has no letters of one width to show columns in."""
    return text.partition("\n\n")[2]


NODES: list[type[io.ComfyNode]] = [MemoryPlan, MemoryReport]
