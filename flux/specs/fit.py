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
from .vision import REDUXES, VISION_TOWERS, ReduxSpec, SiglipSpec

__all__ = ["Given", "check_fit", "check_kind", "check_redux", "faults_between", "redux_faults"]

SHOWN = 5  # files that a message lists
KIND_TITLES = {
    "transformer": "a FLUX.1 diffusion model",
    "autoencoder": "a FLUX.1 autoencoder (VAE)",
    "clip": "a CLIP-L text encoder",
    "t5": "a T5 text encoder",
    "vision": "a vision tower that a Redux adapter takes",
    "redux": "a Redux adapter",
}
USUAL = {  # of each kind
    "transformer": "flux1-dev",
    "autoencoder": "flux1-ae",
    "clip": "clip-l",
    "t5": "t5xxl",
    "vision": "siglip-so400m-384",
    "redux": "flux1-redux-dev",
}
ENCODERS = ("clip", "t5", "text-encoder")
ADAPTERS = ("lora", "controlnet", "ip-adapter", "redux")
LAYERS_TAKEN = 3  # of a language model, side by side, are FLUX.2's text tokens
WIDTHS: dict[str, int] = {  # of what parts put out: hidden states, or latent channels
    **{name: spec.width for name, spec in CLIP_TEXT.items()},
    **{name: spec.width for name, spec in T5_ENCODERS.items()},
    **{name: row.width for name, row in LANGUAGE_MODELS.items()},
    **{name: spec.latent_channels for name, spec in RECOGNISED_AUTOENCODERS.items()},
    **{name: spec.width for name, spec in VISION_TOWERS.items()},
    **{name: spec.text_width for name, spec in REDUXES.items()},
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
    """One file that does not fit.

    Attributes:
        given: The file, or the one beside which another is missing.
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
        wanted_kind: "transformer", "autoencoder", "clip", "t5", "vision" or "redux".
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


def redux_faults(redux: Given, tower: Given | None, transformer: Given | None = None) -> list[str]:
    """Why a Redux adapter cannot be used so, a sentence each; empty when all fits. See ``check_redux``."""
    fault = _tower_fault(redux, tower)
    told = [] if fault is None else [fault.text]
    return told + ([] if transformer is None else faults_between(transformer, [redux]))


def check_redux(
    redux: Given, tower: Given | None, transformer: Given | None = None, candidates: Sequence[Given] = ()
) -> None:
    """Refuse a Redux adapter without the vision tower that it takes, or for a transformer of other text tokens.

    Args:
        redux: The adapter.
        tower: What is to see for it; None for nothing.
        transformer: What its tokens are for, if that is known.
        candidates: The user's files, of which those that fit are named.

    Raises:
        MismatchError: One does not fit the other, or the tower is missing.
    """
    fault = _tower_fault(redux, tower)
    told = [] if fault is None else [f"{fault.text}; {_tower_way_out(redux, fault, candidates)}"]
    if transformer is not None:
        told += [f"{own.text}; {_way_out(transformer, own, candidates)}" for own in _faults(transformer, [redux])]
    if told:
        raise MismatchError("; ".join(told))


def _tower_fault(redux: Given, tower: Given | None) -> _Fault | None:
    """Why a vision tower does not fit a Redux adapter; None where it does."""
    spec = redux.found.spec
    if not isinstance(spec, ReduxSpec):
        return _Fault(redux, f"{redux}, but {KIND_TITLES['redux']} is needed here", ("redux",), _usual("redux"))
    place = _Place(spec.tower, spec.vision_width)
    title, get = PART_TITLES[spec.tower], f"get {where_to_get(spec.tower)}"
    if tower is None:
        return _Fault(redux, f"{redux}, which needs {title}, and there is none", ("vision",), get)
    offered = _offered(tower.found)
    if tower.found.kind == "vision" and offered == place:
        return None
    is_known = tower.found.role == "vision" and offered.width not in (0, place.width)
    widths = f": {place.width} wide, not {offered.width}" if is_known else ""
    return _Fault(tower, f"{tower}, but {redux}, which takes {title}{widths}", ("vision",), get)


def _tower_way_out(redux: Given, fault: _Fault, candidates: Sequence[Given]) -> str:
    """Which of the user's files to take instead, else what to get; and which adapter the refused tower goes with."""
    if isinstance(redux.found.spec, ReduxSpec):
        fitting = _listed(own for own in candidates if _tower_fault(redux, own) is None)
    else:
        fitting = _listed(own for own in candidates if _is(own, "redux"))
    goes_with = _listed(own for own in candidates if _tower_fault(own, fault.given) is None)
    way_out = f"of your files these fit: {fitting}" if fitting else fault.remedy
    return way_out + (f" ({fault.given.name} goes with {goes_with})" if goes_with else "")


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
    if isinstance(spec, (ClipTextSpec, T5Spec, SiglipSpec)):
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
    role, made_for = other.found.role, _made_for(other.found)
    if role not in ADAPTERS or made_for is None:
        return None
    family = "flux2" if isinstance(spec, Flux2Spec) else "flux1"
    width = spec.context_width if role == "redux" else spec.hidden
    own_family, own_width = made_for
    same_family = own_family in ("", family)
    if same_family and own_width in (0, width):
        return None
    tokens = "text tokens" if role == "redux" else "tokens"
    reason = f", whose {tokens} are {width} wide, not {own_width}" if same_family else ""
    usual = [row.name for row in REDUXES.values() if role == "redux" and (family, width) == ("flux1", row.text_width)]
    choose = f"get {where_to_get(usual[0])}" if usual else f"choose one that was made for {model_title(spec)}"
    return _Fault(other, f"{other}, but {transformer}{reason}", (role,), f"{choose}, or leave it out")


def _made_for(found: Recognised) -> tuple[str, int] | None:
    """The family that an adapter was made for, empty where nothing tells, and the width of its tokens, 0 likewise."""
    if isinstance(found.spec, ReduxSpec):
        return "flux1", found.spec.text_width
    return None if found.foreign is None else (found.foreign.family, found.foreign.width)


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
