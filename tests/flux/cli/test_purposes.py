"""Which model each command runs: the embedded one that fits for ``mini``, and no other than it can use."""

from __future__ import annotations

import pytest

from flux.cli.files import model_files
from flux.cli.main import _parser
from flux.cli.purposes import EMBEDDED, SHORT_NAMES, purpose_of
from flux.errors import MismatchError
from flux.mini.files import (
    MINI,
    MINI_CANNY,
    MINI_DEPTH,
    MINI_FILL,
    MINI_KONTEXT,
    MINI_REDUX,
    REDUX_MINI_FILE,
    SIGLIP_MINI_FILE,
)
from flux.models.flux1 import Flux1
from flux.ops.layers import on_meta
from flux.specs.flux1 import FLUX1
from tests.tiny import write_header_only

COMMANDS = {
    "generate": ("generate", "x"),
    "fill": ("fill", "a.png", "m.png", "x"),
    "outpaint": ("outpaint", "a.png", "x", "--left", "16"),
    "canny": ("control", "a.png", "x", "--type", "canny"),
    "depth": ("control", "a.png", "x", "--type", "depth"),
    "image": ("control", "a.png", "x", "--type", "image"),
    "lora": ("control", "a.png", "x", "--type", "depth", "--lora", "mini"),
    "redux": ("redux", "a.png"),
    "edit": ("edit", "a.png", "x"),
}
RUNS = {  # of the embedded models
    "generate": {"mini", "mini-schnell", "kontext-mini", "redux-mini"},
    "fill": {"fill-mini"},
    "outpaint": {"fill-mini"},
    "canny": {"canny-mini"},
    "depth": {"depth-mini"},
    "image": {"canny-mini", "depth-mini"},
    "lora": {"mini", "mini-schnell", "kontext-mini", "redux-mini"},
    "redux": {"mini-schnell", "kontext-mini", "redux-mini"},
    "edit": {"mini-schnell", "kontext-mini", "redux-mini"},
}


def found(name, *words):
    arguments = _parser().parse_args([*COMMANDS[name], *map(str, words)])
    return model_files(arguments, purpose_of(arguments))


@pytest.mark.parametrize(
    ("name", "row"),
    [("generate", MINI), ("fill", MINI_FILL), ("outpaint", MINI_FILL), ("canny", MINI_CANNY), ("depth", MINI_DEPTH),
     ("lora", MINI), ("redux", MINI_REDUX), ("edit", MINI_KONTEXT)],
)  # fmt: skip
def test_mini_is_the_embedded_model_that_fits(name, row):
    files = found(name)
    assert (files.transformer, files.clip, files.t5, files.autoencoder) == (
        row.transformer,
        row.clip,
        row.t5,
        row.autoencoder,
    )
    assert (files.redux, files.vision) == ((REDUX_MINI_FILE, SIGLIP_MINI_FILE) if name == "redux" else (None, None))


@pytest.mark.parametrize("name", COMMANDS)
def test_embedded_models_of_other_tasks_are_refused_by_name(name):
    for short in set(SHORT_NAMES) - {"mini"}:
        if short in RUNS[name]:
            assert found(name, "--model", short).transformer.name == FLUX1[SHORT_NAMES[short]].files[0]
        else:
            with pytest.raises(MismatchError, match=FLUX1[SHORT_NAMES[short]].title) as refused:
                found(name, "--model", short)
            assert "choose" in str(refused.value)
            assert "run this one by `python -m flux " in str(refused.value)


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("fill", "flux1-dev", "FLUX.1 [dev] draws from a prompt alone and has no input for a picture with a hole; "
         "choose FLUX.1 Fill (or fill-mini), or run this one by `python -m flux generate`"),
        ("canny", "flux1-dev", "choose FLUX.1 Canny (or canny-mini)"),
        ("depth", "flux1-canny-dev", "FLUX.1 Canny [dev] follows the edges of a picture and not depth; choose FLUX.1 "
         "Depth"),
        ("generate", "flux1-fill-dev", "FLUX.1 Fill [dev] paints into a picture with a hole and cannot draw from a "
         "prompt alone; choose a text-to-image model, or run this one by `python -m flux fill`"),
        ("redux", "flux1-fill-dev", "choose a text-to-image model"),
        ("edit", "flux1-depth-dev", "and takes no references; choose FLUX.1 Kontext (or kontext-mini)"),
        ("lora", "flux1-canny-dev", "and takes no control LoRA; choose the text-to-image model"),
    ],
)  # fmt: skip
def test_a_file_of_another_task_is_refused_before_other_files_are_looked_for(flux, tmp_path, name, row, says):
    with on_meta():
        shapes = {key: tuple(p.shape) for key, p in Flux1(FLUX1[row]).named_parameters()}
    path = write_header_only(tmp_path / FLUX1[row].files[0], shapes)
    (tmp_path / "a.png").touch()
    words = [tmp_path / word if word.endswith(".png") else word for word in COMMANDS[name]]
    (tmp_path / "m.png").touch()
    said = flux(*words, "--model", path, "--out", tmp_path / "b.png")
    assert (said.code, said.out, len(said.err)) == (2, [], 1)
    assert says in said.err[0]


def test_what_a_control_picture_is_of_must_be_said_to_the_embedded_models(flux, tmp_path):
    (tmp_path / "a.png").touch()
    said = flux("control", tmp_path / "a.png", "x", "--type", "image", "--out", tmp_path / "b.png")
    assert said.code == 2
    assert "a control picture of type image needs the --model or --lora that follows it" in said.err[0]


def test_every_embedded_model_has_a_short_name_and_a_row():
    assert all(name in FLUX1 and FLUX1[name].files for name in EMBEDDED)
    assert {name for name, row in FLUX1.items() if row.text_encoders == ("clip-mini", "t5-mini")} == set(EMBEDDED)


def test_a_real_model_s_redux_files_are_found_in_comfyui_s_folders_and_named_where_they_are_missing(flux, tmp_path):
    models = tmp_path / "models"
    for folder in ("diffusion_models", "style_models", "clip_vision"):
        (models / folder).mkdir(parents=True)
    with on_meta():
        shapes = {key: tuple(p.shape) for key, p in Flux1(FLUX1["flux1-dev"]).named_parameters()}
    path = write_header_only(models / "diffusion_models" / "flux1-dev.safetensors", shapes)
    (tmp_path / "a.png").touch()
    words = ("redux", tmp_path / "a.png", "--model", path, "--out", tmp_path / "b.png")
    said = flux(*words)
    assert said.code == 2
    for name in ("flux1-redux-dev.safetensors (--redux", "sigclip_vision_patch14_384.safetensors (--vision"):
        assert name in said.err[0]
    (models / "style_models" / "flux1-redux-dev.safetensors").touch()
    (models / "clip_vision" / "sigclip_vision_patch14_384.safetensors").touch()
    said = flux(*words)
    assert "clip_l.safetensors (--clip" in said.err[0]
    assert "--redux" not in said.err[0]
    assert "--vision" not in said.err[0]
