"""Whether what meets in a graph fits, told with the files that it came from and those of the user's that would fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...flux.errors import MismatchError
from ...flux.pipelines.library import given_files
from ...flux.specs.fit import Given, check_fit, faults_between
from .files import describe_file
from .paths import CHECKPOINTS, CLIPS, MODELS, STYLE_MODELS, T5S, VAES, VISION_TOWERS, find_file, list_files
from .progress import show

__all__ = [
    "ENCODERS", "MODEL", "check_together", "encoded_by", "files_of", "fit_report", "given_of", "show_loaded",
    "users_files",
]  # fmt: skip

# Our keys in what passes between nodes: which files made it.
ENCODERS = "fluxfoundry_encoders"  # in a CONDITIONING: the text encoders, a tuple of ``Given``
AUTOENCODERS = "fluxfoundry_autoencoders"  # in a CONDITIONING: what encoded its pictures, a tuple of ``Given``
MODEL = "fluxfoundry_model"  # in a LATENT: the diffusion model that drew it

FOLDERS = {
    "transformer": ("diffusion_models", "checkpoints"),
    "clip": ("text_encoders", "checkpoints"),
    "t5": ("text_encoders", "checkpoints"),
    "autoencoder": ("vae", "checkpoints"),
    "redux": ("style_models", "checkpoints"),
    "vision": ("clip_vision", "checkpoints"),
}
OWN = {
    "transformer": MODELS,
    "clip": CLIPS,
    "t5": T5S,
    "autoencoder": VAES,
    "redux": STYLE_MODELS,
    "vision": VISION_TOWERS,
}


def users_files(kinds: Iterable[str]) -> list[Given]:
    """Every model file of some kinds that the loaders list, the user's first, for messages name only a few.

    Each header is read once as long as its file stays.
    """
    kinds = tuple(kinds)
    names: dict[Path, str] = {}
    for folder in dict.fromkeys(folder for kind in kinds for folder in FOLDERS[kind]):
        before = CHECKPOINTS if folder == "checkpoints" else ""
        found = ((find_file(folder, name), before + name) for name in list_files(folder))
        names |= {path: name for path, name in found if path is not None}
    names |= {path: name for kind in kinds for name, path in OWN[kind].own.items()}
    return [replace(given, label=names[given.path]) for given in given_files(names)]


def given_of(owner: Any) -> Given | None:
    """The file that one of our objects was loaded from; None for others'."""
    given = getattr(owner, "given", None)
    return given if isinstance(given, Given) else None


def encoded_by(vae: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """An entry's dict with a note of what encoded a picture in it; nothing is noted of others' VAEs."""
    given, before = given_of(vae), extra.get(AUTOENCODERS) or ()
    if given is None or any(own.path == given.path for own in before):
        return extra
    return {**extra, AUTOENCODERS: tuple(sorted((*before, given), key=lambda own: own.path))}


def files_of(extra: dict[str, Any]) -> tuple[Given, ...]:
    """Every file that an entry's text and pictures came through, as far as it is known."""
    return (*(extra.get(ENCODERS) or ()), *(extra.get(AUTOENCODERS) or ()))


def show_loaded(*files: Given) -> None:
    """Show on a loader what its files are, and what was assumed of them."""
    lines = []
    for given in files:
        lines += [f"{given.path.name}: {describe_file(given.path)}", *given.found.notes]
    show("\n".join(lines))


def fit_report(patcher: Any, path: Path) -> str:
    """Whether a file goes with a MODEL, in a line; for one of another loader, that it is not known."""
    transformer = given_of(patcher.model)
    if transformer is None:
        return "fits: not known, for the MODEL was not loaded by FLUX Foundry"
    try:
        check_together(transformer, [given for given in given_files([path]) if given.found.kind != "transformer"])
    except MismatchError as error:
        return f"fits: no, {error}"
    return f"fits: nothing speaks against {transformer.path.name}"


def check_together(transformer: Given | None, others: Sequence[Given]) -> None:
    """Refuse files that do not fit a diffusion model; nothing is checked of what is not known.

    Raises:
        MismatchError: One does not fit. The message names both files, and which would fit.
    """
    if transformer is None or not faults_between(transformer, others):
        return
    check_fit(transformer, others, users_files(FOLDERS))
