"""FLUX Foundry, a ComfyUI node pack: ComfyUI loads this file. It holds no logic and imports without ComfyUI."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import FluxFoundryExtension

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> FluxFoundryExtension:
    """The extension that ComfyUI asks for its nodes; nothing of the host is imported before this."""
    from .nodes import FluxFoundryExtension

    return FluxFoundryExtension()
