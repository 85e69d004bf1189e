"""A workflow's names never lead out of the host's model folders, even where the host would let them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

NAME = "model.safetensors"


@pytest.fixture(scope="module")
def paths(part: Callable[[str], ModuleType]) -> ModuleType:
    return part("nodes.bridge.paths")


@pytest.fixture
def root(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of a host that joins and asks nothing: a file is whatever name leads to one."""
    root = tmp_path / "models"
    for place in (root, root / "sub", tmp_path / "models-secret"):
        place.mkdir()
        (place / NAME).touch()
    (tmp_path / NAME).touch()

    def full_path(key: str, name: str) -> str:
        path = os.path.join(root, name)
        if not os.path.isfile(path):
            raise FileNotFoundError(name)
        return path

    host = sys.modules["folder_paths"]
    monkeypatch.setattr(host, "get_full_path_or_raise", full_path)
    monkeypatch.setattr(host, "get_folder_paths", lambda key: [str(root)])
    return root


@pytest.mark.parametrize("name", [NAME, f"sub/{NAME}", f"sub/../{NAME}", f"./{NAME}"])
def test_names_within_the_folder_are_files(paths: ModuleType, root: Path, name: str) -> None:
    assert paths.VAES.resolve(name).samefile(root / name)


@pytest.mark.parametrize(
    "name",
    [
        f"../{NAME}",
        f"sub/../../{NAME}",
        f"../models-secret/{NAME}",
        f"../models/../{NAME}",
        f"checkpoints: ../{NAME}",
        f"checkpoints: checkpoints: {NAME}",
        f"embedded: ../{NAME}",
        f"..\\{NAME}",
        f"C:{NAME}",
        f"C:\\{NAME}",
        f"\\\\server\\share\\{NAME}",
        f"//server/share/{NAME}",
        f"{NAME}\0",
        f"..\0/{NAME}",
        f"\ud800{NAME}",
        "x" * 5_000 + NAME,
        "",
        ".",
        "..",
        "/",
    ],
)
def test_names_that_lead_elsewhere_or_nowhere_are_refused(
    part: Callable[[str], ModuleType], paths: ModuleType, root: Path, name: str
) -> None:
    for choice, own in ((paths.VAES, name), (paths.ANY_FILE, f"vae: {name}")):
        with pytest.raises(part("flux.errors").MissingFileError):
            choice.resolve(own)


def test_an_absolute_path_is_refused(part: Callable[[str], ModuleType], paths: ModuleType, root: Path) -> None:
    with pytest.raises(part("flux.errors").MissingFileError):
        paths.VAES.resolve(str(root.parent / NAME))


def test_another_drive_is_refused_as_windows_tells_of_it(
    part: Callable[[str], ModuleType], paths: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_path(key: str, name: str) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")  # os.path.relpath, in the host

    monkeypatch.setattr(sys.modules["folder_paths"], "get_full_path_or_raise", full_path)
    with pytest.raises(part("flux.errors").MissingFileError):
        paths.VAES.resolve(f"D:\\{NAME}")


def test_folders_and_files_that_the_user_linked_into_the_folder_are_his_to_use(
    paths: ModuleType, root: Path, tmp_path: Path
) -> None:
    try:
        (root / "linked").symlink_to(tmp_path / "models-secret", target_is_directory=True)
        (root / "link.safetensors").symlink_to(tmp_path / NAME)
    except OSError:
        pytest.skip("links need a right here that this account has not")
    assert paths.VAES.resolve(f"linked/{NAME}") == root / "linked" / NAME
    assert paths.VAES.resolve("link.safetensors") == root / "link.safetensors"


def test_a_root_that_is_itself_a_link_holds_its_files(
    paths: ModuleType, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alias = tmp_path / "alias"
    try:
        alias.symlink_to(root, target_is_directory=True)
    except OSError:
        pytest.skip("links need a right here that this account has not")
    host = sys.modules["folder_paths"]
    monkeypatch.setattr(host, "get_folder_paths", lambda key: [str(alias)])
    monkeypatch.setattr(host, "get_full_path_or_raise", lambda key, name: str(alias / name))
    assert paths.VAES.resolve(NAME) == alias / NAME
