"""Nodes that tell what model files are."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .bridge.paths import ANY_FILE
from .fields import ROOT, schema

__all__ = ["NODES"]


class InspectFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FluxFoundryInspectFile",
            display_name="Inspect FLUX File",
            category=f"{ROOT}/files",
            description="Tells what a model file is, from its header alone: family, variant, parts, layout, storage "
            "formats.",
            search_aliases=["what is this file", "model info", "checkpoint info", "gguf info", "metadata"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=ANY_FILE.names(),
                    tooltip="A .safetensors or .gguf file in any of ComfyUI's model folders, behind its folder's name. "
                    "Only its header is read, which takes milliseconds however large it is.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A MODEL that the file is to go with: a LoRA, ControlNet, text encoder or autoencoder. The "
                    "report then says whether it fits, and which of your files would. Leave it open to see the file "
                    "alone.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="report",
                    tooltip="What the file is, as lines of text: for nodes that show or save text.",
                ),
            ],
        )

    @classmethod
    def execute(cls, file: str, model: io.Model.Type | None = None) -> io.NodeOutput:
        from .bridge.files import inspect_file
        from .bridge.progress import show

        path = ANY_FILE.resolve(file)
        report = inspect_file(path)
        if model is not None:
            from .bridge.preflight import fit_report

            report += "\n" + fit_report(model, path)
        show(report)  # the front end shows a node's "text" by itself on its own nodes only
        return io.NodeOutput(report, ui=ui.PreviewText(report))

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: object) -> object:
        """Runs again when the file changed."""
        from .bridge.files import stamp

        return stamp(ANY_FILE.resolve(file))


NODES: list[type[io.ComfyNode]] = [InspectFile]
