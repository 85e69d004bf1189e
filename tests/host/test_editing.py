"""Painting into pictures and following them, through a real ComfyUI.

Kept pixels are exact, and Fill and Control are the core's own nodes where both can do it. Models have random weights,
loaded by the core, so that nothing of ours is needed to understand what our nodes give.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from client import Host, Outcome, Prompt, find_comfyui, prepare, serve
from graph import node, our_sampler, start
from pictures import pixels
from PIL import Image
from safetensors.torch import save_file

from flux.models.flux1 import Flux1
from flux.preprocess.canny import canny
from flux.preprocess.depth import normalise_depth, open_depth
from flux.specs.flux1 import CANNY_MINI, FILL_MINI, Flux1Spec
from tests.tiny import write_module

HEIGHT, WIDTH = 150, 210
RELATIVE = 1e-5
LEVEL = 1.5 / 255  # a saved picture's levels are cut, not rounded


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A ComfyUI with the pack, random Fill and Canny models, a depth model, and pictures to work on."""
    comfyui = find_comfyui()
    assert comfyui is not None
    base = tmp_path_factory.mktemp("comfyui-editing")
    prepare(base)
    for name, spec in (("fill", FILL_MINI), ("canny", CANNY_MINI)):
        write_random(base / "models" / "diffusion_models" / f"{name}.safetensors", spec)
    generator = np.random.default_rng(3)
    noise = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    blocks = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((128, 128), 0)
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[40:90, 100:150] = 255
    mask[60:70, 150:170] = 90  # soft
    soft = np.asarray(Image.fromarray(mask).resize((128, 128), Image.Resampling.BILINEAR))
    for name, picture in {"noise": noise, "blocks": np.asarray(blocks), "mask": mask, "soft": soft}.items():
        Image.fromarray(picture).save(base / "input" / f"{name}.png")
    with serve(comfyui, base) as running:
        yield running


def write_random(path: Path, spec: Flux1Spec) -> None:
    write_module(path, Flux1(spec), 6)


def loaded(name: str) -> np.ndarray:
    """An input picture (H, W, 3)."""
    return np.asarray(Image.open(name).convert("RGB"))


def with_pictures(**more: dict) -> Prompt:
    return {
        **start(),
        "noise": node("LoadImage", image="noise.png"),
        "blocks": node("LoadImage", image="blocks.png"),
        "mask": node("LoadImageMask", image="mask.png", channel="red"),
        "soft": node("LoadImageMask", image="soft.png", channel="red"),
        "fill model": node("UNETLoader", unet_name="fill.safetensors", weight_dtype="default"),
        "canny model": node("UNETLoader", unet_name="canny.safetensors", weight_dtype="default"),
        **more,
    }


def inpaint_crop(**changes: object) -> dict:
    settings = {"side": 128, "context": 1.5, "min_context": 16, "grow": 0, "blur": 0.0, "fill_holes": False,
                "invert": False, "multiple": 16}  # fmt: skip
    return node("FluxFoundryInpaintCrop", image=["noise", 0], mask=["mask", 0], **{**settings, **changes})


def outpaint(**changes: object) -> dict:
    settings = {"left": 0, "right": 0, "top": 0, "bottom": 0, "aspect": "off", "anchor": "center", "feather": 0,
                "fill": "grey"}  # fmt: skip
    return node("FluxFoundryOutpaint", image=["blocks", 0], **{**settings, **changes})


def fill(image: list, mask: list, positive: str = "text", **changes: object) -> dict:
    settings = {"strength": 1.0, "start": 0.0, "end": 1.0, "rounding": "soft", "noise_mask": False}
    wires = {"positive": [positive, 0], "vae": ["load", 2], "image": image, "mask": mask}
    return node("FluxFoundryFill", **{**wires, **settings, **changes})


def control(image: str = "blocks", positive: str = "text", **changes: object) -> dict:
    settings = {"kind": "image", "low": 50.0, "high": 200.0, "automatic": False, "fit": "stretch", "strength": 1.0,
                "start": 0.0, "end": 1.0, "slot": 1}  # fmt: skip
    wires = {"positive": [positive, 0], "vae": ["load", 2], "image": [image, 0]}
    return node("FluxFoundryControl", **{**wires, **settings, **changes})


def saved(image: list) -> dict:
    return node("SaveImage", images=image, filename_prefix="test")


def pictures_of(host: Host, outcome: Outcome, *names: str) -> list[np.ndarray]:
    """What nodes saved or showed (H, W, 3), one each."""
    return [pixels(png) for png in host.pictures_of(outcome, *names)]


def apart(host: Host, prompt: Prompt, a: str, b: str, slots: tuple[int, int] = (0, 0)) -> float:
    """How far two latents lie apart, by the first one's spread."""
    report = host.succeed({**prompt, "out": node("ProbeCompare", a=[a, slots[0]], b=[b, slots[1]])}).report()
    return report["largest"] / report["spread"]


# Painting into a picture and around it.


@pytest.mark.parametrize("changes", [{}, {"grow": 6, "blur": 3.0, "fill_holes": True}, {"side": 0, "context": 1.0}])
def test_what_the_mask_keeps_leaves_the_graph_bit_for_bit_as_it_came_in(host: Host, changes: dict) -> None:
    prompt = with_pictures(
        crop=inpaint_crop(**changes),
        fill=fill(["crop", 0], ["crop", 1]),
        sample=our_sampler("fill model", steps=2, positive=["fill", 0], latent=["fill", 2]),
        painted=node("FluxFoundryDecode", vae=["load", 2], latent=["sample", 0]),
        whole=node("FluxFoundryStitch", image=["painted", 0], crop=["crop", 2], colour_match=0.5),
        grown=node("GrowMask", mask=["mask", 0], expand=changes.get("grow", 0), tapered_corners=False),
        seen=node("MaskToImage", mask=["grown", 0]),
        out=saved(["whole", 0]),
        out_mask=saved(["seen", 0]),
    )
    whole, mask = pictures_of(host, host.succeed(prompt), "out", "out_mask")
    original, kept = loaded(host.base / "input" / "noise.png"), mask[..., 0] == 0
    assert (whole[kept] == original[kept]).all()
    assert (whole[~kept] != original[~kept]).any(axis=-1).mean() > 0.8


def test_what_a_model_sees_of_a_hole_and_of_a_reference_is_shown(host: Host) -> None:
    outcome = host.succeed(
        with_pictures(
            fill=fill(["blocks", 0], ["mask", 0]),
            reference=reference(fit="crop"),
            out=node("PreviewAny", source=["fill", 2]),
            out_reference=node("PreviewAny", source=["reference", 1]),
        )
    )
    holed, seen = pictures_of(host, outcome, "fill", "reference")
    original, hidden = loaded(host.base / "input" / "blocks.png"), (holed == 127).all(axis=-1)
    kept = (holed == original).all(axis=-1)
    assert 0.05 < hidden.mean() < 0.5
    assert 0.9 < kept.mean() + hidden.mean() < 1  # the mask's edges are soft
    noise = loaded(host.base / "input" / "noise.png")
    assert all(side % 16 == 0 for side in seen.shape[:2])
    assert seen.shape[0] <= noise.shape[0]


def test_a_grown_picture_holds_the_original_to_the_bit(host: Host) -> None:
    prompt = with_pictures(
        canvas=outpaint(left=21, bottom=40, feather=8),
        fill=fill(["canvas", 0], ["canvas", 1]),
        sample=our_sampler("fill model", steps=2, positive=["fill", 0], latent=["fill", 2]),
        painted=node("FluxFoundryDecode", vae=["load", 2], latent=["sample", 0]),
        whole=node("FluxFoundryStitch", image=["painted", 0], crop=["canvas", 2], colour_match=1.0),
        out=saved(["whole", 0]),
    )
    [whole] = pictures_of(host, host.succeed(prompt), "out")
    assert whole.shape == (168, 149, 3)
    assert (whole[:128, 21:] == loaded(host.base / "input" / "blocks.png")).all()


def reference(**changes: object) -> dict:
    settings = {"strength": 1.0, "start": 0.0, "end": 1.0, "layout": "auto", "fit": "pad", "max_megapixels": 1.0}
    wires = {"conditioning": ["text", 0], "vae": ["load", 2], "image": ["noise", 0]}
    return node("FluxFoundryReference", **{**wires, **settings, **changes})


def test_a_reference_of_any_size_comes_back_at_its_own(host: Host) -> None:
    prompt = with_pictures(
        reference=reference(),
        padded=node("ImagePadForOutpaint", image=["noise", 0], left=0, top=0, right=14, bottom=10, feathering=0),
        whole=node("FluxFoundryStitch", image=["padded", 0], crop=["reference", 2], colour_match=0.0),
        out=saved(["whole", 0]),
    )
    [whole] = pictures_of(host, host.succeed(prompt), "out")
    assert (whole == loaded(host.base / "input" / "noise.png")).all()


def test_a_reference_that_was_scaled_down_gives_a_result_of_its_own_size(host: Host) -> None:
    prompt = with_pictures(
        reference=reference(max_megapixels=0.01),
        sample=our_sampler(steps=1, positive=["reference", 0], latent=["reference", 1]),
        painted=node("FluxFoundryDecode", vae=["load", 2], latent=["sample", 0]),
        whole=node("FluxFoundryStitch", image=["painted", 0], crop=["reference", 2], colour_match=0.0),
        out=saved(["whole", 0]),
        out_small=saved(["painted", 0]),
    )
    whole, small = pictures_of(host, host.succeed(prompt), "out", "out_small")
    assert small.shape[0] * small.shape[1] < 2 * 0.01 * 1024 * 1024
    assert whole.shape == (HEIGHT, WIDTH, 3)


# Fill beside the core's InpaintModelConditioning.


def theirs(image: str = "blocks", mask: str = "soft", *, noise_mask: bool = False) -> dict:
    wires = {"positive": ["text", 0], "negative": ["text", 0], "vae": ["load", 2], "pixels": [image, 0]}
    return node("InpaintModelConditioning", **wires, mask=[mask, 0], noise_mask=noise_mask)


def filled(name: str, steps: int = 2, slot: int = 0, **changes: object) -> dict:
    """What the core's Fill model makes of a node's outputs."""
    return our_sampler("fill model", steps=steps, positive=[name, slot], latent=[name, 2], **changes)


@pytest.mark.parametrize(("image", "mask"), [("blocks", "soft"), ("noise", "mask")])
@pytest.mark.parametrize("noise_mask", [False, True])
def test_fill_is_the_cores_inpaint_conditioning(host: Host, image: str, mask: str, noise_mask: bool) -> None:
    """With the core's rounding; also of a picture whose sides do not divide by 8, which both cut alike."""
    prompt = with_pictures(
        ours=fill([image, 0], [mask, 0], rounding="hidden", noise_mask=noise_mask),
        theirs=theirs(image, mask, noise_mask=noise_mask),
        none=our_sampler("fill model", steps=2, latent=["theirs", 2]),
        a=filled("ours"),
        b=filled("theirs"),
        negative=filled("ours", slot=1),
    )
    assert apart(host, prompt, "ours", "theirs", (2, 2)) == 0
    assert apart(host, prompt, "a", "b") < RELATIVE
    assert apart(host, prompt, "a", "negative") == 0
    assert apart(host, prompt, "a", "none") > 0.05


def test_the_roundings_of_a_soft_mask_are_three(host: Host) -> None:
    names = ("soft", "hidden", "binary")
    prompt = with_pictures(
        **{f"{name} hole": fill(["blocks", 0], ["soft", 0], rounding=name) for name in names},
        **{f"{name}!": filled(f"{name} hole") for name in names},
    )
    for one, other in itertools.combinations(names, 2):
        assert apart(host, prompt, f"{one}!", f"{other}!") > 1e-3


def test_fill_in_part_is_the_mean_of_with_and_without(host: Host) -> None:
    """In one step, which is linear in the prediction; and for a time. Without is a picture that is all hidden."""
    prompt = with_pictures(
        white=node("SolidMask", value=1.0, width=128, height=128),
        nothing=fill(["blocks", 0], ["white", 0]),
        whole=fill(["blocks", 0], ["soft", 0]),
        part=fill(["blocks", 0], ["soft", 0], strength=0.3),
        more=fill(["blocks", 0], ["soft", 0], strength=1.5),
        off=fill(["blocks", 0], ["soft", 0], strength=0.0),
        late=fill(["blocks", 0], ["soft", 0], start=0.5),
        **{f"{name}!": filled(name, steps=1) for name in ("whole", "part", "more", "off", "late")},
        without=filled("nothing", steps=1),
        blended=node("LatentBlend", samples1=["whole!", 0], samples2=["without", 0], blend_factor=0.3),
        again=node("LatentBlend", samples1=["more!", 0], samples2=["without", 0], blend_factor=2 / 3),
    )
    for one, other in (("part!", "blended"), ("again", "whole!"), ("off!", "without"), ("late!", "without")):
        assert apart(host, prompt, one, other) < 10 * RELATIVE, (one, other)
    assert apart(host, prompt, "whole!", "without") > 0.05


# Control beside the core's InstructPixToPixConditioning.


def followed(name: str, **changes: object) -> dict:
    return our_sampler("canny model", steps=2, positive=[name, 0], latent=[name, 2], **changes)


def test_control_is_the_cores_instruct_pix_to_pix_conditioning(host: Host) -> None:
    wires = {"positive": ["text", 0], "negative": ["text", 0], "vae": ["load", 2], "pixels": ["blocks", 0]}
    prompt = with_pictures(
        ours=control(),
        theirs=node("InstructPixToPixConditioning", **wires),
        a=followed("ours"),
        b=followed("theirs"),
        none=our_sampler("canny model", steps=2),
        plain=our_sampler("canny model", steps=2, latent=["ours", 2]),
    )
    assert apart(host, prompt, "plain", "none") == 0
    assert apart(host, prompt, "a", "b") == 0
    assert apart(host, prompt, "a", "none") > 0.05


def test_the_control_is_shown_and_is_the_engines(host: Host) -> None:
    prompt = with_pictures(
        control=control(kind="canny"),
        alone=node("FluxFoundryCanny", image=["blocks", 0], low=50.0, high=200.0, automatic=False),
        out=saved(["control", 3]),
        out_alone=saved(["alone", 0]),
    )
    outcome = host.succeed(prompt)
    assert all(outcome.outputs[name]["images"][0]["type"] == "temp" for name in ("control", "alone"))
    picture = torch.from_numpy(loaded(host.base / "input" / "blocks.png").copy())[None] / 255
    edges = 255 * canny(picture)[0].numpy()
    assert all((shown == edges).all() for shown in pictures_of(host, outcome, "out", "out_alone"))
    assert 0 < edges.mean() < 255


# A hole and a control together, on our MODEL with a control LoRA.


def control_lora(path: Path) -> str:
    """A control LoRA of random numbers for the embedded model's sizes."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for key, layer in Flux1(CANNY_MINI).named_modules():
        if isinstance(layer, torch.nn.Linear):
            down, up = (
                torch.randn(8, layer.in_features, generator=generator),
                torch.randn(layer.out_features, 8, generator=generator),
            )
            tensors[f"{key}.lora_A.weight"] = 0.3 * down / layer.in_features**0.5
            tensors[f"{key}.lora_B.weight"] = up / 8**0.5
            tensors[f"{key}.lora_B.bias"] = 0.02 * torch.randn(layer.out_features, generator=generator)
        if key.endswith("_norm"):
            tensors[f"{key}.scale"] = 1 + 0.2 * torch.randn(128, generator=generator)
    save_file(tensors, path)
    return path.name


def test_a_hole_and_a_control_lora_act_together_in_any_order(host: Host) -> None:
    name = control_lora(host.base / "models" / "loras" / "edges.safetensors")
    prompt = with_pictures(
        model=node("FluxFoundryLoadModel", model="fill.safetensors", dtype="auto"),
        lora=node("FluxFoundryLoadControlLora", model=["model", 0], lora=name, strength=1.0),
        hole=fill(["blocks", 0], ["soft", 0]),
        edges=control(kind="canny"),
        both=control(positive="hole", kind="canny"),
        reversed=fill(["blocks", 0], ["soft", 0], positive="edges"),
        a=our_sampler("lora", steps=2, positive=["both", 0]),
        b=our_sampler("lora", steps=2, positive=["reversed", 0]),
        alone=our_sampler("lora", steps=2, positive=["hole", 0]),
    )
    assert apart(host, prompt, "a", "b") == 0
    assert apart(host, prompt, "a", "alone") > 1e-2


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_hole_and_a_control_act_together_in_any_order_in_part_and_for_a_time(host: Host, strength: float) -> None:
    """Where there is no hole the control is still in its own place, and never a picture to paint in."""
    name = control_lora(host.base / "models" / "loras" / "edges.safetensors")
    hole = {"strength": strength, "end": 0.6}
    prompt = with_pictures(
        model=node("FluxFoundryLoadModel", model="fill.safetensors", dtype="auto"),
        lora=node("FluxFoundryLoadControlLora", model=["model", 0], lora=name, strength=1.0),
        white=node("SolidMask", value=1.0, width=128, height=128),
        nothing=fill(["blocks", 0], ["white", 0]),
        followed=control(positive="nothing", kind="canny"),
        hole=fill(["blocks", 0], ["soft", 0], **hole),
        edges=control(kind="canny", start=0.3),
        both=control(positive="hole", kind="canny", start=0.3),
        reversed=fill(["blocks", 0], ["soft", 0], positive="edges", **hole),
        off=fill(["blocks", 0], ["soft", 0], strength=0.0),
        controlled=control(positive="off", kind="canny"),
        **{
            f"{name}!": our_sampler("lora", steps=4, positive=[name, 0])
            for name in ("both", "reversed", "hole", "controlled", "followed")
        },
    )
    assert apart(host, prompt, "both!", "reversed!") < RELATIVE
    assert apart(host, prompt, "controlled!", "followed!") == 0
    assert apart(host, prompt, "both!", "hole!") > 1e-2


def test_a_latent_goes_through_a_chain_of_fill_and_control_with_its_noise_mask(host: Host) -> None:
    prompt = with_pictures(
        hole=fill(["blocks", 0], ["soft", 0], noise_mask=True),
        both=control(positive="hole", negative=["hole", 1], latent=["hole", 2]),
        a=our_sampler("fill model", steps=2, positive=["hole", 0], latent=["both", 2]),
        b=our_sampler("fill model", steps=2, positive=["hole", 0], latent=["hole", 2]),
        bare=our_sampler("fill model", steps=2, positive=["hole", 0]),
    )
    assert apart(host, prompt, "a", "b") == 0
    assert apart(host, prompt, "a", "bare") > 1e-2


# Depth.


def test_depth_is_the_folders_model(host: Host, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.flux.preprocess.test_depth import save_model

    missing = host.run(with_pictures(depth=depth("no depth model found"), out=saved(["depth", 0])))
    assert "Depth-Anything-V2-Small-hf into a folder of its own" in missing.error
    made = save_model(tmp_path)
    folder = host.base / "models" / "depth" / "owner" / "tiny"
    shutil.copytree(made, folder)
    listed = host.get_json("/object_info/FluxFoundryDepth")["FluxFoundryDepth"]["input"]["required"]["model"]
    assert "owner/tiny" in json.dumps(listed)
    outcome = host.succeed(with_pictures(depth=depth("owner/tiny"), out=saved(["depth", 0])))
    [shown] = pictures_of(host, outcome, "out")
    picture = torch.from_numpy(loaded(host.base / "input" / "noise.png").copy())[None] / 255
    expected = normalise_depth(open_depth(made).estimate(picture))[0].numpy()
    assert np.abs(shown / 255 - expected).max() < LEVEL
    assert expected.std() > 0.05


def depth(model: str) -> dict:
    return node("FluxFoundryDepth", image=["noise", 0], model=model, normalisation="minmax", invert=False)


# What cannot be.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fill(["blocks", 0], ["black", 0]), "the mask is empty, so there is nothing to repaint"),
        (lambda: fill(["blocks", 0], ["soft", 0], start=0.6, end=0.4), "it starts at 0.6 and ends at 0.4"),
        (lambda: control(kind="canny", low=300.0), "the low threshold (300) is above the high one"),
        (lambda: control(region=["black", 0]), "the region's mask is black everywhere"),
        (lambda: outpaint(), "no side is to grow"),
    ],
)
def test_what_makes_no_sense_is_refused(host: Host, make: Callable[[], dict], words: str) -> None:
    black = node("SolidMask", value=0.0, width=64, height=64)
    wrong = make()
    slot = 0 if wrong["class_type"] == "FluxFoundryOutpaint" else 2
    last = saved(["wrong", 0]) if slot == 0 else node("ProbeCompare", a=["wrong", 2], b=["wrong", 2])
    outcome = host.run(with_pictures(black=black, wrong=wrong, out=last))
    assert outcome.status == "error"
    assert words in outcome.error
