"""Pictures in a CONDITIONING that fill a model's further channels: where they lie, and which entries have none.

A control picture's place is the host's ``concat_latent_image``. A picture with a hole has the same, beside a
``concat_mask``; then a control's is our dict of latents by slot, in all entries alike, since a model reads all of them
in one way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .entries import Conditioning

__all__ = [
    "CONTROL", "CONTROLS", "HOLE", "IMAGE", "MASK", "has_hole", "if_taken", "lacks_guide", "marked", "shows_part",
    "taken_by", "with_room",
]  # fmt: skip

IMAGE, MASK = "concat_latent_image", "concat_mask"  # the host's keys
CONTROLS = "fluxfoundry_controls"  # ours: latents (1 or B, C, h, w) by slot
ABSENT = "fluxfoundry_absent"  # ours: True where a guide does not act, though it does in other entries
OPTIONAL = "fluxfoundry_optional"  # ours: kinds of pictures that a model without a place for them leaves alone
CONTROL, HOLE = "control", "hole"  # the kinds

Extra = dict[str, Any]


def has_hole(conditioning: Conditioning) -> bool:
    """Whether any entry carries a picture with a hole, so that controls have their other place."""
    return any(extra.get(MASK) is not None for _, extra in conditioning)


def shows_part(extra: Extra) -> bool:
    """Whether an entry has a picture with a hole of which anything is left to be seen."""
    mask: Tensor | None = extra.get(MASK)
    return mask is not None and bool((mask < 1).any())


def with_room(conditioning: Conditioning) -> Conditioning:
    """Entries whose control picture, where a hole has its place, is the first control LoRA's, as behind a hole."""
    return [[text, _moved(extra)] for text, extra in conditioning]


def _moved(extra: Extra) -> Extra:
    if extra.get(IMAGE) is None or extra.get(MASK) is not None:
        return extra
    rest = {key: value for key, value in extra.items() if key != IMAGE}
    return {**rest, CONTROLS: {1: extra[IMAGE], **(extra.get(CONTROLS) or {})}}


def marked(text: Tensor, extra: Extra) -> tuple[Tensor, Extra]:
    """An entry in which a guide does not act."""
    return text, {**extra, ABSENT: True}


def lacks_guide(extra: Extra) -> bool:
    """Whether a guide does not act in an entry, and no other one is in its place."""
    control = extra.get(IMAGE) is not None and extra.get(MASK) is None
    return bool(extra.get(ABSENT)) and not (control or shows_part(extra) or extra.get(CONTROLS))


def if_taken(extra: Extra, kind: str) -> Extra:
    """An entry whose picture of a kind is for another MODEL of the run, if its own has no place for it."""
    return {**extra, OPTIONAL: frozenset({kind, *(extra.get(OPTIONAL) or ())})}


def taken_by(entry: Extra, *, hole: bool, slots: int) -> Extra:
    """An entry without the pictures that ``if_taken`` lets a model leave alone.

    Args:
        entry: Of a CONDITIONING.
        hole: Whether the model takes a picture with a hole.
        slots: How many control pictures it takes.
    """
    optional, left = entry.get(OPTIONAL) or (), dict(entry)
    if HOLE in optional and not hole:
        left |= {IMAGE: None, MASK: None}
    if CONTROL in optional:
        if left.get(CONTROLS):
            left[CONTROLS] = {slot: latents for slot, latents in left[CONTROLS].items() if slot <= slots}
        if left.get(IMAGE) is not None and left.get(MASK) is None and (hole or not slots):
            left[IMAGE] = None
    return {key: value for key, value in left.items() if value is not None or key not in (IMAGE, MASK)}
