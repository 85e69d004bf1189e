"""Telling the user, and being told to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import latent_preview
from comfy_execution.utils import get_executing_context
from server import PromptServer

__all__ = ["check_cancelled", "preview_callback", "say", "show"]

logger = logging.getLogger(__name__)

Callback = Callable[[int, Any, Any, int], None]


def say(sentence: str) -> None:
    """Warn in the log, and show the sentence on the node that runs."""
    logger.warning("FLUX Foundry: %s", sentence)
    show(sentence)


def show(text: str) -> None:
    """Show a text on the node that runs."""
    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and server is not None:
        server.send_progress_text(text, context.node_id)


def check_cancelled(_: int = 0) -> None:
    """Raise the host's interrupt if the user cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def preview_callback(patcher: Any, steps: int) -> Callback:
    """The host's progress bar and live preview: called with step, estimate, latent and the number of steps."""
    callback: Callback = latent_preview.prepare_callback(patcher, steps)
    return callback
