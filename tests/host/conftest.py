"""Finds a real ComfyUI and starts it once for all host tests; without one they are skipped and say so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)  # client.py and graph.py are helpers of these tests alone

from client import Host, find_comfyui, prepare, serve  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = find_comfyui() is None
    skip = pytest.mark.skip(reason="no ComfyUI found: set COMFYUI_PATH, or put the pack into its custom_nodes")
    for item in items:
        if str(item.path).startswith(HERE):
            item.add_marker(pytest.mark.host)
            if missing:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A running ComfyUI with the pack, the probes and the embedded transformers in its folders."""
    comfyui = find_comfyui()
    assert comfyui is not None
    base = tmp_path_factory.mktemp("comfyui")
    prepare(base)
    with serve(comfyui, base) as running:
        yield running
