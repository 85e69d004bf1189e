"""Names in combos to files: the embedded model's, and those in the host's folders.

A name is the path below its folder. Files of other folders, and embedded ones, stand behind a prefix with ": " in it,
which no file name on Windows can have; elsewhere a file whose own name begins so is not listed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import folder_paths

from ...flux.errors import MissingFileError
from ...flux.mini.files import (
    GUIDED,
    MINI,
    MINI_SCHNELL,
    REDUX_MINI_FILE,
    SIGLIP_MINI_FILE,
    MiniFiles,
)
from ...flux.weights.readers.sharded import INDEX_SUFFIX, SHARD

__all__ = [
    "ANY_FILE", "CHECKPOINTS", "CLIPS", "EMBEDDED", "EMBEDDED_MODELS", "MODELS", "STYLE_MODELS", "T5S", "VAES",
    "VISION_TOWERS", "AnyFile", "Choice", "resolve_embedded",
]  # fmt: skip

EMBEDDED, CHECKPOINTS = "embedded: ", "checkpoints: "
HOST_SUFFIXES = (".safetensors", ".sft")  # that the host lists itself
OWN_SUFFIXES = (".gguf", INDEX_SUFFIX)
SUFFIXES = (*HOST_SUFFIXES, *OWN_SUFFIXES)
LEFT_OUT = [".git"]  # folders, as in the host's own listing
EMBEDDED_MODELS: dict[str, MiniFiles] = {
    "mini": MINI,
    "mini schnell": MINI_SCHNELL,
    **{f"mini {task}": files for task, files in GUIDED.items()},
}
INSPECTED = (
    "diffusion_models", "checkpoints", "text_encoders", "vae", "loras", "controlnet", "style_models", "clip_vision",
)  # fmt: skip
LOOK_SECONDS = 1.0  # that a listing spends on reading headers; what is left is looked at the next time
DESCRIBED = 60  # files that a tooltip tells of


@dataclass(frozen=True)
class Scan:
    """Files of the kinds that the host does not list, and when each folder changed last."""

    roots: tuple[str, ...]
    names: tuple[str, ...]
    changed: dict[str, float]

    def holds(self, roots: tuple[str, ...]) -> bool:
        """Whether nothing came or went since."""
        if roots != self.roots or any(root not in self.changed and os.path.isdir(root) for root in roots):
            return False
        return all(_changed(folder) == then for folder, then in self.changed.items())


_scans: dict[str, Scan] = {}


class Choice:
    """A combo of the pack's own files, those of one of the host's folders, and all-in-one checkpoints.

    Args:
        folder: The host's key of the folder.
        own: Embedded files by name; those that are not there are not listed.
        kind: Of the part that a checkpoint has to hold to be listed.
    """

    def __init__(self, folder: str, own: dict[str, Path], kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.own = {EMBEDDED + name: path for name, path in own.items() if path.is_file()}

    def names(self) -> list[str]:
        """Embedded files first, then the folder's, then checkpoints that hold such a part.

        Pickle files are left out, for they are refused; of a model in several files its index stands for all.
        """
        return [*self.own, *list_files(self.folder), *(CHECKPOINTS + name for name in self._checkpoints())]

    def told(self) -> str:
        """What the listed files are, a line for each, for a tooltip; empty where there are none."""
        from .files import describe_file

        lines, left, end = [], 0, time.monotonic() + LOOK_SECONDS
        for name in self.names():
            if name in self.own:
                continue
            if len(lines) == DESCRIBED or time.monotonic() > end:
                left += 1
            elif (path := self._find(name)) is not None:
                lines.append(f"{name}: {describe_file(path)}")
        return "\n".join([*lines, *([f"and {left} more; Inspect FLUX File tells what each is"] if left else [])])

    def resolve(self, name: str) -> Path:
        """The file of a name, which may come from anywhere.

        Raises:
            MissingFileError: There is no such file any more.
        """
        if name in self.own:
            return self.own[name]
        if name.startswith(EMBEDDED):
            raise MissingFileError(f"there is no {name!r} in this version; choose one of {', '.join(self.own)}")
        if name.startswith(CHECKPOINTS):
            return require_file("checkpoints", name.removeprefix(CHECKPOINTS))
        return require_file(self.folder, name)

    def _find(self, name: str) -> Path | None:
        """The file of a listed name; None where it is gone."""
        try:
            path = self.resolve(name)
        except MissingFileError:
            return None
        return path if path.is_file() else None

    def _checkpoints(self) -> Iterator[str]:
        """Checkpoints that hold such a part, and those that there was no time to look into."""
        from .files import kinds_in

        end = time.monotonic() + LOOK_SECONDS
        for name in list_files("checkpoints"):
            path = find_file("checkpoints", name)
            if path is not None and (time.monotonic() >= end or self.kind in kinds_in(path)):
                yield name


class AnyFile:
    """A combo of every model file there is, each behind its folder's key."""

    def names(self) -> list[str]:
        """Embedded files first, then those of each folder."""
        own = [name for choice in CHOICES for name in choice.own]
        return [*own, *(f"{folder}: {name}" for folder in INSPECTED for name in list_files(folder))]

    def resolve(self, name: str) -> Path:
        """The file of a name, which may come from anywhere.

        Raises:
            MissingFileError: There is no such file any more.
        """
        for choice in CHOICES:
            if name in choice.own:
                return choice.own[name]
        folder, _, own = name.partition(": ")
        if folder not in INSPECTED:
            raise MissingFileError(f"there is no {name!r}; choose a file of the list")
        return require_file(folder, own)


def list_files(folder: str) -> list[str]:
    """Model files in one of the host's folders, one name for each model."""
    try:
        listed = folder_paths.get_filename_list(folder)
        found = {name for name in listed if name.lower().endswith(HOST_SUFFIXES)} | set(_scan(folder).names)
    except KeyError:  # a folder that an older host does not have
        return []
    return sorted(name for name in found if not _is_shard(name, found) and not _looks_prefixed(name))


def find_file(folder: str, name: str) -> Path | None:
    """A model file in one of the host's folders; None where there is none, or the name leads elsewhere."""
    if not name.lower().endswith(SUFFIXES) or _looks_prefixed(name):
        return None
    try:
        path = Path(folder_paths.get_full_path_or_raise(folder, name))
        roots = folder_paths.get_folder_paths(folder)
    except (FileNotFoundError, KeyError, ValueError):  # ValueError: another drive, or a zero byte
        return None
    place = os.path.abspath(path)
    return path if any(PurePath(place).is_relative_to(os.path.abspath(root)) for root in roots) else None


def require_file(folder: str, name: str) -> Path:
    """A model file in one of the host's folders.

    Raises:
        MissingFileError: There is none of that name.
    """
    path = find_file(folder, name)
    if path is None:
        raise MissingFileError(
            f"{name!r} is not in ComfyUI's {folder} folders (any more); put it there and press R, "
            "or choose another file"
        )
    return path


def _scan(folder: str) -> Scan:
    """The files that the host does not list, looked for again only when a folder changed, as the host does."""
    roots = tuple(folder_paths.get_folder_paths(folder))
    known = _scans.get(folder)
    if known is not None and known.holds(roots):
        return known
    names, changed = set(), {}
    for root in roots:
        files, folders = folder_paths.recursive_search(root, excluded_dir_names=LEFT_OUT)
        names.update(name for name in files if name.lower().endswith(OWN_SUFFIXES))
        changed |= folders
    _scans[folder] = Scan(roots, tuple(names), changed)
    return _scans[folder]


def _changed(folder: str) -> float | None:
    try:
        return os.path.getmtime(folder)
    except OSError:
        return None


def _is_shard(name: str, found: set[str]) -> bool:
    """Whether a file is a piece of a model whose index is listed."""
    path = PurePath(name)
    shard = SHARD.fullmatch(path.name)
    return shard is not None and str(path.with_name(shard["stem"] + INDEX_SUFFIX)) in found


def _looks_prefixed(name: str) -> bool:
    return name.startswith((EMBEDDED, CHECKPOINTS))


MODELS = Choice(
    "diffusion_models",
    {
        "flux1-mini": MINI.transformer,
        "flux1-mini-schnell": MINI_SCHNELL.transformer,
        **{files.transformer.stem: files.transformer for files in GUIDED.values()},
    },
    "transformer",
)
CLIPS = Choice("text_encoders", {"clip-mini": MINI.clip}, "clip")
T5S = Choice("text_encoders", {"t5-mini": MINI.t5}, "t5")
VAES = Choice("vae", {"flux1-mini-ae": MINI.autoencoder}, "autoencoder")
STYLE_MODELS = Choice("style_models", {"flux1-redux-mini": REDUX_MINI_FILE}, "redux")
VISION_TOWERS = Choice("clip_vision", {"siglip-mini": SIGLIP_MINI_FILE}, "vision")
CHOICES = (MODELS, CLIPS, T5S, VAES, STYLE_MODELS, VISION_TOWERS)
ANY_FILE = AnyFile()


def resolve_embedded(name: str) -> MiniFiles:
    """The files of an embedded model.

    Raises:
        MissingFileError: There is none of that name.
    """
    if name not in EMBEDDED_MODELS:
        raise MissingFileError(f"there is no embedded model {name!r}; choose one of {', '.join(EMBEDDED_MODELS)}")
    return EMBEDDED_MODELS[name]
