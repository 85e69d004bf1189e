"""Workflow files as they are shipped: whole graphs, with a note, and with links to the files that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
FOLDERS = {"diffusion_models", "text_encoders", "vae", "loras", "style_models", "clip_vision"}
LOADERS = {
    "FluxFoundryLoadModel", "FluxFoundryLoadTextEncoders", "FluxFoundryLoadAutoencoder", "FluxFoundryLoadRedux",
    "FluxFoundryLoadControlLora",
}  # fmt: skip
SHOWN = {"FluxFoundryTextEncode", "FluxFoundrySampler", "SaveImage"}  # in every graph
WITHOUT_A_DOWNLOAD = "quick-start"
MUTED = 2

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def nodes_of(path: Path) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    return nodes


@each_workflow
def test_links_join_sockets_that_know_of_them(path: Path) -> None:
    graph = json.loads(path.read_text(encoding="utf-8"))
    nodes = {n["id"]: n for n in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    assert len(links) == len(graph["links"])
    assert max(nodes) <= graph["last_node_id"]
    assert max(links) <= graph["last_link_id"]
    for number, origin, slot, target, place, kind in links.values():
        output, socket = nodes[origin]["outputs"][slot], nodes[target]["inputs"][place]
        assert number in output["links"]
        assert socket["link"] == number
        assert output["type"] == socket["type"] == kind
    joined = [i["link"] for n in nodes.values() for i in n.get("inputs", ()) if i.get("link") is not None]
    assert sorted(joined) == sorted(links)


@each_workflow
def test_a_note_explains_the_graph(path: Path) -> None:
    notes = [n["widgets_values"][0] for n in nodes_of(path) if n["type"] == "MarkdownNote"]
    assert len(notes) == 1
    assert notes[0].startswith("## ")
    assert path.with_suffix(".jpg").read_bytes().startswith(b"\xff\xd8")


@pytest.mark.parametrize("name", ["redux", "redux-two-images", "redux-masked", "production-chain"])
def test_a_note_tells_of_every_size_that_is_the_embedded_models(name: str) -> None:
    """In the others what is drawn on comes with the picture."""
    path = FOLDER / f"{name}.json"
    [note] = [n["widgets_values"][0] for n in nodes_of(path) if n["type"] == "MarkdownNote"]
    assert "1:1 in" in note
    assert "FLUX Empty Latent" in note


@pytest.mark.parametrize("name", ["redux-two-images", "kontext-two-references"])
def test_two_pictures_of_the_users_have_a_node_each(name: str) -> None:
    assert sum(node["type"] == "LoadImage" for node in nodes_of(FOLDER / f"{name}.json")) == 2


def real_loaders(path: Path) -> list[dict[str, Any]]:
    """The loaders of files that do not ship with the pack."""
    return [n for n in nodes_of(path) if n["type"] in LOADERS and real_files(n)]


def real_files(loader: dict[str, Any]) -> list[str]:
    return [value for value in loader["widgets_values"] if str(value).endswith(".safetensors")]


@each_workflow
def test_every_real_file_has_its_download_link_where_the_front_end_looks(path: Path) -> None:
    loaders = real_loaders(path)
    assert bool(loaders) == (path.stem != WITHOUT_A_DOWNLOAD)
    note = next(n["widgets_values"][0] for n in nodes_of(path) if n["type"] == "MarkdownNote")
    for loader in loaders:
        models = {model["name"]: model for model in loader["properties"]["models"]}
        assert sorted(models) == sorted(real_files(loader))
        for name, model in models.items():
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith("/" + name)
            assert model["directory"] in FOLDERS
            assert model["url"] in note


@each_workflow
def test_a_workflow_that_runs_at_once_has_its_real_files_beside_it_muted(path: Path) -> None:
    nodes = nodes_of(path)
    assert {n["type"] for n in nodes} >= SHOWN
    if any(n["type"] == "FluxFoundryLoadEmbedded" for n in nodes):
        assert {n["mode"] for n in real_loaders(path)} <= {MUTED}
        assert all(n["mode"] == 0 for n in nodes if n["type"] == "FluxFoundryLoadEmbedded")


def test_there_is_a_workflow_for_every_kind_of_guidance() -> None:
    assert {path.stem for path in WORKFLOWS} >= {
        "inpaint", "outpaint", "canny", "depth", "depth-and-canny", "redux", "redux-two-images", "redux-masked",
        "kontext-edit", "kontext-two-references", "production-chain",
    }  # fmt: skip
