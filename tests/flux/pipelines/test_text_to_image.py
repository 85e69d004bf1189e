"""A run from prompt to picture, on a tiny random model in real files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flux.errors import Cancelled, FileError, MismatchError, NumericError, UserError
from flux.models.flux1 import Flux1
from flux.pipelines.denoising import Hooks, denoise
from flux.pipelines.parts import open_transformer
from flux.pipelines.text_to_image import NOISES, Request, decode, generate, generate_each, plan_sigmas, round_size
from flux.sampling.noise import draw_noise
from flux.sampling.schedules import flux_schedule
from flux.sampling.solvers import SOLVERS
from flux.weights.binding import Binding
from tests.tiny import TINY, TINY_SCHNELL, open_tiny, write_module, write_tiny

SIDE, CELLS, STEPS = 32, 4, 3
BLOCKS = TINY.double_blocks + TINY.single_blocks


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(files):
    return open_tiny(files)


def asked(**settings):
    return Request(**({"prompt": "a red circle", "width": SIDE, "height": SIDE, "steps": STEPS, "seed": 5} | settings))


def pixels(model, **settings):
    return generate(model, asked(**settings))[0].pixels


def noise(seed=0, batch=1):
    return draw_noise((TINY.latent_channels, CELLS, CELLS), [seed + i for i in range(batch)])


def picture(seed=0):
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


# What is drawn


def test_a_run_gives_bytes_of_the_size_asked_for_and_its_settings(model):
    (result,) = generate(model, asked(width=48, guidance=2.0))
    assert result.pixels.shape == (SIDE, 48, 3)
    assert result.pixels.dtype == torch.uint8
    assert result.pixels.float().std() > 1
    expected = {"prompt": "a red circle", "width": 48, "height": SIDE, "steps": STEPS, "guidance": 2.0, "seed": 5}
    assert expected.items() <= result.settings.items()
    assert result.settings["sigmas"][0] == 1.0
    assert result.settings["sigmas"][-1] == 0.0


def test_the_same_request_gives_the_same_picture_and_another_seed_or_prompt_another(model):
    first = pixels(model)
    assert torch.equal(first, pixels(model))
    assert not torch.equal(first, pixels(model, seed=6))
    assert not torch.equal(first, pixels(model, prompt="two green stars"))
    assert not torch.equal(first, pixels(model, clip_prompt="two green stars"))


def test_picture_k_of_a_count_equals_a_run_of_its_own_with_its_seed(model):
    several = generate(model, asked(count=3))
    assert [result.seed for result in several] == [5, 6, 7]
    for result in several:
        assert torch.equal(result.pixels, pixels(model, seed=result.seed))


def test_weights_are_read_once_for_all_pictures_and_prompts(model, monkeypatch):
    read = []
    original = Binding.numbers
    monkeypatch.setattr(
        Binding, "numbers", lambda own, *rest: (read.append(" and ".join(own.sources)), original(own, *rest))[1]
    )
    generate(model, asked(count=3, negative="blue"))
    assert read
    counts = {name: read.count(name) for name in read if not name.startswith(("encoder.", "decoder."))}
    assert set(counts.values()) == {1}
    assert set(modulation_names(model.transformer)) <= counts.keys()


def test_a_run_that_is_left_half_way_lets_its_weights_go(model):
    pictures = generate_each(model, asked(count=3))
    next(pictures)
    assert model.transformer.residency.resident_bytes > 0
    pictures.close()
    assert model.transformer.residency.resident_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("style", NOISES)
def test_the_noise_is_drawn_in_the_style_that_was_asked_for(files, style, dtype):
    """Two half-denoised runs to the same end: what differs between them is the noise alone."""
    own = open_tiny(files, dtype)
    drawn = generate(own, asked(noise=style))[0].pixels
    spec = own.transformer.spec
    as_told = {"comfyui": torch.float32, "bfl": torch.bfloat16, "diffusers": dtype}[style]
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(1, spec.latent_channels, CELLS, CELLS, generator=generator, dtype=as_told).float()
    prompt = own.text.encode("a red circle", length=spec.t5_length)
    sigmas = plan_sigmas(spec, asked(), (SIDE // 16) ** 2)
    assert torch.equal(
        drawn, decode(own.autoencoder, denoise(own.transformer, prompt, start, sigmas, guidance=spec.guidance))[0]
    )


def test_pictures_come_one_by_one(model):
    steps = []
    pictures = generate_each(model, asked(count=2), Hooks(progress=lambda *event: steps.append(event)))
    next(pictures)
    assert sum(stage == "sampling" for stage, _, _ in steps) == STEPS


def test_an_empty_prompt_is_allowed(model):
    assert pixels(model, prompt="").shape == (SIDE, SIDE, 3)


def test_guidance_is_an_input_of_distilled_models_only(model, tmp_path):
    assert not torch.equal(pixels(model, guidance=1.0), pixels(model, guidance=8.0))
    schnell, told = open_tiny(write_tiny(tmp_path, TINY_SCHNELL)), []
    with_guidance = generate(schnell, asked(guidance=8.0), Hooks(warn=told.append))[0]
    assert torch.equal(with_guidance.pixels, pixels(schnell))
    assert told == ["Foundry Mini schnell (another size) has no guidance input: guidance 8 has no effect"]
    assert with_guidance.settings["guidance"] is None


def test_a_negative_prompt_changes_the_picture_and_cfg_1_ignores_it(model):
    plain, told = pixels(model), []
    against = pixels(model, negative="blue", cfg=4.0)
    assert not torch.equal(plain, against)
    assert not torch.equal(against, pixels(model, negative="two green stars", cfg=4.0))
    assert torch.equal(pixels(model, negative="blue"), pixels(model, negative="blue", cfg=3.0))
    ignored = generate(model, asked(negative="blue", cfg=1.0), Hooks(warn=told.append))[0].pixels
    assert torch.equal(plain, ignored)
    assert "no effect at cfg 1" in told[0]


def test_sizes_are_rounded_to_16_and_it_is_said(model):
    told = []
    (result,) = generate(model, asked(width=41, height=30), Hooks(warn=told.append))
    assert result.pixels.shape == (32, 48, 3)
    assert told == ["width 41 is not a multiple of 16: 48 is used", "height 30 is not a multiple of 16: 32 is used"]


@pytest.mark.parametrize(("value", "rounded"), [(1, 16), (16, 16), (23, 16), (24, 32), (100, 96), (104, 112)])
def test_halves_round_up_and_nothing_below_16(value, rounded):
    assert round_size(value) == rounded


def test_a_prompt_too_long_is_cut_and_it_is_said(model):
    told = []
    generate(model, asked(prompt="red circle " * 100), Hooks(warn=told.append))
    assert ["clip-mini takes 38" in told[0], "t5-mini takes 63" in told[1]] == [True, True]
    assert "reads all" not in "".join(told)


def test_a_negative_prompt_that_is_cut_is_called_by_its_name(model):
    told = []
    generate(model, asked(negative="red " * 50, cfg=2.0), Hooks(warn=told.append))
    said = "the negative prompt has 50 tokens, clip-mini takes 38: the last 12 were left out; t5-mini reads all of it"
    assert told == [said]


def test_explicit_sigmas_are_used_as_they_are(model):
    (result,) = generate(model, asked(steps=None, sigmas=[1.0, 0.6, 0.0]))
    assert result.settings["sigmas"] == [1.0, 0.6, 0.0]
    assert result.settings["schedule"] == "explicit"


def test_sigmas_that_begin_below_noise_need_a_picture(model):
    with pytest.raises(UserError, match="begin at 0.6 without a picture"):
        pixels(model, steps=None, sigmas=[0.6, 0.0])
    assert pixels(model, steps=None, sigmas=[0.6, 0.0], image=picture()).shape == (SIDE, SIDE, 3)


def test_sigmas_that_leave_noise_are_run_and_it_is_said(model):
    told = []
    generate(model, asked(steps=None, sigmas=[1.0, 0.2]), Hooks(warn=told.append))
    assert told == ["the sigmas end at 0.2, not at 0: that much noise stays in the picture"]


def test_a_prompt_for_clip_is_cut_by_clips_own_limit(model):
    told = []
    generate(model, asked(clip_prompt="red " * 80), Hooks(warn=told.append))
    assert told == ["the prompt has 80 tokens, clip-mini takes 38: the last 42 were left out"]
    told.clear()
    generate(model, asked(prompt="red " * 50), Hooks(warn=told.append))
    assert told == ["the prompt has 50 tokens, clip-mini takes 38: the last 12 were left out; t5-mini reads all of it"]


def test_weights_stored_as_whole_numbers_are_refused_by_name(tmp_path):
    def to_bytes(tensors):
        tensors["img_in.weight"] = tensors["img_in.weight"].to(torch.int8)

    files = write_tiny(tmp_path, change=to_bytes)
    with pytest.raises(FileError, match=r"img_in\.weight is I8 \[128, 64\]: packed numbers without their scales"):
        open_tiny(files)


def test_the_default_shift_comes_from_the_size_for_models_that_were_trained_so():
    assert plan_sigmas(TINY, asked(), 4096)[1] > plan_sigmas(TINY, asked(), 256)[1]
    assert plan_sigmas(TINY_SCHNELL, asked(), 4096) == flux_schedule(STEPS, None)
    assert plan_sigmas(TINY, asked(mu=0.0), 4096) == pytest.approx(flux_schedule(STEPS, None))


# Starting from a picture


def test_denoise_0_gives_the_picture_back_through_the_autoencoder(model):
    image = picture()
    with model.autoencoder.resident() as autoencoder, torch.inference_mode():
        there_and_back = autoencoder.decode(autoencoder.encode(image * 2 - 1))[0]
    expected = ((there_and_back.clamp(-1, 1) + 1) * 127.5).round()
    assert torch.equal(pixels(model, image=image, denoise=0.0).float(), expected.permute(1, 2, 0))


def test_less_denoise_stays_nearer_to_the_picture(model):
    image = picture()
    kept = pixels(model, image=image, denoise=0.0).float()
    distance = [(pixels(model, image=image, denoise=d).float() - kept).abs().mean() for d in (0.1, 0.5, 1.0)]
    assert 0 < distance[0] < distance[1] < distance[2]


def test_a_picture_sets_the_size_and_is_fitted_to_another(model):
    wide = torch.rand(1, 3, SIDE, 64)
    assert pixels(model, image=wide, width=None, height=None, denoise=0.5).shape == (SIDE, 64, 3)
    assert pixels(model, image=wide, denoise=0.5).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_mask_keeps_the_kept_latents_exactly(model, name):
    clean, mask = noise(1), torch.zeros(1, 1, CELLS, CELLS)
    mask[..., :2] = 1
    prompt = model.text.encode("a red circle", length=TINY.t5_length)
    sigmas = flux_schedule(STEPS, 0.5)
    out = denoise(model.transformer, prompt, noise(2), sigmas, solver_name=name, latents=clean, mask=mask)
    assert torch.equal(out[..., 2:], clean[..., 2:])
    assert not torch.isclose(out[..., :2], clean[..., :2]).any()


def test_a_mask_of_pixels_keeps_its_dark_side(model):
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1
    image = picture()
    changed = pixels(model, image=image, mask=mask)
    assert not torch.equal(changed, pixels(model, image=image, denoise=0.0))
    assert torch.equal(pixels(model, image=image, mask=torch.zeros_like(mask)), pixels(model, image=image, denoise=0.0))


# Tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SOLVERS)
def test_tables_and_the_direct_path_give_the_same_bits(files, model, name, dtype):
    part = open_transformer(files.transformer, torch.device("cpu"), dtype)
    positive, negative = (model.text.encode(text, length=TINY.t5_length) for text in ("a red circle", "blue"))

    def run(tables):
        return denoise(
            part, positive, noise(3, batch=2), flux_schedule(STEPS, 0.7), guidance=3.0, negative=negative, cfg=2.0,
            solver_name=name, tables=tables,
        )  # fmt: skip

    ahead, direct = run(tables=True), run(tables=False)
    assert torch.equal(ahead, direct)
    assert ahead.dtype == torch.float32


def modulation_names(part):
    return [f"{prefix}.{leaf}" for prefix in part.module.modulation_layers() for leaf in ("weight", "bias")]


def when_sampling(model, look):
    """Hooks that call ``look`` before every block, but not while weights come; and a handle that takes them off."""
    began = []
    handle = model.transformer.module.register_forward_pre_hook(lambda *_: began.append(None))
    return handle, Hooks(cancelled=lambda: bool(began) and look())


@pytest.mark.parametrize("tables", [True, False])
def test_modulation_weights_are_resident_while_sampling_only_without_tables(model, tables):
    part, seen = model.transformer, []
    every = sum(parameter.numel() * 4 for parameter in part.module.parameters())
    modulation = sum(part.module.get_parameter(name).numel() * 4 for name in modulation_names(part))

    def look():
        seen.append(part.residency.resident_bytes)
        return False

    prompt = model.text.encode("a red circle", length=TINY.t5_length)
    handle, hooks = when_sampling(model, look)
    with handle:
        denoise(part, prompt, noise(), flux_schedule(STEPS, 0.7), tables=tables, hooks=hooks)
    assert set(seen) == {every - modulation if tables else every}
    assert len(seen) == STEPS * (BLOCKS + 1)
    assert part.residency.resident_bytes == 0


def test_every_part_is_let_go_after_its_stage(model):
    generate(model, asked())
    parts = (model.transformer, model.autoencoder, model.text.clip, model.text.t5)
    assert [part.residency.resident_bytes for part in parts] == [0, 0, 0, 0]


# What the caller is told, and asked


def test_progress_tells_every_stage_and_step_in_order(model):
    told = []
    generate(model, asked(image=picture(), denoise=1.0), Hooks(progress=lambda *event: told.append(event)))
    loading = [event for event in told if event[0] == "loading"]
    count = loading[0][2]
    assert loading == [("loading", done, count) for done in range(count + 1)]
    first = told.index(loading[0])
    assert told[first : first + len(loading)] == loading
    assert [*told[:first], *told[first + len(loading) :]] == [
        ("text", 0, 1), ("text", 1, 1), ("encoding", 0, 1), ("encoding", 1, 1),
        *(("sampling", step, STEPS) for step in range(1, STEPS + 1)),
        ("decoding", 0, 1), ("decoding", 1, 1),
    ]  # fmt: skip


def test_previews_come_after_each_step_and_end_in_the_result(model):
    seen = []
    prompt = model.text.encode("a red circle", length=TINY.t5_length)
    hooks = Hooks(preview=lambda step, latents: seen.append((step, latents)))
    out = denoise(model.transformer, prompt, noise(), flux_schedule(STEPS, 0.7), hooks=hooks)
    assert [step for step, _ in seen] == [1, 2, 3]
    assert torch.equal(seen[-1][1], out)


@pytest.mark.parametrize("blocks", [0, 1, BLOCKS, BLOCKS + 1])
def test_cancelling_stops_before_the_next_block_and_lets_the_weights_go(model, blocks):
    asked_times, ran = [], []
    prompt = model.text.encode("a red circle", length=TINY.t5_length)

    def cancelled():
        asked_times.append(None)
        return len(asked_times) > blocks

    handle, hooks = when_sampling(model, cancelled)
    hooks = replace(hooks, progress=lambda *event: ran.append(event))
    with handle, pytest.raises(Cancelled):
        denoise(model.transformer, prompt, noise(), flux_schedule(STEPS, 0.7), hooks=hooks)
    assert len(asked_times) == blocks + 1
    assert sum(stage == "sampling" for stage, _, _ in ran) == blocks // BLOCKS
    assert model.transformer.residency.resident_bytes == 0


@pytest.mark.parametrize("moment", ["text", "loading", "tables"])
def test_cancelling_is_heard_while_weights_come(model, moment):
    """A released file of 24 GB takes long to read."""
    parts = (model.text.clip, model.text.t5, model.transformer)
    apart = sum(model.transformer.module.get_parameter(n).numel() * 4 for n in modulation_names(model.transformer))
    every = sum(parameter.numel() * 4 for parameter in model.transformer.module.parameters()) - apart

    def cancelled():
        text, blocks = (parts[0].residency.resident_bytes, parts[2].residency.resident_bytes)
        return {"text": text > 0, "loading": 0 < blocks < every, "tables": blocks == every}[moment]

    told = []
    with pytest.raises(Cancelled):
        generate(model, asked(), Hooks(progress=lambda *event: told.append(event), cancelled=cancelled))
    assert not any(stage == "sampling" for stage, _, _ in told)
    assert [part.residency.resident_bytes for part in parts] == [0, 0, 0]


def test_a_run_that_is_cancelled_at_once_does_nothing(model):
    told = []
    with pytest.raises(Cancelled):
        generate(model, asked(), Hooks(progress=lambda *event: told.append(event), cancelled=lambda: True))
    assert told == []


# What cannot be done


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "0 steps"),
        ({"steps": -3}, "-3 steps"),
        ({"seed": -1}, "outside 0 to"),
        ({"seed": 2**64}, "outside 0 to"),
        ({"count": 0}, "count is 0"),
        ({"width": 0}, "width is 0"),
        ({"height": 100_000}, "height is 100000"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"denoise": 0.5}, "without a picture"),
        ({"mask": torch.ones(1, 1, SIDE, SIDE)}, "without a picture"),
        ({"solver": "leapfrog"}, "leapfrog"),
        ({"schedule": "karras"}, "karras"),
        ({"noise": "pink"}, "pink"),
        ({"noise": "comfyui_batch"}, "comfyui_batch"),
        ({"seed": 1.5}, "seed is 1.5; give a whole number"),
        ({"steps": 4.0}, "steps is 4.0; give a whole number"),
        ({"image": torch.rand(3, SIDE, SIDE)}, f"the image has shape (3, {SIDE}, {SIDE}); give (B, 3, H, W)"),
        ({"image": torch.rand(1, SIDE, SIDE, 3)}, "give (B, 3, H, W)"),
        ({"image": picture(), "mask": torch.ones(SIDE, SIDE)}, "give (B, 1, H, W)"),
        ({"sigmas": [0.1, 0.9]}, "0.9"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_stage(model, settings, words):
    told = []
    with pytest.raises(UserError) as caught:
        generate(model, asked(**settings), Hooks(progress=lambda *event: told.append(event)))
    assert words in str(caught.value)
    assert told == []


def test_a_model_that_needs_another_picture_is_refused(files):
    model = open_tiny(files)
    model.transformer.spec = replace(model.transformer.spec, in_channels=128)
    with pytest.raises(MismatchError, match="takes 128 input channels"):
        generate(model, asked())


def test_numbers_that_are_not_finite_stop_the_run_at_their_step(tmp_path):
    def spoil(tensors):
        tensors["final_layer.linear.bias"][0] = float("nan")

    model, told = open_tiny(write_tiny(tmp_path, change=spoil)), []
    with pytest.raises(NumericError, match=r"step 1 of 3 .* try another dtype"):
        generate(model, asked(), Hooks(progress=lambda *event: told.append(event)))
    assert ("sampling", 1, STEPS) not in told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("txt_in.bias"), "lacks tensors: txt_in.bias"),
        (
            lambda t: t.update({"extra.weight": torch.zeros(1)}),
            "has tensors that FLUX.1 in Black Forest Labs' names does not have: extra.weight",
        ),
        (lambda t: t.update({"txt_in.bias": torch.zeros(3)}), "another shape: txt_in.bias [3] in place of [128]"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_when_it_is_opened(tmp_path, change, words):
    path = write_module(tmp_path / "odd.safetensors", Flux1(TINY), change=change)
    with pytest.raises(FileError) as caught:
        open_transformer(path, torch.device("cpu"))
    assert words in str(caught.value)


def test_scales_below_a_prefix_are_not_left_out_silently(tmp_path):
    """A weight without its scale draws nothing that anybody asked for."""

    def wrap(tensors):
        inner = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(inner | {"model.diffusion_model.img_in.scale_weight": torch.ones(1)})

    path = write_module(tmp_path / "whole.safetensors", Flux1(TINY), change=wrap)
    with pytest.raises(
        FileError,
        match=r"img_in\.weight is F32 \[128, 64\] with model\.diffusion_model\.img_in\.scale_weight beside it",
    ):
        open_transformer(path, torch.device("cpu"))
