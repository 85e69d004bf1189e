"""Parts of a run by ``start`` and ``end``: FLUX Sampler has them where its schedule for the picture's size has them."""

from __future__ import annotations

import numpy as np
from client import Host
from graph import end, node, our_sampler, start
from pictures import OTHER_PROMPT, pixels

SIDE = 192  # not the embedded model's own size


def timed(side: int) -> dict:
    """One prompt up to the middle of the run, another from there."""
    size = {"width": side, "height": side, "batch_size": 1}
    return start() | {
        "other": node("CLIPTextEncode", clip=["load", 1], text=OTHER_PROMPT),
        "first": node("ConditioningSetTimestepRange", conditioning=["text", 0], start=0.0, end=0.5),
        "second": node("ConditioningSetTimestepRange", conditioning=["other", 0], start=0.5, end=1.0),
        "both": node("ConditioningCombine", conditioning_1=["first", 0], conditioning_2=["second", 0]),
        "empty": node("EmptySD3LatentImage", **size),
        "native": node("ModelSamplingFlux", model=["load", 0], max_shift=1.15, base_shift=0.5, width=128, height=128),
        "sized": node("ModelSamplingFlux", model=["load", 0], max_shift=1.15, base_shift=0.5, width=side, height=side),
        "sigmas": node(
            "FluxFoundrySchedule", model=["load", 0], steps=16, schedule="flux", denoise=1.0, width=side, height=side,
            explicit="",
        ),
    }  # fmt: skip


def test_the_middle_of_a_run_is_its_schedules_at_every_size(host: Host) -> None:
    def drawn(model: str) -> np.ndarray:
        sampler = our_sampler(model, positive=["both", 0], sigmas=["sigmas", 0])
        return pixels(host.picture(timed(SIDE) | {"sample": sampler} | end()))

    ours, sized, native = (drawn(model) for model in ("load", "sized", "native"))
    assert np.array_equal(ours, sized)
    assert not np.array_equal(sized, native)
