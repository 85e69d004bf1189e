"""Fill, control, styles and references against diffusers' pipelines, called whole, and against the rules themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)

from flux.adapters.guides import Reference, StyleTokens
from flux.models.autoencoder import Autoencoder
from flux.models.flux1 import Flux1
from flux.models.positions import LAYOUTS
from flux.pipelines.denoising import prepared, walk
from flux.pipelines.guided import ControlInput, FillInput, ReferenceInput, guidance_of
from flux.pipelines.parts import open_autoencoder, open_transformer
from flux.pipelines.prompts import EncodedPrompt
from flux.sampling.noise import draw_noise
from flux.sampling.packing import pack
from flux.sampling.schedules import flux1_mu, flux_schedule
from flux.specs.autoencoder import AUTOENCODERS
from tests.oracles import TOLERANCE, autoencoder_oracle, flux1_oracle, relative_error, rows
from tests.tiny import TINY, write_module

CPU = torch.device("cpu")
HEIGHT, WIDTH = 32, 48  # pixels: 2 x 3 tokens
CELLS = (HEIGHT // 8, WIDTH // 8)
STEPS, GUIDANCE, SEED = 3, 7.5, 5
WALK_TOLERANCE = 1e-4  # of relative_error, after all steps
TELLS_APART = 1e-3  # what is not the same differs by more than this
MU = flux1_mu(CELLS[0] * CELLS[1] // 4)
PROMPT = EncodedPrompt(rows(1, 9, TINY.context_width, seed=2), rows(1, TINY.pooled_width, seed=3))
NEGATIVE = EncodedPrompt(rows(1, 9, TINY.context_width, seed=12), rows(1, TINY.pooled_width, seed=13))
CHANNELS = {"draw": 64, "control": 128, "fill": 384}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Transformers by what they do."""
    folder = tmp_path_factory.mktemp("parity")
    return {
        task: open_transformer(
            write_module(folder / f"{task}.safetensors", Flux1(replace(TINY, in_channels=channels)), 1), CPU
        )
        for task, channels in CHANNELS.items()
    }


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parity-ae") / "ae.safetensors"
    return open_autoencoder(write_module(path, Autoencoder(AUTOENCODERS["flux1-mini-ae"]), 4), CPU)


def picture(seed, height=HEIGHT, width=WIDTH, batch=1):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def soft_mask(seed=21, batch=1):
    """Values all over 0..1, of which some are 0, 1, and just a half."""
    mask = torch.rand(batch, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
    mask[..., :9, :], mask[..., 20:, 30:] = 0, 1
    mask[..., 10:13, 5:40] = 0.5
    return mask


def noise(batch=1):
    return draw_noise((TINY.latent_channels, *CELLS), [31 + index for index in range(batch)])


def oracles(part, autoencoder):
    """diffusers' transformer and autoencoder with the same weights."""
    with part.resident() as transformer, autoencoder.resident() as coder:
        return flux1_oracle(transformer), autoencoder_oracle(coder)


def called_whole(kind, part, autoencoder, batch=1, **given):
    """The first velocity and the final latents, as tokens, of a pipeline of diffusers."""
    transformer, vae = oracles(part, autoencoder)
    pipeline = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae, transformer=transformer,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    velocities = []
    transformer.register_forward_hook(lambda _module, _given, out: velocities.append(out[0]))
    embeddings = {"prompt_embeds": PROMPT.tokens, "pooled_prompt_embeds": PROMPT.pooled} | given
    for name in [name for name in embeddings if name.endswith("prompt_embeds")]:
        embeddings[name] = embeddings[name].expand(batch, *embeddings[name].shape[1:])
    end = pipeline(
        height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=pack(noise(batch)),
        generator=torch.Generator().manual_seed(SEED), output_type="latent", **embeddings,
    ).images  # fmt: skip
    return velocities[0][:, : end.shape[1]], end


def run(part, autoencoder, inputs, batch=1, layout="offset", **settings):
    """The same by the engine."""
    sigmas = flux_schedule(STEPS, MU)
    guided = guidance_of(inputs, autoencoder, (HEIGHT, WIDTH), layout=layout, seed=SEED)
    with torch.inference_mode(), prepared(part, PROMPT, sigmas, guidance=GUIDANCE, guided=guided, **settings) as field:
        return pack(field(noise(batch), 1.0)), pack(walk(field, noise(batch), sigmas, device=CPU))


def by_hand(transformer, behind, references=None, reference_ids=None):
    """The same by diffusers' transformer, called with tokens that a test put together, and Euler steps.

    Args:
        transformer: The oracle.
        behind: What stands behind each token's noisy channels (1, I, ...); None for nothing.
        references: Further tokens (1, R, 64), and their ids (R, 3).
        reference_ids: See there.
    """
    sigmas, tokens = flux_schedule(STEPS, MU), pack(noise())
    count, columns = tokens.shape[1], CELLS[1] // 2
    ids = torch.tensor([[0.0, index // columns, index % columns] for index in range(count)])
    first = None
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        image = tokens if behind is None else torch.cat((tokens, behind), dim=2)
        image = image if references is None else torch.cat((image, references), dim=1)
        velocity = transformer(
            hidden_states=image,
            encoder_hidden_states=PROMPT.tokens,
            pooled_projections=PROMPT.pooled,
            timestep=torch.tensor([sigma]),
            guidance=torch.tensor([GUIDANCE]),
            img_ids=ids if reference_ids is None else torch.cat((ids, reference_ids)),
            txt_ids=torch.zeros(PROMPT.tokens.shape[1], 3),
        ).sample[:, :count]
        first = velocity if first is None else first
        tokens = tokens + (after - sigma) * velocity
    return first, tokens


def assert_same(ours, theirs):
    assert relative_error(ours[0], theirs[0]) <= TOLERANCE
    assert relative_error(ours[1], theirs[1]) <= WALK_TOLERANCE


def differ(one, other):
    return all(relative_error(a, b) > TELLS_APART for a, b in zip(one, other, strict=True))


# Fill.


@pytest.mark.parametrize("batch", [1, 2])
def test_fill_with_binary_masks_and_samples_equals_diffusers(parts, autoencoder, batch):
    photo, mask = picture(1, batch=batch), soft_mask(batch=batch)
    theirs = called_whole(
        FluxFillPipeline, parts["fill"], autoencoder, batch, image=photo.clone(), mask_image=mask.clone()
    )
    given = FillInput(picture=photo, mask=mask, rounding="binary", posterior="sample")
    assert_same(run(parts["fill"], autoencoder, [given], batch), theirs)


def fill_tokens(vae, photo, mask, hidden):
    """What stands behind the noisy channels of Fill's tokens (1, I, 320), number by number as BFL's code lays it out.

    Args:
        vae: diffusers' autoencoder.
        photo: (1, 3, H, W) in 0..1.
        mask: (1, 1, H, W): what the model is told.
        hidden: (1, 1, H, W): what is grey.
    """
    mode = vae.encode((photo * 2 - 1) * (1 - hidden)).latent_dist.mode()
    latents = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    tokens = []
    for row in range(0, CELLS[0], 2):
        for column in range(0, CELLS[1], 2):
            cells = [(row + down, column + right) for down in (0, 1) for right in (0, 1)]
            token = [latents[0, channel, y, x] for channel in range(16) for y, x in cells]
            token += [mask[0, 0, 8 * y + pixel // 8, 8 * x + pixel % 8] for pixel in range(64) for y, x in cells]
            tokens.append(torch.stack(token))
    return torch.stack(tokens)[None]


@pytest.mark.parametrize("rounding", ["soft", "hidden"])
def test_fill_equals_black_forest_labs_and_comfyuis_way(parts, autoencoder, rounding):
    """Soft masks as they are; or the pixels below the rounded mask hidden, and the model told of the soft one."""
    transformer, vae = oracles(parts["fill"], autoencoder)
    photo, mask = picture(1), soft_mask()
    behind = fill_tokens(vae, photo, mask, mask if rounding == "soft" else mask.round())
    given = FillInput(picture=photo, mask=mask, rounding=rounding)
    assert_same(run(parts["fill"], autoencoder, [given]), by_hand(transformer, behind))


def test_the_ways_of_fill_are_not_the_same_and_black_forest_labs_is_the_default(parts, autoencoder):
    def filled(**how):
        return run(parts["fill"], autoencoder, [FillInput(picture=picture(1), mask=soft_mask(), **how)])

    default = filled()
    assert all(torch.equal(a, b) for a, b in zip(default, filled(rounding="soft", posterior="mean"), strict=True))
    ways = [default, filled(rounding="hidden"), filled(rounding="binary"), filled(posterior="sample")]
    assert all(differ(one, other) for index, one in enumerate(ways) for other in ways[:index])


# Control.


@pytest.mark.parametrize("batch", [1, 2])
def test_control_with_samples_equals_diffusers(parts, autoencoder, batch):
    edges = picture(2, batch=batch)
    theirs = called_whole(FluxControlPipeline, parts["control"], autoencoder, batch, control_image=edges * 2 - 1)
    given = ControlInput(picture=edges, posterior="sample")
    assert_same(run(parts["control"], autoencoder, [given], batch), theirs)


def test_control_with_means_equals_black_forest_labs_way(parts, autoencoder):
    transformer, vae = oracles(parts["control"], autoencoder)
    edges = picture(2)
    latents = (vae.encode(edges * 2 - 1).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    theirs = by_hand(transformer, pack(latents))
    assert_same(run(parts["control"], autoencoder, [ControlInput(picture=edges)]), theirs)
    assert differ(run(parts["control"], autoencoder, [ControlInput(picture=edges, posterior="sample")]), theirs)


# Styles.


@pytest.mark.parametrize("batch", [1, 2])
def test_style_tokens_stand_behind_the_prompts(parts, autoencoder, batch):
    style = rows(1, 5, TINY.context_width, seed=7)
    joined = torch.cat((PROMPT.tokens, style), dim=1)
    theirs = called_whole(FluxPipeline, parts["draw"], autoencoder, batch, prompt_embeds=joined)
    assert_same(run(parts["draw"], autoencoder, [StyleTokens(tokens=style)], batch), theirs)


# References.


def edge_padded(photo):
    """Up to the next multiples of 16 by the last row and column."""
    height, width = photo.shape[-2:]
    return torch.from_numpy(np.pad(photo.numpy(), [(0, 0), (0, 0), (0, -height % 16), (0, -width % 16)], mode="edge"))


SIDES = {"of its size": (HEIGHT, WIDTH), "other": (64, 16), "odd": (39, 21), "less than a token": (5, 80)}


@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize("batch", [1, 2])
def test_one_reference_equals_kontext_of_diffusers(parts, autoencoder, batch, size):
    photo = picture(3, *SIDES[size], batch=batch)
    theirs = called_whole(
        FluxKontextPipeline, parts["draw"], autoencoder, batch,
        image=edge_padded(photo), max_area=HEIGHT * WIDTH, _auto_resize=False,
    )  # fmt: skip
    assert_same(run(parts["draw"], autoencoder, [ReferenceInput(picture=photo)], batch), theirs)


def test_a_reference_is_in_both_passes_of_true_guidance_as_in_diffusers(parts, autoencoder):
    photo, scale = picture(3), 2.5
    theirs = called_whole(
        FluxKontextPipeline, parts["draw"], autoencoder,
        image=photo, max_area=HEIGHT * WIDTH, _auto_resize=False, true_cfg_scale=scale,
        negative_prompt_embeds=NEGATIVE.tokens, negative_pooled_prompt_embeds=NEGATIVE.pooled,
    )  # fmt: skip
    ours = run(parts["draw"], autoencoder, [ReferenceInput(picture=photo)], negative=NEGATIVE, cfg=scale)
    assert relative_error(ours[1], theirs[1]) <= WALK_TOLERANCE
    assert differ(ours, run(parts["draw"], autoencoder, [ReferenceInput(picture=photo)]))


def comfyui_ids(sizes, image, method):
    """Ids of references' tokens, and their padded latent sizes, by ComfyUI's rule (comfy/ldm/flux/model.py).

    Sizes are in latent cells.
    """

    def halved(cells):
        return (cells + 1) // 2

    h = w = index = 0
    ids = []
    for height, width in sizes:
        h_offset = w_offset = 0
        if method == "index":
            index += 1
        elif method == "uxo":
            h_offset, w_offset = 2 * halved(image[0]) + h, 2 * halved(image[1]) + w
            h, w = h + height, w + width
        else:
            index = 1
            if height + h > width + w:
                w_offset = w
            else:
                h_offset = h
            h, w = max(h, height + h_offset), max(w, width + w_offset)
        lines = torch.linspace(halved(h_offset), halved(height) - 1 + halved(h_offset), steps=halved(height))
        columns = torch.linspace(halved(w_offset), halved(width) - 1 + halved(w_offset), steps=halved(width))
        ids += [torch.stack((torch.tensor(float(index)), line, column)) for line in lines for column in columns]
    return torch.stack(ids)


REFERENCES = {
    "one": [(4, 6)],
    "alike": [(4, 6), (4, 6), (4, 6)],
    "tall and wide": [(8, 2), (2, 10), (6, 4), (4, 4)],
    "odd": [(5, 3), (3, 5), (7, 1), (1, 1)],
}


@pytest.mark.parametrize("method", LAYOUTS)
@pytest.mark.parametrize("which", REFERENCES)
def test_several_references_are_laid_out_by_comfyuis_rule(parts, autoencoder, which, method):
    transformer, _ = oracles(parts["draw"], autoencoder)
    sizes = REFERENCES[which]
    latents = [rows(1, 16, *size, seed=40 + index) for index, size in enumerate(sizes)]
    even = [np.pad(each.numpy(), [(0, 0), (0, 0), (0, h % 2), (0, w % 2)], mode="wrap")
            for each, (h, w) in zip(latents, sizes, strict=True)]  # fmt: skip
    tokens = torch.cat([pack(torch.from_numpy(each)) for each in even], dim=1)
    theirs = by_hand(transformer, None, tokens, comfyui_ids(sizes, CELLS, method))
    given = [Reference(latents=each) for each in latents]
    assert_same(run(parts["draw"], autoencoder, given, layout=method), theirs)


def test_the_layouts_are_not_the_same(parts, autoencoder):
    given = [Reference(latents=rows(1, 16, 4, 6, seed=40 + index)) for index in range(2)]
    ways = [run(parts["draw"], autoencoder, given, layout=layout) for layout in LAYOUTS]
    assert all(differ(one, other) for index, one in enumerate(ways) for other in ways[:index])


@pytest.mark.parametrize("task", ["control", "fill"])
def test_references_have_nothing_in_the_channels_that_only_the_image_has(parts, autoencoder, task):
    transformer, _ = oracles(parts[task], autoencoder)
    lacking = CHANNELS[task] - 64
    photo, latents = picture(1), rows(1, 16, 4, 2, seed=40)
    if task == "fill":
        given, (_, vae) = FillInput(picture=photo, mask=soft_mask()), oracles(parts[task], autoencoder)
        behind = fill_tokens(vae, photo, soft_mask(), soft_mask())
    else:
        given, (_, vae) = ControlInput(picture=photo), oracles(parts[task], autoencoder)
        mode = vae.encode(photo * 2 - 1).latent_dist.mode()
        behind = pack((mode - vae.config.shift_factor) * vae.config.scaling_factor)
    tokens = torch.cat((pack(latents), torch.zeros(1, 2, lacking)), dim=2)
    ids = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    theirs = by_hand(transformer, behind, tokens, ids)
    assert_same(run(parts[task], autoencoder, [Reference(latents=latents), given]), theirs)
