"""What a file holds is told part by part, from its header; what is amiss is told with it."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

from flux.errors import FileError, MismatchError
from flux.mini.files import MINI
from flux.pipelines.parts import bind_part
from flux.weights.checkpoints import formats_of, read_parts
from flux.weights.sources import open_checkpoint
from tests.fixtures.listings import LISTINGS, redux, siglip
from tests.tiny import write_header_only

ALL_IN_ONE = {
    "model.diffusion_model.": MINI.transformer,
    "vae.": MINI.autoencoder,
    "text_encoders.clip_l.transformer.": MINI.clip,
    "text_encoders.t5xxl.transformer.": MINI.t5,
}


def parts_of(path, variant=None):
    return read_parts(open_checkpoint(path), variant)


@pytest.mark.parametrize("name", LISTINGS)
def test_every_real_release_is_one_whole_part(tmp_path, name):
    path = write_header_only(tmp_path / "model.safetensors", LISTINGS[name][1])
    (part,) = parts_of(path)
    assert part.fault is None
    assert part.plan is not None
    assert part.recognised.spec is not None
    assert part.layout.layout.name == LISTINGS[name][0]
    assert part.recognised.runs == ("flux2" not in name)


def test_an_all_in_one_file_holds_four_parts(tmp_path):
    whole = {prefix + name: t for prefix, path in ALL_IN_ONE.items() for name, t in load_file(path).items()}
    save_file(whole, tmp_path / "all.safetensors")
    parts = parts_of(tmp_path / "all.safetensors")
    assert [part.kind for part in parts] == ["transformer", "autoencoder", "clip", "t5"]
    assert [part.layout.prefix for part in parts] == list(ALL_IN_ONE)
    assert all(part.fault is None for part in parts)


def test_a_part_with_a_tensor_too_many_is_still_known_and_its_fault_told(tmp_path):
    listing = LISTINGS["flux1-dev"][1]
    path = write_header_only(tmp_path / "odd.safetensors", {**listing, "extra.thing": (3,)})
    (part,) = parts_of(path)
    assert part.kind == "transformer"
    assert "odd.safetensors has tensors that" in part.fault
    assert "extra.thing" in part.fault
    with pytest.raises(FileError, match=r"extra\.thing"):
        part.whole_plan()


def test_the_users_word_decides_where_tensors_cannot(tmp_path):
    path = write_header_only(tmp_path / "model.safetensors", LISTINGS["flux1-dev"][1])
    (part,) = parts_of(path, "flux1-kontext-dev")
    assert part.recognised.spec.name == "flux1-kontext-dev"
    with pytest.raises(MismatchError, match="is not FLUX.1 Fill"):
        parts_of(path, "flux1-fill-dev")


def test_formats_are_counted_by_numbers_most_first():
    checkpoint = open_checkpoint(MINI.transformer)
    (part,) = read_parts(checkpoint)
    counts = formats_of(checkpoint, part)
    assert list(counts)[0] == "BF16"
    assert sum(counts.values()) == sum(tensor.numel() for tensor in load_file(MINI.transformer).values())


def test_a_file_of_another_family_is_foreign_with_its_name(tmp_path):
    path = write_header_only(tmp_path / "x.safetensors", {"model.diffusion_model.joint_blocks.0.x_block.w": (2, 2)})
    (part,) = parts_of(path)
    assert (part.kind, part.layout, part.recognised.title) == ("foreign", None, "a Stable Diffusion 3 model")


TOWER = "vision_tower."


def beside_a_tower(names):
    return {**{TOWER + name: shape for name, shape in siglip().items()}, **names}


def test_a_language_model_with_a_vision_tower_is_told_as_both(tmp_path):
    names = {"model.layers.0.input_layernorm.weight": (2560,), "model.embed_tokens.weight": (151936, 2560)}
    path = write_header_only(tmp_path / "x.safetensors", beside_a_tower(names))
    parts = parts_of(path)
    assert [part.recognised.role for part in parts] == ["text-encoder", "vision"]
    assert parts[1].fault is None


def test_a_tower_inside_another_familys_model_can_be_used(tmp_path):
    names = {"model.diffusion_model.joint_blocks.0.x_block.w": (2, 2)}
    path = write_header_only(tmp_path / "x.safetensors", beside_a_tower(names))
    assert [part.recognised.title for part in parts_of(path)] == [
        "a Stable Diffusion 3 model", "the SigLIP so400m vision tower (patch 14, 384 pixels)",
    ]  # fmt: skip


def test_redux_and_its_tower_are_found_in_an_all_in_one_file(tmp_path):
    names = {
        **{f"model.diffusion_model.{name}": shape for name, shape in LISTINGS["flux1-dev"][1].items()},
        **{f"image_embedder.{name}": shape for name, shape in redux().items()},
    }
    parts = parts_of(write_header_only(tmp_path / "x.safetensors", beside_a_tower(names)))
    assert [(part.kind, part.fault) for part in parts] == [("transformer", None), ("vision", None), ("redux", None)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("txt_in.bias"), "lacks tensors: txt_in.bias"),
        (lambda t: t.update({"txt_in.bias": (3,)}), r"another shape: txt_in.bias \[3\] in place of \[3072\]"),
    ],
)
def test_what_a_module_misses_is_named(tmp_path, change, words):
    shapes = dict(LISTINGS["flux1-dev"][1])
    change(shapes)
    path = write_header_only(tmp_path / "x.safetensors", shapes)
    with pytest.raises(FileError, match=words):
        bind_part(path, "transformer")
