"""A MODEL whose blocks run compiled."""

from __future__ import annotations

from typing import Any

from ...flux.errors import MismatchError
from ...flux.pipelines.compiled import compiled_blocks
from .model import spec_of
from .progress import say
from .transformer import WRAPPERS

__all__ = ["with_compiled_blocks"]

KEY = "fluxfoundry compiles"


def with_compiled_blocks(patcher: Any, *, dynamic: bool) -> Any:
    """A clone of a MODEL whose blocks run compiled, with all that other nodes do to their weights and between them.

    Args:
        patcher: The MODEL.
        dynamic: See ``compiled_blocks``.

    Raises:
        MismatchError: It was not loaded by this pack.
    """
    if spec_of(patcher) is None:
        raise MismatchError(
            "the MODEL was not loaded by FLUX Foundry, so its blocks cannot be compiled here; load it with Load FLUX "
            "Model, or compile it with ComfyUI's own TorchCompileModel"
        )
    clone = patcher.clone()
    clone.remove_wrappers_with_key(WRAPPERS.DIFFUSION_MODEL, KEY)
    clone.add_wrapper_with_key(WRAPPERS.DIFFUSION_MODEL, KEY, _Compiling(dynamic=dynamic))
    return clone


class _Compiling:
    """Wrapper of a denoiser's call."""

    def __init__(self, *, dynamic: bool) -> None:
        self._dynamic, self._told = dynamic, False

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        with compiled_blocks(executor.class_obj, dynamic=self._dynamic, tell=self._tell):
            return executor(*args, **kwargs)

    def _tell(self, sentence: str) -> None:
        """Once, for it is found out again in every step."""
        if not self._told:
            self._told = True
            say(sentence)
