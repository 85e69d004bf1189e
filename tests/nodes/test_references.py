"""FLUX Reference, with a fake of the host and of its autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from fake_host import Vae

REFERENCE = {"strength": 1.0, "start": 0.0, "end": 1.0, "layout": "auto", "fit": "pad", "max_megapixels": 1.0}
BAD = [
    ({"strength": 2.5}, "the strength is 2.5; give a number from 0 to 2"),
    ({"strength": -1.0}, "the strength is -1; give a number from 0 to 2"),
    ({"start": 0.5, "end": 0.5}, "it starts at 0.5 and ends at 0.5"),
    ({"start": 0.9, "end": 0.1}, "it starts at 0.9 and ends at 0.1"),
]


@pytest.mark.parametrize(
    ("settings", "words"), [*BAD, ({"region": torch.zeros(1, 32, 32)}, "the reference would be seen nowhere")]
)
def test_what_a_reference_cannot_take_is_refused(
    load: Callable[[str], ModuleType], run: Callable, settings: dict, words: str
) -> None:
    given = {"conditioning": [[torch.zeros(1, 4, 8), {}]], "vae": Vae(), "image": torch.rand(1, 32, 32, 3)}
    with pytest.raises(load("flux.errors").UserError, match=words):
        run("references", "Reference", **given, **{**REFERENCE, **settings})
