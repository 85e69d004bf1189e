"""``python -m flux models``: the known models, and what each needs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..models.autoencoder import Autoencoder
from ..models.flux1 import Flux1
from ..models.redux import Redux
from ..models.text.clip import ClipText
from ..models.text.t5 import T5Encoder
from ..models.vision.siglip import SiglipVision
from ..ops.layers import on_meta
from ..pipelines.describe import human_bytes
from ..pipelines.layout import table
from ..specs.autoencoder import AUTOENCODERS
from ..specs.flux1 import FLUX1, Flux1Spec
from ..specs.releases import FILE_NAMES, PAGES
from ..specs.text import CLIP_TEXT, T5_ENCODERS
from ..specs.vision import REDUXES, VISION_TOWERS
from .console import say
from .files import EMBEDDED

__all__ = ["catalogue", "run"]

BF16_BYTES = 2
PARTS_INSIDE = ("clip-mini", "t5-mini", "flux1-mini-ae", "siglip-mini", "flux1-redux-mini")
KINDS: tuple[tuple[str, Mapping[str, Any], Callable[[Any], nn.Module]], ...] = (
    ("CLIP text encoder", CLIP_TEXT, ClipText),
    ("T5 text encoder", T5_ENCODERS, T5Encoder),
    ("autoencoder", AUTOENCODERS, Autoencoder),
    ("vision tower", VISION_TOWERS, SiglipVision),
    ("Redux adapter", REDUXES, Redux),
)
INSIDE = "inside the pack"
COMMANDS: tuple[tuple[str, Callable[[dict[str, Any]], bool]], ...] = (  # and which models they run
    ("`generate` takes", lambda row: row["task"] == "draw"),
    ("`redux` takes", lambda row: row["task"] == "draw" and row["heeds_redux"]),
    ("`fill` and `outpaint` take", lambda row: row["task"] == "fill"),
    ("`control` takes", lambda row: row["task"] in ("canny", "depth")),
    ("`edit` takes", lambda row: row["task"] == "edit"),
)
MILLION, BILLION = 10**6, 10**9


def run(arguments: argparse.Namespace) -> int:
    """Print the catalogue as tables or JSON; returns the exit code."""
    facts = catalogue()
    say(json.dumps(facts, indent=2) if arguments.json else _as_text(facts))
    return 0


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Every known transformer, and every part that one of them needs or can use."""
    return {
        "models": [_model(spec) for spec in FLUX1.values()],
        "parts": [
            _part(name, kind, count_parameters(build, spec))
            for kind, specs, build in KINDS
            for name, spec in specs.items()
        ],
    }


def count_parameters(build: Callable[[Any], nn.Module], spec: object) -> int:
    """Parameters of a module, built without memory."""
    with on_meta():
        return sum(parameter.numel() for parameter in build(spec).parameters())


def _model(spec: Flux1Spec) -> dict[str, Any]:
    parameters = count_parameters(Flux1, spec)
    return {
        "name": spec.name,
        "title": spec.title,
        "embedded": spec.name in EMBEDDED,
        "files": list(spec.files),
        "parameters": parameters,
        "bf16_bytes": parameters * BF16_BYTES,
        "steps": spec.steps,
        "guidance": spec.guidance,
        "text_encoders": list(spec.text_encoders),
        "autoencoder": spec.autoencoder,
        "task": spec.task,
        "heeds_redux": spec.heeds_redux,
        "draws_from_text": spec.in_channels == spec.out_channels,
        "licence": spec.licence,
    }


def _part(name: str, kind: str, parameters: int) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "embedded": name in PARTS_INSIDE,
        "files": list(FILE_NAMES[name]),
        "page": PAGES.get(name),
        "parameters": parameters,
        "bf16_bytes": parameters * BF16_BYTES,
    }


def _as_text(facts: dict[str, list[dict[str, Any]]]) -> str:
    models = [
        (
            row["name"],
            INSIDE if row["embedded"] else row["files"][0],
            _count(row["parameters"]),
            human_bytes(row["bf16_bytes"]),
            str(row["steps"]),
            "-" if row["guidance"] is None else f"{row['guidance']:g}",
            ", ".join((*row["text_encoders"], row["autoencoder"])),
            row["licence"],
        )
        for row in facts["models"]
    ]
    parts = [
        (
            row["name"],
            INSIDE if row["embedded"] else row["files"][0],
            _count(row["parameters"]),
            human_bytes(row["bf16_bytes"]),
            row["kind"],
            row["page"] or "",
        )
        for row in facts["parts"]
    ]
    taken = [
        f"{command} {', '.join(row['name'] for row in facts['models'] if runs(row))}" for command, runs in COMMANDS
    ]
    return "\n".join(
        (
            *table(("MODEL", "FILE", "SIZE", "BF16", "STEPS", "GUIDANCE", "NEEDS", "LICENCE"), models),
            "",
            *table(("PART", "FILE", "SIZE", "BF16", "KIND", "FROM"), parts),
            "",
            *taken,
            "Real models also need tokenizers: CLIP's vocab.json and merges.txt, and T5's tokenizer.json "
            f"(the folders tokenizer and tokenizer_2 of {PAGES['tokenizers']}).",
        )
    )


def _count(parameters: int) -> str:
    unit, letter = (BILLION, "B") if parameters >= BILLION else (MILLION, "M")
    return f"{parameters / unit:.2f}{letter}"
