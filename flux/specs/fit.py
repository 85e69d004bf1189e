"""Preflight: whether files fit each other, told from what they were recognised as, before anything is read.

Everything here compares specs. A message names both files, what each is, and which of the user's own files would do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MismatchError
from .autoencoder import RECOGNISED_AUTOENCODERS, AutoencoderSpec
from .flux1 import Flux1Spec
from .flux2 import Flux2Spec
from .foreign import LANGUAGE_MODELS, model_title
from .recognition import Recognised, TransformerSpec
from .releases import PART_TITLES, where_to_get
from .text import CLIP_TEXT, T5_ENCODERS, ClipTextSpec, T5Spec

__all__ = ["Given", "check_fit", "check_kind", "faults_between"]

SHOWN = 5  # files that a message lists
KIND_TITLES = {
    "transformer": "a FLUX.1 diffusion model",
    "autoencoder": "a FLUX.1 autoencoder (VAE)",
    "clip": "a CLIP-L text encoder",
    "t5": "a T5 text encoder",
}
USUAL = {"transformer": "flux1-dev", "autoencoder": "flux1-ae", "clip": "clip-l", "t5": "t5xxl"}  # of each kind
ENCODERS = ("clip", "t5", "text-encoder")
ADAPTERS = ("lora", "controlnet", "ip-adapter", "redux")
LAYERS_TAKEN = 3  # of a language model, side by side, are FLUX.2's text tokens
WIDTHS: dict[str, int] = {  # of what parts put out: hidden states, or latent channels
    **{name: spec.width for name, spec in CLIP_TEXT.items()},
    **{name: spec.width for name, spec in T5_ENCODERS.items()},
    **{name: row.width for name, row in LANGUAGE_MODELS.items()},
    **{name: spec.latent_channels for name, spec in RECOGNISED_AUTOENCODERS.items()},
}


@dataclass(frozen=True)
class Given:
    """One of the user's files, or one part of it, and what it was found to be."""

    path: Path
    found: Recognised
    label: str = ""  # what the user calls it, where that is not the file's name

    @property
    def name(self) -> str:
        return self.label or self.path.name

    def __str__(self) -> str:
        return f"{self.name} is {self.found.title}"


@dataclass(frozen=True)
class _Place:
    """What belongs in one place of a model: a part's name, and the width that the model takes from it."""

    name: str
    width: int


@dataclass(frozen=True)
class _Fault:
    """One file that does not fit the transformer.

    Attributes:
        given: The file.
        text: Both files and why, as a sentence.
        roles: That a file in its place may have.
        remedy: What to get when none of the user's files fits, as a phrase.
    """

    given: Given
    text: str
    roles: tuple[str, ...]
    remedy: str


def faults_between(transformer: Given, others: Sequence[Given]) -> list[str]:
    """Why files do not fit a transformer, a sentence each; empty when all fit as far as is known."""
    return [fault.text for fault in _faults(transformer, others)]


def check_fit(transformer: Given, others: Sequence[Given], candidates: Sequence[Given] = ()) -> None:
    """Refuse files that do not fit a transformer.

    Args:
        transformer: The diffusion model.
        others: What is to run with it: encoders, autoencoder, adapters.
        candidates: The user's files, of which those that fit are named.

    Raises:
        MismatchError: One does not fit.
    """
    faults = _faults(transformer, others)
    if faults:
        raise MismatchError("; ".join(f"{fault.text}; {_way_out(transformer, fault, candidates)}" for fault in faults))


def check_kind(given: Given, wanted_kind: str, candidates: Sequence[Given] = ()) -> None:
    """Refuse a file that is not the part that is needed, or that the engine does not run.

    Args:
        given: The file.
        wanted_kind: "transformer", "autoencoder", "clip" or "t5".
        candidates: The user's files, of which those that are such a part are named.

    Raises:
        MismatchError: It is something else.
    """
    if _is(given, wanted_kind):
        return
    fitting = _listed(candidate for candidate in candidates if _is(candidate, wanted_kind))
    way_out = f"of your files these fit: {fitting}" if fitting else _usual(wanted_kind)
    idle = ", which this version does not run yet" if given.found.spec is not None and not given.found.runs else ""
    raise MismatchError(f"{given}{idle}, but {KIND_TITLES[wanted_kind]} is needed here; {way_out}")


def _usual(kind: str) -> str:
    return f"choose another file, such as {where_to_get(USUAL[kind])}"


def _is(given: Given, kind: str) -> bool:
    return given.found.kind == kind and given.found.runs


def _faults(transformer: Given, others: Iterable[Given]) -> list[_Fault]:
    spec = transformer.found.spec
    if not isinstance(spec, (Flux1Spec, Flux2Spec)):
        text = f"{transformer}, but {KIND_TITLES['transformer']} is needed here"
        return [_Fault(transformer, text, ("transformer",), _usual("transformer"))]
    found = (_part_fault(transformer, spec, other) or _adapter_fault(transformer, spec, other) for other in others)
    return [fault for fault in found if fault is not None]


def _places(spec: TransformerSpec) -> dict[str, _Place]:
    """What belongs to a transformer, by role."""
    autoencoder = _Place(spec.autoencoder, spec.latent_channels)
    if isinstance(spec, Flux2Spec):
        encoder = _Place(spec.text_encoder, spec.context_width // LAYERS_TAKEN)
        return {"text-encoder": encoder, "autoencoder": autoencoder}
    clip, t5 = spec.text_encoders
    return {
        "clip": _Place(clip, spec.pooled_width),
        "t5": _Place(t5, spec.context_width),
        "autoencoder": autoencoder,
    }


def _offered(found: Recognised) -> _Place:
    """What a part is and puts out; without name or width where they are not known."""
    spec = found.spec
    if isinstance(spec, (ClipTextSpec, T5Spec)):
        return _Place(spec.name, spec.width)
    if isinstance(spec, AutoencoderSpec):
        return _Place(spec.name, spec.latent_channels)
    return _Place(found.foreign.name, found.foreign.width) if found.foreign is not None else _Place("", 0)


def _part_fault(transformer: Given, spec: TransformerSpec, other: Given) -> _Fault | None:
    """Why an encoder or autoencoder does not fit; None for what fits or is something else."""
    role, places = other.found.role, _places(spec)
    if role not in (*ENCODERS, "autoencoder"):
        return None
    place = places.get(role)
    if place is None:
        wanted = {encoder: places[encoder] for encoder in ENCODERS if encoder in places}
        needs = " and ".join(PART_TITLES[encoder.name] for encoder in wanted.values())
        return _fault(transformer, other, f"which takes {needs}", wanted)
    offered = _offered(other.found)
    if offered == place:
        return None
    unit = "latent channels" if role == "autoencoder" else "wide"
    widths = f": {place.width} {unit}, not {offered.width}" if offered.width not in (0, place.width) else ""
    takes = PART_TITLES[place.name] if _has_release(place) else "another"
    return _fault(transformer, other, f"which takes {takes}{widths}", {role: place})


def _fault(transformer: Given, other: Given, reason: str, wanted: Mapping[str, _Place]) -> _Fault:
    get = " and ".join(where_to_get(place.name) for place in wanted.values() if _has_release(place))
    remedy = f"get {get}" if get else f"no release fits {transformer.name}; use the parts that it was trained with"
    return _Fault(other, f"{other}, but {transformer}, {reason}", tuple(wanted), remedy)


def _has_release(place: _Place) -> bool:
    """Whether the part of this name is what fits; a model of other sizes has the name of its nearest release's."""
    return WIDTHS.get(place.name) == place.width


def _adapter_fault(transformer: Given, spec: TransformerSpec, other: Given) -> _Fault | None:
    """Why an adapter was made for another model; None for what fits, as far as is known, or is something else."""
    foreign = other.found.foreign
    if foreign is None or foreign.role not in ADAPTERS:
        return None
    family = "flux2" if isinstance(spec, Flux2Spec) else "flux1"
    width = spec.context_width if foreign.role == "redux" else spec.hidden
    if foreign.family in ("", family) and foreign.width in (0, width):
        return None
    tokens = "text tokens" if foreign.role == "redux" else "tokens"
    same_family = foreign.family in ("", family)
    reason = f", whose {tokens} are {width} wide, not {foreign.width}" if same_family else ""
    remedy = f"choose one that was made for {model_title(spec)}, or leave it out"
    return _Fault(other, f"{other}, but {transformer}{reason}", (foreign.role,), remedy)


def _way_out(transformer: Given, fault: _Fault, candidates: Sequence[Given]) -> str:
    """Which of the user's files to take instead, else what to get; and what the refused one would go with."""
    if fault.given is transformer:
        fitting = [candidate for candidate in candidates if _is(candidate, "transformer")]
        goes_with: list[Given] = []
    else:
        fitting = [
            candidate for candidate in candidates
            if candidate.found.role in fault.roles and not _faults(transformer, [candidate])
        ]  # fmt: skip
        goes_with = [
            candidate for candidate in candidates
            if candidate.found.kind == "transformer" and not _faults(candidate, [fault.given])
        ]  # fmt: skip
    way_out = f"of your files these fit: {_listed(fitting)}" if fitting else fault.remedy
    return way_out + (f" ({fault.given.name} goes with {_listed(goes_with)})" if goes_with else "")


def _listed(files: Iterable[Given]) -> str:
    """Names of files, each once; empty for none."""
    names = list(dict.fromkeys(file.name for file in files))
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
