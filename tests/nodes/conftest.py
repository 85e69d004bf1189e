"""Loads the root as one package, ``fluxfoundry_pack``, with a small fake of the host behind it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAME = "fluxfoundry_pack"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))  # fake_host.py is a helper of these tests alone

from fake_host import internals, modules  # noqa: E402


def load_pack() -> ModuleType:
    """The root package, as ComfyUI loads it: by its path, under a name of the loader's choice."""
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def in_place_of(fakes: Mapping[str, ModuleType]) -> Iterator[None]:
    """Modules under the names of others; in the end those are back."""
    before = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes)
    yield
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The root package; its ``nodes`` can be imported while the fixture lives."""
    with in_place_of(modules(tmp_path_factory.mktemp("models"))):
        yield load_pack()
        for name in [name for name in sys.modules if name == NAME or name.startswith(NAME + ".")]:
            del sys.modules[name]


@pytest.fixture(scope="session")
def part(pack: ModuleType):
    """Imports a module of the pack by its dotted name."""
    return lambda name: importlib.import_module(f"{NAME}.{name}")


@pytest.fixture(scope="module")
def load(pack: ModuleType, part: Callable[[str], ModuleType]) -> Iterator[Callable[[str], ModuleType]]:
    """``part``, with the host's internals faked; what was imported with them is forgotten in the end."""
    fakes = internals()
    before = set(sys.modules)
    with in_place_of(fakes):
        yield part
        for name in set(sys.modules) - before - set(fakes):
            if ".nodes." in name:
                del sys.modules[name]


@pytest.fixture
def run(load: Callable[[str], ModuleType]) -> Callable[..., tuple]:
    """Executes a node of a family by its class's name; gives its outputs."""

    def execute(family: str, node: str, **inputs: object) -> tuple:
        return getattr(load(f"nodes.{family}"), node).execute(**inputs).result

    return execute


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.WARNING)
    return lambda: caplog.text
