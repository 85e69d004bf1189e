"""The pack as the host shows it."""

from __future__ import annotations

import pytest
from client import ROOT, Host

NODES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def info(host: Host) -> dict:
    return host.get_json("/object_info")


def test_every_node_with_a_help_page_is_listed_and_no_other(info: dict) -> None:
    assert sorted(name for name in info if name.startswith("FluxFoundry")) == NODES


@pytest.mark.parametrize("name", NODES)
def test_the_host_passes_on_category_and_tooltips(info: dict, name: str) -> None:
    entry = info[name]
    assert entry["category"].startswith("FLUX Foundry/")
    inputs = [spec for group in ("required", "optional") for spec in entry["input"].get(group, {}).values()]
    assert all(spec[1]["tooltip"] for spec in inputs)
    assert all(entry["output_tooltips"])


@pytest.mark.parametrize("name", NODES)
def test_help_pages_are_served_where_the_front_end_looks(host: Host, name: str) -> None:
    assert host.get(f"/extensions/fluxfoundry/docs/{name}.md").decode().startswith("# ")


def test_embedded_files_come_first_in_every_loader(info: dict) -> None:
    for node, inputs in {
        "FluxFoundryLoadModel": ("model",),
        "FluxFoundryLoadTextEncoders": ("clip_l", "t5"),
        "FluxFoundryLoadAutoencoder": ("vae",),
    }.items():
        for name in inputs:
            kind, options = info[node]["input"]["required"][name]
            choices = kind if isinstance(kind, list) else options["options"]
            assert choices[0].startswith("embedded: ")
