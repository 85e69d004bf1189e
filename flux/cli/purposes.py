"""What each drawing command wants of a transformer, and which embedded one ``--model mini`` is for it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ..errors import MismatchError, UserError
from ..specs.flux1 import FLUX1, Flux1Spec

__all__ = ["DRAWING", "EMBEDDED", "MINI", "SHORT_NAMES", "Purpose", "check_purpose", "purpose_of"]

DRAWING = ("generate", "fill", "outpaint", "control", "redux", "edit")
SHORT_NAMES = {
    "mini": "flux1-mini",
    "mini-schnell": "flux1-mini-schnell",
    "fill-mini": "flux1-fill-mini",
    "canny-mini": "flux1-canny-mini",
    "depth-mini": "flux1-depth-mini",
    "kontext-mini": "flux1-kontext-mini",
    "redux-mini": "flux1-mini-redux",
}
EMBEDDED = tuple(SHORT_NAMES.values())
MINI = "mini"  # in each command the embedded model that fits

DOES = {  # by what a model was trained for
    "draw": "draws from a prompt alone",
    "fill": "paints into a picture with a hole",
    "canny": "follows the edges of a picture",
    "depth": "follows the depth of a picture",
    "edit": "edits pictures by instruction",
}
RUN_BY = {
    "draw": "generate",
    "fill": "fill",
    "canny": "control --type canny",
    "depth": "control --type depth",
    "edit": "edit",
}


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """What a command wants of a transformer.

    Attributes:
        tasks: What it may have been trained for, of ``specs.flux1.TASKS``.
        mini: The short name of the embedded model that fits.
        lacks: What others do not do, for a message.
        choose: What to choose instead of them, likewise.
        styled: Whether a Redux adapter and its vision tower run beside it.
    """

    tasks: tuple[str, ...]
    mini: str
    lacks: str
    choose: str
    styled: bool = False

    def resolve(self, model: str) -> str:
        """The short name of what ``--model mini`` is here; any other name as it is."""
        return self.mini if model == MINI else model

    def embedded(self) -> list[str]:
        """Short names of the embedded models that fit."""
        specs = {short: FLUX1[name] for short, name in SHORT_NAMES.items()}
        return [
            short for short, spec in specs.items() if spec.task in self.tasks and (spec.heeds_redux or not self.styled)
        ]


GENERATE = Purpose(
    tasks=("draw", "edit"),
    mini="mini",
    lacks="and cannot draw from a prompt alone",
    choose="choose a text-to-image model",
)
FILL = Purpose(
    tasks=("fill",),
    mini="fill-mini",
    lacks="and has no input for a picture with a hole",
    choose="choose FLUX.1 Fill (or fill-mini)",
)
CANNY = Purpose(
    tasks=("canny",),
    mini="canny-mini",
    lacks="and not edges",
    choose="choose FLUX.1 Canny (or canny-mini), name it with --variant where its tensors cannot tell, or give a "
    "text-to-image model a control LoRA with --lora",
)
DEPTH = Purpose(
    tasks=("depth",),
    mini="depth-mini",
    lacks="and not depth",
    choose="choose FLUX.1 Depth (or depth-mini), name it with --variant where its tensors cannot tell, or give a "
    "text-to-image model a control LoRA with --lora",
)
CONTROL = Purpose(
    tasks=("canny", "depth"),
    mini="canny-mini",
    lacks="and has no input for a control picture",
    choose="choose a control model, or give a text-to-image model a control LoRA with --lora",
)
CONTROL_LORA = Purpose(
    tasks=("draw", "edit"),
    mini="mini",
    lacks="and takes no control LoRA",
    choose="choose the text-to-image model that the LoRA was made for, as FLUX.1 [dev]",
)
REDUX = Purpose(
    tasks=("draw", "edit"),  # the run warns of one that was not trained to heed Redux
    mini="redux-mini",
    lacks="and does not draw from pictures that Redux has read",
    choose="choose a text-to-image model (or redux-mini)",
    styled=True,
)
EDIT = Purpose(
    tasks=("edit", "draw"),  # which tensors cannot tell apart; the run warns of one that was not trained to edit
    mini="kontext-mini",
    lacks="and takes no references",
    choose="choose FLUX.1 Kontext (or kontext-mini)",
)
CONTROLS = {"canny": CANNY, "depth": DEPTH, "image": CONTROL}


def purpose_of(arguments: argparse.Namespace) -> Purpose:
    """What a command's options want.

    Raises:
        UserError: They leave open which embedded model is meant.
    """
    if arguments.command == "control":
        return _control(arguments)
    return {"generate": GENERATE, "fill": FILL, "outpaint": FILL, "redux": REDUX, "edit": EDIT}[arguments.command]


def _control(arguments: argparse.Namespace) -> Purpose:
    if arguments.lora is not None:
        return CONTROL_LORA
    if arguments.type == "image" and arguments.model == MINI:
        raise UserError(
            "a control picture of type image needs the --model or --lora that follows it; the embedded models follow "
            "--type canny (with --ready, for a picture that is edges already) and --type depth"
        )
    return CONTROLS[arguments.type]


def check_purpose(spec: Flux1Spec, purpose: Purpose) -> None:
    """Refuse a transformer that was trained for something else.

    Raises:
        MismatchError: It was.
    """
    if spec.task not in purpose.tasks:
        raise MismatchError(
            f"{spec.title} {DOES[spec.task]} {purpose.lacks}; {purpose.choose}, or run this one by "
            f"`python -m flux {RUN_BY[spec.task]}`"
        )
