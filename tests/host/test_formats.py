"""Files of every storage format and layout in the host: what comes out, what they take, and LoRA on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from client import Host, Prompt
from graph import node, our_sampler, start
from pictures import PROMPT
from safetensors.torch import load_file, save_file

from flux.mini.files import MINI
from flux.models.flux1 import Conditions
from flux.models.positions import image_ids, text_ids
from flux.pipelines.parts import open_transformer
from flux.pipelines.prompts import open_text_encoders
from flux.sampling.packing import pack, token_grid, unpack
from flux.weights.sources import open_checkpoint
from tests.oracles import flux1_to_diffusers
from tests.stored import suffix_of, write_stored

CPU = torch.device("cpu")
PACKED = (
    "fp8", "fp8 old keys", "fp8 plain", "fp8 diffusers", "fp8-row", "nvfp4", "mxfp8", "int8-row", "nf4", "gguf:Q8_0",
    "gguf:Q4_K",
)  # fmt: skip
LAYOUTS = ("diffusers", "diffusers sharded", "all-in-one")
TOLERANCE = 1e-4  # of the spread: both sides compute in fp32 and sum in another order


def numbers_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def write(host: Host, kind: str) -> tuple[str, Path]:
    """The embedded transformer in another format: its name in our loader, and the file."""
    folder = host.base / "models" / "diffusion_models"
    name = f"{kind.replace(':', ' ')}{suffix_of(kind)}"
    path = folder / name
    tensors = numbers_of(MINI.transformer)
    if kind in LAYOUTS:
        return write_layout(host, kind, tensors)
    if path.exists():
        return name, path
    if kind == "fp8 old keys":
        stored = {}
        for key, tensor in tensors.items():
            if tensor.dim() == 2:
                scale = tensor.abs().max() / 448
                stored[key] = (tensor / scale).to(torch.float8_e4m3fn)
                stored[key.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
            else:
                stored[key] = tensor
        save_file({**stored, "scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}, path)
    elif kind == "fp8 diffusers":  # of which a layer of ours takes several tensors, each with a scale of its own
        write_stored(path, flux1_to_diffusers(tensors), "fp8")
    elif kind == "fp8 plain":
        save_file({key: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for key, t in tensors.items()}, path)
    else:
        write_stored(path, tensors, kind)
    return name, path


def write_layout(host: Host, kind: str, tensors: dict[str, torch.Tensor]) -> tuple[str, Path]:
    models = host.base / "models"
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    if kind == "all-in-one":
        path = models / "checkpoints" / "all.safetensors"
        parts = {f"model.diffusion_model.{name}": tensor for name, tensor in halves.items()}
        parts |= {f"vae.{name}": tensor for name, tensor in load_file(MINI.autoencoder).items()}
        parts |= {f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in load_file(MINI.clip).items()}
        parts |= {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in load_file(MINI.t5).items()}
        save_file(parts, path)
        return "checkpoints: all.safetensors", path
    theirs = {name: tensor.contiguous() for name, tensor in flux1_to_diffusers(halves).items()}
    if kind == "diffusers":
        save_file(theirs, models / "diffusion_models" / "diffusers.safetensors")
        return "diffusers.safetensors", models / "diffusion_models" / "diffusers.safetensors"
    folder = models / "diffusion_models" / "sharded"
    folder.mkdir(exist_ok=True)
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(theirs)}
    for file in set(places.values()):
        save_file({name: theirs[name] for name, place in places.items() if place == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return str(index.relative_to(folder.parent)), index


def velocities(host: Host, model: Prompt, **settings: str) -> dict[str, torch.Tensor]:
    """What ProbeVelocity reports of the node "model"."""
    probe = node("ProbeVelocity", model=["model", 0], **{"way": "whole", "lora": "", **settings})
    report = host.succeed({**model, "out": probe}).report()
    return {name: torch.tensor(numbers) for name, numbers in report.items()}


def is_modulation(name: str) -> bool:
    """In Black Forest Labs' names or diffusers'."""
    return any(
        part in name
        for part in (
            "_mod.lin.",
            ".modulation.lin.",
            "adaLN_modulation.",
            ".norm.linear.",
            ".norm1.linear",
            ".norm1_context.",
            "norm_out.linear.",
        )
    )


def load(name: str, **settings: str) -> Prompt:
    return {"model": node("FluxFoundryLoadModel", model=name, **{"dtype": "auto", **settings})}


def engine_velocity(path: Path) -> torch.Tensor:
    """The engine's own velocity for ProbeVelocity's inputs."""
    generator = torch.Generator().manual_seed(3)
    x, tokens, pooled = (torch.randn(shape, generator=generator) for shape in ((1, 16, 8, 8), (1, 32, 192), (1, 128)))
    conditions = Conditions(tokens, text_ids(32, CPU), image_ids(*token_grid(8, 8), CPU))
    part = open_transformer(path, CPU, torch.float32)
    with part.resident() as network, torch.inference_mode():
        modulations = network.modulate(network.embed(torch.tensor([0.7]), pooled, torch.tensor([3.0])))
        return unpack(network(pack(x), conditions, modulations), 8, 8).flatten()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() < TOLERANCE * expected.std()


@pytest.mark.parametrize("kind", [*PACKED, *LAYOUTS])
def test_a_model_of_any_format_gives_the_engines_velocity(host: Host, kind: str) -> None:
    name, path = write(host, kind)
    assert_close(velocities(host, load(name))["whole"], engine_velocity(path))


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_take_what_they_take_in_the_file(host: Host, kind: str) -> None:
    name, path = write(host, kind)
    report = host.succeed({**load(name), "out": node("ProbeMemory", model=["model", 0])}).report()
    assert report["patcher"] == "FoundryPatcher"
    assert report["parameters"] == open_checkpoint(path).nbytes
    modulations = sum(source.nbytes for name, source in open_checkpoint(path).items() if is_modulation(name))
    assert report["size"] == report["parameters"] - modulations


def test_an_asked_for_dtype_unpacks_when_it_is_loaded(host: Host) -> None:
    name, path = write(host, "gguf:Q4_K")
    report = host.succeed({**load(name, dtype="bf16"), "out": node("ProbeMemory", model=["model", 0])}).report()
    assert report["dtypes"] == ["torch.bfloat16"]
    assert report["parameters"] == 2 * sum(t.numel() for t in load_file(MINI.transformer).values())
    assert_close(velocities(host, load(name, dtype="fp32"))["whole"], engine_velocity(path))


@pytest.fixture(scope="module")
def lora(host: Host) -> str:
    """A LoRA in three naming styles, on a fused matrix, on a slice of one, and on a bias."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return 0.05 * torch.randn(shape, generator=generator)

    tensors = {
        "lora_unet_single_blocks_0_linear1.lora_down.weight": draw(4, 256),
        "lora_unet_single_blocks_0_linear1.lora_up.weight": draw(1792, 4),
        "transformer.transformer_blocks.0.attn.to_k.lora_A.weight": draw(4, 256),
        "transformer.transformer_blocks.0.attn.to_k.lora_B.weight": draw(256, 4),
        "diffusion_model.single_blocks.2.modulation.lin.lora_A.weight": draw(4, 256),
        "diffusion_model.single_blocks.2.modulation.lin.lora_B.weight": draw(768, 4),
        "diffusion_model.single_blocks.1.linear1.diff_b": draw(1792),
    }
    save_file(tensors, host.base / "models" / "loras" / "packed.safetensors")
    return "packed.safetensors"


def with_lora(name: str, lora: str, **settings: str) -> Prompt:
    loaded = {"loaded": load(name, **settings)["model"]}
    return {**loaded, "model": node("LoraLoaderModelOnly", model=["loaded", 0], lora_name=lora, strength_model=0.7)}


@pytest.mark.parametrize("kind", PACKED)
def test_a_lora_acts_on_packed_weights_as_on_their_numbers_and_goes_without_trace(
    host: Host, lora: str, kind: str
) -> None:
    name, _ = write(host, kind)
    plain = velocities(host, load(name))["whole"]
    packed = velocities(host, with_lora(name, lora))["whole"]
    unpacked = velocities(host, with_lora(name, lora, dtype="fp32"))["whole"]
    assert_close(packed, unpacked)
    assert (packed - plain).abs().max() > 0.01 * plain.std()
    # Another path than the first, or the host would give the cached result.
    assert torch.equal(velocities(host, load(name), way="merged", lora="again")["whole"], plain)
    assert torch.equal(velocities(host, load(name), lora="again")["whole"], plain)


@pytest.mark.parametrize("kind", ["fp8", "gguf:Q4_K", "nf4"])
def test_packed_weights_that_are_loaded_in_part_give_the_same_bits(host: Host, lora: str, kind: str) -> None:
    name, _ = write(host, kind)
    for model in (load(name), with_lora(name, lora)):
        expected = velocities(host, model)["whole"]
        parts = velocities(host, model, way="partly")
        assert all(torch.equal(found, expected) for found in parts.values())
        assert torch.equal(velocities(host, model, lora="after")["whole"], expected)


@pytest.mark.parametrize("kind", ["fp8", "gguf:Q4_K"])
def test_a_lora_as_a_hook_acts_on_packed_weights_and_goes_without_trace(host: Host, lora: str, kind: str) -> None:
    name, _ = write(host, kind)
    plain = velocities(host, load(name))["whole"]
    packed = velocities(host, load(name), way="hooked", lora=lora)
    unpacked = velocities(host, load(name, dtype="fp32"), way="hooked", lora=lora)
    for what, found in packed.items():
        if what.startswith("plain"):
            assert torch.equal(found, plain), what
        else:
            assert_close(found, unpacked[what])
            assert (found - plain).abs().max() > 0.01 * plain.std()


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_packed_weights_come_back_from_a_device_as_views_of_the_file(host: Host, kind: str) -> None:
    name, _ = write(host, kind)
    assert torch.equal(velocities(host, load(name), way="moved")["whole"], velocities(host, load(name))["whole"])


def test_a_packed_model_is_loaded_again_as_the_host_is_told(host: Host) -> None:
    name, _ = write(host, "gguf:Q8_0")
    again = velocities(host, load(name), way="reloaded")["whole"]
    assert torch.equal(again, velocities(host, load(name))["whole"])


@pytest.mark.parametrize("kind", ["fp8", "gguf:Q4_K"])
def test_tables_of_packed_modulations_give_the_same_bits_as_the_direct_run(host: Host, kind: str) -> None:
    name, _ = write(host, kind)
    prompt = {
        **start(),
        **load(name),
        "direct": node("ProbeModel", model=["model", 0], what="direct"),
        "a": our_sampler("model", steps=3),
        "b": our_sampler("direct", steps=3),
        "compare": node("ProbeCompare", a=["a", 0], b=["b", 0]),
    }
    assert host.succeed(prompt).report()["equal"]


def test_the_cores_save_nodes_are_refused_with_what_to_do(host: Host) -> None:
    name, _ = write(host, "gguf:Q8_0")
    prompt = {**load(name), "save": node("ModelSave", model=["model", 0], filename_prefix="model")}
    outcome = host.run(prompt)
    assert "load it with dtype bf16" in outcome.error


@pytest.mark.parametrize(("clip_kind", "t5_kind"), [("fp8", "gguf:Q8_0"), ("bf16", "fp8"), ("gguf:F16", "nf4")])
def test_packed_text_encoders_give_the_engines_text(host: Host, clip_kind: str, t5_kind: str) -> None:
    folder = host.base / "models" / "text_encoders"
    paths = {}
    for part, kind, source in (("clip", clip_kind, MINI.clip), ("t5", t5_kind, MINI.t5)):
        path = folder / f"{part} {kind.replace(':', ' ')}{suffix_of(kind)}"
        paths[part] = write_stored(path, numbers_of(source), kind)
    prompt = {
        "clip": node("FluxFoundryLoadTextEncoders", clip_l=paths["clip"].name, t5=paths["t5"].name, t5_length="512"),
        "text": node("CLIPTextEncode", clip=["clip", 0], text=PROMPT),
        "out": node("ProbeText", text=["text", 0]),
    }
    report = host.succeed(prompt).report()
    encoders = open_text_encoders(paths["clip"], paths["t5"], MINI.tokenizer, MINI.tokenizer, CPU, torch.float32)
    [expected] = encoders.encode_all([(PROMPT, None)], length=32)
    assert_close(torch.tensor(report["tokens"]), expected.tokens.flatten())
    assert_close(torch.tensor(report["pooled"]), expected.pooled.flatten())
    memory = host.succeed({"clip": prompt["clip"], "out": node("ProbeMemory", clip=["clip", 0])}).report()
    assert memory["patcher"] == "FoundryPatcher"


def test_an_autoencoder_in_gguf_and_in_a_checkpoint_decodes_as_the_plain_file(host: Host) -> None:
    write(host, "all-in-one")
    write_stored(host.base / "models" / "vae" / "ae.gguf", numbers_of(MINI.autoencoder), "gguf:F16")
    prompt = {**start(), "sample": our_sampler(steps=1)}
    pictures = []
    for number, name in enumerate(("embedded: flux1-mini-ae", "ae.gguf", "checkpoints: all.safetensors")):
        prompt[f"vae {number}"] = node("FluxFoundryLoadAutoencoder", vae=name)
        prompt[f"decode {number}"] = node("VAEDecode", vae=[f"vae {number}", 0], samples=["sample", 0])
        prompt[f"save {number}"] = node("SaveImage", images=[f"decode {number}", 0], filename_prefix="test")
    pictures = host.pictures(prompt)
    assert len(pictures) == 3
    assert pictures[0] == pictures[1] == pictures[2]


def test_all_three_loaders_take_one_checkpoint(host: Host) -> None:
    name, _ = write(host, "all-in-one")
    apart = {
        **load(name),
        "clip": node("FluxFoundryLoadTextEncoders", clip_l=name, t5=name, t5_length="512"),
        "encode 2": node("CLIPTextEncode", clip=["clip", 0], text=PROMPT),
        "text 2": node("FluxGuidance", conditioning=["encode 2", 0], guidance=3.0),
        "a": our_sampler(steps=2),
        "b": our_sampler("model", steps=2, positive=["text 2", 0]),
        "compare": node("ProbeCompare", a=["a", 0], b=["b", 0]),
    }
    assert host.succeed({**start(), **apart}).report()["equal"]


def test_a_variant_that_the_tensors_contradict_is_refused(host: Host) -> None:
    name, _ = write(host, "gguf:Q8_0")
    probe = node("ProbeMemory", model=["model", 0])
    outcome = host.run({**load(name, variant="flux1-krea-dev"), "out": probe})
    assert outcome.status == "error"
    assert name in outcome.error
    assert "Krea" in outcome.error


def test_lists_and_tooltips_tell_of_every_file(host: Host) -> None:
    names = [write(host, kind)[0] for kind in ("gguf:Q4_K", "diffusers sharded", "all-in-one")]
    kind, options = host.get_json("/object_info/FluxFoundryLoadModel")["FluxFoundryLoadModel"]["input"]["required"][
        "model"
    ]
    choices = kind if isinstance(kind, list) else options["options"]
    assert set(names) <= set(choices)
    assert not [name for name in choices if "of-00002" in name]
    assert f"{names[0]}: Foundry Mini diffusion model, GGUF Q4_K" in options["tooltip"].splitlines()


def test_a_file_is_inspected_in_the_graph(host: Host) -> None:
    write(host, "all-in-one")
    prompt = {"inspect": node("FluxFoundryInspectFile", file="checkpoints: all.safetensors")}
    [shown] = host.succeed(prompt).outputs["inspect"]["text"]
    assert shown.splitlines()[0] == "all.safetensors"
    assert "Foundry Mini diffusion model" in shown
    assert "T5 text encoder" in shown
