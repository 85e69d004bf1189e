"""What a file is, told from its header."""

from __future__ import annotations

import json

import pytest

from flux.models.flux1 import Flux1
from flux.ops.layers import on_meta
from flux.pipelines.describe import human_bytes
from flux.specs.flux1 import FLUX1
from tests.fixtures.listings import redux, siglip_whole
from tests.tiny import write_header_only


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    """FLUX.1 [dev] by its header: 23.8 GB on paper, nothing on the disk."""
    with on_meta():
        shapes = {name: tuple(p.shape) for name, p in Flux1(FLUX1["flux1-dev"]).named_parameters()}
    return write_header_only(
        tmp_path_factory.mktemp("dev") / "model.safetensors", shapes, metadata={"author": "nobody"}
    )


def test_a_real_model_is_told_in_full(flux, dev):
    said = flux("inspect", dev)
    assert (said.code, said.err) == (0, [])
    rows = [line.split(maxsplit=1) for line in said.out[1:]]
    told = {label: rest for label, rest in rows if label != "note"}
    assert said.out[0] == str(dev)
    assert told["what"] == "the FLUX.1 [dev] diffusion model"
    assert (told["kind"], told["variant"]) == ("transformer", "flux1-dev")
    assert "hidden 3072, heads 24, double_blocks 19, single_blocks 38, axes 16/56/56" in told["spec"]
    assert told["tensors"] == "780 (780 BF16)"
    assert told["parameters"] == "11,901,408,320"
    assert told["bytes"] == "23,802,816,640 (23.8 GB)"
    assert told["metadata"] == "author"
    assert [
        "note",
        "taken for FLUX.1 [dev], since neither its metadata nor its name tells; by its tensors it could also be FLUX.1 "
        "Krea [dev], FLUX.1 Kontext [dev]",
    ] in rows


def test_json_is_a_list_with_a_place_for_every_file(flux, dev, tiny, tmp_path):
    said = flux("inspect", "--json", dev, tiny.clip, tmp_path / "none.safetensors")
    told = json.loads("\n".join(said.out))
    assert said.code == 2
    assert [part["variant"] for facts in told[:2] for part in facts["parts"]] == ["flux1-dev", "clip-mini"]
    assert told[0]["parts"][0]["spec"]["guidance_embedding"] is True
    assert told[0]["dtypes"] == {"BF16": 780}
    assert "was not found" in told[2]["error"]
    assert said.err == [f"error: {told[2]['error']}"]


def test_the_good_files_are_told_beside_a_bad_one(flux, tiny, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    said = flux("inspect", tmp_path / "bad.safetensors", tiny.t5)
    assert said.code == 2
    assert said.out[1].endswith("Foundry Mini's T5 text encoder")
    assert "bad.safetensors" in said.err[0]


def test_foreign_and_unknown_files_are_named_without_being_a_fault(flux, tmp_path):
    foreign = write_header_only(tmp_path / "a.safetensors", {"model.diffusion_model.joint_blocks.0.x_block.w": (2, 2)})
    unknown = write_header_only(tmp_path / "b.safetensors", {"x.[31my": (2, 2)}, dtype="F8_E4M3")
    said = flux("inspect", foreign, unknown)
    text = "\n".join(said.out)
    assert said.code == 0
    assert "a Stable Diffusion 3 model" in text
    assert "of no kind that is known here" in text
    assert "fp8_e4m3fn" in text


def test_files_that_do_not_fit_the_transformer_among_them_are_told(flux, dev, tiny):
    said = flux("inspect", dev, tiny.clip, tiny.autoencoder)
    text = "\n".join(said.out)
    assert "clip.safetensors is Foundry Mini's CLIP text encoder, but model.safetensors is the FLUX.1 [dev]" in text
    assert "ae.safetensors is Foundry Mini's autoencoder (VAE), but model.safetensors is" in text
    told = json.loads("\n".join(flux("inspect", "--json", dev, tiny.t5).out))
    assert [len(facts["does_not_fit"]) for facts in told] == [1, 0]
    assert not any("but" in line for line in flux("inspect", tiny.transformer, tiny.clip, tiny.t5).out)


def test_vision_towers_and_redux_are_told_in_full(flux, tmp_path):
    tower = write_header_only(tmp_path / "model.safetensors", siglip_whole())
    adapter = write_header_only(tmp_path / "redux.safetensors", redux(), dtype="F16")
    text = "\n".join(flux("inspect", tower).out)
    assert "the SigLIP so400m vision tower (patch 14, 384 pixels)" in text
    assert "width 1152, layers 27, heads 16, mlp_width 4304, patch 14, side 384" in text
    text = "\n".join(flux("inspect", adapter).out)
    assert "the FLUX.1 Redux [dev] adapter (image prompts)" in text
    assert "vision_width 1152, text_width 4096, tower siglip-so400m-384" in text


def test_redux_that_does_not_fit_the_model_beside_it_is_told(flux, tiny, tmp_path):
    adapter = write_header_only(tmp_path / "redux.safetensors", redux())
    text = "\n".join(flux("inspect", tiny.transformer, adapter).out)
    assert "redux.safetensors is the FLUX.1 Redux [dev] adapter (image prompts), but tiny.safetensors is" in text
    assert "whose text tokens are 192 wide, not 4096" in text


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (23_802_816_640, "23.8 GB"), (5 * 10**15, "5000.0 TB")],
)
def test_bytes_are_written_for_people(count, words):
    assert human_bytes(count) == words
