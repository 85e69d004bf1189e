"""Every workflow that the pack ships, run with the embedded models.

Those that draw from text alone get one prompt and are judged by it. The guided ones run as they are, for their prompts
go with their pictures; what has to be in their results, and what has to be as it was, is told here.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from client import ROOT, Host, Outcome, Prompt
from graph import for_embedded, to_prompt
from pictures import OTHER_REQUEST, PROMPT, REQUEST, assert_shows, pixels
from PIL import Image

from benchmarks.checker import find_blobs
from benchmarks.guided import covered_in, iou
from flux.mini.language import Request, Wanted
from flux.mini.scenes import draw, lay_out

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
ALIKE = 0.85  # IoU of outlines that follow a control


def asked(*objects: tuple[str, str], background: str | None = None) -> Request:
    """Colours and shapes, wherever they are."""
    return Request(objects=tuple(Wanted(shape, colour) for colour, shape in objects), background=background)


CIRCLE, GREEN_CIRCLE, STAR = ("red", "circle"), ("green", "circle"), ("yellow", "star")
SQUARE = ("blue", "square")
RESULTS = {
    "inpaint": asked(CIRCLE, STAR),
    "outpaint": asked(CIRCLE, SQUARE, background="white"),
    "canny": asked(STAR, background="blue"),
    "depth": asked(("green", "ring"), ("red", "square"), background="yellow"),
    "depth-and-canny": asked(("green", "star"), ("purple", "circle"), background="white"),
    "redux": asked(CIRCLE, SQUARE),
    "redux-two-images": asked(CIRCLE, ("blue", "star"), background="white"),
    "redux-masked": asked(CIRCLE),
    "kontext-edit": asked(GREEN_CIRCLE, SQUARE),
    "kontext-two-references": asked(CIRCLE, ("blue", "star"), background="white"),
    "production-chain": asked(GREEN_CIRCLE, STAR),
}
FOLLOWING = ("canny", "depth", "depth-and-canny")
HOLE, SOFT = (68, 32, 128, 96), 8  # left, top, right, bottom of what is painted, and how far its edge is soft
# What is as it was, in which of the pictures that are shown in between, or in what is saved.
KEPT = {"inpaint": "around", "outpaint": "left", "production-chain": "around"}
STAYING = {"kontext-edit": [SQUARE]}  # at its place
NEAR = 8.0  # pixels
FROM_TEXT = [path for path in WORKFLOWS if path.stem not in RESULTS]


def prompt_of(host: Host, name: str) -> Prompt:
    path = ROOT / "workflows" / f"{name}.json"
    return to_prompt(json.loads(path.read_text(encoding="utf-8")), host.get_json("/object_info"))


@pytest.mark.parametrize("name", [path.stem for path in FROM_TEXT])
def test_a_workflow_draws_what_its_prompt_says(host: Host, name: str) -> None:
    prompt = prompt_of(host, name)
    for n in prompt.values():
        if n["class_type"] == "LoadImage":
            n["inputs"]["image"] = input_picture(host, OTHER_REQUEST)
    pictures = host.pictures(for_embedded(prompt, PROMPT))
    assert pictures
    for png in pictures:
        assert_shows(png, REQUEST)


@pytest.mark.parametrize("name", RESULTS)
def test_a_guided_workflow_gives_what_it_is_for(host: Host, name: str) -> None:
    prompt = prompt_of(host, name)
    outcome = host.succeed(prompt)
    saved = pictures_of(host, prompt, outcome, "SaveImage")
    assert saved
    for png in saved:
        assert_shows(png, RESULTS[name])
    first, *between = map(pixels, pictures_of(host, prompt, outcome, "PreviewImage"))
    if name in FOLLOWING:
        for png in saved:
            assert iou(covered_in(first), covered_in(pixels(png))) > ALIKE
    if name in KEPT:
        after = between[0] if between else pixels(saved[0])
        kept = np.ones(first.shape[:2], bool)
        if KEPT[name] == "around":
            left, top, right, bottom = HOLE
            kept[top - SOFT : bottom + SOFT, left - SOFT : right + SOFT] = False
        shared = after[: first.shape[0], : first.shape[1]]
        assert np.array_equal(first[kept], shared[kept])
        assert not np.array_equal(first, after)
    for colour, shape in STAYING.get(name, ()):
        before, after = (place_of(image, colour, shape) for image in (first, pixels(saved[0])))
        assert np.hypot(*np.subtract(before, after)) <= NEAR


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_offered_as_a_template_with_a_thumbnail(host: Host, path: Path) -> None:
    assert path.stem in host.get_json("/workflow_templates")["fluxfoundry"]
    assert json.loads(host.get(f"/api/workflow_templates/fluxfoundry/{path.name}"))
    assert host.get(f"/api/workflow_templates/fluxfoundry/{path.stem}.jpg").startswith(b"\xff\xd8")


def pictures_of(host: Host, prompt: Prompt, outcome: Outcome, kind: str) -> list[bytes]:
    """The pictures that nodes of a kind gave, by the nodes' numbers."""
    nodes = sorted((key for key, n in prompt.items() if n["class_type"] == kind), key=int)
    return host.pictures_of(outcome, *nodes)


def place_of(image: np.ndarray, colour: str, shape: str) -> tuple[float, float]:
    """Where the only object of a kind lies."""
    [blob] = [blob for blob in find_blobs(image) if (blob.colour, blob.shape) == (colour, shape)]
    return blob.x, blob.y


def input_picture(host: Host, request: Request) -> str:
    """A scene in the host's input folder; gives its name."""
    rng = random.Random("workflow")
    name = "scene.png"
    Image.fromarray(draw(lay_out(request, rng))).save(host.base / "input" / name)
    return name
