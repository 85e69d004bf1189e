"""Every released model, built without memory: its parameters counted, and FLUX.1's named, as in the released files."""

from __future__ import annotations

import functools

import pytest
import torch

from flux.models.autoencoder import Autoencoder
from flux.models.flux1 import Flux1
from flux.models.text.clip import ClipText
from flux.models.text.t5 import T5Encoder
from flux.specs.autoencoder import AUTOENCODERS
from flux.specs.flux1 import FLUX1
from flux.specs.text import CLIP_L, T5_XXL

# Parameters and tensors of each released transformer.
RELEASED = {
    "flux1-schnell": (11_891_178_560, 776),
    "flux1-dev": (11_901_408_320, 780),
    "flux1-krea-dev": (11_901_408_320, 780),
    "flux1-kontext-dev": (11_901_408_320, 780),
    "flux1-fill-dev": (11_902_391_360, 780),
    "flux1-canny-dev": (11_901_604_928, 780),
    "flux1-depth-dev": (11_901_604_928, 780),
}
# Parameters of each part of FLUX.1 [dev]; a part is the keys that begin so and contain one of the rest.
DEV_PARTS = {
    ("img_in.", ""): 199_680,
    ("txt_in.", ""): 12_585_984,
    ("time_in.", ""): 10_229_760,
    ("guidance_in.", ""): 10_229_760,
    ("vector_in.", ""): 11_802_624,
    ("double_blocks.", "_mod."): 2_152_378_368,
    ("double_blocks.", "_attn."): 1_434_928_640,
    ("double_blocks.", "_mlp."): 2_869_487_616,
    ("single_blocks.", ".modulation."): 1_076_189_184,
    ("single_blocks.", ".linear1."): 1_076_189_184 + 1_434_918_912,
    ("single_blocks.", ".linear2."): 358_612_992 + 1_434_451_968 + 116_736,
    ("single_blocks.", ".norm."): 9_728,
    ("final_layer.adaLN_modulation.", ""): 18_880_512,
    ("final_layer.linear.", ""): 196_672,
}


@functools.cache
def shapes(name):
    """Key to shape of a transformer."""
    with torch.device("meta"):
        model = Flux1(FLUX1[name])
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def size(shape):
    return functools.reduce(int.__mul__, shape)


def published_shapes(in_channels, guidance):
    """The key table of the released FLUX.1 files."""
    linears = {
        "img_in": (3072, in_channels),
        "txt_in": (3072, 4096),
        "time_in.in_layer": (3072, 256),
        "time_in.out_layer": (3072, 3072),
        "vector_in.in_layer": (3072, 768),
        "vector_in.out_layer": (3072, 3072),
        "final_layer.adaLN_modulation.1": (6144, 3072),
        "final_layer.linear": (64, 3072),
    }
    if guidance:
        linears |= {"guidance_in.in_layer": (3072, 256), "guidance_in.out_layer": (3072, 3072)}
    scales = []
    for block in (f"double_blocks.{n}" for n in range(19)):
        for stream in ("img", "txt"):
            linears |= {
                f"{block}.{stream}_mod.lin": (18432, 3072),
                f"{block}.{stream}_attn.qkv": (9216, 3072),
                f"{block}.{stream}_attn.proj": (3072, 3072),
                f"{block}.{stream}_mlp.0": (12288, 3072),
                f"{block}.{stream}_mlp.2": (3072, 12288),
            }
            scales += [f"{block}.{stream}_attn.norm.{which}_norm.scale" for which in ("query", "key")]
    for block in (f"single_blocks.{n}" for n in range(38)):
        linears |= {
            f"{block}.modulation.lin": (9216, 3072),
            f"{block}.linear1": (21504, 3072),
            f"{block}.linear2": (3072, 15360),
        }
        scales += [f"{block}.norm.{which}_norm.scale" for which in ("query", "key")]
    weights = {f"{name}.weight": shape for name, shape in linears.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    return weights | biases | dict.fromkeys(scales, (128,))


def test_every_released_transformer_is_counted():
    assert set(RELEASED) == {name for name in FLUX1 if "mini" not in name}


@pytest.mark.parametrize("name", RELEASED)
def test_transformer_has_the_published_parameters_and_tensors(name):
    assert (sum(map(size, shapes(name).values())), len(shapes(name))) == RELEASED[name]


@pytest.mark.parametrize("name", RELEASED)
def test_transformer_has_the_published_keys_and_shapes(name):
    assert shapes(name) == published_shapes(FLUX1[name].in_channels, guidance=name != "flux1-schnell")


@pytest.mark.parametrize(("start", "part"), DEV_PARTS)
def test_each_part_of_dev_has_the_published_parameters(start, part):
    found = [shape for key, shape in shapes("flux1-dev").items() if key.startswith(start) and part in key]
    assert sum(map(size, found)) == DEV_PARTS[start, part]


def test_parts_of_dev_are_the_whole():
    assert sum(DEV_PARTS.values()) == RELEASED["flux1-dev"][0]


@pytest.mark.parametrize(("name", "percent"), [("flux1-dev", 27.286), ("flux1-schnell", 27.310)])
def test_modulation_layers_are_over_a_quarter_of_the_transformer(name, percent):
    with torch.device("meta"):
        model = Flux1(FLUX1[name])
    layers = model.modulation_layers()
    modulation = sum(count(layer) for layer in layers.values())
    assert len(layers) == 2 * 19 + 38 + 1
    assert modulation == 3_247_448_064
    assert 100 * modulation / count(model) == pytest.approx(percent, abs=5e-4)
    assert set(layers) <= {name for name, _ in model.named_modules()}


def test_autoencoder_has_the_published_parameters_and_tensors():
    with torch.device("meta"):
        model = Autoencoder(AUTOENCODERS["flux1-ae"])
    assert (count(model.encoder), count(model.decoder)) == (34_274_208, 49_545_475)
    assert (count(model), len(model.state_dict())) == (83_819_683, 244)


def test_clip_l_has_the_published_parameters():
    with torch.device("meta"):
        assert count(ClipText(CLIP_L)) == 123_060_480


def test_t5_xxl_encoder_has_the_published_parameters():
    with torch.device("meta"):
        assert count(T5Encoder(T5_XXL)) == 4_762_310_656
