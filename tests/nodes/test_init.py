"""The host's way in."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]

IMPORT_ALONE = """
import importlib.util, sys
root = sys.argv[1]
spec = importlib.util.spec_from_file_location("alone", root + "/__init__.py", submodule_search_locations=[root])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not [name for name in sys.modules if name.startswith(("comfy", "torch", "alone."))]
assert not hasattr(module, "NODE_CLASS_MAPPINGS")
"""


def test_the_root_imports_without_comfyui_and_brings_nothing_in() -> None:
    subprocess.run([sys.executable, "-c", IMPORT_ALONE, str(ROOT)], check=True)


def test_the_entrypoint_gives_an_extension_with_every_node(pack: ModuleType, part) -> None:
    extension = asyncio.run(pack.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    assert isinstance(nodes, list)
    assert len(nodes) == len(list((ROOT / pack.WEB_DIRECTORY / "docs").glob("*.md")))
    assert nodes == part("nodes").NODES


def test_the_engine_may_be_in_a_process_twice_operators_included(part) -> None:
    import flux.pipelines.compiled as alone

    assert part("flux.pipelines.compiled")._operators is not alone._operators


def test_the_web_directory_exists(pack: ModuleType) -> None:
    assert (ROOT / pack.WEB_DIRECTORY).is_dir()
