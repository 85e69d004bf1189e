"""Every workflow that the pack ships, run with the embedded model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from client import ROOT, Host
from graph import for_embedded, to_prompt
from pictures import OTHER_REQUEST, PROMPT, REQUEST, assert_shows
from PIL import Image

from flux.mini.language import Request
from flux.mini.scenes import draw, lay_out

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_draws_what_its_prompt_says(host: Host, path: Path) -> None:
    prompt = to_prompt(json.loads(path.read_text(encoding="utf-8")), host.get_json("/object_info"))
    for n in prompt.values():
        if n["class_type"] == "LoadImage":
            n["inputs"]["image"] = input_picture(host, OTHER_REQUEST)
    pictures = host.pictures(for_embedded(prompt, PROMPT))
    assert pictures
    for png in pictures:
        assert_shows(png, REQUEST)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_offered_as_a_template_with_a_thumbnail(host: Host, path: Path) -> None:
    assert path.stem in host.get_json("/workflow_templates")["fluxfoundry"]
    assert json.loads(host.get(f"/api/workflow_templates/fluxfoundry/{path.name}"))
    assert host.get(f"/api/workflow_templates/fluxfoundry/{path.stem}.jpg").startswith(b"\xff\xd8")


def input_picture(host: Host, request: Request) -> str:
    """A scene in the host's input folder; gives its name."""
    rng = random.Random("workflow")
    name = "scene.png"
    Image.fromarray(draw(lay_out(request, rng))).save(host.base / "input" / name)
    return name
