"""What the bridge promises of a run: tables, patches, masks, seeds, LoRA, and clear words where something is wrong."""

from __future__ import annotations

import shutil

import pytest
import torch
from client import Host, Prompt, RefusedError
from graph import core_sampler, node, our_sampler, start
from safetensors.torch import save_file

from flux.mini.files import MINI
from flux.models.autoencoder import Autoencoder
from flux.models.text.clip import ClipText
from flux.ops.layers import on_meta
from flux.specs.autoencoder import FLUX1 as FLUX1_AE
from flux.specs.text import CLIP_L
from tests.tiny import write_header_only


def same(latent: str) -> dict:
    """An output node, so that what is before it runs."""
    return node("ProbeCompare", a=[latent, 0], b=[latent, 0])


def compared(host: Host, a: dict, b: dict, **more: dict) -> dict:
    prompt = {**start(), **more, "a": a, "b": b, "compare": node("ProbeCompare", a=["a", 0], b=["b", 0])}
    return host.succeed(prompt).report()


@pytest.mark.parametrize("what", ["direct", "identity blocks"])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_tables_and_patched_blocks_give_the_same_bits_as_the_plain_run(host: Host, what: str, cfg: float) -> None:
    other = {
        "other": node("ProbeModel", model=["load", 0], what=what),
        "negative": node("CLIPTextEncode", clip=["load", 1], text="(a green:1.3) star"),
    }
    settings = {"steps": 3, "cfg": cfg, "negative": ["negative", 0]}
    assert compared(host, core_sampler(**settings), core_sampler("other", **settings), **other)["equal"]


@pytest.mark.parametrize("what", ["control", "attention patches", "other attention", "input patch", "rope options"])
def test_patches_of_other_nodes_do_to_our_model_what_they_do_to_the_cores(host: Host, what: str) -> None:
    more = {
        "core": node("UNETLoader", unet_name="flux1-mini.safetensors", weight_dtype="default"),
        "our other": node("ProbeModel", model=["load", 0], what=what),
        "their other": node("ProbeModel", model=["core", 0], what=what),
    }
    patched = our_sampler("our other", steps=3)
    report = compared(host, patched, our_sampler("their other", steps=3), **more)
    assert report["largest"] < 1e-3 * report["spread"]
    report = compared(host, patched, our_sampler(steps=3), **more)
    assert report["largest"] > 1e-2 * report["spread"]


def test_a_controlnet_without_strength_changes_no_bit(host: Host) -> None:
    other = {"other": node("ProbeModel", model=["load", 0], what="zero control")}
    assert compared(host, our_sampler(steps=3), our_sampler("other", steps=3), **other)["equal"]


@pytest.mark.parametrize("sampler", [core_sampler, our_sampler])
def test_modulations_of_the_whole_schedule_are_made_ahead(host: Host, sampler: object) -> None:
    other = {"other": node("ProbeModel", model=["load", 0], what="watch table")}
    sample = sampler("other", steps=3, seed=103 if sampler is our_sampler else 104)
    prompt = {**start(), **other, "sample": sample, "out": node("ProbeTable", latent=["sample", 0])}
    assert host.succeed(prompt).report()["moments"] == [3, 3, 3]


def test_a_solver_with_times_between_the_sigmas_is_served(host: Host) -> None:
    other = {"other": node("ProbeModel", model=["load", 0], what="direct")}
    settings = {"steps": 3, "sampler_name": "dpm_2"}
    assert compared(host, core_sampler(**settings), core_sampler("other", **settings), **other)["equal"]


def test_each_picture_of_a_batch_is_the_one_of_its_own_seed(host: Host) -> None:
    # Batches of one size are compared: a single picture's sums are rounded in another order.
    more = {
        "two": node("EmptySD3LatentImage", width=96, height=136, batch_size=2),
        "from seven": our_sampler(steps=3, seed=7, latent=["two", 0]),
        "from eight": our_sampler(steps=3, seed=8, latent=["two", 0]),
    }
    second, first = (
        node("ProbePick", latent=[name, 0], index=index) for name, index in (("from seven", 1), ("from eight", 0))
    )
    report = compared(host, second, first, **more)
    assert report["largest"] < 1e-5 * report["spread"]


def test_a_picked_picture_keeps_its_seed(host: Host) -> None:
    more = {
        "two": node("EmptySD3LatentImage", width=128, height=128, batch_size=2),
        "picked": node("LatentFromBatch", samples=["two", 0], batch_index=1, length=1),
    }
    report = compared(host, our_sampler(steps=2, latent=["picked", 0]), our_sampler(steps=2, seed=8), **more)
    assert report["equal"]


def test_what_a_mask_keeps_stays_as_it_was_to_the_bit(host: Host) -> None:
    prompt = {
        **start(),
        "grey": node("EmptyImage", width=128, height=128, batch_size=1, color=0x804020),
        "latent": node("VAEEncode", vae=["load", 2], pixels=["grey", 0]),
        "whole": node("SolidMask", value=0.0, width=128, height=128),
        "part": node("SolidMask", value=1.0, width=64, height=128),
        "mask": node("MaskComposite", destination=["whole", 0], source=["part", 0], x=0, y=0, operation="add"),
        "masked": node("SetLatentNoiseMask", samples=["latent", 0], mask=["mask", 0]),
        "sample": our_sampler(latent=["masked", 0], steps=3),
        "compare": node("ProbeCompare", a=["sample", 0], b=["latent", 0], mask=["mask", 0]),
    }
    report = host.succeed(prompt).report()
    assert report["kept"] > 0
    assert report["kept_largest"] == 0
    assert report["largest"] > 0


@pytest.mark.parametrize("name", ["diffusion_model.single_blocks.0.linear1", "lora_unet_single_blocks_0_linear1"])
def test_a_lora_acts_by_its_strength_and_leaves_nothing_behind(host: Host, name: str) -> None:
    down, up = ("lora_A", "lora_B") if "." in name else ("lora_down", "lora_up")
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{name}.{down}.weight": torch.randn(4, 256, generator=generator),
        f"{name}.{up}.weight": torch.randn(1792, 4, generator=generator),
    }
    file = f"{down}.safetensors"
    save_file(tensors, host.base / "models" / "loras" / file)
    more = {
        "lora": node("LoraLoaderModelOnly", model=["load", 0], lora_name=file, strength_model=0.5),
        "none": node("LoraLoaderModelOnly", model=["load", 0], lora_name=file, strength_model=0.0),
    }
    plain = our_sampler(steps=2)
    assert compared(host, our_sampler("lora", steps=2), plain, **more)["largest"] > 1e-3
    assert compared(host, our_sampler("none", steps=2), plain, **more)["equal"]
    assert compared(host, our_sampler(steps=2, seed=9), our_sampler(steps=2, seed=9))["equal"]


def failure(host: Host, prompt: Prompt) -> str:
    outcome = host.run({**prompt, "out": same("sample")})
    assert outcome.status == "error"
    return outcome.error


@pytest.mark.parametrize("sampler", [core_sampler, our_sampler])
def test_conditioning_of_another_family_is_refused_with_its_width(host: Host, sampler: object) -> None:
    prompt = {**start(), "text": node("ProbeConditioning", width=2048, pooled=1280, length=77), "sample": sampler()}
    message = failure(host, prompt)
    assert "width 2048" in message
    assert "Foundry Mini takes 192" in message


def test_conditioning_of_another_family_is_refused_for_a_core_loaded_model(host: Host) -> None:
    prompt = {
        **start(),
        "core": node("UNETLoader", unet_name="flux1-mini.safetensors", weight_dtype="default"),
        "text": node("ProbeConditioning", width=2048, pooled=1280, length=77),
        "sample": our_sampler("core"),
    }
    assert "width 2048" in failure(host, prompt)


@pytest.mark.parametrize("sampler", [our_sampler, core_sampler])
def test_numbers_that_are_not_finite_stop_the_run_at_their_step(host: Host, sampler: object) -> None:
    prompt = {
        **start(),
        "bad": node("ProbeModel", model=["load", 0], what="nan"),
        "sample": sampler("bad", steps=5),
    }
    message = failure(host, prompt)
    assert message.startswith("step 1 of 5 gave numbers that are not finite")
    assert "dtype" in message


def test_a_run_that_begins_in_the_middle_without_a_picture_is_told_of(host: Host) -> None:
    host.succeed({**start(), "sample": our_sampler(steps=2, denoise=0.5), "out": same("sample")})
    assert "with an empty latent, so it goes on from plain grey" in (host.base / "log.txt").read_text()


def test_a_latent_with_other_channels_is_refused_by_decoders(host: Host) -> None:
    four = node("EmptyLatentImage", width=128, height=128, batch_size=1)
    tiles = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    for decoder, name, more in (
        ("VAEDecode", "samples", {}),
        ("VAEDecodeTiled", "samples", tiles),
        ("FluxFoundryDecode", "latent", {}),
    ):
        prompt = {
            **start(),
            "four": four,
            "decode": node(decoder, vae=["load", 2], **{name: ["four", 0]}, **more),
            "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
        }
        outcome = host.run(prompt)
        assert outcome.status == "error"
        assert "4 channels" in outcome.error


def test_a_latent_with_other_channels_is_refused_by_our_sampler(host: Host) -> None:
    latent = {"four": node("ProbeForeignLatent", channels=4)}
    sample = our_sampler(steps=2, latent=["four", 0])
    message = failure(host, {**start(), **latent, "sample": sample, "out": same("sample")})
    assert "4 channels" in message
    assert "16" in message


def test_a_file_that_is_something_else_is_named(host: Host) -> None:
    folder = host.base / "models" / "diffusion_models"
    shutil.copy(MINI.clip, folder / "a-clip.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "flux1-mini.safetensors").read_bytes()[:100_000])
    for file, words in (("a-clip.safetensors", "text encoder"), ("cut.safetensors", "cut off")):
        prompt = {
            **start(),
            "model": node("FluxFoundryLoadModel", model=file, dtype="auto"),
            "sample": our_sampler("model"),
        }
        message = failure(host, prompt)
        assert file in message
        assert words in message


def test_a_name_that_no_folder_has_is_not_taken(host: Host) -> None:
    prompt = {
        **start(),
        "model": node("FluxFoundryLoadModel", model="../secret.safetensors", dtype="auto"),
        "sample": our_sampler("model"),
        "out": same("sample"),
    }
    with pytest.raises(RefusedError, match="value_not_in_list"):
        host.queue(prompt)


def test_a_size_off_the_grid_is_rounded_and_runs(host: Host) -> None:
    prompt = {
        **start(),
        "empty": node("FluxFoundryEmptyLatent", aspect="exact width and height", megapixels=1.0, width=130, height=120,
                      batch_size=1),
        "grid": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "a": our_sampler(steps=2),
        "b": our_sampler(steps=2, latent=["grid", 0]),
        "compare": node("ProbeCompare", a=["a", 0], b=["b", 0]),
    }  # fmt: skip
    assert host.succeed(prompt).report()["equal"]
    assert "130 x 120 is not a multiple of 16: 128 x 128 is used" in (host.base / "log.txt").read_text()


def test_a_prompt_that_is_too_long_is_cut_and_said(host: Host) -> None:
    host.succeed({**start(text="red circle " * 60), "sample": our_sampler(steps=1), "out": same("sample")})
    assert "T5 takes 63: the last" in (host.base / "log.txt").read_text()


def test_a_prompt_that_only_clip_cuts_is_said_too(host: Host) -> None:
    host.succeed({**start(text="red " * 50), "sample": our_sampler(steps=1), "out": same("sample")})
    said = "CLIP-L takes 38: the last 12 were left out; T5 reads all of it"
    assert said in (host.base / "log.txt").read_text()


def test_a_prompt_of_its_own_for_clip_is_cut_by_clips_limit_and_said(host: Host) -> None:
    text = node("FluxFoundryTextEncode", clip=["load", 1], prompt="a red star", clip_prompt="red " * 80, guidance=3.0)
    log = host.base / "log.txt"
    before = len(log.read_text())
    host.succeed({**start(), "text": text, "sample": our_sampler(steps=1), "out": same("sample")})
    said = log.read_text()[before:]
    assert "CLIP-L takes 38: the last 42" in said
    assert "T5 takes" not in said


def test_an_empty_prompt_is_allowed(host: Host) -> None:
    host.succeed({**start(text=""), "sample": our_sampler(steps=1), "out": same("sample")})


def test_more_steps_than_a_table_holds_give_the_bits_of_the_direct_run(host: Host) -> None:
    other = {"other": node("ProbeModel", model=["load", 0], what="direct")}
    empty = {"empty": node("EmptySD3LatentImage", width=16, height=16, batch_size=1)}
    settings = {"steps": 70}
    assert compared(host, core_sampler(**settings), core_sampler("other", **settings), **other, **empty)["equal"]


def test_a_latent_of_another_autoencoder_is_refused_by_name(host: Host) -> None:
    prompt = {
        **start(),
        "foreign": node("ProbeForeignLatent", channels=16),
        "decode": node("FluxFoundryDecode", vae=["load", 2], latent=["foreign", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
    }
    outcome = host.run(prompt)
    assert outcome.error.endswith("load flux1-ae with Load FLUX Autoencoder")


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a cat",
        "",
        "(very (red:1.2)) fox, 50% off! naïve café",
        "A  Sign that\nsays \\(OPEN\\) 日本",
        "x " * 60,
    ],
)
def test_real_encoders_get_the_tokens_and_weights_that_the_host_gives_its_own(host: Host, text: str) -> None:
    report = host.succeed({"tokens": node("ProbeTokens", text=text)}).report()
    assert report["ours"] == report["theirs"]


def another_size(host: Host, name: str, folder: str, build: object, spec: object) -> str:
    """A part of another model in one of the host's folders, all zeros."""
    with on_meta():
        shapes = {key: tuple(p.shape) for key, p in build(spec).named_parameters()}
    write_header_only(host.base / "models" / folder / name, shapes)
    return name


def test_a_file_in_the_wrong_loader_is_named_with_those_of_the_users_that_fit(host: Host) -> None:
    shutil.copy(MINI.t5, host.base / "models" / "diffusion_models" / "misplaced.safetensors")
    prompt = {"load": node("FluxFoundryLoadModel", model="misplaced.safetensors", dtype="auto")}
    prompt["save"] = node("FluxFoundrySaveModel", model=["load", 0], filename_prefix="x", format="bf16", layout="bfl")
    error = host.run(prompt).error
    assert (
        "misplaced.safetensors is Foundry Mini's T5 text encoder, but a FLUX.1 diffusion model is needed here" in error
    )
    assert "of your files these fit: " in error
    assert "flux1-mini.safetensors" in error


def test_text_of_another_models_encoders_is_refused_with_both_files(host: Host) -> None:
    clip = another_size(host, "big-clip.safetensors", "text_encoders", ClipText, CLIP_L)
    encoders = node("FluxFoundryLoadTextEncoders", clip_l=clip, t5="embedded: t5-mini", t5_length="512")
    text = node("CLIPTextEncode", clip=["encoders", 0], text="a red circle")
    for sampler in (our_sampler, core_sampler):
        message = failure(host, {**start(), "encoders": encoders, "text": text, "sample": sampler(steps=1)})
        assert (
            "big-clip.safetensors is the CLIP-L text encoder, but flux1-mini.safetensors is the Foundry Mini" in message
        )
        assert "of your files these fit: " in message
        assert message.endswith("embedded: clip-mini")  # the user's own stand before it


def test_a_latent_is_refused_by_another_models_autoencoder_with_both_files(host: Host) -> None:
    vae = node("FluxFoundryLoadAutoencoder", vae=another_size(host, "big-ae.safetensors", "vae", Autoencoder, FLUX1_AE))
    prompt = {**start(), "sample": our_sampler(steps=1), "vae": vae}
    outcome = host.run({**prompt, "out": node("FluxFoundryDecode", vae=["vae", 0], latent=["sample", 0]),
                        "see": node("PreviewImage", images=["out", 0])})  # fmt: skip
    assert "big-ae.safetensors is the FLUX.1 autoencoder (VAE), but flux1-mini.safetensors is" in outcome.error
    assert "of your files these fit: embedded: flux1-mini-ae" in outcome.error


def test_inspect_tells_whether_a_lora_goes_with_the_model(host: Host) -> None:
    write_header_only(
        host.base / "models" / "loras" / "xl.safetensors",
        {
            f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_{side}.weight": (4, 4)
            for side in ("up", "down")
        },
    )
    own = {"diffusion_model.single_blocks.0.linear1.lora_A.weight": (4, 256),
           "diffusion_model.single_blocks.0.linear1.lora_B.weight": (1792, 4)}  # fmt: skip
    write_header_only(host.base / "models" / "loras" / "own.safetensors", own)
    for name, words in (
        ("xl", "fits: no, xl.safetensors is a LoRA"),
        ("own", "fits: nothing speaks against flux1-mini"),
    ):
        inspect = node("FluxFoundryInspectFile", file=f"loras: {name}.safetensors", model=["load", 0])
        [text] = [out["text"] for out in host.succeed({**start(), "out": inspect}).outputs.values()]
        assert words in (text if isinstance(text, str) else text[0])
