"""Our MODEL, CLIP and VAE in the core's nodes, the core's in ours, and the pictures that come out."""

from __future__ import annotations

import numpy as np
import pytest
from client import Host, Prompt
from graph import STEPS, core_sampler, end, node, our_sampler, start
from pictures import OTHER_PROMPT, OTHER_REQUEST, PROMPT, REQUEST, assert_shows, pixels

from flux.mini.files import MINI, MINI_SCHNELL, open_mini
from flux.pipelines.text_to_image import Request, generate

LEVELS = 2  # of 255, by which a few pixels may differ: one side rounds where the other cuts
SAMPLERS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_snr")


def test_our_model_clip_and_vae_draw_the_prompt_in_the_cores_nodes(host: Host) -> None:
    assert_shows(host.picture({**start(), "sample": core_sampler(), **end()}), REQUEST)


def test_our_model_works_under_sampler_custom_advanced(host: Host) -> None:
    sampling = {
        "noise": node("RandomNoise", noise_seed=7),
        "guider": node("BasicGuider", model=["load", 0], conditioning=["text", 0]),
        "solver": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["load", 0], scheduler="simple", steps=STEPS, denoise=1.0),
        "sample": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["solver", 0],
                       sigmas=["sigmas", 0], latent_image=["empty", 0]),
    }  # fmt: skip
    assert_shows(host.picture({**start(), **sampling, **end()}), REQUEST)


@pytest.mark.parametrize("solver", SAMPLERS)
def test_core_conditioning_and_latents_go_into_our_sampler(host: Host, solver: str) -> None:
    assert_shows(host.picture({**start(), "sample": our_sampler(solver=solver), **end()}), REQUEST)


def test_our_schedule_and_the_cores_feed_either_sampler(host: Host) -> None:
    sigmas = {
        "sigmas": node("FluxFoundrySchedule", model=["load", 0], steps=STEPS, schedule="flux", denoise=1.0, width=128,
                       height=128, explicit=""),
        "own": our_sampler(),
        "given": our_sampler(sigmas=["sigmas", 0], steps=1),
        "compare": node("ProbeCompare", a=["own", 0], b=["given", 0]),
    }  # fmt: skip
    assert host.succeed({**start(), **sigmas}).report()["equal"]


def test_an_empty_latent_of_another_family_is_fitted(host: Host) -> None:
    prompt = {
        **start(),
        "four": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "a": our_sampler(steps=2),
        "b": our_sampler(steps=2, latent=["four", 0]),
        "compare": node("ProbeCompare", a=["a", 0], b=["b", 0]),
    }
    assert host.succeed(prompt).report()["equal"]


@pytest.mark.parametrize(("model", "steps"), [("mini", STEPS), ("mini schnell", 4)])
def test_a_core_loaded_model_gives_the_same_picture_in_our_sampler(host: Host, model: str, steps: int) -> None:
    file = "flux1-" + model.replace(" ", "-") + ".safetensors"
    prompt = {
        **start(model),
        "core": node("UNETLoader", unet_name=file, weight_dtype="default"),
        "ours": our_sampler(steps=steps),
        "theirs": our_sampler("core", steps=steps),
        "compare": node("ProbeCompare", a=["ours", 0], b=["theirs", 0]),
        **end("theirs"),
    }
    outcome = host.succeed(prompt)
    assert outcome.report()["largest"] < 1e-3 * outcome.report()["spread"]
    assert_shows(host.picture(prompt), REQUEST)


@pytest.mark.parametrize(("model", "steps"), [("mini", STEPS), ("mini schnell", 4)])
def test_the_engine_without_a_host_draws_the_picture_of_the_hosts_own_loader(
    host: Host, model: str, steps: int
) -> None:
    file = "flux1-" + model.replace(" ", "-") + ".safetensors"
    prompt = {
        **start(model),
        "core": node("UNETLoader", unet_name=file, weight_dtype="default"),
        "sample": our_sampler("core", steps=steps),
        **end(),
    }
    files = MINI if model == "mini" else MINI_SCHNELL
    [alone] = generate(open_mini(files), Request(prompt=PROMPT, seed=7, steps=steps, guidance=3.0))
    difference = np.abs(pixels(host.picture(prompt)).astype(int) - alone.pixels.numpy().astype(int))
    assert difference.max() <= LEVELS


def test_the_cores_sampler_gives_our_model_and_its_own_the_same_latent(host: Host) -> None:
    shift = {"max_shift": 1.15, "base_shift": 0.5, "width": 128, "height": 128}
    prompt = {
        **start(),
        "core": node("UNETLoader", unet_name="flux1-mini.safetensors", weight_dtype="default"),
        "shifted ours": node("ModelSamplingFlux", model=["load", 0], **shift),
        "shifted core": node("ModelSamplingFlux", model=["core", 0], **shift),
        "ours": core_sampler("shifted ours", cfg=2.0),
        "theirs": core_sampler("shifted core", cfg=2.0),
        "compare": node("ProbeCompare", a=["ours", 0], b=["theirs", 0]),
    }
    report = host.succeed(prompt).report()
    assert report["largest"] < 1e-3 * report["spread"]


def ours(model: str, steps: int, text: str) -> Prompt:
    """A graph of our nodes alone."""
    size = {"aspect": "128x128 (embedded model)", "megapixels": 1.0, "width": 1024, "height": 1024}
    return {
        "load": node("FluxFoundryLoadEmbedded", model=model),
        "text": node("FluxFoundryTextEncode", clip=["load", 1], prompt=text, guidance=3.0),
        "empty": node("FluxFoundryEmptyLatent", **size, batch_size=1),
        "sample": our_sampler(steps=steps),
        **end(decoder="FluxFoundryDecode"),
    }


@pytest.mark.parametrize(("model", "steps"), [("mini", STEPS), ("mini schnell", 4)])
@pytest.mark.parametrize(("text", "request_"), [(PROMPT, REQUEST), (OTHER_PROMPT, OTHER_REQUEST)])
def test_our_nodes_alone_draw_the_prompt(host: Host, model: str, steps: int, text: str, request_: object) -> None:
    assert_shows(host.picture(ours(model, steps, text)), request_)


def test_three_loaders_give_what_the_embedded_one_gives(host: Host) -> None:
    apart = {
        "model": node("FluxFoundryLoadModel", model="embedded: flux1-mini", dtype="auto"),
        "clip": node(
            "FluxFoundryLoadTextEncoders", clip_l="embedded: clip-mini", t5="embedded: t5-mini", t5_length="512"
        ),
        "vae": node("FluxFoundryLoadAutoencoder", vae="embedded: flux1-mini-ae"),
        "text 2": node("FluxFoundryTextEncode", clip=["clip", 0], prompt=PROMPT, guidance=3.0),
        "sample 2": our_sampler("model", positive=["text 2", 0]),
        "decode 2": node("FluxFoundryDecode", vae=["vae", 0], latent=["sample 2", 0]),
        "save 2": node("SaveImage", images=["decode 2", 0], filename_prefix="test"),
    }
    one, other = host.pictures({**ours("mini", STEPS, PROMPT), **apart})
    assert (pixels(one) == pixels(other)).all()


def test_text_encode_nodes_of_the_core_and_ours_agree(host: Host) -> None:
    prompt = {
        **start(),
        "ours": node("FluxFoundryTextEncode", clip=["load", 1], prompt=PROMPT, guidance=3.0),
        "flux": node("CLIPTextEncodeFlux", clip=["load", 1], clip_l=PROMPT, t5xxl=PROMPT, guidance=3.0),
        "a": our_sampler(steps=2, positive=["ours", 0]),
        "b": our_sampler(steps=2, positive=["flux", 0]),
        "compare": node("ProbeCompare", a=["a", 0], b=["b", 0]),
    }
    assert host.succeed(prompt).report()["equal"]


def test_a_picture_goes_in_and_comes_out_with_the_prompts_change(host: Host) -> None:
    base = ours("mini", STEPS, PROMPT)
    prompt = {
        **base,
        "encode": node("VAEEncode", vae=["load", 2], pixels=["decode", 0]),
        "kept": our_sampler(latent=["encode", 0], denoise=0.0),
        "other": node("FluxFoundryTextEncode", clip=["load", 1], prompt=OTHER_PROMPT, guidance=3.0),
        "some": our_sampler(latent=["encode", 0], positive=["other", 0], denoise=0.9, seed=8),
        "compare": node("ProbeCompare", a=["encode", 0], b=["kept", 0]),
        "decode 2": node("VAEDecodeTiled", vae=["load", 2], samples=["some", 0], tile_size=512, overlap=64,
                         temporal_size=64, temporal_overlap=8),
        "save 2": node("SaveImage", images=["decode 2", 0], filename_prefix="test"),
    }  # fmt: skip
    assert host.succeed(prompt).report()["equal"]
    for kept, request in (("save", REQUEST), ("save 2", OTHER_REQUEST)):
        one = {name: n for name, n in prompt.items() if name == kept or n["class_type"] != "SaveImage"}
        assert_shows(host.picture(one), request)
