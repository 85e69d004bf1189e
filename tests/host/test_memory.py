"""Memory policies in the host: what stays, what is given back, and that pictures do not notice."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
from client import Host, Prompt
from graph import core_sampler, node, our_sampler, start

from flux.mini.files import FOLDER
from flux.models.flux1 import Flux1
from flux.specs.flux1 import MINI
from tests.tiny import write_module

MODEL = "embedded: flux1-mini"
POLICIES = ("keep", "balance", "save")
STEPS = 3


def load(name: str = "model", model: str = MODEL, **settings: Any) -> Prompt:
    return {name: node("FluxFoundryLoadModel", model=model, dtype="auto", **settings)}


def compare(host: Host, models: Prompt, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    prompt = {**start(), **models, "a": a, "b": b, "compare": node("ProbeCompare", a=["a", 0], b=["b", 0])}
    report: dict[str, Any] = host.succeed(prompt).report()
    return report


@pytest.mark.parametrize("sampler", [our_sampler, core_sampler])
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_pictures_are_the_same_under_every_policy(host: Host, policy: str, sampler: Any) -> None:
    models = {**load("keep", memory="keep"), **load("other", memory=policy)}
    report = compare(host, models, sampler("keep", steps=STEPS), sampler("other", steps=STEPS))
    assert report["equal"]
    assert report["spread"] > 0.1


def test_weights_that_are_kept_as_they_are_stored_draw_what_the_hosts_layers_draw(host: Host) -> None:
    models = {**load("keep", memory="keep"), **load("auto")}
    report = compare(host, models, our_sampler("keep", steps=STEPS), our_sampler("auto", steps=STEPS))
    assert report["largest"] < 1e-3 * report["spread"]


def test_what_the_host_counts_is_what_the_policy_leaves(host: Host) -> None:
    found = {}
    for policy in POLICIES:
        prompt = {**load(memory=policy), "out": node("ProbeResidents", model=["model", 0])}
        found[policy] = host.succeed(prompt).report()
        assert found[policy]["loaded"] == found[policy]["size"] == found[policy]["resident"]
    assert found["save"]["loaded"] < found["balance"]["loaded"] < found["keep"]["loaded"] < found["keep"]["whole"]
    assert found["keep"]["streamed"] == []
    assert len(found["save"]["streamed"]) == found["save"]["blocks"]


@pytest.fixture(scope="module")
def deep(host: Host) -> str:
    """A model of more blocks: which of them are streamed changes with their number, as they are spread evenly."""
    path = host.base / "models" / "diffusion_models" / "deep.safetensors"
    write_module(path, Flux1(replace(MINI, name="deep", double_blocks=4, single_blocks=8)), 7)
    return path.name


def test_the_host_takes_blocks_back_one_by_one_and_the_model_gives_the_same(host: Host, deep: str) -> None:
    prompt = {**load(model=deep, memory="keep"), "out": node("ProbeGiveWay", model=["model", 0])}
    report = host.succeed(prompt).report()
    assert report["freed"]
    assert all(freed >= report["asked"] for freed in report["freed"])
    assert report["streamed"] == sorted(set(report["streamed"]))
    assert report["streamed"][-1] == report["blocks"]
    assert report["equal"]
    assert report["there"]
    assert report["back"] == report["size"]


@pytest.mark.parametrize("share", [1.8, 0.8])
def test_two_models_in_turn_share_a_small_card(host: Host, share: float) -> None:
    models = {**load("one", memory="keep"), **load("other", "flux1-mini.safetensors", memory="keep")}
    prompt = {**models, "out": node("ProbeSmallCard", one=["one", 0], other=["other", 0], share=share)}
    report = host.succeed(prompt).report()
    for turn in report["rounds"]:
        assert turn["equal"]
        assert turn["free"] >= 0
        assert turn["running"] > turn["waiting"]
    assert (report["rounds"][-1]["running"] == report["size"]) == (share > 1)
    assert (report["rounds"][-1]["waiting"] > 0) == (share > 1)


def test_the_hosts_flags_mean_what_they_always_mean(host: Host) -> None:
    report = host.succeed({**load(memory="keep"), "out": node("ProbeFlags", model=["model", 0])}).report()
    assert report["novram"] == report["least"]
    assert report["none"] == report["lowvram"] == report["highvram"] == report["size"]
    assert report["least"] <= report["reserve"] < report["size"]


def test_a_budget_below_the_least_is_answered_with_the_least(host: Host) -> None:
    prompt = {**start(), **load(memory="budget", budget=0.1), "a": our_sampler("model", steps=STEPS)}
    prompt["empty"] = node("EmptySD3LatentImage", width=1024, height=1024, batch_size=4)
    prompt["out"] = node("ProbeCompare", a=["a", 0], b=["a", 0])
    outcome = host.run(prompt)
    assert outcome.status == "error"
    assert "below the least that this takes" in str(outcome.error)


def test_a_budget_that_fits_is_kept(host: Host) -> None:
    prompt = {**load(memory="budget", budget=1.0), "out": node("ProbeResidents", model=["model", 0])}
    assert host.succeed(prompt).report()["streamed"] == []


def test_a_lora_under_a_policy_draws_what_it_draws_without_and_reloads_nothing(host: Host) -> None:
    prompt = {**load(memory="save"), "out": node("ProbePatched", model=["model", 0])}
    report = host.succeed(prompt).report()
    assert report["streamer_stays"]
    assert report["changed"] > 0
    assert report["back"] == 0


def test_what_is_dropped_leaves_no_thread_behind(host: Host) -> None:
    counts = []
    for turn in range(4):
        prompt = {
            **start(), **load(memory=("save", "balance")[turn % 2]), "a": our_sampler("model", steps=1, seed=turn),
            "out": node("ProbeThreads", latent=["a", 0]),
        }  # fmt: skip
        counts.append(host.succeed(prompt).report()["readers"])
    assert max(counts) <= 2


def encoders(policy: str) -> Prompt:
    return {
        "clip": node(
            "FluxFoundryLoadTextEncoders", clip_l="embedded: clip-mini", t5="embedded: t5-mini", t5_length="256",
            memory=policy,
        ),
    }  # fmt: skip


def test_text_encoders_give_the_same_under_every_policy(host: Host) -> None:
    found = {}
    for policy in ("auto", *POLICIES):
        text = node("CLIPTextEncode", clip=["clip", 0], text="a (red:1.2) circle")
        prompt = {**encoders(policy), "text": text, "out": node("ProbeText", text=["text", 0])}
        found[policy] = host.succeed(prompt).report()
    assert found["keep"] == found["balance"] == found["save"]
    for key, numbers in found["auto"].items():
        assert found["save"][key] == pytest.approx(numbers, abs=1e-4)


def test_a_vision_tower_sees_the_same_under_every_policy(host: Host) -> None:
    found = {}
    for policy in POLICIES:
        prompt = {
            "redux": node(
                "FluxFoundryLoadRedux", redux="embedded: flux1-redux-mini", vision_tower="embedded: siglip-mini",
                memory=policy,
            ),
            "picture": node("EmptyImage", width=64, height=64, batch_size=1, color=0xFF8000),
            "seen": node("CLIPVisionEncode", clip_vision=["redux", 1], image=["picture", 0], crop="center"),
            "out": node("ProbeSeen", seen=["seen", 0]),
        }  # fmt: skip
        found[policy] = host.succeed(prompt).report()
    assert found["keep"] == found["balance"] == found["save"]
    assert any(found["keep"]["last"])


def test_a_control_lora_is_followed_under_a_policy(host: Host) -> None:
    loras = {
        name: node("FluxFoundryLoadControlLora", model=[model, 0], lora="embedded: flux1-canny-mini-lora", strength=1.0)
        for name, model in (("a lora", "keep"), ("b lora", "other"))
    }
    models = {**load("keep", memory="keep"), **load("other", memory="save"), **loras}
    report = compare(host, models, our_sampler("a lora", steps=STEPS), our_sampler("b lora", steps=STEPS))
    assert report["equal"]


def test_an_autoencoder_in_strips_gives_the_pictures_and_latents_of_one_piece(host: Host) -> None:
    prompt = {**start(), "a": our_sampler(steps=2)}
    for policy in ("keep", "save"):
        vae = [policy, 0]
        prompt[policy] = node("FluxFoundryLoadAutoencoder", vae="embedded: flux1-mini-ae", memory=policy)
        prompt[f"{policy} picture"] = node("VAEDecode", vae=vae, samples=["a", 0])
        prompt[f"{policy} latent"] = node("VAEEncode", vae=vae, pixels=["keep picture", 0])
    prompt["out"] = node("ProbeCompare", a=["keep latent", 0], b=["save latent", 0])
    prompt["pictures"] = node(
        "ProbeStrips", one=["keep picture", 0], other=["save picture", 0], vae=["keep", 0], striped=["save", 0],
        latent=["a", 0],
    )  # fmt: skip
    outcome = host.succeed(prompt)
    said = {name: json.loads(out["report"][0]) for name, out in outcome.outputs.items() if "report" in out}
    assert said["out"]["largest"] < 1e-4 * said["out"]["spread"]
    assert said["pictures"]["largest"] < 1e-4
    assert said["pictures"]["room"][1] < said["pictures"]["room"][0]
    assert said["pictures"]["after_oom"] < 1e-4


def test_a_plan_tells_every_stage_and_the_same_as_what_is_loaded(host: Host) -> None:
    loaders = {
        **load(memory="save"), **encoders("save"),
        "vae": node("FluxFoundryLoadAutoencoder", vae="embedded: flux1-mini-ae", memory="save"),
    }  # fmt: skip
    sizes = {"width": 512, "height": 512, "batch_size": 1, "steps": STEPS}  # smaller ones take less in one piece
    plan = node(
        "FluxFoundryMemoryPlan", model=["model", 0], clip=["clip", 0], vae=["vae", 0], memory="as loaded", **sizes
    )  # fmt: skip
    text = host.succeed({**loaders, "plan": plan, "out": node("ProbeTold", text=["plan", 0])}).report()["text"]
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert {"clip", "t5", "transformer", "decode"} <= rows.keys()
    assert "of 5 blocks are streamed" in text
    assert "in strips" in text
    resident = host.succeed({**load(memory="save"), "out": node("ProbeResidents", model=["model", 0])}).report()
    assert f"{resident['loaded'] / (1 << 20):.1f} MiB" in rows["transformer"]


def test_on_a_card_what_unpacking_takes_counts_beside_a_budget(host: Host) -> None:
    said = host.succeed({**load(memory="budget", budget=1.0), "out": node("ProbeOnACard", model=["model", 0])}).report()
    assert said["outlined"] == [False, True]
    assert said["there"] > said["here"]
    on_the_card, here = said["runs"]
    assert on_the_card > here > 0


@pytest.mark.parametrize("policy", ["keep", "save"])
def test_a_plan_under_another_policy_is_the_plan_of_a_model_that_was_loaded_so(host: Host, policy: str) -> None:
    told = []
    for loaded, asked in (("auto", policy), (policy, "as loaded")):
        prompt = load(memory=loaded)
        prompt["plan"] = node(
            "FluxFoundryMemoryPlan", model=["model", 0], width=128, height=128, batch_size=1, steps=STEPS, memory=asked
        )
        prompt["out"] = node("ProbeTold", text=["plan", 0])
        text = host.succeed(prompt).report()["text"]
        told.append(next(line for line in text.splitlines() if line.startswith("transformer")).split()[:-2])
    assert told[0] == told[1]


def test_a_step_cache_takes_room_in_the_plan(host: Host) -> None:
    rows, rules = [], {"threshold": 0.1, "max_skips": 2, "warmup": 3}
    for name in ("model", "cached"):
        prompt = {**load(), "cached": node("FluxFoundryStepCache", model=["model", 0], **rules)}
        prompt["plan"] = node(
            "FluxFoundryMemoryPlan", model=[name, 0], width=1024, height=1024, batch_size=1, steps=STEPS,
            memory="as loaded",
        )  # fmt: skip
        prompt["out"] = node("ProbeTold", text=["plan", 0])
        text = host.succeed(prompt).report()["text"]
        rows.append(next(line for line in text.splitlines() if line.startswith("transformer")))
    assert rows[0] != rows[1]


def test_both_models_of_a_combination_are_planned_and_reported(host: Host) -> None:
    prompt = {
        **start(),
        **load(memory="save"),
        **load("second", "embedded: flux1-mini-schnell", memory="save"),
        "both": node(
            "FluxFoundryCombine", model_1=["model", 0], conditioning_1=["text", 0], model_2=["second", 0],
            conditioning_2=["text", 0], balance=0.5,
        ),
        "plan": node(
            "FluxFoundryMemoryPlan", model=["both", 0], width=128, height=128, batch_size=1, steps=STEPS,
            memory="as loaded",
        ),
        "a": our_sampler("both", positive=["both", 1], steps=STEPS, seed=77),
        "picture": node("VAEDecode", vae=["load", 2], samples=["a", 0]),
        "report": node("FluxFoundryMemoryReport", image=["picture", 0]),
        "planned": node("ProbeTold", text=["plan", 0]),
        "out": node("ProbeTold", text=["report", 0]),
    }  # fmt: skip
    outputs = host.succeed(prompt).outputs
    planned, reported = (json.loads(outputs[name]["report"][0])["text"] for name in ("planned", "out"))
    assert [line.split("  ")[0] for line in planned.splitlines() if line.startswith("transformer")] == [
        "transformer", "transformer 2",
    ]  # fmt: skip
    assert "other models stay beside it" in planned
    assert f"{STEPS} x " in next(line for line in reported.splitlines() if line.startswith("transformer"))


def test_a_report_tells_what_every_stage_took(host: Host) -> None:
    loaders = {**load(memory="save"), **encoders("save")}
    loaders["vae"] = node("FluxFoundryLoadAutoencoder", vae="embedded: flux1-mini-ae")
    prompt = {
        **loaders,
        "text": node("CLIPTextEncode", clip=["clip", 0], text="a red circle"),
        "empty": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "a": our_sampler("model", steps=STEPS, seed=77),
        "picture": node("VAEDecode", vae=["vae", 0], samples=["a", 0]),
        "report": node("FluxFoundryMemoryReport", image=["picture", 0]),
        "out": node("ProbeTold", text=["report", 0]),
    }
    text = host.succeed(prompt).report()["text"]
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert {"clip", "t5", "transformer", "decode"} <= rows.keys()
    assert f"{STEPS} x " in rows["transformer"]
    assert "Not run this time" not in text
    prompt["a"]["inputs"]["seed"] = 78  # the text is not encoded again
    again = host.succeed(prompt).report()["text"]
    assert "had the result: clip, t5" in again


def test_a_model_of_another_loader_is_not_planned(host: Host) -> None:
    prompt = {
        "model": node("UNETLoader", unet_name="flux1-mini.safetensors", weight_dtype="default"),
        "plan": node(
            "FluxFoundryMemoryPlan", model=["model", 0], width=128, height=128, batch_size=1, steps=1,
            memory="as loaded",
        ),
    }  # fmt: skip
    outcome = host.run(prompt)
    assert outcome.status == "error"
    assert "was not loaded by FLUX Foundry" in str(outcome.error)


def test_ten_prompts_with_changing_models_leave_memory_where_it_was_after_the_second(host: Host) -> None:
    reports = []
    for turn in range(10):
        model, policy = ((MODEL, "balance"), ("flux1-mini-schnell.safetensors", "save"))[turn % 2]
        prompt = {
            **start(), **load(model=model, memory=policy), "a": our_sampler("model", steps=2, seed=100 + turn),
            "decode": node("VAEDecode", vae=["load", 2], samples=["a", 0]),
            "out": node("ProbeTaken", image=["decode", 0]),
        }  # fmt: skip
        reports.append(host.succeed(prompt).report())
    second, last = reports[1], reports[-1]
    assert last["resident_set"] == pytest.approx(second["resident_set"], rel=0.02)
    assert last["loaded"] == pytest.approx(second["loaded"], rel=0.02)
    assert last["readers"] <= 2


def test_free_lets_go_of_everything(host: Host) -> None:
    prompt = {**start(), **load(memory="save"), "a": our_sampler("model", steps=1, seed=500)}
    prompt["out"] = node("ProbeThreads", latent=["a", 0])
    assert host.succeed(prompt).report()["readers"] >= 1
    host.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)  # the server looks at its flags about once a second
    again = {**start(), "a": our_sampler(steps=1, seed=501), "out": node("ProbeThreads", latent=["a", 0])}
    assert host.succeed(again).report()["readers"] == 0


@pytest.mark.parametrize("policy", ["keep", "balance"])
def test_a_step_that_memory_runs_out_in_is_repeated_with_fewer_blocks_in_it(host: Host, policy: str) -> None:
    report = host.succeed({**load(memory=policy), "out": node("ProbeRunsOut", model=["model", 0])}).report()
    assert report["equal"]
    assert report["streamed_after"] > report["streamed_before"]
    assert report["there"]
    assert "no more weights can leave the device; loaded with memory save, 48x48 would have fitted" in report["gave_up"]
    assert report["afterwards"]


def test_where_memory_runs_out_other_models_leave_first(host: Host) -> None:
    models = {**load("one", memory="keep"), **load("other", "flux1-mini.safetensors", memory="keep")}
    report = host.succeed({**models, "out": node("ProbeOthersFirst", one=["one", 0], other=["other", 0])}).report()
    waits, streamed = report["waits"], report["streamed"]
    assert waits[0] > waits[1]
    assert streamed[0] == streamed[1] == 0
    assert waits[2] < waits[1] or streamed[2] > 0
    assert report["equal"]


def error_of_a_run(host: Host, what: str, models: Prompt, model: str) -> str:
    """What a run ends with in which something happens to a model; the next one is seen to work."""
    prompt = {
        **start(),
        **models,
        "struck": node("ProbeModel", model=[model, 0], what=what),
        "a": our_sampler("struck", steps=STEPS, seed=501),
        "out": node("ProbeCompare", a=["a", 0], b=["a", 0]),
    }
    outcome = host.run(prompt)
    assert outcome.status == "error"
    assert host.succeed({**prompt, "a": our_sampler("load", steps=STEPS, seed=501)}).report()["equal"]
    return outcome.error


def test_a_device_that_is_lost_is_told_in_a_sentence_and_the_next_prompt_runs(host: Host) -> None:
    error = error_of_a_run(host, "lost", {}, "load")
    assert "the device cpu stopped working (CUDA error: unspecified launch failure)" in error


@pytest.mark.skipif(sys.platform != "linux", reason="no other system has leases")
def test_a_file_that_is_cut_in_a_run_ends_it_with_a_sentence_and_the_host_goes_on(host: Host) -> None:
    folder = host.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "to-be-cut.safetensors"
    shutil.copy(FOLDER / "flux1-mini.safetensors", path)
    error = error_of_a_run(host, "cut", load(model=path.name, memory="save"), "model")
    assert "to-be-cut.safetensors is about to be changed by another program" in error
    path.unlink()
