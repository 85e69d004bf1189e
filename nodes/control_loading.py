"""Nodes that load control LoRAs, which let a text-to-image model follow edges or depth."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..flux.mini.files import CONTROL_LORAS
from .bridge.paths import Choice, list_files
from .fields import ROOT, schema, strength

__all__ = ["LORAS", "NODES"]


class LoraChoice(Choice):
    """A combo of LoRAs; checkpoints hold none."""

    def names(self) -> list[str]:
        """Embedded files first, then the folder's."""
        return [*self.own, *list_files(self.folder)]


LORAS = LoraChoice("loras", {path.stem: path for path in CONTROL_LORAS.values()}, "control-lora")


class LoadControlLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        told = LORAS.told()
        return schema(
            node_id="FluxFoundryLoadControlLora",
            display_name="Load FLUX Control LoRA",
            category=f"{ROOT}/loaders",
            description="Puts a control LoRA on a FLUX model, so that it follows edges or depth of a picture. One "
            "behind another for several controls at once.",
            search_aliases=["canny lora", "depth lora", "lora loader", "control lora", "flux tools"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A text-to-image model from Load FLUX Model (FLUX.1 [dev] for Black Forest Labs' LoRAs), "
                    "with other LoRAs or without, packed or not.",
                ),
                io.Combo.Input(
                    "lora",
                    options=LORAS.names(),
                    tooltip="A control LoRA in ComfyUI's loras folder (flux1-canny-dev-lora.safetensors, "
                    "flux1-depth-dev-lora.safetensors). Other LoRAs are refused; ComfyUI's Load LoRA takes them."
                    + (f"\n{told}" if told else ""),
                ),
                strength(
                    "How closely the control is followed: 1 as the LoRA was trained, less is freer, more is "
                    "stiffer; 0 switches it off, and its picture is not seen.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model with the control: for a sampler, or a further Load FLUX Control LoRA. FLUX "
                    "Control gives it the picture; that of the first one InstructPixToPixConditioning gives, too.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, lora: str, strength: float) -> io.NodeOutput:
        from .bridge.control_lora import put_control_lora

        return io.NodeOutput(put_control_lora(model, LORAS.resolve(lora), strength))


NODES: list[type[io.ComfyNode]] = [LoadControlLora]
