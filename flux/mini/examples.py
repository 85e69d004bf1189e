"""What the embedded guided models learn from: a picture, the sentence that asks for it, and the pictures that guide it.

Every example is a function of a random state and a canvas. Half of the scenes, of holes three quarters, are laid out as
the text model knows them; in the others objects lie anywhere on the lattice, for there it is the guide that says where
things are. Beside edges and depth some lie off the lattice and have any size: what is followed need not be made up.
Elsewhere that would be too much: a model this small, made to draw shapes of any size at any pixel, draws all badly.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from ..preprocess.canny import canny
from ..preprocess.control import as_bytes
from .language import COLOURS, SHAPES, SIZES, Request, Wanted, is_held_out, phrase, random_request, text_of
from .scenes import (
    LATTICE,
    MARGIN,
    NAMED,
    NATIVE_SIDE,
    PALETTE,
    RADII,
    Item,
    Scene,
    draw,
    lay_out,
    place_of,
    shape_mask,
)

__all__ = [
    "EDITS", "HOLE_MODES", "REACH", "ControlExample", "EditExample", "FillExample", "StyleExample", "canny_of",
    "control_example", "depth_of", "edit_example", "fill_example", "grid_picture", "scene_example", "style_example",
]  # fmt: skip

Image = NDArray[np.uint8]
Mask = NDArray[np.float32]
Canvas = tuple[int, int]  # width and height

SCATTERED_SHARE = 0.5
FILL_SCATTERED_SHARE = 0.25  # what fills a hole is made up, which takes more practice at every further place
FREE_SHARE = 0.4  # of the scattered scenes beside edges and depth: off the lattice
SIGN_SHARE = 0.1
SMALLEST, LARGEST_ALONE, LARGEST_AMONG = 11.0, 28.0, 20.0  # radii of scattered objects at the native side
ATTEMPTS = 60
NEAREST, FARTHEST_OBJECT = 1.0, 0.35  # of objects in a depth picture, whose background is 0 to ``FARTHEST``
FARTHEST = 0.12
BYTE = 255


@dataclass(frozen=True)
class FillExample:
    """``mask`` (H, W) is 1 where ``picture`` (H, W, 3) was taken out; ``prompt`` tells what was there, or the whole.

    Attributes:
        scene: What the picture shows.
        item: What the hole was made around, if it was made around one.
    """

    prompt: str
    picture: Image
    mask: Mask
    scene: Scene
    item: Item | None = None


@dataclass(frozen=True)
class ControlExample:
    """``control`` (H, W, 3) is the edges or the depth of ``picture``."""

    prompt: str
    picture: Image
    control: Image
    request: Request
    scene: Scene


@dataclass(frozen=True)
class EditExample:
    """``picture`` is what ``prompt`` makes of ``references``; all have one size.

    Attributes:
        kind: One of ``EDITS``.
        sources: What each reference shows; None for what is no scene.
        after: What the picture shows.
    """

    prompt: str
    picture: Image
    references: tuple[Image, ...]
    kind: str
    sources: tuple[Scene | None, ...]
    after: Scene | None


@dataclass(frozen=True)
class StyleExample:
    """``picture`` shows the things that lie in ``keep`` (H, W) of ``reference``, with what ``prompt`` adds.

    Attributes:
        told: The sentence that asks for this picture without a reference.
        scene: What is taken over of the reference, as it lies there.
    """

    prompt: str
    told: str
    picture: Image
    reference: Image
    keep: Mask
    scene: Scene


def scene_example(
    rng: random.Random,
    canvas: Canvas,
    *,
    held_out: bool = False,
    sign_share: float = SIGN_SHARE,
    scattered_share: float = SCATTERED_SHARE,
    free_share: float = 0.0,
) -> tuple[Request, Scene]:
    """A request and a scene that answers it, laid out or scattered.

    Args:
        rng: Decides everything.
        canvas: Width and height.
        held_out: Whether the request is one that training never draws.
        sign_share: How many are words.
        scattered_share: How many scenes without words have their objects anywhere on the lattice.
        free_share: How many of the scattered scenes have their objects off the lattice, of any size.
    """
    while True:
        request = random_request(rng, sign_share=sign_share, held_out=held_out)
        if request.word is not None or rng.random() >= scattered_share:
            return request, lay_out(request, rng, *canvas)
        loose = _loosened(request)
        if is_held_out(loose) == held_out:
            scene = _scatter(loose, rng, *canvas, free=rng.random() < free_share)
            if scene is not None:
                return loose, scene


def _loosened(request: Request) -> Request:
    """The same objects wherever they are and of any size; shapes are told apart, for places no longer tell them."""
    kinds = {wanted.shape: wanted for wanted in request.objects}
    objects = tuple(replace(wanted, size=None, position=None) for wanted in kinds.values())
    return Request(objects=objects, background=request.background)


def _scatter(request: Request, rng: random.Random, width: int, height: int, *, free: bool) -> Scene | None:
    """Objects anywhere, apart from each other; None where no place was found."""
    scale = min(1.0, min(width, height) / NATIVE_SIDE)
    wanted = [o for o in request.objects for _ in range(o.count)]
    largest = LARGEST_ALONE if len(wanted) == 1 else LARGEST_AMONG
    taken = {o.colour for o in wanted}
    background = request.background or rng.choice([c for c in COLOURS if c not in taken])
    items: list[Item] = []
    for thing in wanted:
        for _ in range(ATTEMPTS):
            sizes = RADII[len(wanted) == 1].values()
            radius = (rng.uniform(SMALLEST, largest) if free else rng.choice(list(sizes))) * scale
            room = radius * REACH + MARGIN * scale
            if 2 * room > min(width, height):
                continue
            x, y = (
                rng.uniform(room, side - room) if free else _on_lattice(rng, room, side) for side in (width, height)
            )
            item = Item(thing.shape, thing.colour, x, y, radius)
            if all(_apart(item, other, scale) for other in items):
                items.append(item)
                break
        else:
            return None
    return Scene(width, height, background, tuple(items))


def _on_lattice(rng: random.Random, room: float, side: int) -> float:
    """A place on the lattice, ``room`` away from both ends if there is one, else the middle."""
    first, last = math.ceil(room / LATTICE), math.floor((side - room) / LATTICE)
    return float(LATTICE * rng.randint(first, last)) if first <= last else side / 2


REACH = 1.15  # how far a shape's corners lie beyond its radius, at most


def _apart(one: Item, other: Item, scale: float) -> bool:
    return math.dist((one.x, one.y), (other.x, other.y)) >= (one.radius + other.radius) * REACH + MARGIN * scale


def _say(request: Request, rng: random.Random) -> str:
    return text_of(phrase(request, rng))


# Filling a hole.

HOLE_MODES = {"object": 12, "whole": 1.5, "strip": 4, "box": 1.5, "empty": 2}
BOX_MARGIN = (3.0, 8.0)  # pixels between an object and its hole, alike on all sides: what is painted fills its hole
STRIP = (0.2, 0.5)  # of a side
BLURRED_SHARE = 0.15
BLUR = 5


def fill_example(rng: random.Random, canvas: Canvas, *, mode: str | None = None, held_out: bool = False) -> FillExample:
    """A scene with a hole: where an object is, at the sides, anywhere, or where nothing is.

    Args:
        rng: Decides everything.
        canvas: Width and height.
        mode: One of ``HOLE_MODES``; None for any.
        held_out: Whether the request is one that training never draws.
    """
    request, scene = scene_example(rng, canvas, held_out=held_out, scattered_share=FILL_SCATTERED_SHARE)
    mode = mode or rng.choices(list(HOLE_MODES), weights=list(HOLE_MODES.values()))[0]
    if mode == "object" and not scene.items:
        mode = "whole"
    item = rng.choice(scene.items) if mode == "object" else None
    if item is not None:
        mask = hole_around(item, scene, rng)
        prompt = said_alone(item, scene, rng) if rng.random() < 0.6 else _say(request, rng)
    elif mode == "empty":
        mask, prompt = _box(rng, canvas), ""
        scene = replace(scene, items=tuple(i for i in scene.items if not _touches(mask, i, canvas)), sign=None)
    else:
        mask, prompt = _hole(mode, rng, canvas), _say(request, rng)
    if rng.random() < BLURRED_SHARE:
        mask = cv2.GaussianBlur(mask, (BLUR, BLUR), 0).astype(np.float32)
    return FillExample(prompt, draw(scene), mask, scene, item)


def said_alone(item: Item, scene: Scene, rng: random.Random) -> str:
    """A sentence for one object, with or without the background."""
    background = scene.background if rng.random() < 0.3 else None
    return _say(Request(objects=(Wanted(item.shape, item.colour),), background=background), rng)


def hole_around(item: Item, scene: Scene, rng: random.Random) -> Mask:
    """A box or an ellipse (H, W) around an object, with some room."""
    mask = np.zeros((scene.height, scene.width), np.float32)
    half = item.radius * REACH + rng.uniform(*BOX_MARGIN)
    x0, x1, y0, y1 = (round(v) for v in (item.x - half, item.x + half, item.y - half, item.y + half))
    if rng.random() < 0.7:
        cv2.rectangle(mask, (x0, y0), (x1, y1), 1.0, cv2.FILLED)
    else:
        axes = (round((x1 - x0) * 0.62), round((y1 - y0) * 0.62))
        cv2.ellipse(mask, ((x0 + x1) // 2, (y0 + y1) // 2), axes, 0, 0, 360, 1.0, cv2.FILLED)
    return mask


def _hole(mode: str, rng: random.Random, canvas: Canvas) -> Mask:
    if mode == "box":
        return _box(rng, canvas)
    width, height = canvas
    if mode == "whole":
        return np.ones((height, width), np.float32)
    mask = np.zeros((height, width), np.float32)
    for side in rng.sample(("left", "right", "top", "bottom"), rng.choice((1, 1, 2))):
        share = rng.uniform(*STRIP)
        across, down = round(width * share), round(height * share)
        rows, columns = {
            "left": (slice(None), slice(across)), "right": (slice(None), slice(width - across, None)),
            "top": (slice(down), slice(None)), "bottom": (slice(height - down, None), slice(None)),
        }[side]  # fmt: skip
        mask[rows, columns] = 1.0
    return mask


def _box(rng: random.Random, canvas: Canvas) -> Mask:
    width, height = canvas
    mask = np.zeros((height, width), np.float32)
    across, down = (round(side * rng.uniform(0.25, 0.6)) for side in canvas)
    x, y = rng.randrange(width - across), rng.randrange(height - down)
    mask[y : y + down, x : x + across] = 1.0
    return mask


def _touches(mask: Mask, item: Item, canvas: Canvas) -> bool:
    return bool((mask * shape_mask(item.shape, item.x, item.y, item.radius, *canvas)).any())


# Following edges or depth.


def control_example(
    rng: random.Random, canvas: Canvas, kind: str, *, held_out: bool = False, sign_share: float = SIGN_SHARE
) -> ControlExample:
    """A scene with its edges (``kind`` "canny") or its depth."""
    request, scene = scene_example(rng, canvas, held_out=held_out, sign_share=sign_share, free_share=FREE_SHARE)
    picture = draw(scene)
    control = canny_of(picture) if kind == "canny" else depth_of(scene, rng)
    return ControlExample(_say(request, rng), picture, control, request, scene)


def canny_of(picture: Image) -> Image:
    """Edges (H, W, 3) as the product finds them for a control model."""
    edges: Image = as_bytes(canny(torch.from_numpy(picture)[None].float() / BYTE))[0]
    return edges


def depth_of(scene: Scene, rng: random.Random) -> Image:
    """Nearness (H, W, 3): each object its own, brighter is nearer; letters are the nearest there is."""
    near = np.full((scene.height, scene.width), rng.uniform(0, FARTHEST), np.float32)
    for item in scene.items:
        mask = shape_mask(item.shape, item.x, item.y, item.radius, scene.width, scene.height)
        near += mask * (rng.uniform(FARTHEST_OBJECT, NEAREST) - near)
    if scene.sign is not None:
        letters = draw(replace(scene, background="black", sign=replace(scene.sign, colour="white")))
        near = np.maximum(near, letters[..., 0] / np.float32(BYTE))
    depth: Image = np.repeat((near * BYTE).round().astype(np.uint8)[..., None], 3, axis=2)
    return depth


# Editing by instruction.

EDITS = {"recolour": 4, "remove": 3, "add": 4, "background": 3, "join": 2, "nothing": 1.5}
FREE_COLOUR = {"black": "white", "blue": "yellow", "purple": "yellow"}  # of an object without one, by the background
GRIDS = (8, 12, 16, 24)


def edit_example(rng: random.Random, canvas: Canvas, *, kind: str | None = None, held_out: bool = False) -> EditExample:
    """A scene and what an instruction makes of it; ``kind`` is one of ``EDITS``, None any."""
    while True:
        chosen = kind or rng.choices(list(EDITS), weights=list(EDITS.values()))[0]
        _, scene = scene_example(rng, canvas, held_out=held_out, sign_share=0.0)
        if chosen == "nothing":
            if rng.random() < 0.5:
                return EditExample("", draw(scene), (draw(scene),), chosen, (scene,), scene)
            picture = grid_picture(rng, canvas)
            return EditExample("", picture, (picture,), chosen, (None,), None)
        if chosen == "join":
            return _join(rng, canvas, held_out=held_out)
        edited = edit_scene(scene, chosen, rng)
        if edited is not None:
            prompt, after = edited
            return EditExample(prompt, draw(after), (draw(scene),), chosen, (scene,), after)


def edit_scene(scene: Scene, kind: str, rng: random.Random) -> tuple[str, Scene] | None:
    """An instruction of a kind and the scene that it makes; None where the scene does not allow one."""
    alone = [i for i in scene.items if sum(o.shape == i.shape for o in scene.items) == 1]
    if kind == "background":
        free = [c for c in COLOURS if c != scene.background and all(c != i.colour for i in scene.items)]
        colour = rng.choice(free)
        return rng.choice(BACKGROUND_WORDS).format(colour=colour), replace(scene, background=colour)
    if kind == "add":
        return _add(scene, rng)
    if not alone or (kind == "remove" and len(scene.items) == 1 and rng.random() < 0.7):
        return None
    item = rng.choice(alone)
    if kind == "remove":
        rest = tuple(i for i in scene.items if i is not item)
        return rng.choice(REMOVE_WORDS).format(shape=item.shape), replace(scene, items=rest)
    colour = rng.choice([c for c in COLOURS if c not in (item.colour, scene.background)])
    changed = replace(item, colour=colour)
    words = rng.choice(RECOLOUR_WORDS).format(shape=item.shape, colour=colour)
    return words, replace(scene, items=tuple(changed if i is item else i for i in scene.items))


RECOLOUR_WORDS = ("make the {shape} {colour}", "make the {shape} {colour}", "paint the {shape} {colour}")
REMOVE_WORDS = ("remove the {shape}", "remove the {shape}", "delete the {shape}")
BACKGROUND_WORDS = ("change the background to {colour}", "make the background {colour}")
JOIN_WORDS = ("both side by side", "put both side by side")
PLACES = {
    "left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom",
    "center": "in the center",
}  # fmt: skip


def _add(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    position = rng.choice(list(NAMED))
    shape, size = rng.choice(SHAPES), rng.choice(SIZES)
    named = [c for c in COLOURS if c != scene.background]
    colour = rng.choice(named) if rng.random() < 0.75 else None
    scale = min(1.0, min(scene.width, scene.height) / NATIVE_SIDE)
    radius = RADII[False][size] * scale
    x, y = place_of(position, radius, scene.width, scene.height)
    item = Item(shape, colour or FREE_COLOUR.get(scene.background, "black"), x, y, radius)
    if any(other.shape == shape or not _apart(item, other, scale) for other in scene.items):
        return None
    words = " ".join(filter(None, (size, colour, shape)))
    article = "an" if words[0] in "aeiou" else "a"
    return f"{rng.choice(('add', 'add', 'put'))} {article} {words} {PLACES[position]}", replace(
        scene, items=(*scene.items, item)
    )


def _join(rng: random.Random, canvas: Canvas, *, held_out: bool) -> EditExample:
    """Two pictures of one object each, and both objects on the first one's background."""
    width, height = canvas
    while True:
        pair = random_request(rng, sign_share=0.0, held_out=held_out)
        if len(pair.objects) == 2 and pair.objects[0].count == pair.objects[1].count == 1 and pair.relation is None:
            break
    kinds = [Wanted(o.shape, o.colour) for o in pair.objects]
    background = rng.choice([c for c in COLOURS if all(c != k.colour for k in kinds)])
    grounds = (background, rng.choice([c for c in COLOURS if c != kinds[1].colour]))
    singles = [
        lay_out(Request(objects=(kind,), background=ground), rng, width, height)
        for kind, ground in zip(kinds, grounds, strict=True)
    ]
    together = lay_out(Request(objects=tuple(kinds), background=background), rng, width, height)
    references = tuple(draw(one) for one in singles)
    return EditExample(rng.choice(JOIN_WORDS), draw(together), references, "join", tuple(singles), together)


def grid_picture(rng: random.Random, canvas: Canvas) -> Image:
    """Lines across and down at even distances, in two colours: where everything is can be measured on it."""
    width, height = canvas
    ground, ink = rng.sample(COLOURS, 2)
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = PALETTE[ground]
    step, thick = rng.choice(GRIDS), rng.choice((1, 2, 3))
    first_x, first_y = rng.randrange(step), rng.randrange(step)
    for k in range(thick):
        picture[:, first_x + k :: step] = PALETTE[ink]
        picture[first_y + k :: step] = PALETTE[ink]
    return picture


# Taking over what a picture shows.

PARTLY_SHARE = 0.25  # of the examples that take over one object only
RESTYLED_SHARE = 0.25  # of those whose prompt sets another background


def style_example(rng: random.Random, canvas: Canvas, *, held_out: bool = False) -> StyleExample:
    """A scene as a reference: for the same things, for one of them, or for another background by the prompt.

    The things of a scattered scene have no places in words, and stand in the picture where those without a place do, in
    the order in which they lie.
    """
    request, scene = scene_example(rng, canvas, held_out=held_out, sign_share=0.0)
    request = _in_order(request, scene)
    reference, keep, prompt = draw(scene), np.ones((scene.height, scene.width), np.float32), ""
    shown, told = scene, replace(request, background=scene.background)
    if rng.random() < PARTLY_SHARE and len(scene.items) > 1:
        item = rng.choice(scene.items)
        shown, told = replace(scene, items=(item,)), replace(_only(item), background=scene.background)
        keep = hole_around(item, scene, rng)
    elif rng.random() < RESTYLED_SHARE:
        colour = rng.choice([c for c in COLOURS if all(c != i.colour for i in scene.items)])
        shown, told = replace(scene, background=colour), replace(told, background=colour)
        prompt = f"a {colour} background"
    picture = draw(lay_out(told, rng, *canvas))
    return StyleExample(prompt, text_of(phrase(told, rng)), picture, reference, keep, shown)


def _in_order(request: Request, scene: Scene) -> Request:
    """The same objects named as they lie, and so laid out alike: the top one of three first, the rest from the left."""
    if request.relation is not None or any(wanted.position for wanted in request.objects):
        return request
    items = sorted(scene.items, key=lambda item: item.x)
    if len(items) > 2:
        first = min(items, key=lambda item: item.y)
        items = [first, *(item for item in items if item is not first)]
    kinds = [(item.shape, item.colour) for item in items]
    ordered = sorted(request.objects, key=lambda wanted: kinds.index((wanted.shape, wanted.colour)))
    return replace(request, objects=tuple(ordered))


def _only(item: Item) -> Request:
    return Request(objects=(Wanted(item.shape, item.colour),))
