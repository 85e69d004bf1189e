"""Files of random weights are whole files that open, and their numbers have the size that they should."""

from __future__ import annotations

import pytest
import torch

from benchmarks.random_files import FORMATS, RandomItem, deviation, random_format, write_random
from flux.models.flux1 import Flux1
from flux.models.text.t5 import T5Encoder
from flux.pipelines.parts import bind_part
from flux.specs.flux1 import FLUX1
from flux.specs.text import T5_MINI
from flux.weights.checkpoints import formats_of
from flux.weights.formats.base import DATA

MINI = FLUX1["flux1-mini"]
SHAPE = (64, 1024)


@pytest.mark.parametrize("name", FORMATS)
def test_packed_matrices_are_drawn_with_the_deviation_that_keeps_a_signal(name):
    written = random_format(name)
    parts = written.encode(torch.zeros(()).expand(SHAPE))
    numbers = written.row.decode(parts, SHAPE, torch.float32)
    assert numbers.std() == pytest.approx(deviation(SHAPE), rel=0.03)
    assert abs(numbers.mean()) < 0.02 * deviation(SHAPE)
    assert len(numbers.unique()) > 10


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_has_other_codes_and_a_seed_gives_the_same_again(name):
    first, again = random_format(name), random_format(name)
    one = first.encode(torch.zeros(SHAPE))[DATA]
    other = first.encode(torch.zeros(SHAPE))[DATA]
    assert not torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert torch.equal(one.view(torch.uint8), again.encode(torch.zeros(SHAPE))[DATA].view(torch.uint8))


def test_items_that_are_drawn_packed_take_no_memory_for_their_numbers():
    item = RandomItem("a.weight", (1 << 20, 1 << 20), 0, is_drawn_packed=True)
    assert item.numbers().shape == item.shape
    assert item.numbers().untyped_storage().nbytes() == 2


def test_vectors_are_those_of_a_layer_that_changes_nothing():
    assert RandomItem("a.bias", (3,), 0, is_drawn_packed=False).numbers().tolist() == [0, 0, 0]
    assert RandomItem("a.scale", (3,), 0, is_drawn_packed=False).numbers().tolist() == [1, 1, 1]


@pytest.mark.parametrize(("kind", "name"), [("fp8", "mini.safetensors"), ("gguf:Q4_K", "mini.gguf")])
def test_a_file_of_random_weights_opens_as_what_it_says(tmp_path, kind, name):
    write_random(tmp_path / name, lambda: Flux1(MINI), "flux1-bfl", kind, MINI.title)
    bound = bind_part(tmp_path / name, "transformer")
    assert bound.recognised.spec == MINI
    assert next(iter(formats_of(bound.checkpoint))) == {"fp8": "fp8_e4m3fn scaled", "gguf:Q4_K": "Q4_K"}[kind]
    numbers = bound.bindings["double_blocks.0.img_mlp.2.weight"].numbers(torch.float32)
    assert numbers.std() == pytest.approx(1024**-0.5, rel=0.03)


def test_an_encoder_is_written_with_its_own_names(tmp_path):
    write_random(tmp_path / "t5.safetensors", lambda: T5Encoder(T5_MINI), "t5-hf", "fp8", "t5")
    assert bind_part(tmp_path / "t5.safetensors", "t5").recognised.spec == T5_MINI
