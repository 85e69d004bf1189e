"""What ComfyUI users see of the pack: the families' nodes, joined into one extension.

A node's schema needs only ``comfy_api`` and a listing of files. What does the work lies in ``bridge`` and is imported
when a node runs, so that the pack costs a start of ComfyUI next to nothing.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    caching,
    combining,
    compiling,
    control,
    control_loading,
    editing,
    files,
    filling,
    latents,
    loading,
    memory,
    redux,
    references,
    sampling,
    saving,
    text,
)

__all__ = ["NODES", "FluxFoundryExtension"]

FAMILIES = (
    loading, text, latents, sampling, editing, filling, control, control_loading, redux, references, combining, caching,
    compiling, files, saving, memory,
)  # fmt: skip
NODES: list[type[io.ComfyNode]] = [node for family in FAMILIES for node in family.NODES]


class FluxFoundryExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
