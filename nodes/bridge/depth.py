"""Folders of depth models, by their names in a combo. Looking at pictures with them is in ``control``."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...flux.errors import MissingFileError
from ...flux.preprocess.depth import CONFIG, EXAMPLE

__all__ = ["depth_folder", "depth_models"]

FOLDER = "depth"  # below ComfyUI's models, and its key in extra_model_paths.yaml
NONE = "no depth model found"
PATTERNS = (f"*/{CONFIG}", f"*/*/{CONFIG}")  # owner/name, as a hub's client may lay them out

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def depth_models() -> list[str]:
    """Names of the folders that hold a model; a single one that says so where there are none."""
    return sorted(_found()) or [NONE]


def depth_folder(name: str) -> Path:
    """The folder of a name, which may come from anywhere.

    Raises:
        MissingFileError: There is none of that name, or none at all.
    """
    found = _found()
    if name in found:
        return found[name]
    places = " or ".join(folder_paths.get_folder_paths(FOLDER))
    if not found:
        raise MissingFileError(
            f"there is no depth model in {places}; download {EXAMPLE} into a folder of its own there and press R, or "
            "leave this node out: the IMAGE of any other depth node does as well"
        )
    raise MissingFileError(f"there is no depth model {name!r} in {places} (any more); choose one of {', '.join(found)}")


def _found() -> dict[str, Path]:
    """Folders by name; of two places with the same name the host's first one counts."""
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for pattern in PATTERNS:
            for config in root.glob(pattern):
                found.setdefault(config.parent.relative_to(root).as_posix(), config.parent)
    return found
