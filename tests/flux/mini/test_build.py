"""All stages of the embedded model, and the installing of what they made."""

from __future__ import annotations

import functools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from flux.adapters.control_lora import check_control_lora, read_control_lora
from flux.mini import __main__ as command
from flux.mini import build, train_autoencoder, train_flow, train_text
from flux.mini.build import FLOW_STAGES, GUIDED_STAGES, STAGES, preview_factors
from flux.mini.files import CONTROL_LORAS, REDUX_MINI_FILE, SIGLIP_MINI_FILE, MiniFiles, open_mini
from flux.mini.files import FOLDER as SHIPPED
from flux.mini.train_autoencoder import AutoencoderRecipe, psnr_on_fresh_scenes
from flux.mini.train_text import TextRecipe
from flux.pipelines.parts import open_transformer
from flux.pipelines.redux import open_redux_encoder
from flux.specs.autoencoder import MINI as MINI_AUTOENCODER
from flux.specs.flux1 import CANNY_MINI, DEPTH_MINI, FILL_MINI, KONTEXT_MINI, MINI, MINI_REDUX, MINI_SCHNELL
from flux.specs.text import CLIP_MINI, T5_MINI
from flux.specs.vision import REDUX_MINI, SIGLIP_MINI
from flux.training.checkpoints import load_checkpoint

pytestmark = pytest.mark.usefixtures("tiny")


def test_preview_factors_are_the_linear_map_to_mean_colours(monkeypatch):
    monkeypatch.setattr(build, "PREVIEW_SCENES", 4)
    to_latent = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))

    def encode(pixels):
        return torch.einsum("bchw,cd->bdhw", F.avg_pool2d(pixels, 8), to_latent) + 0.5

    found = preview_factors(SimpleNamespace(encode=encode, spec=SimpleNamespace(downscale=8)))
    factors, bias = torch.tensor(found["factors"]), torch.tensor(found["bias"])
    assert factors.shape == (16, 3)
    colours = torch.rand(10, 3) * 2 - 1
    torch.testing.assert_close((colours @ to_latent + 0.5) @ factors + bias, colours, rtol=1e-3, atol=1e-3)


@pytest.fixture
def short_build(tmp_path, monkeypatch):
    """The shipped model's own sizes, a step for each stage, and a folder in place of the pack's weights."""
    monkeypatch.setattr(train_autoencoder, "MINI", MINI_AUTOENCODER)
    monkeypatch.setattr(train_text, "T5_MINI", T5_MINI)
    monkeypatch.setattr(train_text, "CLIP_MINI", CLIP_MINI)
    monkeypatch.setattr(train_flow, "MINI", MINI)
    monkeypatch.setattr(train_flow, "MINI_SCHNELL", MINI_SCHNELL)
    stage = {"steps": 1, "decay": 1, "batch": 2, "learning_rate": 1e-3}
    short = {
        "FOLDER": tmp_path / "weights",
        "AUTOENCODER": AutoencoderRecipe(joint_steps=1, decoder_steps=1, batch=2, crop=32),
        "TEXT": TextRecipe(steps=1, batch=2),
        "NATIVE_SCENES": 2,
        "OTHER_SCENES": 1,
        "BASE": stage,
        "GUIDED": stage,
        "SCHNELL": stage,
        "GUIDED_RECIPES": dict.fromkeys((*GUIDED_STAGES, "words", "style_further"), stage),
        "PREVIEW_SCENES": 2,
        "psnr_on_fresh_scenes": functools.partial(psnr_on_fresh_scenes, count=1),
    }
    for name, value in short.items():
        monkeypatch.setattr(build, name, value)
    return tmp_path


def test_a_whole_build_installs_files_that_open(short_build, capsys):
    folder, target = short_build / "checkpoints", short_build / "weights"
    assert command.main(["--folder", str(folder)]) == 0
    said = capsys.readouterr().out
    assert [stage for stage in STAGES if f"{stage}: done in" in said] == list(STAGES)
    # Each stage is taken from its checkpoint when it is run again.
    assert command.main(["--folder", str(folder), "--stage", "guided", "--stage", "text"]) == 0
    assert "guided: resumed at step 1" in capsys.readouterr().out

    lines = []
    build.Builder(folder, 0, "cpu", compiled=False, report=lines.append).install(target)
    expected = {
        "ae": torch.float16,
        "clip": torch.bfloat16,
        "t5": torch.bfloat16,
        "flux1-mini": torch.bfloat16,
        "flux1-mini-schnell": torch.bfloat16,
    }
    files = {name: target / f"{name}.safetensors" for name in expected}
    assert {path.name for path in target.iterdir()} == {*(path.name for path in files.values()), "tokenizer.json"}
    assert len(lines) == len(expected)
    for name, dtype in expected.items():
        assert {tensor.dtype for tensor in load_file(files[name]).values()} == {dtype}
        assert files[name].stat().st_mode & 0o777 == 0o644
        with safe_open(files[name], "pt") as file:
            assert file.metadata()["license"] == "Apache-2.0"
    with safe_open(files["ae"], "pt") as file:
        preview = json.loads(file.metadata()["preview"])
    assert (len(preview["factors"]), len(preview["bias"])) == (16, 3)
    shipped, (averaged, _) = load_file(files["flux1-mini"]), load_checkpoint(folder / "guided.safetensors")
    assert all(torch.equal(shipped[k], averaged[f"average.{k}"].bfloat16()) for k in shipped)

    for name, spec in (("flux1-mini", MINI), ("flux1-mini-schnell", MINI_SCHNELL)):
        shared = {kind: files[kind] for kind in ("clip", "t5")}
        opened = open_mini(
            MiniFiles(files[name], autoencoder=files["ae"], tokenizer=target / "tokenizer.json", **shared)
        )
        assert opened.transformer.spec == spec
        assert opened.autoencoder.spec == MINI_AUTOENCODER
        with opened.transformer.resident() as transformer:
            assert all(bool(parameter.isfinite().all()) for parameter in transformer.parameters())


def test_guided_parts_are_installed_so_that_they_open(short_build):
    folder, target, lines = short_build / "checkpoints", short_build / "weights", []
    shutil.copytree(SHIPPED, target)
    for path in target.iterdir():
        if any(word in path.name for word in ("fill", "canny", "depth", "kontext", "redux", "siglip")):
            path.unlink()
    builder = build.Builder(folder, 0, "cpu", compiled=False, report=lines.append)
    for stage in GUIDED_STAGES:
        builder.run(stage)
    builder.install_guided(target)
    cpu = torch.device("cpu")
    made = {spec: (spec.name, "average.") for spec in (FILL_MINI, CANNY_MINI, DEPTH_MINI, KONTEXT_MINI)}
    for spec, (stage, prefix) in {**made, MINI_REDUX: ("style", "average.text.")}.items():
        part = open_transformer(target / spec.files[0], cpu)
        assert (part.spec, part.notes) == (spec, ())
        averaged, _ = load_checkpoint(folder / f"{stage}.safetensors")
        with part.resident() as model:
            wanted = averaged[f"{prefix}double_blocks.0.img_mlp.0.weight"]
            error = (model.double_blocks[0].img_mlp[0].weight - wanted).abs().max() / wanted.abs().max()
            assert 0 < error < 0.1
    for task in ("canny", "depth"):
        lora = read_control_lora(target / CONTROL_LORAS[task].name)
        check_control_lora(lora, MINI)
        assert lora.channels == 64
    encoder = open_redux_encoder(target / SIGLIP_MINI_FILE.name, target / REDUX_MINI_FILE.name, cpu)
    assert (encoder.tower.spec, encoder.redux.spec) == (SIGLIP_MINI, REDUX_MINI)
    assert sum("installed" in line for line in lines) == 9


def test_training_goes_on_from_the_shipped_weights(short_build, monkeypatch, capsys):
    target = short_build / "weights"
    shutil.copytree(SHIPPED, target)
    monkeypatch.setitem(build.BASE, "learning_rate", 0.0)
    folder = short_build / "checkpoints"
    assert command.main(["--folder", str(folder), "--from-shipped"]) == 0
    said = capsys.readouterr().out
    assert [stage for stage in STAGES if f"{stage}: done in" in said] == list(FLOW_STAGES)
    shipped, (reached, _) = load_file(target / "flux1-mini.safetensors"), load_checkpoint(folder / "base.safetensors")
    assert all(torch.equal(reached[f"model.{name}"], tensor.float()) for name, tensor in shipped.items())

    again = short_build / "again"
    build.Builder(folder, 0, "cpu", compiled=False, report=lambda line: None).install(again)
    for name in ("ae", "t5", "clip"):
        before, after = (load_file(place / f"{name}.safetensors") for place in (target, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_redux_goes_on_from_the_shipped_weights(short_build, monkeypatch):
    target, folder = short_build / "weights", short_build / "checkpoints"
    shutil.copytree(SHIPPED, target)
    monkeypatch.setitem(build.GUIDED_RECIPES, "style_further", build.GUIDED_RECIPES["style"] | {"learning_rate": 0.0})
    assert command.main(["--folder", str(folder), "--from-shipped", "--stage", "style"]) == 0
    reached, _ = load_checkpoint(folder / "style.safetensors")
    for prefix, path in (("style.tower.", SIGLIP_MINI_FILE), ("style.redux.", REDUX_MINI_FILE)):
        shipped = load_file(target / path.name)
        assert all(torch.equal(reached[f"average.{prefix}{key}"], value.float()) for key, value in shipped.items())
    part = open_transformer(target / MINI_REDUX.files[0], torch.device("cpu"), torch.float32, keep="numbers")
    with part.resident() as model:
        assert all(torch.equal(reached[f"average.text.{key}"], value) for key, value in model.state_dict().items())


def test_several_processes_share_guided_stages_only(short_build, monkeypatch, capsys):
    monkeypatch.setattr(command.parallel, "size", lambda: 2)
    with pytest.raises(SystemExit):
        command.main(["--folder", str(short_build), "--stage", "latents"])
    assert "can share only the stages fill, canny" in capsys.readouterr().err
    assert build.Builder(short_build, 0, "cpu", compiled=False, report=print)._recipe("fill").batch == 1


def test_a_stage_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--stage", "dessert"])
    assert "autoencoder" in capsys.readouterr().err
