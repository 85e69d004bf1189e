"""Prompts that were encoded before, in this graph or another, are not encoded again.

Only what our own text encoders made is kept: of others' it is not known what file they are, nor what was done to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
import torch

from ...flux.pipelines.describe import human_bytes
from ...flux.pipelines.prompt_cache import MemoryStore, PromptCache, computed_on, text_key
from ...flux.pipelines.prompt_folder import Cleared, FolderStore, clear_folder
from ...flux.version import VERSION
from ...flux.weights.readers.stamps import fingerprint
from .compat import to_intermediate
from .preflight import ENCODERS
from .progress import say

__all__ = ["clear", "encode_tokens", "folder"]

Conditioning = list[list[Any]]
Tokens = Mapping[str, list[list[tuple[Any, ...]]]]

TEXT, POOLED, POOLED_KEY = "tokens", "pooled", "pooled_output"  # an entry's tensors, and the host's key of the second
ALTERING = ("forced_hooks", "hook_patches", "injections", "weight_wrapper_patches")  # of a patcher, beside patches
CAST = "manual_cast_dtype"  # the only object patch that changes no number: encoders compute in fp32 in any case

_memory = MemoryStore()


def folder() -> Path:
    """Where prompts are kept on disk: among what the user made, as it is emptied at no start and no loader lists it."""
    return Path(folder_paths.get_user_directory()) / "fluxfoundry" / "prompts"


def encode_tokens(clip: Any, tokens: Tokens, extra: dict[str, Any], *, kept: bool, on_disk: bool) -> Conditioning:
    """Have a CLIP encode tokens, unless what it would give is there already; then it is not loaded.

    Args:
        clip: Any.
        tokens: Of both encoders.
        extra: What is written beside the text.
        kept: Whether a former result may be given, and this one is kept.
        on_disk: Whether that goes for files, too.
    """
    encoder = _encoder_key(clip) if kept and _are_plain(tokens) else None
    if encoder is None:
        return _encoded(clip, tokens, extra)
    stores = [FolderStore(folder(), tell=say)] if on_disk and not clip.patcher.patches else []
    cache, key = PromptCache(_memory, *stores), text_key(encoder, sorted(tokens.items()))
    found = cache.get(key)
    if found is not None:
        text, pooled = (to_intermediate(found[name]) for name in (TEXT, POOLED))
        return [[text, {POOLED_KEY: pooled, ENCODERS: clip.cond_stage_model.given, **extra}]]
    made = _encoded(clip, tokens, extra)
    [[text, facts]] = made
    cache.put(key, {TEXT: text, POOLED: facts[POOLED_KEY]}, " and ".join(_names(clip)))
    return made


def clear(*, memory: bool, disk: bool) -> str:
    """Let go of what is kept; gives what that was, a line for each place."""
    lines = []
    if memory:
        lines.append(f"memory: {_told(_memory.clear())}")
    if disk:
        lines.append(f"disk: {_told(clear_folder(folder()))}, in {folder()}")
    return "\n".join(lines)


def _encoded(clip: Any, tokens: Tokens, extra: dict[str, Any]) -> Conditioning:
    made: Conditioning = clip.encode_from_tokens_scheduled(tokens, add_dict=extra)
    return made


def _told(gone: Cleared) -> str:
    return f"prompts cleared: {gone.entries}, {human_bytes(gone.nbytes)}" if gone.entries else "there was nothing"


def _encoder_key(clip: Any) -> str | None:
    """What an embedding depends on beside its tokens; None where that cannot be told.

    Patches (LoRA) are told by the number that the host gives to each set of them, which is new after every start.
    """
    module, patcher = clip.cond_stage_model, clip.patcher
    stamps = getattr(module, "stamps", None)  # ours alone have them
    if stamps is None or _is_altered(clip):
        return None
    prints = [fingerprint(path, stamp) for path, stamp in stamps.items()]
    known = [found for found in prints if found is not None]
    if len(known) < len(prints):
        return None
    numbers = sorted(map(str, module.dtypes))
    gives = to_intermediate(torch.empty(0)).dtype
    patched = str(patcher.patches_uuid) if patcher.patches else ""
    return " ".join((VERSION, "ComfyUI", *known, *numbers, str(gives), computed_on(patcher.load_device), patched))


def _names(clip: Any) -> list[str]:
    return [given.found.spec.name for given in clip.cond_stage_model.given]


def _is_altered(clip: Any) -> bool:
    """Whether something else than patches of weights may change what the encoders give, or what goes with it."""
    patcher = clip.patcher
    if getattr(clip, "apply_hooks_to_conds", None) is not None:
        return True
    if any(getattr(patcher, name, None) for name in ALTERING) or set(patcher.object_patches) - {CAST}:
        return True
    wrappers = getattr(patcher, "wrappers", {}).values()
    return any(own for kind in wrappers for own in kind.values())


def _are_plain(tokens: Tokens) -> bool:
    """Whether tokens are numbers with weights; an embedding in place of one has no text to be known by."""
    return all(
        isinstance(token[0], int) and isinstance(token[1], float | int)
        for rows in tokens.values() for row in rows for token in row
    )  # fmt: skip
