"""Which files a model is: those inside the pack, or a transformer's path and what goes with it.

What no option names is looked for beside the transformer, and in ComfyUI's folders when the transformer stands in one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..errors import MissingFileError, UserError
from ..specs.flux1 import FLUX1, Flux1Spec, check_draws
from ..specs.recognise import recognise_kind
from ..weights.readers.header import SafetensorsHeader

__all__ = ["EMBEDDED", "FILE_NAMES", "PAGES", "ModelFiles", "model_files"]

WEIGHTS = Path(__file__).resolve().parent.parent / "mini" / "weights"
EMBEDDED = ("flux1-mini", "flux1-mini-schnell")
SHORT_NAMES = {"mini": "flux1-mini", "mini-schnell": "flux1-mini-schnell"}

FILE_NAMES: dict[str, tuple[str, ...]] = {  # of each part, the names that its releases go by, the usual one first
    "clip-l": ("clip_l.safetensors",),
    "t5xxl": ("t5xxl_fp16.safetensors", "t5xxl_bf16.safetensors", "t5xxl.safetensors", "t5xxl_fp8_e4m3fn.safetensors"),
    "flux1-ae": ("ae.safetensors", "flux1-ae.safetensors", "flux_vae.safetensors"),
    "clip-mini": ("clip.safetensors",),
    "t5-mini": ("t5.safetensors",),
    "flux1-mini-ae": ("ae.safetensors",),
}
PAGES: dict[str, str] = {
    "clip-l": "https://huggingface.co/comfyanonymous/flux_text_encoders",
    "t5xxl": "https://huggingface.co/comfyanonymous/flux_text_encoders",
    "flux1-ae": "https://huggingface.co/black-forest-labs/FLUX.1-schnell",
    "tokenizers": "https://huggingface.co/black-forest-labs/FLUX.1-schnell",
}
ENCODER_FOLDERS = ("text_encoders", "clip")  # ComfyUI's names, beside its folder of transformers
AUTOENCODER_FOLDERS = ("vae",)
TOKENIZER_FOLDERS = ("tokenizers", "tokenizer")
CLIP_FILES, T5_FILE = ("vocab.json", "merges.txt"), "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files of one model; tokenizers may be folders."""

    transformer: Path
    clip: Path
    t5: Path
    autoencoder: Path
    clip_tokenizer: Path
    t5_tokenizer: Path


def model_files(arguments: argparse.Namespace) -> ModelFiles:
    """Find every file of the model that is asked for.

    Raises:
        UserError: The model is not known, a file is not there, or the transformer's file is something else.
    """
    path, spec = _transformer(arguments.model)
    if all(name.endswith("-mini") for name in spec.text_encoders):
        return _with_options(arguments, _mini(path))
    found = _Search(spec, path)
    files = ModelFiles(
        transformer=path,
        clip=arguments.clip or found.part("--clip", spec.text_encoders[0], ENCODER_FOLDERS),
        t5=arguments.t5 or found.part("--t5", spec.text_encoders[1], ENCODER_FOLDERS),
        autoencoder=arguments.vae or found.part("--vae", spec.autoencoder, AUTOENCODER_FOLDERS),
        clip_tokenizer=found.tokenizer(arguments.tokenizers, "tokenizer", CLIP_FILES),
        t5_tokenizer=found.tokenizer(arguments.tokenizers, "tokenizer_2", (T5_FILE,)),
    )
    found.complain()
    return files


def _transformer(model: str) -> tuple[Path, Flux1Spec]:
    name = SHORT_NAMES.get(model, model)
    if name in EMBEDDED:
        return WEIGHTS / FLUX1[name].files[0], FLUX1[name]
    path = Path(model)
    if not path.exists():
        raise UserError(_unknown_model(model, name))
    header = SafetensorsHeader(path)
    spec = recognise_kind("transformer", header, path.name, header.metadata).spec
    assert isinstance(spec, Flux1Spec)
    check_draws(spec)
    return path, spec


def _unknown_model(model: str, name: str) -> str:
    if name in FLUX1:
        return (
            f"{FLUX1[name].title} is not inside the pack; give --model the path of {' or '.join(FLUX1[name].files)} "
            "(`python -m flux models` lists what else it needs)"
        )
    return (
        f"there is no model and no file named {model!r}; give {', '.join((*SHORT_NAMES, *EMBEDDED))}, or the path of a "
        "FLUX.1 transformer's .safetensors file"
    )


def _mini(transformer: Path) -> ModelFiles:
    return ModelFiles(
        transformer=transformer,
        clip=WEIGHTS / "clip.safetensors",
        t5=WEIGHTS / "t5.safetensors",
        autoencoder=WEIGHTS / "ae.safetensors",
        clip_tokenizer=WEIGHTS / T5_FILE,
        t5_tokenizer=WEIGHTS / T5_FILE,
    )


def _with_options(arguments: argparse.Namespace, files: ModelFiles) -> ModelFiles:
    """The embedded model's files, but for those that an option names."""
    return ModelFiles(
        transformer=files.transformer,
        clip=arguments.clip or files.clip,
        t5=arguments.t5 or files.t5,
        autoencoder=arguments.vae or files.autoencoder,
        clip_tokenizer=arguments.tokenizers or files.clip_tokenizer,
        t5_tokenizer=arguments.tokenizers or files.t5_tokenizer,
    )


class _Search:
    """Looks for a real model's other files, and tells of all that are missing at once."""

    def __init__(self, spec: Flux1Spec, transformer: Path) -> None:
        self.spec, self.path = spec, transformer
        self.home = transformer.absolute().parent
        self.missing: list[str] = []

    def part(self, option: str, name: str, folders: tuple[str, ...]) -> Path:
        """The file of an encoder or autoencoder."""
        places = (self.home, *(self.home.parent / folder for folder in folders))
        for place in places:
            for file_name in FILE_NAMES[name]:
                if (place / file_name).is_file():
                    return place / file_name
        self.missing.append(f"{FILE_NAMES[name][0]} ({option}; from {PAGES[name]})")
        return Path()

    def tokenizer(self, given: Path | None, release_folder: str, wanted: tuple[str, ...]) -> Path:
        """The folder with all of one tokenizer's files: the one given, or below the transformer's."""
        homes = (given,) if given is not None else (self.home / folder for folder in TOKENIZER_FOLDERS)
        release = (self.home / release_folder,) if given is None else ()
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
