"""FLUX Step Cache under every sampler: what it skips, what it shows, and that a run leaves nothing behind."""

from __future__ import annotations

import pytest
from client import Host, Prompt
from graph import STEPS, core_sampler, end, node, our_sampler, start
from pictures import OTHER_PROMPT, PROMPT, REQUEST, assert_shows

from flux.mini.files import open_mini
from flux.pipelines.denoising import Hooks
from flux.pipelines.step_cache import StepCache
from flux.pipelines.text_to_image import Request, generate

SAMPLERS = [our_sampler, core_sampler]
RULES = {"threshold": 0.25, "max_skips": 2, "warmup": 3}
NEGATIVE = {"negative": node("CLIPTextEncode", clip=["load", 1], text=OTHER_PROMPT)}
GUIDED = {"cfg": 2.0, "negative": ["negative", 0]}


def cache(model: str = "load", **changes: object) -> dict:
    return node("FluxFoundryStepCache", model=[model, 0], **{**RULES, **changes})


def compared(host: Host, a: dict, b: dict, **more: dict) -> dict:
    prompt = {**start(), **more, "a": a, "b": b, "compare": node("ProbeCompare", a=["a", 0], b=["b", 0])}
    return host.succeed(prompt).report()


def shown(host: Host, prompt: Prompt, name: str = "sample") -> str:
    """The last text on a node."""
    prompt = {**prompt, "out": node("ProbeCompare", a=[name, 0], b=[name, 0])}
    with host.listening() as listener:
        host.queue(prompt, listener.client)
        last = listener.until("execution_success", "execution_error", "execution_interrupted")
    assert last["type"] == "execution_success", last
    return [message["text"] for message in listener.seen if message.get("node") == name and "text" in message][-1]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("settings", [{}, GUIDED], ids=["one prompt", "two"])
def test_a_threshold_of_0_changes_no_bit(host: Host, sampler: object, settings: dict) -> None:
    more = {"cached": cache(threshold=0.0), **NEGATIVE}
    settings = {"steps": 9, "seed": 201, **settings}
    assert compared(host, sampler(**settings), sampler("cached", **settings), **more)["equal"]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("settings", [{}, GUIDED], ids=["one prompt", "two"])
def test_a_run_with_skipped_steps_ends_near_the_one_without(host: Host, sampler: object, settings: dict) -> None:
    more = {"cached": cache(), **NEGATIVE}
    report = compared(host, sampler(seed=202, **settings), sampler("cached", seed=202, **settings), **more)
    assert 0 < report["largest"] < 0.5 * report["spread"]
    text = shown(host, {**start(), **more, "sample": sampler("cached", seed=203, **settings)})
    assert text.startswith("step cache: blocks were skipped in ")
    assert text.endswith(" of their work")


def test_it_skips_what_the_engine_skips_and_the_picture_shows_the_prompt(host: Host) -> None:
    told: list[str] = []
    request = Request(prompt=PROMPT, seed=7, steps=STEPS, guidance=3.0, step_cache=StepCache(**RULES))
    generate(open_mini(), request, Hooks(tell=told.append))
    prompt = {**start(), "cached": cache(), "sample": our_sampler("cached")}
    assert [shown(host, prompt)] == told
    assert_shows(host.picture(prompt | end()), REQUEST)


@pytest.mark.parametrize("settings", [{}, GUIDED], ids=["one prompt", "two"])
def test_patched_blocks_skip_the_same_and_give_the_same_bits(host: Host, settings: dict) -> None:
    more = {
        "cached": cache(), **NEGATIVE,
        "other": node("ProbeModel", model=["cached", 0], what="identity blocks"),
    }  # fmt: skip
    settings = {"seed": 204, **settings}
    assert compared(host, core_sampler("cached", **settings), core_sampler("other", **settings), **more)["equal"]


@pytest.mark.parametrize("what", ["control", "attention patches", "input patch"])
def test_patches_of_other_nodes_go_with_it(host: Host, what: str) -> None:
    more = {
        "patched": node("ProbeModel", model=["load", 0], what=what),
        "exact": cache("patched", threshold=0.0),
        "cached": cache("patched", threshold=0.15),
    }
    plain = our_sampler("patched", seed=205)
    assert compared(host, plain, our_sampler("exact", seed=205), **more)["equal"]
    report = compared(host, plain, our_sampler("cached", seed=205), **more)
    assert 0 < report["largest"] < 0.5 * report["spread"]


def test_a_run_leaves_nothing_on_the_model_for_the_next(host: Host) -> None:
    """The host keeps the MODEL and what was drawn; the same guidance, given by the sampler, has it draw again."""
    more = {
        "cached": cache(),
        "other": node("CLIPTextEncode", clip=["load", 1], text=OTHER_PROMPT),
        "wide": node("EmptySD3LatentImage", width=192, height=128, batch_size=2),
    }
    first, again = our_sampler("cached", seed=207), our_sampler("cached", seed=207, guidance=3.0)
    between = our_sampler("cached", positive=["other", 0], latent=["wide", 0], seed=206)
    for drawn in (first, between):
        host.succeed({**start(), **more, "a": drawn, "out": node("ProbeCompare", a=["a", 0], b=["a", 0])})
    assert compared(host, first, again, **more)["equal"]


def test_of_combined_models_each_is_compared_with_itself(host: Host) -> None:
    """Two prompts, the second predicted by the MODEL with patches that change nothing, so that it is another one."""
    more = {
        "other": node("CLIPTextEncode", clip=["load", 1], text=OTHER_PROMPT),
        "second": node("ProbeModel", model=["load", 0], what="identity blocks"),
        "both": node("FluxFoundryCombine", model_1=["load", 0], conditioning_1=["text", 0], model_2=["second", 0],
                     conditioning_2=["other", 0], balance=0.5),
        "exact": cache("both", threshold=0.0),
        "cached": cache("both"),
    }  # fmt: skip

    def sampler(model: str, seed: int = 208) -> dict:
        return our_sampler(model, positive=["both", 1], seed=seed)

    assert compared(host, sampler("both"), sampler("exact"), **more)["equal"]
    report = compared(host, sampler("both"), sampler("cached"), **more)
    assert 0 < report["largest"] < 0.5 * report["spread"]
    assert "blocks were skipped in" in shown(host, {**start(), **more, "sample": sampler("cached", seed=210)})


def test_on_the_second_of_combined_models_alone_it_is_told_to_have_no_effect(host: Host) -> None:
    more = {
        "cached": cache(),
        "both": node("FluxFoundryCombine", model_1=["load", 0], conditioning_1=["text", 0], model_2=["cached", 0],
                     conditioning_2=["text", 0], balance=0.5),
        "sample": our_sampler("both", positive=["both", 1], steps=1, seed=209),
        "out": node("ProbeCompare", a=["sample", 0], b=["sample", 0]),
    }  # fmt: skip
    host.succeed({**start(), **more})
    assert "FLUX Step Cache has no effect on model_2 of FLUX Combine" in (host.base / "log.txt").read_text()


def failure(host: Host, prompt: Prompt) -> str:
    outcome = host.run({**prompt, "out": node("ProbeCompare", a=["sample", 0], b=["sample", 0])})
    assert outcome.status == "error"
    return outcome.error


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_few_steps_few_step_models_and_models_of_other_loaders_are_refused(host: Host, sampler: object) -> None:
    cached = {"cached": cache(), "sample": sampler("cached", steps=8)}
    assert "with 8 steps every one changes much; take it out" in failure(host, {**start(), **cached})
    cached["sample"] = sampler("cached", steps=20)
    assert "Foundry Mini schnell is made for 4 steps" in failure(host, {**start("mini schnell"), **cached})
    core = node("UNETLoader", unet_name="flux1-mini.safetensors", weight_dtype="default")
    message = failure(host, {**start(), "core": core, **cached, "cached": cache("core")})
    assert "the MODEL was not loaded by FLUX Foundry" in message


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_streamed_blocks_skip_the_same_and_give_the_same_bits(host: Host, sampler: object) -> None:
    model = {"model": "embedded: flux1-mini", "dtype": "auto"}
    more = {
        "kept": node("FluxFoundryLoadModel", **model, memory="keep"),
        "saved": node("FluxFoundryLoadModel", **model, memory="save"),
        "kept cached": cache("kept"),
        "saved cached": cache("saved"),
    }
    report = compared(host, sampler("kept cached", seed=211), sampler("saved cached", seed=211), **more)
    assert report["equal"]
