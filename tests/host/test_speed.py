"""Compiled blocks and the host's choice of attention, inside a host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from client import Host, find_comfyui, prepare, serve
from graph import node, our_sampler, start
from safetensors.torch import save_file

CLOSE = 1e-3  # of the latent's spread: rounding, over three steps
MATTERS = 1e-2
KINDS = 2  # of blocks


def compared(host: Host, a: dict, b: dict, **more: dict) -> dict:
    prompt = {**start(), **more, "a": a, "b": b, "compare": node("ProbeCompare", a=["a", 0], b=["b", 0])}
    report = host.succeed(prompt).report()
    return {"close": report["largest"] < CLOSE * report["spread"], **report}


def graphs(host: Host, **more: dict) -> int:
    """Compiled by the host's process, after a run or without one."""
    sample = node("EmptySD3LatentImage", width=16, height=16, batch_size=1)
    return host.succeed({"sample": sample, **more, "graphs": node("ProbeGraphs", a=["sample", 0])}).report()["graphs"]


@pytest.fixture(scope="module")
def lora(host: Host) -> str:
    name, generator = "diffusion_model.single_blocks.0.linear1", torch.Generator().manual_seed(1)
    tensors = {
        f"{name}.lora_A.weight": torch.randn(4, 256, generator=generator),
        f"{name}.lora_B.weight": torch.randn(1792, 4, generator=generator),
    }
    save_file(tensors, host.base / "models" / "loras" / "speed.safetensors")
    return "speed.safetensors"


def test_compiled_blocks_draw_the_same_and_are_compiled_once_for_all_that_changes(host: Host, lora: str) -> None:
    before = graphs(host)
    compiled = {"compiled": node("FluxFoundryCompile", model=["load", 0], dynamic=True)}
    assert compared(host, our_sampler("compiled", steps=3), our_sampler(steps=3), **compiled)["close"]
    assert graphs(host) == before + KINDS
    for n, strength in enumerate((0.5, 1.0)):
        more = {
            **compiled,
            "lora": node("LoraLoaderModelOnly", model=["load", 0], lora_name=lora, strength_model=strength),
            "compiled": node("FluxFoundryCompile", model=["lora", 0], dynamic=True),
            "encode": node("CLIPTextEncode", clip=["load", 1], text=("a red star", "two green squares on black")[n]),
            "empty": node("EmptySD3LatentImage", width=128, height=128 - 32 * n, batch_size=1),
        }
        settings = {"steps": 3, "seed": 40 + n}
        report = compared(host, our_sampler("compiled", **settings), our_sampler("lora", **settings), **more)
        assert report["close"]
        more["lora"] = node("LoraLoaderModelOnly", model=["load", 0], lora_name=lora, strength_model=0.0)
        report = compared(host, our_sampler("compiled", **settings), our_sampler("load", **settings), **more)
        assert report["close"]
    assert graphs(host) == before + KINDS


@pytest.mark.parametrize("what", ["control", "attention patches", "other attention", "input patch", "rope options"])
def test_patches_of_other_nodes_do_the_same_to_compiled_blocks(host: Host, what: str) -> None:
    more = {
        "other": node("ProbeModel", model=["load", 0], what=what),
        "compiled": node("FluxFoundryCompile", model=["other", 0], dynamic=True),
    }
    assert compared(host, our_sampler("compiled", steps=3), our_sampler("other", steps=3), **more)["close"]


@pytest.mark.parametrize("memory", ["auto", "save"])
def test_packed_and_streamed_weights_are_compiled_too(host: Host, memory: str) -> None:
    more = {
        "packed": node("FluxFoundryLoadModel", model="embedded: flux1-mini-redux", dtype="auto", memory=memory),
        "compiled": node("FluxFoundryCompile", model=["packed", 0], dynamic=True),
    }
    assert compared(host, our_sampler("compiled", steps=3), our_sampler("packed", steps=3), **more)["close"]


def test_a_model_of_another_loader_is_refused_with_the_way_out(host: Host) -> None:
    prompt = {
        **start(),
        "core": node("UNETLoader", unet_name="flux1-mini.safetensors", weight_dtype="default"),
        "compiled": node("FluxFoundryCompile", model=["core", 0], dynamic=True),
        "sample": our_sampler("compiled", steps=1),
        "out": node("ProbeCompare", a=["sample", 0], b=["sample", 0]),
    }
    outcome = host.run(prompt)
    assert "load it with Load FLUX Model, or compile it with ComfyUI's own TorchCompileModel" in outcome.error


def test_the_cores_node_compiles_our_model_as_a_whole(host: Host) -> None:
    compiled = {"compiled": node("TorchCompileModel", model=["load", 0], backend="inductor")}
    assert compared(host, our_sampler("compiled", steps=3), our_sampler(steps=3), **compiled)["close"]


FLAG = "--use-split-cross-attention"


@pytest.fixture(scope="module")
def started_otherwise(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host that the user started with a flag for attention."""
    comfyui = find_comfyui()
    assert comfyui is not None
    base = tmp_path_factory.mktemp("comfyui-attention")
    prepare(base)
    with serve(comfyui, base, FLAG) as running:
        yield running


def test_attention_is_the_engines_unless_the_host_was_started_with_another(host: Host, started_otherwise: Host) -> None:
    lines = {
        host: "attention on cpu by sdpa (torch's, by its own choice): nothing else is faster here of what is exact",
        started_otherwise: f"attention on cpu by comfyui (the host's, by {FLAG}): the host was started so",
    }
    for own, line in lines.items():
        core = {"core": node("UNETLoader", unet_name="flux1-mini.safetensors", weight_dtype="default")}
        assert compared(own, our_sampler(steps=2), our_sampler("core", steps=2), **core)["close"]
        assert line in (own.base / "log.txt").read_text()
