"""Do the embedded guided models do what they are there for? Measured on scenes that training never drew.

``python -m benchmarks.guided --count 200``. Every picture goes through the engine's own sampler; what it shows is found
from its pixels by ``checker``. Masks of what is drawn come from the scenes, which are known exactly.

Legend: IoU is the intersection over the union of what is covered; scenes have 128x128 pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.checker import Blob, check, find_blobs
from benchmarks.checker.picture import VISIBLE, measure
from benchmarks.prompts import draw_group
from benchmarks.report import Report
from flux.adapters.guides import Channels, Guide, Reference, StyleTokens
from flux.mini import files
from flux.mini.examples import (
    EDITS,
    REACH,
    EditExample,
    StyleExample,
    control_example,
    edit_example,
    fill_example,
    style_example,
)
from flux.mini.scenes import Item, Scene, shape_mask
from flux.pipelines.denoising import Guidance
from flux.pipelines.guided import FillInput, encode_picture, fill_latents
from flux.pipelines.redux import ReduxEncoder, ReduxPicture
from flux.pipelines.text_to_image import FluxModel
from flux.preprocess.vision import vision_pixels

__all__ = ["MEASURES", "Score", "covered_in", "iou", "main", "table", "weights_mark"]

Image = NDArray[np.uint8]
Flags = NDArray[np.bool_]

CANVAS = (128, 128)
CELL, TOKENS = 8, 64  # pixels of a latent cell; tokens of the canvas
BATCH = 16
SEED = 2_026
NEAR = 8.0  # pixels by which an object may be off and still be the one
MARK_LENGTH = 12  # characters
GROWN = 3  # pixels around an object in which its outline is looked for
COVERED = 15 / 32  # of a pixel; scenes are drawn in sixteenths, so that none lies on this border
EDGE = 5  # pixels across which an edge may be soft; objects are farther apart
BYTE = 255
STRENGTHS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)


@dataclass
class Score:
    """Right of asked by name, means by name, and examples of faults."""

    name: str
    right: dict[str, list[bool]] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    pictures: list[Image] = field(default_factory=list)
    seconds: float = 0.0

    def mark(self, what: str, right: bool, fault: str = "") -> None:
        """Count one case."""
        self.right.setdefault(what, []).append(bool(right))
        if not right and fault:
            self.faults.append(f"{what}: {fault}")

    def value(self, what: str, number: float) -> None:
        """Note one number, of which the mean is told."""
        self.values.setdefault(what, []).append(float(number))

    def rates(self) -> dict[str, float]:
        """Shares and means by name."""
        return {name: float(np.mean(cases)) for name, cases in {**self.right, **self.values}.items()}


def fill(count: int, model: FluxModel | None = None) -> Score:
    """Holes around an object, asked for by itself or by a sentence about the whole."""
    score, model = Score("fill-mini"), model or files.open_mini(files.MINI_FILL)
    rng = random.Random(f"measure/fill/{SEED}")
    for start in range(0, count, BATCH):
        examples = [fill_example(rng, CANVAS, mode="object", held_out=True) for _ in range(min(BATCH, count - start))]
        examples = [example for example in examples if example.item is not None]
        pictures = _pictures([example.picture for example in examples])
        masks = torch.from_numpy(np.stack([example.mask for example in examples]))[:, None]
        latents = fill_latents(FillInput(picture=pictures, mask=masks), model.autoencoder, (CANVAS[1], CANVAS[0]))
        drawn = draw(model, [example.prompt for example in examples], [Channels(latents=latents)], SEED + start)
        for example, image in zip(examples, drawn, strict=True):
            assert example.item is not None
            blobs = find_blobs(image)
            rest = tuple(item for item in example.scene.items if item is not example.item)
            found = [b for b in blobs if all(_distance(b, i) > NEAR for i in rest) and _inside(b, example.mask)]
            kinds = [(b.colour, b.shape) for b in found]
            wanted = (example.item.colour, example.item.shape)
            score.mark("object in the hole", kinds == [wanted], f"{example.prompt!r} gave {kinds}, not {wanted}")
            score.mark("rest kept", all(_is_there(i, blobs) for i in rest) and _same_ground(image, example.scene))
            _keep(score, example.picture * (1 - example.mask[..., None]).astype(np.uint8), image)
    return score


def control(count: int, kind: str, model: FluxModel | None = None, lora: Any = None) -> Score:
    """Edges or depth of a scene, with a sentence that tells colours."""
    row = {"canny": files.MINI_CANNY, "depth": files.MINI_DEPTH}[kind]
    score = Score(f"{kind}-mini{' LoRA' if lora is not None else ''}")
    model = model or files.open_mini(files.MINI if lora is not None else row)
    rng = random.Random(f"measure/{kind}/{SEED}")
    for start in range(0, count, BATCH):
        examples = [
            control_example(rng, CANVAS, kind, held_out=True, sign_share=0.0) for _ in range(min(BATCH, count - start))
        ]
        latents = encode_picture(model.autoencoder, _pictures([example.control for example in examples]))
        guides = [Channels(latents=latents, lora=lora)]
        drawn = draw(model, [example.prompt for example in examples], guides, SEED + start)
        for example, image in zip(examples, drawn, strict=True):
            truth, seen = _covered(example.scene), covered_in(image)
            score.value("IoU of outlines", iou(truth, seen))
            verdict = check(image, example.request)
            for index in range(verdict.colour[1]):
                score.mark("colours", index < verdict.colour[0], f"{example.prompt!r}: {'; '.join(verdict.faults)}")
            for index in range(verdict.shape[1]):
                score.mark("shapes", index < verdict.shape[0])
            _keep(score, example.control, image)
    return score


def edit(count: int, model: FluxModel | None = None) -> Score:
    """Instructions of every kind that changes one thing."""
    score, model = Score("kontext-mini"), model or files.open_mini(files.MINI_KONTEXT)
    rng = random.Random(f"measure/edit/{SEED}")
    kinds = [kind for kind in EDITS if kind not in ("join", "nothing")]
    for start in range(0, count, BATCH):
        examples = [
            edit_example(rng, CANVAS, kind=kinds[(start + k) % len(kinds)], held_out=True)
            for k in range(min(BATCH, count - start))
        ]
        latents = encode_picture(model.autoencoder, _pictures([example.references[0] for example in examples]))
        drawn = draw(model, [example.prompt for example in examples], [Reference(latents=latents)], SEED + start)
        for example, image in zip(examples, drawn, strict=True):
            _judge_edit(score, example, image)
            _keep(score, example.references[0], image)
    return score


def _judge_edit(score: Score, example: EditExample, image: Image) -> None:
    before, after = example.sources[0], example.after
    assert before is not None
    assert after is not None
    blobs, shown = find_blobs(image), measure(image)
    kept = [item for item in after.items if item in before.items]
    new = [item for item in after.items if item not in before.items]
    gone = [item for item in before.items if item not in after.items]
    done = all(_is_there(item, blobs) for item in new)
    done = done and all(_is_there(item, blobs) == (item in after.items) for item in gone)
    if example.kind == "background":
        done = shown.background == after.background
    seen = "; ".join(f"{b.colour} {b.shape} at ({b.x:.0f}, {b.y:.0f})" for b in blobs)
    score.mark("change made", done, f"{example.prompt!r} gave {shown.background} with {seen}")
    score.mark(f"change made: {example.kind}", done)
    score.mark("rest: colours equal", all(_is_there(item, blobs) for item in kept), f"{example.prompt!r} gave {seen}")
    score.mark("rest: background", shown.background == after.background)
    for item in kept:
        score.value("rest: IoU", _iou_of(item, after, shown.contrast))


def style(
    count: int, model: FluxModel | None = None, strength: float = 1.0, redux: ReduxEncoder | None = None
) -> Score:
    """Scenes as references, with no prompt at all: which of their objects are there again, wherever."""
    score, model = Score("redux-mini"), model or files.open_mini(files.MINI_REDUX)
    redux = redux or files.open_redux_mini()
    rng = random.Random(f"measure/style/{SEED}")
    for start in range(0, count, BATCH):
        examples = [_whole_style(rng) for _ in range(min(BATCH, count - start))]
        tokens = torch.cat([_style_tokens(redux, example.reference) for example in examples])
        guides = [StyleTokens(tokens=tokens, strength=strength)]
        drawn = draw(model, [""] * len(examples), guides, SEED + start)
        for example, image in zip(examples, drawn, strict=True):
            blobs = find_blobs(image)
            wanted = [(item.colour, item.shape) for item in example.scene.items]
            seen = [(b.colour, b.shape) for b in blobs]
            for kind in wanted:
                again = kind in seen
                score.mark("colour and shape", again, f"{wanted} gave {seen}")
                if again:
                    seen.remove(kind)
            colours, shapes = [b.colour for b in blobs], [b.shape for b in blobs]
            for item in example.scene.items:
                score.mark("colours again", _taken(colours, item.colour))
                score.mark("shapes again", _taken(shapes, item.shape))
            score.mark("background", measure(image).background == example.scene.background)
            _keep(score, example.reference, image)
    return score


def _taken(found: list[str | None], wanted: str) -> bool:
    """Whether something wanted is among what was found, of which it is taken out."""
    if wanted not in found:
        return False
    found.remove(wanted)
    return True


def _whole_style(rng: random.Random) -> StyleExample:
    while True:
        example = style_example(rng, CANVAS, held_out=True)
        if not example.prompt and example.keep.all():
            return example


def _style_tokens(redux: ReduxEncoder, reference: Image) -> Tensor:
    views = vision_pixels(_pictures([reference]).movedim(1, -1), redux.tower.spec.side)
    return redux.encode(ReduxPicture(views=views)).tokens


def draw(model: FluxModel, prompts: Sequence[str], guides: Sequence[Guide], seed: int) -> list[Image]:
    """Pictures (H, W, 3) of several prompts at once; row k of a guide is prompt k's."""
    return list(draw_group(model, prompts, seed, CANVAS, Guidance(guides=guides)).numpy())


def _pictures(images: Sequence[Image]) -> Tensor:
    """(B, 3, H, W) in 0..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / BYTE


def covered_in(image: Image) -> Flags:
    """Which pixels objects cover by a half or more, whatever their colours.

    A pixel at an edge is compared with what stands out most beside it, for that is what it is a mixture with.
    """
    contrast = measure(image).contrast
    peak = cv2.dilate(contrast, np.ones((EDGE, EDGE), np.uint8))
    return np.asarray((contrast > VISIBLE) & (contrast > COVERED * peak))


def _mask(item: Item) -> Flags:
    mask: Flags = shape_mask(item.shape, item.x, item.y, item.radius, *CANVAS) > COVERED
    return mask


def _covered(scene: Scene) -> Flags:
    covered = np.zeros((CANVAS[1], CANVAS[0]), bool)
    for item in scene.items:
        covered |= _mask(item)
    return covered


def iou(one: Flags, other: Flags) -> float:
    """Intersection over union of what two (H, W) cover; 1 where neither covers anything."""
    union = float((one | other).sum())
    return float((one & other).sum()) / union if union else 1.0


def _iou_of(item: Item, scene: Scene, contrast: NDArray[np.float32]) -> float:
    """The IoU of an object with what is seen around its place, the scene's other objects left out.

    A pixel is covered that stands out about half as much as the object's middle does.
    """
    own = _mask(item)
    inner = cv2.erode(own.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    seen = contrast > max(VISIBLE, COVERED * float(np.median(contrast[inner])))
    others = np.zeros(seen.shape, np.uint8)
    for other in scene.items:
        if other != item:
            others |= _mask(other).astype(np.uint8)
    free = cv2.dilate(others, np.ones((3, 3), np.uint8)) == 0
    reach = (item.radius + GROWN) * REACH
    rows, columns = (slice(max(0, round(c - reach)), round(c + reach)) for c in (item.y, item.x))
    return iou((own & free)[rows, columns], (seen & free)[rows, columns])


def _distance(blob: Blob, item: Item) -> float:
    return float(np.hypot(blob.x - item.x, blob.y - item.y))


def _inside(blob: Blob, mask: NDArray[np.float32]) -> bool:
    y, x = (min(max(int(c), 0), side - 1) for c, side in zip((blob.y, blob.x), mask.shape, strict=True))
    return bool(mask[y, x] > 1 / 2)


def _is_there(item: Item, blobs: Sequence[Blob]) -> bool:
    """Whether an object of this colour and shape lies at this place."""
    return any((b.colour, b.shape) == (item.colour, item.shape) and _distance(b, item) <= NEAR for b in blobs)


def _same_ground(image: Image, scene: Scene) -> bool:
    return measure(image).background == scene.background


def _keep(score: Score, given: Image, made: Image) -> None:
    score.pictures.append(np.concatenate((given, made), axis=1))


MEASURES: dict[str, Callable[[int], Score]] = {
    "fill": fill,
    "canny": lambda count: control(count, "canny"),
    "depth": lambda count: control(count, "depth"),
    "canny LoRA": lambda count: control(count, "canny", lora=files.open_control_lora("canny")),
    "depth LoRA": lambda count: control(count, "depth", lora=files.open_control_lora("depth")),
    "edit": edit,
    "style": style,
}
BARS = {
    "object in the hole": 0.9, "rest kept": 0.9, "IoU of outlines": 0.85, "colours": 0.9, "change made": 0.85,
    "rest: IoU": 0.9, "rest: colours equal": 0.95, "colour and shape": 0.85, "colours again": 0.85,
    "shapes again": 0.85,
}  # fmt: skip


def table(count: int, names: Sequence[str] | None = None) -> Report:
    """Rates of the embedded guided models, beside their bars."""
    began = time.monotonic()
    rows = [row for name in names or MEASURES for row in _figures(MEASURES[name](count))]
    strengths = _by_strength(count) if names is None or "style" in names else []
    seconds, mark = time.monotonic() - began, weights_mark()
    note = (
        f"{count} held-out cases each, 128x128, defaults; {seconds:.0f} s in all. Bars of what else stays (rest kept, "
        f"rest: colours equal) are this project's own. Weights: {mark}."
    )
    head = ("| model | what | measured | bar |", "|---|---|---|---|")
    text = "\n".join((*head, *map(_row, rows), "", *_strength_lines(strengths), note))
    return Report(text, {"cases": count, "seconds": seconds, "weights": mark, "rows": rows, "strengths": strengths})


def _figures(score: Score) -> list[dict[str, Any]]:
    return [
        {"model": score.name, "what": what, "measured": rate, "bar": BARS.get(what)}
        for what, rate in score.rates().items()
    ]


def _row(one: Mapping[str, Any]) -> str:
    what, bar = one["what"], one["bar"]
    if "IoU" in what:
        shown, least = f"{one['measured']:.3f}", "" if bar is None else f"≥ {bar:.2f}"
    else:
        shown, least = f"{100 * one['measured']:.1f} %", "" if bar is None else f"≥ {100 * bar:.0f} %"
    return f"| {one['model']} | {what} | {shown} | {least} |"


def weights_mark() -> str:
    """Tells all weights that take part from any others."""
    digest = hashlib.sha256()
    for path in (*files.GUIDED_FILES, files.MINI.transformer, files.MINI.autoencoder, files.MINI.clip, files.MINI.t5):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:MARK_LENGTH]


def _by_strength(count: int) -> list[dict[str, float]]:
    """How much of a reference is there again, by Redux strength."""
    model, redux, cases = files.open_mini(files.MINI_REDUX), files.open_redux_mini(), max(1, count // 2)
    return [
        {"strength": strength, "there_again": style(cases, model, strength, redux).rates()["colour and shape"]}
        for strength in STRENGTHS
    ]


def _strength_lines(found: Sequence[Mapping[str, float]]) -> list[str]:
    """The same as Markdown with an empty line at its end; nothing of nothing."""
    if not found:
        return []
    strengths, shares = zip(*((one["strength"], one["there_again"]) for one in found), strict=True)
    falls = all(one > other for one, other in pairwise(shares))
    return [
        f"| Redux strength | {' | '.join(f'{strength:g}' for strength in strengths)} |",
        f"|---|{'---|' * len(found)}",
        f"| colour and shape there again | {' | '.join(f'{100 * share:.0f} %' for share in shares)} |",
        "",
        f"It {'falls' if falls else 'does not fall'} with every step.",
        "",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and faults and pictures if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guided", description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", choices=sorted(MEASURES), action="append")
    parser.add_argument("--faults", action="store_true", help="list what was wrong, of --only")
    parser.add_argument("--sheet", type=Path, help="write pictures of --only to this PNG: what was given, what came")
    options = parser.parse_args(arguments)
    if not (options.faults or options.sheet):
        sys.stdout.write(f"{table(options.count, options.only)}\n")
        return 0
    for name in options.only or MEASURES:
        score = MEASURES[name](options.count)
        lines = [f"{what}: {rate:.3f}" for what, rate in score.rates().items()]
        sys.stdout.write("\n".join((f"## {score.name}", *lines, *score.faults)) + "\n")
        if options.sheet:
            _write_sheet(score.pictures, options.sheet.with_stem(f"{options.sheet.stem}-{name}"))
    return 0


def _write_sheet(pictures: Sequence[Image], path: Path, columns: int = 4) -> None:
    from PIL import Image as Pillow

    whole = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures) - columns + 1, columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(np.concatenate(whole)).save(path)


if __name__ == "__main__":
    sys.exit(main())
