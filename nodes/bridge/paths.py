"""Names in combos to files: the embedded model's, and those in the host's folders."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...flux.errors import MissingFileError
from ...flux.mini.files import MINI, MINI_SCHNELL, MiniFiles

__all__ = ["CLIPS", "EMBEDDED", "EMBEDDED_MODELS", "MODELS", "T5S", "VAES", "Choice", "resolve_embedded"]

EMBEDDED = "embedded: "
SUFFIXES = (".safetensors", ".sft")
EMBEDDED_MODELS: dict[str, MiniFiles] = {"mini": MINI, "mini schnell": MINI_SCHNELL}


class Choice:
    """A combo of the pack's own files and one of the host's folders.

    Args:
        folder: The host's key of the folder.
        own: Embedded files by name.
    """

    def __init__(self, folder: str, own: dict[str, Path]) -> None:
        self.folder = folder
        self.own = {EMBEDDED + name: path for name, path in own.items()}

    def names(self) -> list[str]:
        """Embedded files first, then the folder's; pickle files are left out, for they are refused."""
        found = folder_paths.get_filename_list(self.folder)
        return [*self.own, *(name for name in found if name.lower().endswith(SUFFIXES))]

    def resolve(self, name: str) -> Path:
        """The file of a name, which may come from anywhere.

        Raises:
            MissingFileError: There is no such file any more.
        """
        if name in self.own:
            return self.own[name]
        if name.startswith(EMBEDDED):
            raise MissingFileError(f"there is no {name!r} in this version; choose one of {', '.join(self.own)}")
        try:
            return Path(folder_paths.get_full_path_or_raise(self.folder, name))
        except FileNotFoundError as error:
            raise MissingFileError(
                f"{name!r} is not in ComfyUI's {self.folder} folders (any more); put it there and press R, "
                "or choose another file"
            ) from error


MODELS = Choice("diffusion_models", {"flux1-mini": MINI.transformer, "flux1-mini-schnell": MINI_SCHNELL.transformer})
CLIPS = Choice("text_encoders", {"clip-mini": MINI.clip})
T5S = Choice("text_encoders", {"t5-mini": MINI.t5})
VAES = Choice("vae", {"flux1-mini-ae": MINI.autoencoder})


def resolve_embedded(name: str) -> MiniFiles:
    """The files of an embedded model.

    Raises:
        MissingFileError: There is none of that name.
    """
    if name not in EMBEDDED_MODELS:
        raise MissingFileError(f"there is no embedded model {name!r}; choose one of {', '.join(EMBEDDED_MODELS)}")
    return EMBEDDED_MODELS[name]
