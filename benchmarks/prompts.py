"""Do the embedded models draw what prompts ask for? Measured on requests that training never drew.

``python -m benchmarks.prompts --model mini --count 600``. Every picture goes through the engine's own sampler and
autoencoder, and is judged by ``checker``, which looks at pixels only.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checker import Tally, check
from benchmarks.report import Report
from flux.mini.files import MINI, MINI_SCHNELL, open_mini
from flux.mini.language import Request, is_held_out, mirrored, phrase, random_request, text_of
from flux.pipelines.denoising import Guidance, denoise
from flux.pipelines.prompts import EncodedPrompt
from flux.pipelines.text_to_image import FluxModel, decode, plan_sigmas
from flux.pipelines.text_to_image import Request as Settings
from flux.sampling.noise import draw_noise

__all__ = ["Judged", "main", "measure", "table"]

MODELS = {"mini": MINI, "mini-schnell": MINI_SCHNELL}
NATIVE = (128, 128)  # width and height
OTHER_CANVASES = ((96, 96), (112, 144), (192, 128), (128, 192), (192, 192))
OTHERS_OF = 6  # these are measured on one prompt in so many
OTHER_KINDS = ("all", "position", "words")  # of what is asked on them
CELL, TOKEN = 8, 16  # pixels that a latent cell, and a transformer's token, stand for
SEED = 2_026
BATCH = 16  # prompts that walk side by side; they do not touch each other
FAULTS_SHOWN = 12
BARS: dict[str, float | None] = {
    "colour": 0.98, "shape": 0.95, "position": 0.97, "all": 0.9, "words of 3-4 letters": 0.85,
    "size": None, "count": None, "background": None, "words": None,
}  # fmt: skip


@dataclass
class Judged:
    """What came out: rates by kind, the time it took, and examples of faults."""

    model: str
    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)


def requests_for_measuring(count: int, seed: int = SEED, sign_share: float = 0.35) -> list[tuple[Request, str]]:
    """Held-out requests, each in one of its phrasings; no prompt twice, none that training saw the other way round."""
    rng = random.Random(f"measure/{seed}")
    chosen: dict[str, Request] = {}
    while len(chosen) < count:
        request = random_request(rng, sign_share=sign_share, held_out=True)
        while not is_held_out(mirrored(request)):  # another relation in its place, so that their share stays
            request = _held_out_relation(rng)
        chosen.setdefault(text_of(phrase(request, rng)), request)
    return [(request, text) for text, request in chosen.items()]


def _held_out_relation(rng: random.Random) -> Request:
    while True:
        request = random_request(rng, sign_share=0.0, held_out=True)
        if request.relation is not None:
            return request


def measure(
    name: str, count: int, *, model: FluxModel | None = None, keep: int = 0, canvas: tuple[int, int] = NATIVE
) -> Judged:
    """Draw and judge ``count`` prompts at a canvas' width and height; the first ``keep`` pictures are kept."""
    model = model or open_mini(MODELS[name])
    judged = Judged(name)
    chosen = requests_for_measuring(count)
    began = time.monotonic()
    for start in range(0, count, BATCH):
        group = chosen[start : start + BATCH]
        pixels = draw_group(model, [text for _, text in group], SEED + start, canvas)
        for (request, text), picture in zip(group, pixels, strict=True):
            verdict = check(picture.numpy(), request)
            judged.tally.add(verdict, request)
            if verdict.faults:
                judged.faults.append(f"{text!r}: {'; '.join(verdict.faults)}")
            if len(judged.pictures) < keep:
                judged.pictures.append(picture)
    judged.seconds = time.monotonic() - began
    return judged


def draw_group(
    model: FluxModel,
    prompts: Sequence[str],
    seed: int,
    canvas: tuple[int, int] = NATIVE,
    guided: Guidance | None = None,
) -> Tensor:
    """Pictures (B, H, W, 3) as bytes of several prompts at once, with the model's own defaults.

    Row k of whatever guides the run is prompt k's.
    """
    spec = model.transformer.spec
    width, height = canvas
    encoded = [model.text.encode(prompt, length=spec.t5_length) for prompt in prompts]
    together = EncodedPrompt(torch.cat([e.tokens for e in encoded]), torch.cat([e.pooled for e in encoded]))
    noise = draw_noise((spec.latent_channels, height // CELL, width // CELL), [seed + i for i in range(len(prompts))])
    sigmas = plan_sigmas(spec, Settings(prompt=""), (width // TOKEN) * (height // TOKEN))
    return decode(
        model.autoencoder, denoise(model.transformer, together, noise, sigmas, guidance=spec.guidance, guided=guided)
    )


def table(count: int, names: list[str] | None = None) -> Report:
    """Rates of the embedded models, beside the bars of mini."""
    judged = [measure(name, count) for name in names or sorted(MODELS)]
    rates = {one.model: one.tally.rates() for one in judged}
    rows = [
        {"what": kind, "rates": {model: own.get(kind, 0.0) for model, own in rates.items()}, "bar": BARS[kind]}
        for kind in BARS
    ]
    seconds = {one.model: one.seconds / count for one in judged}
    canvases = [_on_canvas(count // OTHERS_OF, canvas) for canvas in OTHER_CANVASES]
    told = ", ".join(f"{model} {own:.2f} s" for model, own in seconds.items())
    text = "\n".join(
        (
            f"| | {' | '.join(rates)} | bar (mini) |",
            f"|---|{'---|' * len(rates)}---|",
            *map(_row, rows),
            "",
            f"{count} held-out prompts a model, 128x128, defaults; time a picture: {told}.",
            "",
            "| mini on other canvases | all | position | words |",
            "|---|---|---|---|",
            *map(_canvas_row, canvases),
        )
    )
    return Report(text, {"prompts": count, "rows": rows, "seconds": seconds, "canvases": canvases})


def _on_canvas(count: int, canvas: tuple[int, int]) -> dict[str, Any]:
    """How mini does on another canvas."""
    rates = measure("mini", count, canvas=canvas).tally.rates()
    shares = {kind: rates.get(kind, 0.0) for kind in OTHER_KINDS}
    return {"width": canvas[0], "height": canvas[1], "prompts": count, "rates": shares}


def _row(one: Mapping[str, Any]) -> str:
    cells = " | ".join(f"{100 * rate:.1f} %" for rate in one["rates"].values())
    bar = "" if one["bar"] is None else f"≥ {100 * one['bar']:.0f} %"
    return f"| {one['what']} | {cells} | {bar} |"


def _canvas_row(one: Mapping[str, Any]) -> str:
    cells = " | ".join(f"{100 * rate:.0f} %" for rate in one["rates"].values())
    return f"| {one['width']}x{one['height']}, {one['prompts']} prompts | {cells} |"


def main(arguments: list[str] | None = None) -> int:
    """Print the rates as a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prompts", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), action="append")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--sheet", type=Path, help="write the first pictures as a contact sheet to this PNG")
    parser.add_argument("--faults", action="store_true", help="list what was wrong")
    options = parser.parse_args(arguments)
    for name in options.model or sorted(MODELS):
        judged = measure(name, options.count, keep=32 if options.sheet else 0)
        sys.stdout.write(f"## {name}: {options.count} prompts, {judged.seconds:.0f} s\n\n{judged.tally.table()}\n\n")
        for fault in judged.faults[: None if options.faults else FAULTS_SHOWN]:
            sys.stdout.write(f"- {fault}\n")
        if options.sheet:
            _write_sheet(judged.pictures, options.sheet.with_stem(f"{options.sheet.stem}-{name}"))
    return 0


def _write_sheet(pictures: list[Tensor], path: Path, columns: int = 8) -> None:
    from PIL import Image

    rows = [torch.cat(pictures[i : i + columns], dim=1) for i in range(0, len(pictures), columns)]
    whole = torch.cat([row for row in rows if row.shape == rows[0].shape])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(whole.numpy()).save(path)


if __name__ == "__main__":
    sys.exit(main())
