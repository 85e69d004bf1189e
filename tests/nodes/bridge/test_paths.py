from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def paths(part):
    return part("nodes.bridge.paths")


def test_embedded_models_stand_first_and_pickles_nowhere(paths) -> None:
    assert paths.MODELS.names() == [
        *(f"embedded: flux1-{name}" for name in (
            "mini", "mini-schnell", "fill-mini", "canny-mini", "depth-mini", "kontext-mini", "mini-redux",
        )),
        "flux1-dev.safetensors", "sub/flux1-schnell.sft",
    ]  # fmt: skip


def test_no_two_embedded_files_have_one_name(paths) -> None:
    names = [name for choice in (paths.MODELS, paths.STYLE_MODELS, paths.VISION_TOWERS) for name in choice.own]
    assert len(names) == len(set(names)) == 9


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


@pytest.fixture
def put(pack) -> Iterator:
    """Puts a file into one of the host's folders, for the length of a test."""
    folders, written = sys.modules["folder_paths"], []

    def write(key: str, name: str, content: bytes | dict = b"") -> Path:
        path = Path(folders.get_folder_paths(key)[0]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            save_file(content, path)
        else:
            path.write_bytes(content)
        written.append(path)
        return path

    yield write
    for path in written:
        path.unlink()


def test_gguf_files_are_listed_as_soon_as_they_are_there(paths, put) -> None:
    assert not [name for name in paths.MODELS.names() if name.endswith(".gguf")]
    path = put("diffusion_models", "low/flux1-dev-Q4_K.gguf")
    name = str(Path("low/flux1-dev-Q4_K.gguf"))
    assert name in paths.MODELS.names()
    assert paths.MODELS.resolve(name) == path


def test_a_gguf_file_that_went_is_listed_no_more(paths, put) -> None:
    path = put("vae", "ae.gguf")
    assert "ae.gguf" in paths.VAES.names()
    path.unlink()
    assert "ae.gguf" not in paths.VAES.names()
    path.touch()


def test_an_index_stands_for_the_files_that_it_names(paths, put) -> None:
    for part in (1, 2):
        put("text_encoders", f"t5/model-0000{part}-of-00002.safetensors")
    index = put("text_encoders", "t5/model.safetensors.index.json", json.dumps({"weight_map": {}}).encode())
    put("text_encoders", "lost-00001-of-00002.safetensors")
    listed = [name for name in paths.T5S.names() if "of-0000" in name or "index" in name]
    assert listed == ["lost-00001-of-00002.safetensors", str(Path("t5/model.safetensors.index.json"))]
    assert paths.T5S.resolve(listed[1]) == index


def all_in_one(paths) -> dict[str, torch.Tensor]:
    return {f"model.diffusion_model.{name}": t for name, t in load_file(paths.MINI.transformer).items()}


def test_a_checkpoint_is_listed_where_it_holds_such_a_part(paths, put) -> None:
    path = put("checkpoints", "all.safetensors", all_in_one(paths))
    put("checkpoints", "other.safetensors", {"weight": torch.zeros(1)})
    put("checkpoints", "bad.safetensors", b"no header")
    assert paths.MODELS.names()[-1] == "checkpoints: all.safetensors"
    assert paths.MODELS.resolve("checkpoints: all.safetensors") == path
    for choice in (paths.CLIPS, paths.T5S, paths.VAES):
        assert not [name for name in choice.names() if name.startswith("checkpoints")]


def test_checkpoints_that_there_was_no_time_to_look_into_are_listed(paths, put, monkeypatch) -> None:
    put("checkpoints", "other.safetensors", {"weight": torch.zeros(1)})
    monkeypatch.setattr(paths, "LOOK_SECONDS", -1.0)
    assert "checkpoints: other.safetensors" in paths.VAES.names()


def test_a_file_whose_own_name_begins_like_a_prefix_cannot_pass_for_another(part, paths, put) -> None:
    if sys.platform == "win32":
        pytest.skip("no file on Windows has such a name")
    put("vae", "checkpoints: ae.safetensors")
    put("vae", "embedded: ae.safetensors")
    assert paths.VAES.names() == ["embedded: flux1-mini-ae", "ae.safetensors"]
    for name in ("checkpoints: ae.safetensors", "embedded: ae.safetensors"):
        with pytest.raises(part("flux.errors").MissingFileError):
            paths.VAES.resolve(name)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints: ../secret.safetensors", "checkpoints: ", "checkpoints: /etc/passwd", "old.ckpt", "secret.txt",
        "x\0.safetensors", "..", "/",
    ],
)  # fmt: skip
def test_names_that_are_no_model_file_of_the_folder_are_refused(part, paths, put, name: str) -> None:
    put("checkpoints", "../secret.safetensors", {"weight": torch.zeros(1)})
    put("diffusion_models", "secret.txt")
    with pytest.raises(part("flux.errors").MissingFileError):
        paths.MODELS.resolve(name)


def test_tooltips_say_what_the_listed_files_are(paths, put) -> None:
    put("diffusion_models", "mini.safetensors", load_file(paths.MINI.transformer))
    assert paths.MODELS.told() == "mini.safetensors: Foundry Mini diffusion model, BF16"


def test_every_model_file_can_be_inspected_behind_its_folders_name(part, paths, put) -> None:
    path = put("loras", "style.safetensors", {"weight": torch.zeros(1)})
    names = paths.ANY_FILE.names()
    assert names[0].startswith("embedded: ")
    assert {"loras: style.safetensors", "vae: ae.safetensors"} < set(names)
    assert paths.ANY_FILE.resolve("loras: style.safetensors") == path
    for name in names[:5]:
        assert paths.ANY_FILE.resolve(name).is_file()
    for name in ("output: style.safetensors", "loras: ../vae/ae.safetensors", "style.safetensors", ""):
        with pytest.raises(part("flux.errors").MissingFileError):
            paths.ANY_FILE.resolve(name)
