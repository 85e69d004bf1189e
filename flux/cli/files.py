"""Which files a model is: those inside the pack, or a transformer's path and what goes with it.

What no option names is looked for in the transformer's own file, beside it, and in ComfyUI's folders when it stands in
one: by the usual names first, then by what the files there are.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..errors import MissingFileError, UserError
from ..specs.flux1 import FLUX1, Flux1Spec
from ..specs.releases import FILE_NAMES, PAGES
from ..specs.vision import REDUXES, ReduxSpec
from .purposes import EMBEDDED, MINI, SHORT_NAMES, Purpose, check_purpose

__all__ = ["EMBEDDED", "ModelFiles", "control_lora_file", "model_files"]

WEIGHTS = Path(__file__).resolve().parent.parent / "mini" / "weights"

REPOSITORY_FOLDER = "transformer"  # of a repository in diffusers' layout
ENCODER_FOLDERS = ("text_encoders", "clip", "text_encoder", "text_encoder_2")  # ComfyUI's names, and diffusers'
AUTOENCODER_FOLDERS = ("vae",)
TOKENIZER_FOLDERS = ("tokenizers", "tokenizer")
REDUX_FOLDERS, VISION_FOLDERS = ("style_models",), ("clip_vision",)
EMBEDDED_LORAS = {  # by what they follow
    "canny": WEIGHTS / "flux1-canny-mini-lora.safetensors",
    "depth": WEIGHTS / "flux1-depth-mini-lora.safetensors",
}
EMBEDDED_PARTS = {  # of what runs beside a transformer, the parts that the pack has itself
    "clip-mini": WEIGHTS / "clip.safetensors",
    "t5-mini": WEIGHTS / "t5.safetensors",
    "flux1-mini-ae": WEIGHTS / "ae.safetensors",
    "siglip-mini": WEIGHTS / "siglip-mini.safetensors",
    "flux1-redux-mini": WEIGHTS / "flux1-redux-mini.safetensors",
}
CLIP_FILES, T5_FILE = ("vocab.json", "merges.txt"), "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files of one model; tokenizers may be folders. ``redux`` and ``vision`` are None where no picture is read."""

    transformer: Path
    clip: Path
    t5: Path
    autoencoder: Path
    clip_tokenizer: Path
    t5_tokenizer: Path
    redux: Path | None = None
    vision: Path | None = None


def model_files(arguments: argparse.Namespace, purpose: Purpose) -> ModelFiles:
    """Find every file of the model that is asked for.

    Raises:
        UserError: The model is not known, a file is not there, or the transformer's file is something else.
    """
    path, spec = _transformer(arguments.model, arguments.variant, purpose)
    found = _Search(spec, path)
    clip, t5 = spec.text_encoders
    redux, vision = _style_files(arguments, found) if purpose.styled else (None, None)
    files = ModelFiles(
        transformer=path,
        clip=arguments.clip or found.part("--clip", clip, ENCODER_FOLDERS),
        t5=arguments.t5 or found.part("--t5", t5, ENCODER_FOLDERS),
        autoencoder=arguments.vae or found.part("--vae", spec.autoencoder, AUTOENCODER_FOLDERS),
        clip_tokenizer=found.tokenizer(arguments.tokenizers, clip, "tokenizer", CLIP_FILES),
        t5_tokenizer=found.tokenizer(arguments.tokenizers, t5, "tokenizer_2", (T5_FILE,)),
        redux=redux,
        vision=vision,
    )
    found.complain()
    return files


def control_lora_file(given: str, kind: str) -> Path:
    """The file of a control LoRA: the one given, or for "mini" the embedded one that follows ``kind``.

    Raises:
        UserError: There is no embedded one.
    """
    if given != MINI:
        return Path(given)
    if kind not in EMBEDDED_LORAS:
        raise UserError(f"the embedded control LoRAs follow {' and '.join(EMBEDDED_LORAS)}; give --lora a file")
    return EMBEDDED_LORAS[kind]


def _style_files(arguments: argparse.Namespace, found: _Search) -> tuple[Path, Path]:
    """The Redux adapter and the vision tower: as given, else those that go with the transformer."""
    if arguments.redux is None:
        rows = [row for row in REDUXES.values() if row.text_width == found.spec.context_width]
        if not rows:
            raise UserError(
                f"no Redux adapter is known for {found.spec.title}, whose text tokens are {found.spec.context_width} "
                "wide; give --redux and --vision"
            )
        name, tower = rows[0].name, rows[0].tower
    else:
        name, tower = "", _tower_of(arguments.redux) if arguments.vision is None else ""
    return (
        arguments.redux or found.part("--redux", name, REDUX_FOLDERS),
        arguments.vision or found.part("--vision", tower, VISION_FOLDERS),
    )


def _tower_of(redux: Path) -> str:
    """The name of the vision tower that a Redux adapter's file takes."""
    from ..pipelines.parts import find_part

    spec = find_part(redux, "redux")[1].recognised.spec
    assert isinstance(spec, ReduxSpec)
    return spec.tower


def _transformer(model: str, variant: str | None, purpose: Purpose) -> tuple[Path, Flux1Spec]:
    model = purpose.resolve(model)
    name = SHORT_NAMES.get(model, model)
    if name in EMBEDDED:
        check_purpose(FLUX1[name], purpose)
        return WEIGHTS / FLUX1[name].files[0], FLUX1[name]
    path = Path(model)
    if not path.exists():
        raise UserError(_unknown_model(model, name, purpose))
    if (path / REPOSITORY_FOLDER).is_dir():
        path = path / REPOSITORY_FOLDER
    from ..pipelines.parts import find_part  # brings torch, which the embedded models' files need not wait for

    spec = find_part(path, "transformer", variant)[1].recognised.spec
    assert isinstance(spec, Flux1Spec)
    check_purpose(spec, purpose)
    return path, spec


def _unknown_model(model: str, name: str, purpose: Purpose) -> str:
    if name in FLUX1:
        return (
            f"{FLUX1[name].title} is not inside the pack; give --model the path of {' or '.join(FLUX1[name].files)} "
            "(`python -m flux models` lists what else it needs)"
        )
    return (
        f"there is no model and no file named {model!r}; give {', '.join(purpose.embedded())}, or the path of a "
        "FLUX.1 transformer's .safetensors or .gguf file"
    )


class _Search:
    """Looks for a real model's other files, and tells of all that are missing at once."""

    def __init__(self, spec: Flux1Spec, transformer: Path) -> None:
        self.spec, self.path = spec, transformer
        place = transformer.absolute()
        self.home = place if place.is_dir() else place.parent
        self.missing: list[str] = []

    def part(self, option: str, name: str, folders: tuple[str, ...]) -> Path:
        """The file of an encoder or autoencoder: the transformer's own, one of the usual name, or what is one."""
        from ..pipelines.library import model_files_in

        if name in EMBEDDED_PARTS and self.path.parent == WEIGHTS:
            return EMBEDDED_PARTS[name]
        if name in self._named(self.path):
            return self.path
        if name in EMBEDDED_PARTS:
            return EMBEDDED_PARTS[name]
        places = (self.home, *(self.home.parent / folder for folder in folders))
        usual = (place / file_name for place in places for file_name in FILE_NAMES[name])
        for path in usual:
            if path.is_file():
                return path
        for path in (path for place in places for path in model_files_in(place)):
            if name in self._named(path):
                return path
        self.missing.append(f"{FILE_NAMES[name][0]} ({option}; from {PAGES[name]})")
        return Path()

    def _named(self, path: Path) -> list[str]:
        """The specs of all parts of a file."""
        from ..pipelines.library import given_files

        return [given.found.spec.name for given in given_files([path]) if given.found.spec is not None]

    def tokenizer(self, given: Path | None, encoder: str, release_folder: str, wanted: tuple[str, ...]) -> Path:
        """The folder with all of one tokenizer's files: the one given, or below the transformer's, or beside it."""
        if encoder in EMBEDDED_PARTS:
            return given or WEIGHTS / T5_FILE
        homes = (given,) if given is not None else (self.home / folder for folder in TOKENIZER_FOLDERS)
        release = (self.home / release_folder, self.home.parent / release_folder) if given is None else ()
        for home in homes:
            for place in (home / release_folder, home):
                if all((place / name).is_file() for name in wanted):
                    return place
        for place in release:
            if all((place / name).is_file() for name in wanted):
                return place
        where = "--tokenizers" if given is None else f"in {given}"
        self.missing.append(f"{' and '.join(wanted)} ({where}; from {release_folder}/ of {PAGES['tokenizers']})")
        return Path()

    def complain(self) -> None:
        """Say what was not found, if anything."""
        if self.missing:
            raise MissingFileError(
                f"{self.path.name} is {self.spec.title} and needs more files, which are not there: "
                f"{', '.join(self.missing)}; name them with these options, or put them into {self.home}"
            )
