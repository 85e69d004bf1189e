"""Parts bound to their files: in what format they run, and that vision towers and Redux open from all of them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux.errors import FileError, MismatchError
from flux.models.redux import Redux
from flux.models.vision.siglip import SiglipVision
from flux.ops import dtypes
from flux.pipelines import denoising, parts
from flux.pipelines.describe import describe
from flux.pipelines.parts import open_autoencoder, open_redux, open_t5, open_transformer, open_vision, widens_at_use
from flux.specs.vision import REDUX_MINI, SIGLIP_MINI
from tests.guides import PROMPT, SIGMAS
from tests.stored import suffix_of, write_stored
from tests.tiny import write_module, write_tiny

CPU = torch.device("cpu")
LOST = {  # of the result, at most, by how the weights are stored
    "fp32": 0.0, "bf16": 0.01, "fp16": 0.002, "fp8": 0.1, "fp8-row": 0.1, "mxfp8": 0.1, "nvfp4": 0.4, "int8": 0.1,
    "nf4": 0.4, "gguf:F16": 0.002, "gguf:Q8_0": 0.05, "gguf:Q4_0": 0.4,
}  # fmt: skip
PREFIXES = {"vision": "image_encoder.", "redux": "image_embedder."}  # diffusers' names for both in a pipeline
OPENERS = {"vision": open_vision, "redux": open_redux}
LARGE = dtypes.SMALL_MODEL + 1  # parameters
MODULES = {"vision": SiglipVision(SIGLIP_MINI), "redux": Redux(REDUX_MINI)}


@pytest.mark.parametrize(
    ("fast", "autoencoder"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
)
def test_the_autoencoder_never_runs_in_fp16_unless_it_is_asked_to(tmp_path, monkeypatch, fast, autoencoder):
    """A card without bf16 is fast in fp16, whose range FLUX.1's autoencoder leaves."""
    files, device = write_tiny(tmp_path), torch.device("cpu")
    monkeypatch.setattr(parts, "fast_dtype", lambda _: fast)
    monkeypatch.setattr(parts, "compute_dtype", lambda _, parameters: fast)
    assert open_autoencoder(files.autoencoder, device).dtype == autoencoder
    assert open_autoencoder(files.autoencoder, device, torch.float16).dtype == torch.float16
    assert open_transformer(files.transformer, device).dtype == open_t5(files.t5, device).dtype == fast


@pytest.mark.parametrize(
    ("parameters", "formats", "device", "dtype", "stays"),
    [
        (LARGE, {"BF16"}, "cpu", torch.float32, True),
        (LARGE, {"BF16", "F32"}, "cpu", torch.float32, True),  # vectors of a GGUF file
        (LARGE, {"F16"}, "cpu", torch.float32, True),
        (LARGE - 1, {"BF16"}, "cpu", torch.float32, False),
        (LARGE, {"F32"}, "cpu", torch.float32, False),
        (LARGE, {"BF16"}, "cpu", torch.bfloat16, False),
        (LARGE, {"BF16"}, "cuda", torch.float32, False),
        (LARGE, {"BF16", "fp8_e4m3fn"}, "cpu", torch.float32, False),  # takes longer to unpack
    ],
)
def test_sixteen_bits_are_widened_at_use_where_products_are_in_fp32(parameters, formats, device, dtype, stays):
    assert widens_at_use(parameters, formats, torch.device(device), dtype) == stays


def test_a_large_file_of_bf16_takes_what_it_takes_on_disk(tmp_path, monkeypatch):
    path = write_tiny(tmp_path).transformer
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    small = open_transformer(path, CPU, torch.float32).residency
    monkeypatch.setattr(parts, "SMALL_MODEL", 0)
    large = open_transformer(path, CPU, torch.float32).residency
    assert not small.accounts.packable
    matrices = [name for name, own in large.module.named_parameters() if own.dim() > 1]
    assert large.accounts.packable == set(matrices)
    assert large.load() < 0.51 * small.load()


@pytest.fixture
def heap(monkeypatch):
    """What the heap is asked for, as it begins and ends."""
    asked = []

    def noting(name):
        @contextmanager
        def inside():
            asked.append(name)
            yield
            asked.append(f"no more {name}")

        return inside

    monkeypatch.setattr(parts, "giving_back_freed_memory", noting("giving back"))
    monkeypatch.setattr(denoising, "keeping_freed_memory", noting("keeping"))
    return asked


def test_an_autoencoder_gives_freed_memory_back(tmp_path, heap):
    with open_autoencoder(write_tiny(tmp_path).autoencoder, CPU).resident():
        assert heap == ["giving back"]
    assert heap == ["giving back", "no more giving back"]


def test_steps_keep_freed_memory_and_loading_does_not(tmp_path, heap):
    part = open_transformer(write_tiny(tmp_path).transformer, CPU)
    loading = denoising.Hooks(progress=lambda *_: heap.append("loading") if heap[-1:] != ["loading"] else None)
    with denoising.prepared(part, PROMPT, SIGMAS, hooks=loading):
        assert heap == ["loading", "keeping"]
    assert heap == ["loading", "keeping", "no more keeping"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The small tower and adapter in fp32."""
    folder = tmp_path_factory.mktemp("plain")
    return {kind: write_module(folder / f"{kind}.safetensors", module, 7) for kind, module in MODULES.items()}


def given_to(kind):
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, SIGLIP_MINI.side, SIGLIP_MINI.side) if kind == "vision" else (1, 81, REDUX_MINI.vision_width)
    return torch.rand(shape, generator=generator) * 2 - 1


@torch.inference_mode()
def output(path, kind):
    with OPENERS[kind](path, CPU).resident() as module:
        return module(given_to(kind))


@torch.inference_mode()
def expected(path, kind):
    module = MODULES[kind]
    module.load_state_dict(load_file(path))
    return module(given_to(kind))


@pytest.mark.parametrize("room", [1 << 40, 0])
@pytest.mark.parametrize("stored", LOST)
@pytest.mark.parametrize("kind", OPENERS)
def test_towers_and_redux_run_from_every_storage_format_packed_or_not(tmp_path, monkeypatch, plain, kind, stored, room):
    monkeypatch.setattr(parts, "available_bytes", lambda _: room)
    tensors = {PREFIXES[kind] + name: tensor for name, tensor in load_file(plain[kind]).items()}
    path = write_stored(tmp_path / f"x{suffix_of(stored)}", tensors, stored)
    wanted = expected(plain[kind], kind)
    error = (output(path, kind) - wanted).norm() / wanted.norm()
    assert error <= LOST[stored] + 1e-6


@pytest.mark.parametrize(
    "rename",
    [
        pytest.param(lambda name: name.removeprefix("vision_model."), id="transformers 5"),
        pytest.param(lambda name: f"vision_tower.{name}", id="below a prefix"),
        pytest.param(lambda name: f"model.vision_tower.vision_tower.{name}", id="deeper"),
    ],
)
def test_a_tower_opens_under_all_its_names(tmp_path, plain, rename):
    tensors = {rename(name): tensor for name, tensor in load_file(plain["vision"]).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    assert torch.equal(output(tmp_path / "x.safetensors", "vision"), expected(plain["vision"], "vision"))


def test_a_tower_opens_out_of_a_whole_siglip(tmp_path, plain):
    names = ("vision_model.head.probe", "text_model.head.weight", "text_model.encoder.layers.0.mlp.fc1.weight",
             "text_model.final_layer_norm.weight", "text_model.encoder.layers.0.self_attn.q_proj.weight",
             "logit_scale", "logit_bias")  # fmt: skip
    save_file(load_file(plain["vision"]) | {name: torch.ones(1) for name in names}, tmp_path / "x.safetensors")
    assert torch.equal(output(tmp_path / "x.safetensors", "vision"), expected(plain["vision"], "vision"))


def test_a_file_that_is_something_else_is_refused_with_what_lies_beside_it(plain):
    with pytest.raises(MismatchError, match=r"redux\.safetensors is .*; of your files these fit: vision\.safetensors$"):
        open_vision(plain["redux"], CPU)
    with pytest.raises(MismatchError, match=r"vision\.safetensors is .*; of your files these fit: redux\.safetensors$"):
        open_redux(plain["vision"], CPU)


def test_a_lost_tensor_of_a_tower_is_named(tmp_path, plain):
    tensors = load_file(plain["vision"])
    del tensors["vision_model.encoder.layers.2.mlp.fc1.bias"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match=r"lacks tensors: vision_model\.encoder\.layers\.2\.mlp\.fc1\.bias"):
        open_vision(tmp_path / "x.safetensors", CPU)


@pytest.mark.parametrize(
    ("kind", "spec", "layout"), [("vision", SIGLIP_MINI, "siglip-hf"), ("redux", REDUX_MINI, "redux-bfl")]
)
def test_what_they_are_is_told_from_the_header(plain, kind, spec, layout):
    (part,) = describe(plain[kind])["parts"]
    assert (part["kind"], part["variant"], part["layout"]) == (kind, spec.name, layout)
    assert (part["runs"], part["fault"], part["notes"]) == (True, None, [])
    assert part["spec"]["name"] == spec.name
