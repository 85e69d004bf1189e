from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def paths(part):
    return part("nodes.bridge.paths")


def test_embedded_models_stand_first_and_pickles_nowhere(paths) -> None:
    assert paths.MODELS.names() == [
        "embedded: flux1-mini", "embedded: flux1-mini-schnell", "flux1-dev.safetensors", "sub/flux1-schnell.sft",
    ]  # fmt: skip


def test_embedded_names_are_files_of_the_pack(paths) -> None:
    for choice in (paths.MODELS, paths.CLIPS, paths.T5S, paths.VAES):
        for name in choice.own:
            assert choice.resolve(name).parent.name == "weights"


def test_other_names_are_looked_up_in_the_hosts_folders(paths) -> None:
    assert paths.VAES.resolve("ae.safetensors").parts[-2:] == ("vae", "ae.safetensors")


@pytest.mark.parametrize("name", ["../../secret.safetensors", "gone.safetensors", "embedded: other", ""])
def test_names_from_elsewhere_are_refused(part, paths, name: str) -> None:
    with pytest.raises(part("flux.errors").MissingFileError, match="choose"):
        paths.MODELS.resolve(name)


def test_the_embedded_models_differ_in_their_transformer_only(part, paths) -> None:
    mini, schnell = paths.resolve_embedded("mini"), paths.resolve_embedded("mini schnell")
    assert isinstance(mini.transformer, Path)
    assert mini.transformer != schnell.transformer
    assert mini.autoencoder == schnell.autoencoder
    with pytest.raises(part("flux.errors").MissingFileError, match="mini, mini schnell"):
        paths.resolve_embedded("maxi")
