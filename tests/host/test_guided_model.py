"""Guided generation with our MODEL: references, masks, further channels and further models, beside the host's own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from client import Host, Prompt
from graph import core_sampler, node, our_sampler, start
from safetensors.torch import load_file, save_file

from flux.models.flux1 import Flux1
from flux.specs.flux1 import CANNY_MINI, FILL_MINI, KONTEXT_MINI, MINI, Flux1Spec
from tests.stored import suffix_of, write_stored
from tests.tiny import write_module

RELATIVE = 1e-5


@pytest.fixture(scope="module")
def models(host: Host) -> dict:
    """One file of random weights, loaded by us and by the core."""
    return loaded(host, "random", MINI, 5)


def loaded_file(host: Host, name: str) -> Path:
    return host.base / "models" / "diffusion_models" / f"{name}.safetensors"


def loaded(host: Host, name: str, spec: Flux1Spec, seed: int) -> Prompt:
    """A transformer of random weights in the user's folder, as our loader and as the core's has it."""
    path = loaded_file(host, name)
    if not path.exists():
        write_module(path, Flux1(spec), seed)
    return {
        "ours": node("FluxFoundryLoadModel", model=path.name, dtype="auto"),
        "core": node("UNETLoader", unet_name=path.name, weight_dtype="default"),
    }


def compared(host: Host, models: dict, *cases: dict) -> list[dict]:
    parity = node("ProbeParity", a=["ours", 0], b=["core", 0], cases=json.dumps(cases))
    return host.succeed({**models, "parity": parity}).report()


SIZES = ([[8, 8]], [[6, 10], [12, 4]], [[7, 9], [9, 5], [3, 8]])
METHODS = ("offset", "index", "uxo")
ROPE = {"scale_x": 0.5, "shift_x": 1.0, "scale_y": 2.0, "shift_y": 0.5, "scale_t": 1.0, "shift_t": 3.0}
OTHERS = ("replaced_blocks", "watched_attention")


def test_references_give_the_cores_velocity_in_every_layout_at_odd_sizes_and_with_rope_options(
    host: Host, models: dict
) -> None:
    cases = [
        {"references": sizes, "method": method, "size": size, "batch": batch}
        for sizes in SIZES
        for method in METHODS
        for size, batch in (([8, 8], 1), ([7, 5], 2))
    ]
    cases += [{"references": SIZES[2], "method": method, "rope": ROPE} for method in METHODS]
    cases += [{"references": SIZES[1]}]
    for case, found in zip(cases, compared(host, models, *cases), strict=True):
        assert found["error"] < RELATIVE, case
        assert found["effect"] > 1e-2, case


def test_attention_masks_give_the_cores_velocity_with_and_without_patches(host: Host, models: dict) -> None:
    # Which of the core's attentions runs decides what a boolean mask does there; as logarithms it is the same for all.
    kinds = ({"mask": "additive"}, {"mask": "boolean", "for_b": {"mask": "log"}})
    masks = [{**kind, "size": size, "batch": 2} for kind in kinds for size in ([8, 8], [7, 5])]
    patched = [{**masks[0], "patch": patch} for patch in (*OTHERS, "unmasked_blocks")]
    for case, found in zip([*masks, *patched], compared(host, models, *masks, *patched), strict=True):
        assert found["error"] < RELATIVE, case
        assert found["effect"] > 1e-2, case
        assert found["told"] == found["told_other"], case


def test_patches_see_references_as_on_the_cores_model(host: Host, models: dict) -> None:
    cases = [{"references": SIZES[2], "method": "index", "patch": patch} for patch in OTHERS]
    for case, found in zip(cases, compared(host, models, *cases), strict=True):
        assert found["error"] < RELATIVE, case
        assert found["told"] == found["told_other"], case
    assert found["told"][0] == [None, [20, 15, 8]]


def region(size: list[int]) -> list[list[float]]:
    """The left third of a picture, softly bordered by a half."""
    return leaving(size, 0.0)


def leaving(size: list[int], rest: float) -> list[list[float]]:
    """The same, with something of it everywhere."""
    height, width = size
    return [[1.0 if x < width // 3 else 0.5 if x == width // 3 else rest for x in range(width)] for _ in range(height)]


VIEWS = (
    [{"strength": 0.5}],
    [{"strength": 1.7}, {"strength": 1.0}],
    [{"strength": 1.0}, {"strength": 0.3, "region": region([8, 12])}],
    [{"strength": 1.0, "region": region([8, 12])}, {"strength": 0.8, "region": leaving([8, 12], 0.2)}],
)


@pytest.mark.parametrize("patch", [None, *OTHERS])
def test_strength_and_region_of_references_are_a_bias_on_their_keys_for_all_other_queries(
    host: Host, models: dict, patch: str | None
) -> None:
    base = {"size": [8, 12], "references": SIZES[1], "method": "index", **({} if patch is None else {"patch": patch})}
    cases = [{**base, "views": views} for views in VIEWS]
    cases += [{**base, "views": VIEWS[2], "mask": "additive"}]
    for case, found in zip(cases, compared(host, models, *cases), strict=True):
        assert found["error"] < RELATIVE, case
        assert found["effect"] > 1e-3, case


PICTURES = {
    "picture": node("ProbePicture", width=120, height=136, seed=1),
    "encoded": node("VAEEncode", vae=["load", 2], pixels=["picture", 0]),
    "whole": node("SolidMask", value=0.0, width=120, height=136),
    "part": node("SolidMask", value=1.0, width=50, height=136),
    "mask": node("MaskComposite", destination=["whole", 0], source=["part", 0], x=20, y=0, operation="add"),
}
INPAINT = {"positive": ["text", 0], "negative": ["text", 0], "vae": ["load", 2], "pixels": ["picture", 0]}
STYLE = {"conditioning": ["text", 0], "style_model": ["style", 0], "clip_vision_output": ["style", 1]}
OTHER_TEXT = {
    "plain": node("CLIPTextEncode", clip=["load", 1], text="a green star"),
    "other": node("FluxGuidance", conditioning=["plain", 0], guidance=4.0),
    "early": node("ConditioningSetTimestepRange", conditioning=["text", 0], start=0.0, end=0.5),
    "late": node("ConditioningSetTimestepRange", conditioning=["other", 0], start=0.5, end=1.0),
}
CASES: dict[str, tuple[Flux1Spec, Prompt, list, list]] = {
    "InpaintModelConditioning": (
        FILL_MINI, {"guide": node("InpaintModelConditioning", **INPAINT, mask=["mask", 0], noise_mask=False)},
        ["guide", 0], ["guide", 2],
    ),
    "InpaintModelConditioning with a noise mask": (
        FILL_MINI, {"guide": node("InpaintModelConditioning", **INPAINT, mask=["mask", 0], noise_mask=True)},
        ["guide", 0], ["guide", 2],
    ),
    "InpaintModelConditioning without a Fill model": (
        MINI, {"guide": node("InpaintModelConditioning", **INPAINT, mask=["mask", 0], noise_mask=True)},
        ["guide", 0], ["guide", 2],
    ),
    "Fill without a picture": (FILL_MINI, {}, ["text", 0], ["empty", 0]),
    "Fill with a noise mask alone": (
        FILL_MINI, {"masked": node("SetLatentNoiseMask", samples=["encoded", 0], mask=["mask", 0])}, ["text", 0],
        ["masked", 0],
    ),
    "InstructPixToPixConditioning": (
        CANNY_MINI, {"guide": node("InstructPixToPixConditioning", **INPAINT)}, ["guide", 0], ["guide", 2],
    ),
    "StyleModelApply multiply": (
        MINI, {"style": node("ProbeStyle"), "guide": node("StyleModelApply", **STYLE, strength=0.7,
                                                          strength_type="multiply")}, ["guide", 0], ["empty", 0],
    ),
    "StyleModelApply attn_bias": (
        MINI, {"style": node("ProbeStyle"), "guide": node("StyleModelApply", **STYLE, strength=0.4,
                                                          strength_type="attn_bias")}, ["guide", 0], ["empty", 0],
    ),
    "ReferenceLatent": (
        MINI, {"guide": node("ReferenceLatent", conditioning=["text", 0], latent=["encoded", 0])}, ["guide", 0],
        ["empty", 0],
    ),
    "ReferenceLatent twice with a method": (
        MINI, {"one": node("ReferenceLatent", conditioning=["text", 0], latent=["encoded", 0]),
               "two": node("ReferenceLatent", conditioning=["one", 0], latent=["encoded", 0]),
               "guide": node("FluxKontextMultiReferenceLatentMethod", conditioning=["two", 0],
                             reference_latents_method="uxo/uno")}, ["guide", 0], ["empty", 0],
    ),
    "FluxGuidance": (
        MINI, {"guide": node("FluxGuidance", conditioning=["text", 0], guidance=7.0)}, ["guide", 0], ["empty", 0],
    ),
    "ConditioningSetTimestepRange": (
        MINI, {**OTHER_TEXT, "guide": node("ConditioningCombine", conditioning_1=["early", 0],
                                           conditioning_2=["late", 0])}, ["guide", 0], ["empty", 0],
    ),
    "a noise mask": (
        MINI, {"masked": node("SetLatentNoiseMask", samples=["encoded", 0], mask=["mask", 0])}, ["text", 0],
        ["masked", 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_core_nodes_mean_the_same_to_our_sampler_and_model_as_to_the_cores(host: Host, case: str) -> None:
    spec, nodes, positive, latent = CASES[case]
    prompt = {
        **start(), **PICTURES, **nodes, **loaded(host, f"random {spec.task}", spec, 6),
        "sigmas": node("FluxFoundrySchedule", model=["core", 0], steps=3, schedule="simple", denoise=1.0, width=128,
                       height=128, explicit=""),
        "noise": node("RandomNoise", noise_seed=7),
        "solver": node("KSamplerSelect", sampler_name="euler"),
    }  # fmt: skip
    for name in ("ours", "core"):
        model = f"shifted {name}"  # so that a fraction of the run is the same time for both
        prompt[model] = node(
            "ModelSamplingFlux", model=[name, 0], max_shift=1.15, base_shift=0.5, width=128, height=128
        )
        prompt[f"guider {name}"] = node("BasicGuider", model=[model, 0], conditioning=positive)
        prompt[f"core's {name}"] = node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=[f"guider {name}", 0], sampler=["solver", 0],
            sigmas=["sigmas", 0], latent_image=latent,
        )  # fmt: skip
        prompt[f"ours {name}"] = our_sampler(model, positive=positive, latent=latent, sigmas=["sigmas", 0])
    for sampled in ("core's ours", "ours core", "ours ours"):
        compare = {"compare": node("ProbeCompare", a=["core's core", 0], b=[sampled, 0])}
        report = host.succeed({**prompt, **compare}).report()
        assert report["largest"] < 1e-4 * report["spread"], sampled


def log_of(host: Host) -> str:
    return (host.base / "log.txt").read_text()


def said(host: Host, prompt: Prompt, latent: str = "sample") -> str:
    """What a run wrote into the log."""
    before = len(log_of(host))
    host.succeed({**prompt, "out": node("ProbeCompare", a=[latent, 0], b=[latent, 0])})
    return log_of(host)[before:]


def failure(host: Host, prompt: Prompt, latent: str = "sample") -> str:
    outcome = host.run({**prompt, "out": node("ProbeCompare", a=[latent, 0], b=[latent, 0])})
    assert outcome.status == "error"
    return outcome.error


def assert_same(host: Host, prompt: Prompt, one: str, other: str, tolerance: float = 1e-5) -> None:
    compare = {"compare": node("ProbeCompare", a=[one, 0], b=[other, 0])}
    report = host.succeed({**prompt, **compare}).report()
    assert report["largest"] <= tolerance * report["spread"], (one, other)


def assert_differ(host: Host, prompt: Prompt, one: str, other: str) -> None:
    compare = {"compare": node("ProbeCompare", a=[one, 0], b=[other, 0])}
    report = host.succeed({**prompt, **compare}).report()
    assert report["largest"] > 1e-2 * report["spread"], (one, other)


def with_models(host: Host, **specs: Flux1Spec) -> Prompt:
    """Models of random weights, each by its name and by "core" and its name."""
    prompt = {**start(), **PICTURES}
    for name, spec in specs.items():
        both = loaded(host, f"random {spec.task}", spec, 6)
        prompt |= {name: both["ours"], f"core {name}": both["core"]}
    return prompt


GUIDES = {
    "hole": node("InpaintModelConditioning", **INPAINT, mask=["mask", 0], noise_mask=False),
    "edges": node("InstructPixToPixConditioning", **{**INPAINT, "positive": ["other", 0]}),
    **OTHER_TEXT,
}


def combine(one: str, one_text: list, two: str, two_text: list, balance: float) -> dict:
    return node("FluxFoundryCombine", model_1=[one, 0], conditioning_1=one_text, model_2=[two, 0],
                conditioning_2=two_text, balance=balance)  # fmt: skip


def blend(one: str, two: str, second: float) -> dict:
    return node("LatentBlend", samples1=[two, 0], samples2=[one, 0], blend_factor=second)


def sampled(model: str, positive: list, sampler: object = our_sampler) -> dict:
    """One step from noise to the end, which is linear in the prediction."""
    return sampler(model, steps=1, positive=positive)


def style_lora(host: Host) -> str:
    """A LoRA on a block of any of the random models."""
    name, generator = "style.safetensors", torch.Generator().manual_seed(2)
    layer = "diffusion_model.single_blocks.1.linear1"
    tensors = {
        f"{layer}.lora_A.weight": torch.randn(4, 256, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(1792, 4, generator=generator),
    }
    save_file(tensors, host.base / "models" / "loras" / name)
    return name


@pytest.mark.parametrize("sampler", [our_sampler, core_sampler])
@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_two_models_predict_together_by_their_balance(host: Host, sampler: object, balance: float) -> None:
    prompt = {
        **with_models(host, fill=FILL_MINI, canny=CANNY_MINI), **GUIDES,
        "lora": node("LoraLoaderModelOnly", model=["canny", 0], lora_name=style_lora(host), strength_model=0.4),
        "patched": node("ProbeModel", model=["lora", 0], what="attention patches"),
        "both": combine("fill", ["hole", 0], "patched", ["edges", 0], balance),
        "fill alone": sampled("fill", ["hole", 0], sampler),
        "canny alone": sampled("patched", ["edges", 0], sampler),
        "plain canny": sampled("canny", ["edges", 0], sampler),
        "blended": blend("fill alone", "canny alone", balance),
        "together": sampled("both", ["both", 1], sampler),
    }  # fmt: skip
    assert_same(host, prompt, "together", "blended")
    assert_differ(host, prompt, "canny alone", "plain canny")


@pytest.mark.parametrize("sampler", [our_sampler, core_sampler])
def test_a_second_model_whose_control_is_over_or_elsewhere_leaves_the_first_alone(host: Host, sampler: object) -> None:
    settings = {"kind": "image", "low": 50.0, "high": 200.0, "automatic": False, "fit": "stretch", "slot": 1,
                "strength": 1.0, "start": 0.0, "end": 1.0}  # fmt: skip
    wires = {"positive": ["other", 0], "vae": ["load", 2], "image": ["picture", 0], "latent": ["empty", 0]}
    prompt = {
        **with_models(host, fill=FILL_MINI, canny=CANNY_MINI), **GUIDES,
        "control late": node("FluxFoundryControl", **{**wires, **settings, "start": 0.5}),
        "control part": node("FluxFoundryControl", **{**wires, **settings, "strength": 0.5}),
        "control whole": node("FluxFoundryControl", **{**wires, **settings}),
        "with late": combine("fill", ["hole", 0], "canny", ["control late", 0], 0.5),
        "with part": combine("fill", ["hole", 0], "canny", ["control part", 0], 0.5),
        "with whole": combine("fill", ["hole", 0], "canny", ["control whole", 0], 1 / 3),
        "a": sampled("with late", ["with late", 1], sampler), "b": sampled("fill", ["hole", 0], sampler),
        "c": sampled("with part", ["with part", 1], sampler), "d": sampled("with whole", ["with whole", 1], sampler),
    }  # fmt: skip
    assert_same(host, prompt, "a", "b")
    assert_same(host, prompt, "c", "d")
    assert_differ(host, prompt, "c", "b")


CONTROL_SETTINGS = {
    "vae": ["load", 2], "image": ["picture", 0], "latent": ["empty", 0], "kind": "image", "low": 50.0, "high": 200.0,
    "automatic": False, "fit": "stretch", "slot": 1, "strength": 1.0, "start": 0.0, "end": 1.0,
}  # fmt: skip
FILL_SETTINGS = {
    "vae": ["load", 2], "image": ["picture", 0], "mask": ["mask", 0], "strength": 1.0, "start": 0.0, "end": 1.0,
    "rounding": "soft", "noise_mask": False,
}  # fmt: skip


@pytest.mark.parametrize("sampler", [our_sampler, core_sampler])
@pytest.mark.parametrize(("one", "two"), [("draw", "canny"), ("canny", "draw"), ("fill", "canny"), ("canny", "fill")])
def test_a_control_behind_a_combination_goes_to_the_model_that_takes_it(
    host: Host, sampler: object, one: str, two: str
) -> None:
    text = {"draw": ["text", 0], "canny": ["text", 0], "fill": ["hole", 0]}
    prompt = {
        **with_models(host, draw=MINI, fill=FILL_MINI, canny=CANNY_MINI), **GUIDES,
        "edged": node("FluxFoundryControl", **CONTROL_SETTINGS, positive=["text", 0]),
        "first": combine(one, text[one], two, text[two], 0.4),
        "behind": node("FluxFoundryControl", **CONTROL_SETTINGS, positive=["first", 1]),
        "before": combine(
            one, ["edged", 0] if one == "canny" else text[one], two, ["edged", 0] if two == "canny" else text[two], 0.4
        ),
        "a": sampled("first", ["behind", 0], sampler), "b": sampled("before", ["before", 1], sampler),
    }  # fmt: skip
    assert_same(host, prompt, "a", "b")


@pytest.mark.parametrize("sampler", [our_sampler, core_sampler])
@pytest.mark.parametrize(("one", "two"), [("fill", "canny"), ("canny", "fill"), ("draw", "fill"), ("fill", "draw")])
def test_a_hole_behind_a_combination_goes_to_the_model_that_takes_it(
    host: Host, sampler: object, one: str, two: str
) -> None:
    text = {"draw": ["text", 0], "canny": ["edges", 0], "fill": ["text", 0]}
    prompt = {
        **with_models(host, draw=MINI, fill=FILL_MINI, canny=CANNY_MINI), **GUIDES,
        "holed": node("FluxFoundryFill", **FILL_SETTINGS, positive=["text", 0]),
        "first": combine(one, text[one], two, text[two], 0.4),
        "behind": node("FluxFoundryFill", **FILL_SETTINGS, positive=["first", 1]),
        "before": combine(
            one, ["holed", 0] if one == "fill" else text[one], two, ["holed", 0] if two == "fill" else text[two], 0.4
        ),
        "a": sampled("first", ["behind", 0], sampler), "b": sampled("before", ["before", 1], sampler),
    }  # fmt: skip
    assert_same(host, prompt, "a", "b")
    assert "takes the picture with a hole for a control picture" not in said(host, prompt, "a")


def test_models_of_one_file_with_different_loras_are_combined_too(host: Host) -> None:
    prompt = {
        **with_models(host, draw=MINI), **OTHER_TEXT,
        "lora": node("LoraLoaderModelOnly", model=["draw", 0], lora_name=style_lora(host), strength_model=0.4),
        "both": combine("draw", ["text", 0], "lora", ["other", 0], 0.4),
        "unstyled": sampled("draw", ["text", 0]),
        "styled": sampled("lora", ["other", 0]),
        "blended": blend("unstyled", "styled", 0.4),
        "together": sampled("both", ["both", 1]),
    }  # fmt: skip
    assert "so that it is loaded twice" in said(host, prompt, "together")
    assert_same(host, prompt, "together", "blended")


def test_one_model_twice_blends_two_prompts_and_is_loaded_once(host: Host) -> None:
    prompt = {
        **with_models(host, draw=MINI), **OTHER_TEXT,
        "both": combine("draw", ["text", 0], "draw", ["other", 0], 0.25),
        "one": sampled("draw", ["text", 0]),
        "two": sampled("draw", ["other", 0]),
        "blended": blend("one", "two", 0.25),
        "together": sampled("both", ["both", 1]),
    }  # fmt: skip
    assert "loaded twice" not in said(host, prompt, "together")
    assert_same(host, prompt, "together", "blended")


def test_combined_models_combine_again(host: Host) -> None:
    prompt = {
        **with_models(host, draw=MINI, fill=FILL_MINI, canny=CANNY_MINI), **GUIDES,
        "two": combine("fill", ["hole", 0], "canny", ["edges", 0], 0.5),
        "first": combine("two", ["two", 1], "draw", ["text", 0], 0.2),
        "last": combine("draw", ["text", 0], "two", ["two", 1], 0.8),
        "hole alone": sampled("fill", ["hole", 0]),
        "edges alone": sampled("canny", ["edges", 0]),
        "drawn": sampled("draw", ["text", 0]),
        "half": blend("hole alone", "edges alone", 0.5),
        "blended": blend("half", "drawn", 0.2),
        "one way": sampled("first", ["first", 1]),
        "other way": sampled("last", ["last", 1]),
    }  # fmt: skip
    assert_same(host, prompt, "one way", "blended")
    assert_same(host, prompt, "other way", "blended")


def test_what_cannot_be_combined_is_refused_with_the_way_out(host: Host) -> None:
    prompt = {**with_models(host, draw=MINI, canny=CANNY_MINI), **GUIDES}
    foreign = {
        "both": combine("draw", ["text", 0], "core canny", ["edges", 0], 0.5),
        "sample": sampled("both", ["both", 1]),
    }
    assert "model_2 was not loaded by FLUX Foundry" in failure(host, {**prompt, **foreign})
    prompt["both"] = combine("draw", ["text", 0], "canny", ["edges", 0], 0.5)
    for sampler in (our_sampler, core_sampler):
        message = failure(host, {**prompt, "sample": sampled("draw", ["both", 1], sampler)})
        assert "connect the model output of FLUX Combine" in message
    message = failure(host, {**prompt, "sample": sampled("core draw", ["both", 1])})
    assert "carries what FLUX Combine made, which only a MODEL of FLUX Foundry takes" in message


def control_lora(host: Host, name: str, seed: int) -> str:
    """A control LoRA of random numbers in Black Forest Labs' names, for the embedded model's sizes."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for key, layer in Flux1(MINI).named_modules():
        if isinstance(layer, torch.nn.Linear):
            inputs = 2 * layer.in_features if key == "img_in" else layer.in_features
            down, up = (
                torch.randn(8, inputs, generator=generator),
                torch.randn(layer.out_features, 8, generator=generator),
            )
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = 0.3 * down / inputs**0.5, up / 8**0.5
            tensors[f"{key}.lora_B.bias"] = 0.02 * torch.randn(layer.out_features, generator=generator)
        if key.endswith("_norm"):
            tensors[f"{key}.scale"] = 1 + 0.2 * torch.randn(128, generator=generator)
    save_file(tensors, host.base / "models" / "loras" / f"{name}.safetensors")
    return f"{name}.safetensors"


CORE_LORA = "LoraLoaderModelOnly"


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_cores_lora_loader_puts_a_control_lora_on_our_model_as_on_its_own(host: Host, strength: float) -> None:
    prompt = {**with_models(host, draw=MINI), **GUIDES}
    name = control_lora(host, "edges", 3)
    for model in ("draw", "core draw"):
        prompt[f"{model} lora"] = node(CORE_LORA, model=[model, 0], lora_name=name, strength_model=strength)
        prompt[f"{model} styled"] = node(
            CORE_LORA, model=[f"{model} lora", 0], lora_name=style_lora(host), strength_model=0.3
        )
        prompt[f"{model} sample"] = our_sampler(f"{model} styled", steps=2, positive=["edges", 0])
    prompt["none"] = our_sampler("draw lora", steps=2, positive=["other", 0])
    assert_same(host, prompt, "draw sample", "core draw sample", 1e-4)
    assert_differ(host, prompt, "draw sample", "none")


@pytest.mark.parametrize("kind", ["fp8", "gguf:Q8_0", "nf4"])
def test_a_control_lora_acts_on_packed_layers_as_on_the_same_numbers_unpacked(host: Host, kind: str) -> None:
    name = f"packed {kind.replace(':', ' ')}{suffix_of(kind)}"
    file = host.base / "models" / "diffusion_models" / name
    prompt = {**with_models(host, draw=MINI), **GUIDES}
    write_stored(file, load_file(loaded_file(host, "random draw")), kind)
    for dtype in ("auto", "fp32"):
        prompt[dtype] = node("FluxFoundryLoadModel", model=name, dtype=dtype)
        prompt[f"lora {dtype}"] = node(
            CORE_LORA, model=[dtype, 0], lora_name=control_lora(host, "edges", 3), strength_model=0.8
        )
        prompt[f"sample {dtype}"] = our_sampler(f"lora {dtype}", steps=2, positive=["edges", 0])
    assert_same(host, prompt, "sample auto", "sample fp32", 1e-4)


def put(model: str, lora: str, strength: float = 1.0) -> dict:
    return node("FluxFoundryLoadControlLora", model=[model, 0], lora=lora, strength=strength)


def control(conditioning: str, latent: str, slot: int, *, key: bool = False) -> dict:
    """A picture for a slot, under our key where the host has none for it, or where that is asked for."""
    wires = {"conditioning": [conditioning, 0], "latent": [latent, 0]}
    return node("ProbeControls", **wires, slot=slot, ours=key or slot > 1)


def with_controls(host: Host) -> tuple[Prompt, str, str]:
    """A MODEL, two control LoRAs with norms of their own, and pictures for both."""
    edges, depth = control_lora(host, "edges", 3), control_lora(host, "depth", 4)
    prompt = {
        **with_models(host, draw=MINI),
        "other picture": node("ProbePicture", width=128, height=128, seed=2),
        "other encoded": node("VAEEncode", vae=["load", 2], pixels=["other picture", 0]),
        "nothing": node("ProbeForeignLatent", channels=16, value=0.0),
        "edges first": control("text", "encoded", 1), "depth second": control("edges first", "other encoded", 2),
        "depth first": control("text", "other encoded", 1), "edges second": control("depth first", "encoded", 2),
        "only second": control("text", "other encoded", 2), "empty second": control("edges first", "nothing", 2),
    }  # fmt: skip
    return prompt, edges, depth


def test_our_loader_puts_one_control_lora_on_as_the_cores(host: Host) -> None:
    prompt, edges, _ = with_controls(host)
    prompt |= {
        "one": put("draw", edges, 0.8),
        "theirs": node(CORE_LORA, model=["draw", 0], lora_name=edges, strength_model=0.8),
        "a": our_sampler("one", steps=2, positive=["edges first", 0]),
        "b": our_sampler("theirs", steps=2, positive=["edges first", 0]),
    }
    assert_same(host, prompt, "a", "b")


def test_control_loras_side_by_side_have_a_picture_each_in_any_order(host: Host) -> None:
    prompt, edges, depth = with_controls(host)
    prompt |= {
        "edges": put("draw", edges, 0.8), "both": put("edges", depth, 0.6),
        "depth": put("draw", depth, 0.6), "swapped": put("depth", edges, 0.8),
        "a": our_sampler("both", steps=2, positive=["depth second", 0]),
        "b": our_sampler("swapped", steps=2, positive=["edges second", 0]),
        "core's": core_sampler("both", steps=2, positive=["depth second", 0]),
        "core's swapped": core_sampler("swapped", steps=2, positive=["edges second", 0]),
        "without": our_sampler("both", steps=2, positive=["edges first", 0]),
        "with none": our_sampler("both", steps=2, positive=["empty second", 0]),
    }  # fmt: skip
    assert_same(host, prompt, "a", "b", 1e-4)
    assert_same(host, prompt, "core's", "core's swapped", 1e-4)
    assert_same(host, prompt, "without", "with none")
    assert_differ(host, prompt, "a", "without")


def test_a_control_lora_on_a_fill_model_has_its_picture_beside_the_hole(host: Host) -> None:
    prompt, edges, depth = with_controls(host)
    prompt = {**prompt, **with_models(host, fill=FILL_MINI), **GUIDES}
    prompt |= {
        "edges": put("fill", edges, 0.8), "both": put("edges", depth, 0.6),
        "depth": put("fill", depth, 0.6), "swapped": put("depth", edges, 0.8),
        "hole 1": control("hole", "encoded", 1, key=True), "hole 2": control("hole 1", "other encoded", 2),
        "other 1": control("hole", "other encoded", 1, key=True), "other 2": control("other 1", "encoded", 2),
        "a": our_sampler("both", steps=2, positive=["hole 2", 0]),
        "b": our_sampler("swapped", steps=2, positive=["other 2", 0]),
        "c": our_sampler("both", steps=2, positive=["hole", 0]),
        "off": put("fill", edges, 0.0),
        "d": our_sampler("off", steps=2, positive=["hole 1", 0]),
        "e": our_sampler("fill", steps=2, positive=["hole", 0]),
    }  # fmt: skip
    assert_same(host, prompt, "a", "b", 1e-4)
    assert_same(host, prompt, "d", "e")
    assert_differ(host, prompt, "a", "c")


def test_hole_control_styles_and_references_give_the_same_in_any_order(host: Host) -> None:
    prompt, edges, _ = with_controls(host)
    region = {"region": ["mask", 0]}
    parts = {
        "hole": ("positive", node(
            "FluxFoundryFill", vae=["load", 2], image=["picture", 0], mask=["mask", 0], strength=1.0, start=0.0,
            end=1.0, rounding="soft", noise_mask=False,
        )),
        "edges": ("positive", node(
            "FluxFoundryControl", vae=["load", 2], image=["other picture", 0], kind="image", low=50.0, high=200.0,
            automatic=False, fit="stretch", strength=1.0, start=0.25, end=1.0, slot=1,
        )),
        "style": ("conditioning", node(
            "FluxFoundryRedux", style_model=["redux", 0], clip_vision=["redux", 1], image=["other picture", 0],
            strength=0.7, strength_mode="attention", detail=0, max_tokens=0, fit="stretch", start=0.0, end=1.0,
            **region,
        )),
        "view": ("conditioning", node(
            "FluxFoundryReference", vae=["load", 2], image=["picture", 0], strength=0.6, start=0.0, end=0.75,
            layout="auto", fit="pad", max_megapixels=1.0, **region,
        )),
    }  # fmt: skip
    prompt |= {
        **with_models(host, fill=FILL_MINI),
        "redux": node("FluxFoundryLoadRedux", redux="embedded: flux1-redux-mini", vision_tower="embedded: siglip-mini"),
        "guided": put("fill", edges, 0.8),
    }
    names = []
    for order in itertools.permutations(parts):
        before = "text"
        for part in order:
            socket, guide = parts[part]
            after = "/".join((before, part))
            prompt[after] = {**guide, "inputs": {**guide["inputs"], socket: [before, 0]}}
            before = after
        names.append(f"sampled {before}")
        prompt[names[-1]] = our_sampler("guided", steps=4, positive=[before, 0])
    for name in names[1:]:
        assert_same(host, prompt, names[0], name, 1e-4)
    for part in parts:
        rest = [other for other in parts if other != part and part != "hole"] or ["hole"]
        prompt[f"without {part}"] = our_sampler("guided", steps=4, positive=["/".join(("text", *rest)), 0])
        assert_differ(host, prompt, names[0], f"without {part}")


def test_a_control_lora_at_strength_0_keeps_its_place_and_does_nothing(host: Host) -> None:
    prompt, edges, depth = with_controls(host)
    prompt |= {
        "off": put("draw", edges, 0.0), "second": put("off", depth), "alone": put("draw", depth),
        "a": our_sampler("second", steps=2, positive=["only second", 0]),
        "b": our_sampler("alone", steps=2, positive=["depth first", 0]),
        "c": our_sampler("off", steps=2, positive=["edges first", 0]),
        "d": our_sampler("draw", steps=2),
    }  # fmt: skip
    assert_same(host, prompt, "a", "b")
    assert_same(host, prompt, "c", "d")


def test_what_a_model_has_no_input_for_is_refused_with_the_way_out(host: Host) -> None:
    prompt, edges, depth = with_controls(host)
    prompt |= {"one": put("draw", edges), "core one": put("core draw", edges), **with_models(host, fill=FILL_MINI)}
    prompt["fill with edges"] = put("fill", edges)
    hole = node("InpaintModelConditioning", **INPAINT, mask=["mask", 0], noise_mask=False)
    for sampler in (our_sampler, core_sampler):
        message = failure(host, {**prompt, "sample": sampler("one", positive=["depth second", 0])})
        assert (
            "a picture for control 2, but the MODEL takes 1; put one Load FLUX Control LoRA behind another" in message
        )
        message = failure(host, {**prompt, "sample": sampler("draw", positive=["edges first", 0])})
        assert "Foundry Mini has no input for one; choose FLUX.1 Canny or Depth" in message
        message = failure(host, {**prompt, "hole": hole, "sample": sampler("draw", positive=["hole", 0])})
        assert "Foundry Mini has no input for one, so that it would have no effect; choose FLUX.1 Fill" in message
        for model in ("fill", "fill with edges"):
            message = failure(host, {**prompt, "sample": sampler(model, positive=["edges first", 0])})
            assert (
                "Foundry Mini Fill takes a picture with a hole in its place; put FLUX Fill before or behind" in message
            )
    message = failure(host, {**prompt, "sample": our_sampler("core one", positive=["edges first", 0])})
    assert "the MODEL was not loaded by FLUX Foundry; load it with Load FLUX Model" in message
    message = failure(host, {**prompt, "sample": our_sampler("core draw", positive=["only second", 0])})
    assert "a second control picture, which only a MODEL of FLUX Foundry takes" in message


@pytest.mark.parametrize(("sampler", "wire"), [(our_sampler, "latent"), (core_sampler, "latent_image")])
def test_a_sampler_tells_of_what_a_model_was_not_given_or_not_made_for(
    host: Host, sampler: Callable[..., dict], wire: str
) -> None:
    prompt, edges, _ = with_controls(host)
    specs = {"fill": FILL_MINI, "canny": CANNY_MINI}
    prompt = {**prompt, **with_models(host, **specs), "lora": put("draw", edges)}
    prompt["looks"] = node("ReferenceLatent", conditioning=["text", 0], latent=["encoded", 0])
    prompt["hole"] = node("InpaintModelConditioning", **INPAINT, mask=["mask", 0], noise_mask=True)
    for model, positive, words in (
        ("fill", "text", "Foundry Mini Fill got no picture, so that it paints all of an empty one: add FLUX Fill"),
        ("canny", "text", "Foundry Mini Canny got no control picture"),
        ("lora", "text", "Foundry Mini got no control picture"),
        ("draw", "hole", "Foundry Mini does not see the picture's hole: to paint into a picture choose FLUX.1 Fill"),
        ("canny", "hole", "Foundry Mini Canny takes the picture with a hole for a control picture"),
        ("draw", "looks", "Foundry Mini was not trained to look at references: choose FLUX.1 Kontext"),
    ):
        latent = [positive, 2] if positive == "hole" else ["empty", 0]
        sample = sampler(model, steps=1, positive=[positive, 0], **{wire: latent})
        assert words in said(host, {**prompt, "sample": sample})
    prompt["bare hole"] = {**prompt["hole"], "inputs": {**prompt["hole"]["inputs"], "noise_mask": False}}
    if sampler is our_sampler:
        told = said(host, {**prompt, "sample": sampler("core draw", steps=1, positive=["bare hole", 0])})
        assert "carries a picture, but this MODEL has no input for one: choose Fill, Canny or Depth" in told
    for model, positive in (("fill", "hole"), ("lora", "edges first"), ("draw", "text"), ("core draw", "text")):
        told = said(host, {**prompt, "sample": sampler(model, steps=1, positive=[positive, 0])})
        assert "FLUX Foundry:" not in told


def reference(conditioning: list, **changes: object) -> dict:
    settings = {"strength": 1.0, "start": 0.0, "end": 1.0, "layout": "auto", "fit": "pad", "max_megapixels": 1.0}
    return node("FluxFoundryReference", conditioning=conditioning, vae=["load", 2], image=["picture", 0],
                **{**settings, **changes})  # fmt: skip


def kontext(host: Host) -> Prompt:
    return {
        **with_models(host, edit=KONTEXT_MINI),
        "picture": node("ProbePicture", width=128, height=112, seed=1),
        "ours": reference(["text", 0]),
        "theirs": node("ReferenceLatent", conditioning=["text", 0], latent=["encoded", 0]),
    }


@pytest.mark.parametrize("sampler", [our_sampler, core_sampler])
def test_a_plain_reference_is_the_cores_and_chains_with_it(host: Host, sampler: object) -> None:
    prompt = {
        **kontext(host),
        "ours, theirs": node("ReferenceLatent", conditioning=["ours", 0], latent=["encoded", 0]),
        "theirs, ours": reference(["theirs", 0]),
        "method": node("FluxKontextMultiReferenceLatentMethod", conditioning=["theirs", 0],
                       reference_latents_method="index"),
        "a": sampler("edit", steps=2, positive=["ours", 0]),
        "b": sampler("edit", steps=2, positive=["theirs", 0]),
        "core": sampler("core edit", steps=2, positive=["ours", 0]),
        "core theirs": sampler("core edit", steps=2, positive=["theirs", 0]),
        "c": sampler("edit", steps=2, positive=["ours, theirs", 0]),
        "d": sampler("edit", steps=2, positive=["theirs, ours", 0]),
        "ours, index": reference(["text", 0], layout="index"),
        "e": sampler("edit", steps=2, positive=["ours, index", 0]),
        "f": sampler("edit", steps=2, positive=["method", 0]),
    }  # fmt: skip
    for one, other in (("a", "b"), ("core", "core theirs"), ("c", "d"), ("e", "f")):
        assert_same(host, prompt, one, other)


def test_a_references_strength_and_region_reach_our_model_from_any_sampler(host: Host) -> None:
    prompt = {
        **kontext(host),
        "weak": reference(["text", 0], strength=0.4),
        "somewhere": reference(["text", 0], region=["mask", 0]),
        "everywhere": reference(["text", 0], region=["whole 1", 0]),
        "whole 1": node("SolidMask", value=1.0, width=64, height=64),
        "off": reference(["text", 0], strength=0.0),
        "behind": node("ReferenceLatent", conditioning=["weak", 0], latent=["encoded", 0]),
        "before": reference(["theirs", 0], strength=0.4),
    }
    for name in ("text", "theirs", "weak", "somewhere", "everywhere", "off", "behind", "before"):
        prompt[f"{name}!"] = core_sampler("edit", steps=2, positive=[name, 0])
    for name in ("weak", "somewhere"):
        prompt[f"{name} ours"] = our_sampler("edit", steps=2, positive=[name, 0])
    assert_same(host, prompt, "off!", "text!", 0)
    for one, other in (("weak!", "theirs!"), ("weak!", "text!"), ("somewhere!", "theirs!"), ("behind!", "before!")):
        assert_differ(host, prompt, one, other)
    assert_same(host, prompt, "everywhere!", "theirs!")
    for text in ("weak", "somewhere"):
        message = failure(host, {**prompt, "sample": our_sampler("core edit", positive=[text, 0])})
        assert "a reference with a strength or a region, which only a MODEL of FLUX Foundry takes" in message
        host.succeed({**prompt, "out": node("ProbeCompare", a=[f"{text} ours", 0], b=[f"{text} ours", 0])})


def entries(host: Host, prompt: Prompt, name: str) -> dict:
    probe = node("ProbeConditions", conditioning=[name, 0], latent=[name, 1], crop=[name, 2])
    return host.succeed({**prompt, "out": probe}).report()


def test_a_reference_acts_for_its_time_and_stands_in_its_place_of_the_list(host: Host) -> None:
    prompt = kontext(host)
    prompt["early"] = reference(["theirs", 0], strength=0.5, end=0.5, layout="uxo")
    before, behind = entries(host, prompt, "early")["entries"]
    latent = [1, 16, 14, 16]
    assert before["reference_latents"] == [latent, latent]
    assert before["fluxfoundry_references"] == [None, {"strength": 0.5, "region": None}]
    assert before["reference_latents_method"] == "uxo"
    assert behind["reference_latents"] == [latent]
    assert "fluxfoundry_references" not in behind
    assert 0.499 < before["end_percent"] == behind["start_percent"] <= 0.5
    assert behind["end_percent"] == 1.0


def test_an_output_gets_the_references_size_on_the_grid_and_the_crop_its_own(host: Host) -> None:
    prompt = kontext(host)
    prompt["picture"] = node("ProbePicture", width=121, height=99, seed=1)
    found = entries(host, prompt, "ours")
    assert found["latent"] == [1, 16, 14, 16]
    assert found["crop"] == {"picture": [1, 112, 128, 3], "original": [1, 99, 121, 3]}


def test_a_reference_above_its_budget_is_scaled_and_that_is_said(host: Host) -> None:
    prompt = kontext(host)
    prompt["small"] = reference(["text", 0], max_megapixels=0.01)
    prompt["sample"] = our_sampler("edit", steps=1, positive=["small", 0], latent=["small", 1])
    assert "has more pixels than its budget of 10486: it is scaled to" in said(host, prompt)
    assert entries(host, prompt, "small")["latent"] == [1, 16, 12, 14]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start": 0.5, "end": 0.5}, "it starts at 0.5 and ends at 0.5; give fractions of the run"),
        ({"region": ["two", 0]}, "; give one mask (1, height, width), for every picture alike"),
        ({"region": ["black", 0]}, "the region's mask is black everywhere"),
    ],
)
def test_references_that_make_no_sense_are_refused(host: Host, settings: dict, words: str) -> None:
    prompt = kontext(host)
    prompt["masks"] = node("ImageToMask", image=["pictures", 0], channel="red")
    prompt["pictures"] = node("EmptyImage", width=32, height=32, batch_size=2, color=255)
    prompt["two"] = node("ImageToMask", image=["pictures", 0], channel="blue")
    prompt["black"] = node("SolidMask", value=0.0, width=32, height=32)
    prompt["wrong"] = reference(["text", 0], **settings)
    assert words in failure(host, {**prompt, "sample": our_sampler("edit", positive=["wrong", 0])})


@pytest.mark.parametrize("channels", [4, 32])
def test_a_reference_of_another_family_is_refused_also_from_the_cores_node(host: Host, channels: int) -> None:
    prompt = {
        **kontext(host),
        "foreign": node("ProbeForeignLatent", channels=channels, value=0.5),
        "wrong": node("ReferenceLatent", conditioning=["text", 0], latent=["foreign", 0]),
    }
    for sampler in (our_sampler, core_sampler):
        message = failure(host, {**prompt, "sample": sampler("edit", positive=["wrong", 0])})
        assert (
            f"a reference of shape [1, {channels}, 16, 16], but the MODEL looks at latents of pictures with 16"
            in message
        )


def test_a_method_that_modulates_references_apart_is_refused_by_name(host: Host) -> None:
    prompt = kontext(host)
    prompt["method"] = node("FluxKontextMultiReferenceLatentMethod", conditioning=["theirs", 0],
                            reference_latents_method="index_timestep_zero")  # fmt: skip
    message = failure(host, {**prompt, "sample": core_sampler("edit", positive=["method", 0])})
    assert "index_timestep_zero, which FLUX Foundry's MODEL does not take; choose offset, index or uxo" in message
    prompt["cached"] = node("FluxKVCache", model=["edit", 0])
    message = failure(host, {**prompt, "sample": core_sampler("cached", positive=["theirs", 0])})
    assert "take Flux KV Cache out" in message
    host.succeed({**prompt, "a": core_sampler("cached", steps=1), "out": node("ProbeCompare", a=["a", 0], b=["a", 0])})
