"""Save FLUX Model in the host: files that are the command line's bit for bit, LoRA merged, nothing replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from client import Host, Prompt
from graph import node, our_sampler, start
from safetensors.torch import load_file, save_file

from flux.mini.files import MINI
from flux.weights.convert import convert
from flux.weights.sources import open_checkpoint

LAYER = "single_blocks.0.linear1"
RANK = 4


def saved(host: Host, load: Prompt, model: str = "load", **settings: str) -> tuple[Path, str]:
    """What the node wrote, and what it said."""
    given = {"filename_prefix": "diffusion_models/saved", "format": "bf16", "layout": "bfl", **settings}
    outcome = host.succeed({**load, "save": node("FluxFoundrySaveModel", model=[model, 0], **given)})
    [text] = [out["text"] for out in outcome.outputs.values() if "text" in out]
    said = text if isinstance(text, str) else text[0]
    return host.base / "output" / "diffusion_models" / said.splitlines()[0], said


def loaded(name: str, dtype: str = "auto") -> Prompt:
    return {"load": node("FluxFoundryLoadModel", model=name, dtype=dtype)}


def lora(host: Host) -> tuple[Prompt, torch.Tensor]:
    """A LoRA on a layer at half strength, and what it adds to the weight."""
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(RANK, 256, generator=generator), torch.randn(1792, RANK, generator=generator) * 0.05
    name = f"diffusion_model.{LAYER}"
    path = host.base / "models" / "loras" / "s.safetensors"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    prompt = node("LoraLoaderModelOnly", model=["load", 0], lora_name="s.safetensors", strength_model=0.5)
    return {"lora": prompt}, 0.5 * up @ down


@pytest.mark.parametrize(
    ("form", "layout"), [("bf16", "bfl"), ("fp8", "bfl"), ("bf16", "diffusers"), ("gguf:Q8_0", "bfl"), ("nf4", "bfl")]
)
def test_a_model_is_saved_as_the_command_line_converts_it(host: Host, tmp_path: Path, form: str, layout: str) -> None:
    path, said = saved(host, loaded("embedded: flux1-mini", "bf16"), format=form, layout=layout)
    assert "Foundry Mini: " in said
    expected = tmp_path / f"expected{path.suffix}"
    convert(MINI.transformer, expected, f"{form},{layout}" if layout == "diffusers" else form)
    ours, theirs = open_checkpoint(path), open_checkpoint(expected)
    assert sorted(ours) == sorted(theirs)
    for name, source in ours.items():
        assert source.format.name == theirs[name].format.name
        assert torch.equal(source.numbers(torch.float32), theirs[name].numbers(torch.float32)), name


def test_nothing_is_replaced(host: Host) -> None:
    first, _ = saved(host, loaded("embedded: flux1-mini"), filename_prefix="diffusion_models/same", format="bf16")
    second, _ = saved(host, loaded("embedded: flux1-mini"), filename_prefix="diffusion_models/same", format="fp16")
    assert first.name == "same_00001_.safetensors"
    assert second.name == "same_00002_.safetensors"


@pytest.mark.parametrize("sampled_before", [False, True])
def test_a_lora_is_merged_into_its_weight_and_into_no_other(host: Host, sampled_before: bool) -> None:
    prompt, added = lora(host)
    load = {**start(), **prompt} if sampled_before else {**loaded("embedded: flux1-mini", "fp32"), **prompt}
    if sampled_before:  # the host has merged it in place by then
        sample = our_sampler("lora", steps=1)
        host.succeed({**load, "sample": sample, "out": node("ProbeCompare", a=["sample", 0], b=["sample", 0])})
    path, said = saved(host, load, "lora", format="fp32")
    assert "patches merged into 1 weights" in said
    before, after = load_file(MINI.transformer), load_file(path)
    for name, tensor in before.items():
        expected = tensor.float() + (added if name == f"{LAYER}.weight" else 0)
        assert torch.allclose(after[name], expected, atol=1e-5), name


def test_a_packed_model_is_saved_as_it_is_bit_for_bit(host: Host) -> None:
    packed = host.base / "models" / "diffusion_models" / "to-save.safetensors"
    convert(MINI.transformer, packed, "fp8", replace=True)
    path, said = saved(host, loaded(packed.name), format="as it is")
    assert "fp8_e4m3fn scaled" in said
    before, after = load_file(packed), load_file(path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        stored = after[name]
        assert torch.equal(stored.float(), tensor.float()), name


def test_a_lora_on_a_packed_model_is_merged_into_what_it_was(host: Host) -> None:
    packed = host.base / "models" / "diffusion_models" / "to-save.safetensors"
    convert(MINI.transformer, packed, "fp8", replace=True)
    prompt, added = lora(host)
    path, _ = saved(host, {**loaded(packed.name), **prompt}, "lora", format="fp32")
    base = open_checkpoint(packed)[f"{LAYER}.weight"].numbers(torch.float32)
    assert torch.allclose(load_file(path)[f"{LAYER}.weight"], base + added, atol=1e-5)


def test_the_cores_flux_model_is_saved_too(host: Host) -> None:
    core = {"load": node("UNETLoader", unet_name="flux1-mini.safetensors", weight_dtype="default")}
    path, _ = saved(host, core, format="fp32")
    before, after = load_file(MINI.transformer), load_file(path)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor.float()) for name, tensor in before.items())


def test_what_was_saved_is_loaded_again(host: Host) -> None:
    path, _ = saved(host, loaded("embedded: flux1-mini"), format="gguf:Q8_0")
    target = host.base / "models" / "diffusion_models" / "back.gguf"
    target.write_bytes(path.read_bytes())
    again = {**start(), "back": node("FluxFoundryLoadModel", model="back.gguf", dtype="auto")}
    compare = node("ProbeCompare", a=["a", 0], b=["b", 0])
    prompt = {**again, "a": our_sampler("back", steps=2), "b": our_sampler(steps=2), "compare": compare}
    report = host.succeed(prompt).report()
    assert 0 < report["largest"] < 0.5 * report["spread"]


@pytest.mark.parametrize("prefix", ["../outside", "/tmp/outside", "a/../../outside"])
def test_a_file_never_leaves_the_output_folder(host: Host, prefix: str) -> None:
    given = {"filename_prefix": prefix, "format": "bf16", "layout": "bfl"}
    save = node("FluxFoundrySaveModel", model=["load", 0], **given)
    outcome = host.run({**loaded("embedded: flux1-mini"), "save": save})
    assert outcome.status == "error"
    assert "leads out of ComfyUI's output folder; keep it inside" in outcome.error
