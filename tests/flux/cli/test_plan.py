"""``plan``: known models without files, files by their headers, and what is wrong with what was asked."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from flux.memory.policy import GIB
from flux.mini import files
from flux.pipelines.modules import parameter_shapes
from flux.pipelines.plan_picture import WIDTH
from flux.specs.flux1 import FLUX1
from flux.weights.readers.safetensors import SafetensorsFile
from tests.tiny import write_header_only

GPU = ("--device", "cuda", "--memory", "24")


def planned(flux, *arguments):
    said = flux("plan", *arguments, "--json")
    assert said.code == 0
    return json.loads("\n".join(said.out))


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-schnell", "flux1-fill-dev", "mini", "mini-schnell"])
def test_a_known_model_is_planned_without_files(flux, name):
    stages = planned(flux, name, *GPU)["stages"]
    fills = name == "flux1-fill-dev"
    assert list(stages) == ["clip", "t5", *(["encode"] if fills else []), "transformer", "decode"]
    for stage in stages.values():
        parts = ("resident_bytes", "ring_bytes", "activation_bytes", "workspace_bytes")
        assert stage["peak_bytes"] == sum(stage[part] for part in parts) > 0


def test_policies_change_what_is_streamed(flux):
    kept, saved, six = (
        planned(flux, "flux1-dev", *GPU, "--policy", policy)["stages"]["transformer"]
        for policy in ("keep", "save", "6")
    )
    assert (kept["streamed_bytes"], kept["blocks_streamed"]) == (0, [])
    assert len(saved["blocks_streamed"]) == saved["blocks"] == 57
    assert saved["peak_bytes"] < six["peak_bytes"] <= 6 * GIB < kept["peak_bytes"]


def test_size_batch_steps_and_references_are_those_asked_for(flux):
    def activations(*more):
        return planned(flux, "flux1-kontext-dev", *GPU, *more)["stages"]["transformer"]["activation_bytes"]

    whole = activations()
    assert activations("--width", "512", "--height", "512") < whole < activations("--batch", "2")
    assert activations("--reference", "1024x1024") > whole
    stages = planned(flux, "flux1-kontext-dev", *GPU, "--reference", "512x512", "--steps", "9", "--negative")["stages"]
    assert (stages["transformer"]["passes"], stages["t5"]["passes"]) == (18, 2)
    assert "encode" in stages


def test_the_transformer_is_counted_beside_decoding_where_another_picture_follows(flux):
    one, three = (planned(flux, "flux1-dev", *GPU, "--count", count)["stages"] for count in ("1", "3"))
    assert one["decode"]["beside_bytes"] == 0
    assert three["decode"]["beside_bytes"] > three["transformer"]["resident_bytes"]
    assert planned(flux, "flux1-dev", *GPU, "--count", "3", "--policy", "6")["stages"]["decode"]["beside_bytes"] == 0


def test_a_step_cache_is_planned_for(flux):
    plain, cached = (planned(flux, "flux1-dev", *GPU, *more)["peak_bytes"] for more in ((), ("--step-cache",)))
    assert cached > plain


def test_redux_brings_its_tower_and_further_tokens(flux):
    plain, styled = (planned(flux, "flux1-dev", *GPU, *more)["stages"] for more in ([], ["--redux", "2"]))
    assert list(styled) == ["clip", "t5", "vision", "transformer", "decode"]
    assert (styled["vision"]["title"], styled["vision"]["passes"]) == ("siglip-so400m-384", 2)
    tokens = styled["transformer"]["operations"] / plain["transformer"]["operations"]
    assert tokens > (4096 + 512 + 2 * 729) / (4096 + 512)


def test_what_a_run_has_beside_its_transformer_is_planned(flux):
    lora = files.FOLDER / "flux1-canny-mini-lora.safetensors"
    plain, both = (
        planned(flux, "mini", *GPU, *more)["stages"] for more in ([], ["--beside", "canny-mini", "--beside", lora])
    )
    assert list(both) == ["clip", "t5", "encode", "transformer", "transformer 2", "decode"]
    assert plain["transformer"]["beside_bytes"] == 0
    numbers = sum(math.prod(entry.shape) for entry in SafetensorsFile(lora).values())
    without = planned(flux, "mini", *GPU, "--beside", "canny-mini")["stages"]["transformer"]
    assert both["transformer"]["beside_bytes"] - without["beside_bytes"] == 2 * numbers
    assert without["beside_bytes"] >= both["transformer 2"]["resident_bytes"] > 0


def test_files_are_planned_by_their_headers(flux, tmp_path):
    path = write_header_only(tmp_path / "dev.safetensors", parameter_shapes(FLUX1["flux1-dev"]), "F8_E4M3")
    found = planned(flux, path, *GPU)["stages"]
    assert found["transformer"]["weights_bytes"] == 11_901_408_320
    assert found["t5"]["weights_bytes"] == planned(flux, "flux1-dev", *GPU)["stages"]["t5"]["weights_bytes"]


def test_embedded_files_are_planned_as_they_are_stored(flux):
    folder = files.FOLDER
    stages = planned(flux, folder / "flux1-fill-mini.gguf", folder / "t5.safetensors", folder / "clip.safetensors",
                     folder / "ae.safetensors")["stages"]  # fmt: skip
    size = (folder / "flux1-fill-mini.gguf").stat().st_size
    assert 0.95 * size < stages["transformer"]["weights_bytes"] <= size


def test_the_table_says_where_the_peak_is_and_what_is_streamed(flux):
    said = flux("plan", "flux1-dev", *GPU, "--policy", "12")
    assert (said.code, said.err) == (0, [])
    assert said.out[0].split() == ["STAGE", "MODEL", "WEIGHTS", "STAY", "STREAMED", "BESIDES", "PEAK", "TIME"]
    text = "\n".join(said.out)
    assert "transformer (FLUX.1 [dev]), of 24.00 GiB free on cuda; policy 12 GiB." in text
    assert "FLUX.1 [dev]: 20 of 57 blocks are streamed" in text
    assert "6.05 GiB of modulation weights come once and do not stay" in text


def test_a_time_is_told_on_the_machines_own_device(flux):
    assert all(stage["seconds"] > 0 for stage in planned(flux, "mini", "--device", "cpu")["stages"].values())
    assert all("seconds" not in stage for stage in planned(flux, "mini", *GPU)["stages"].values())


def test_the_plan_is_drawn(flux, tmp_path):
    said = flux("plan", "flux1-dev", *GPU, "--picture", tmp_path / "plan.png")
    assert said.code == 0
    with Image.open(tmp_path / "plan.png") as picture:
        assert (picture.format, picture.width) == ("PNG", WIDTH)


def test_an_apple_gpu_need_not_be_here(flux):
    assert planned(flux, "flux1-dev", "--device", "mps", "--memory", "24")["device"] == "mps"
    assert flux("plan", "mini", "--device", "mps").code == 0


def test_pictures_in_strips_are_said(flux):
    said = flux("plan", "flux1-dev", *GPU, "--policy", "save")
    assert "flux1-ae: decodes in strips of rows." in said.out


def test_too_little_memory_is_said(flux):
    said = flux("plan", "flux1-dev", "--device", "cuda", "--memory", "8", "--policy", "keep")
    assert said.out[-1].startswith("That is more than is free: choose policy auto or save")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flux1-dev", "--policy", "fast"], "there is no memory policy 'fast'; give one of auto, keep, balance, save"),
        (["flux1-dev", "--policy", "1"], "a budget of 1 GiB is below the least that this takes"),
        (["flux1-dev", "--memory", "0"], "memory is 0; give the free memory in GiB"),
        (["flux1-dev", "--memory", "inf"], "memory is inf; give the free memory in GiB"),
        (["flux1-dev", "--device", "cuda:banana"], "there is no device 'cuda:banana'"),
        (["mini-schnell", "--step-cache"], "none can be skipped; run it without a step cache"),
        (["flux1-dev", "--picture", "plan.jpg"], "the plan is drawn as a PNG"),
        (["canny"], "canny is neither a known model, which `models` lists, nor a file"),
        (["flux1-dev", "--width", "0"], "width is 0; give 16 to 8192 pixels"),
        (["flux1-dev", "--batch", "0"], "batch is 0; give 1 or more"),
        (["flux1-dev", "--count", "0"], "count is 0; give 1 or more"),
        (["flux1-dev", "--reference", "big"], "a reference's size is 'big'; give width and height"),
        (["flux1-dev", "flux1-schnell"], "2 transformers were given; give one"),
        (["flux1-dev", "--redux", "-1"], "redux is -1; give how many pictures"),
        (["flux1-dev", "--beside", str(files.MINI.autoencoder)], "is neither a transformer nor a control LoRA"),
        (["none.safetensors"], "none.safetensors was not found"),
        (["flux1-dev", "--device", "tpu"], "there is no device 'tpu'"),
        ([str(files.MINI.autoencoder)], "0 transformers were given; give one"),
    ],
)
def test_what_cannot_be_planned_is_said(flux, arguments, message):
    said = flux("plan", *arguments, *([] if "--device" in arguments else ["--device", "cuda"]))
    assert said.code == 2
    assert message in said.err[-1]
