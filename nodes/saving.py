"""Nodes that write model files."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..flux.weights.formats.written import WRITTEN
from .fields import ROOT, schema

__all__ = ["NODES"]

AS_IT_IS = "as it is"


class SaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundrySaveModel",
            display_name="Save FLUX Model",
            category=f"{ROOT}/files",
            description="Writes a FLUX diffusion model in any storage format, with the LoRAs that are on it merged.",
            search_aliases=["quantize", "convert", "export model", "gguf", "fp8", "merge lora", "model save"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A FLUX diffusion model. LoRAs and other patches of weights are merged into the file.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/flux",
                    tooltip="Folder and beginning of the name, below ComfyUI's output folder. A number is added, so "
                    "that nothing is replaced. What is in output/diffusion_models is listed by the loaders after R.",
                ),
                io.Combo.Input(
                    "format",
                    options=[AS_IT_IS, *WRITTEN],
                    default="bf16",
                    tooltip="What the large matrices are stored as; the rest stays in 16 or 32 bits. fp8 halves bf16, "
                    "gguf:Q4_K and nvfp4 take less than a third of it. 'as it is' keeps each tensor's own format where "
                    "nothing is merged into it and a safetensors file can have it; GGUF becomes bf16.",
                ),
                io.Combo.Input(
                    "layout",
                    options=["bfl", "diffusers"],
                    tooltip="bfl: Black Forest Labs' names, which ComfyUI reads. diffusers: for diffusers. GGUF files "
                    "always have the first.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the new file is.")],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, filename_prefix: str, format: str, layout: str) -> io.NodeOutput:  # noqa: A002
        from .bridge.progress import show
        from .bridge.saving import save_model

        path, told = save_model(model, filename_prefix, format, layout)
        show(f"{path.name}\n{told}")
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"{path.name}\n{told}"))


NODES: list[type[io.ComfyNode]] = [SaveModel]
