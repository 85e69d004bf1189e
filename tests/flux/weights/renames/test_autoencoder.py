"""The autoencoders' names against diffusers' own modules."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2

from flux.models.autoencoder import Autoencoder
from flux.specs.autoencoder import AUTOENCODERS, AutoencoderSpec
from flux.weights.renames import Reshape, assemble
from flux.weights.renames.autoencoder import BFL, DIFFUSERS, FLUX2_BFL, FLUX2_DIFFUSERS
from tests.fixtures.listings import flux1_ae_bfl, flux1_ae_diffusers, flux2_vae_bfl, flux2_vae_diffusers
from tests.oracles import TOLERANCE, randomise, relative_error, rows

SHAPES = {"released": ((1, 2, 4, 4), 2), "shallow": ((1, 3), 1), "flat": ((1, 1, 1), 2)}  # multipliers, blocks a level
BASE, GROUPS, LATENT = 8, 4, 6


def settings(shape):
    multipliers, blocks = SHAPES[shape]
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(multipliers),
        "up_block_types": ("UpDecoderBlock2D",) * len(multipliers),
        "block_out_channels": tuple(BASE * m for m in multipliers),
        "layers_per_block": blocks,
        "latent_channels": LATENT,
        "norm_num_groups": GROUPS,
    }


@functools.cache
def flux1_theirs(shape):
    return randomise(AutoencoderKL(**settings(shape), use_quant_conv=False, use_post_quant_conv=False))


@functools.cache
def flux2_theirs(shape):
    model = randomise(AutoencoderKLFlux2(**settings(shape)))
    model.bn.running_mean.copy_(rows(4 * LATENT, seed=1))
    model.bn.running_var.copy_(rows(4 * LATENT, seed=2).square())
    return model


MODELS = {"flux1": (flux1_theirs, DIFFUSERS), "flux2": (flux2_theirs, FLUX2_DIFFUSERS)}


def carried_out(plan, state):
    return {name: assemble(recipe, state.__getitem__) for name, recipe in plan.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", MODELS)
def test_diffusers_weights_come_back_to_the_bit(family, shape):
    build, layout = MODELS[family]
    state = build(shape).state_dict()
    ours = carried_out(layout.table.to_ours(state), state)
    back = carried_out(layout.table.to_foreign(ours), ours)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("shape", SHAPES)
def test_our_model_with_diffusers_weights_encodes_and_decodes_as_diffusers(shape):
    multipliers, blocks = SHAPES[shape]
    model = Autoencoder(
        AutoencoderSpec(
            name="small",
            base_channels=BASE,
            channel_multipliers=multipliers,
            res_blocks=blocks,
            latent_channels=LATENT,
            norm_groups=GROUPS,
            scale=1.0,
            shift=0.0,
        )
    )
    state = flux1_theirs(shape).state_dict()
    model.load_state_dict(carried_out(DIFFUSERS.table.to_ours(state), state))
    pixels, latents = rows(1, 3, 16, 24, seed=1), rows(1, LATENT, 2, 3, seed=2)
    with torch.no_grad():
        encoded = flux1_theirs(shape).encode(pixels).latent_dist.mode()
        assert relative_error(model.encode_mean(pixels), encoded) <= TOLERANCE
        assert relative_error(model.decode_mean(latents), flux1_theirs(shape).decode(latents).sample) <= TOLERANCE


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def real_size(build, **changes):
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        return build(**kinds, block_out_channels=(128, 256, 512, 512), layers_per_block=2, **changes)


def test_diffusers_own_modules_have_the_listed_names_and_shapes():
    flux1 = real_size(AutoencoderKL, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    assert shapes_of(flux1) == flux1_ae_diffusers()
    assert shapes_of(real_size(AutoencoderKLFlux2, latent_channels=32)) == flux2_vae_diffusers()


def test_our_model_has_the_listed_names_and_shapes():
    with torch.device("meta"):
        model = Autoencoder(AUTOENCODERS["flux1-ae"])
    assert shapes_of(model) == flux1_ae_bfl()


@pytest.mark.parametrize(
    ("layout", "bfl", "diffusers"),
    [
        pytest.param(DIFFUSERS, flux1_ae_bfl(), flux1_ae_diffusers(), id="flux1"),
        pytest.param(FLUX2_DIFFUSERS, flux2_vae_bfl(), flux2_vae_diffusers(), id="flux2"),
    ],
)
def test_a_releases_names_and_shapes_are_the_same_release_in_the_other_layout(layout, bfl, diffusers):
    assert layout.table.to_ours(diffusers).shapes(diffusers.__getitem__) == bfl
    assert layout.table.to_foreign(bfl).shapes(bfl.__getitem__) == diffusers


def test_the_published_parameters_are_listed():
    def count(listing, *starts):
        return sum(math.prod(shape) for name, shape in listing.items() if name.startswith(starts))

    assert count(flux1_ae_bfl(), "encoder.") == 34_274_208
    assert count(flux1_ae_bfl(), "decoder.") == 49_545_475
    assert count(flux2_vae_bfl(), "encoder.") == 34_425_856
    assert count(flux2_vae_bfl(), "decoder.") == 49_620_259
    assert (len(flux1_ae_bfl()), len(flux2_vae_bfl())) == (244, 251)


def test_only_the_middle_attentions_matrices_are_reshaped():
    reshaped = {
        name for name, recipe in FLUX2_DIFFUSERS.table.to_ours(flux2_vae_diffusers()).items()
        if recipe.reshape is Reshape.TO_CONV
    }  # fmt: skip
    expected = {f"{side}.mid.attn_1.{x}.weight" for side in ("encoder", "decoder") for x in ("q", "k", "v", "proj_out")}
    assert reshaped == expected


def test_the_decoders_levels_are_counted_from_the_other_end():
    plan = DIFFUSERS.table.to_ours(flux1_ae_diffusers())
    sources = {level: plan[f"decoder.up.{level}.block.2.conv1.weight"].sources[0] for level in range(4)}
    assert sources == {level: f"decoder.up_blocks.{3 - level}.resnets.2.conv1.weight" for level in range(4)}
    assert plan["decoder.up.3.upsample.conv.bias"].sources == ("decoder.up_blocks.0.upsamplers.0.conv.bias",)
    assert plan["encoder.down.1.downsample.conv.bias"].sources == ("encoder.down_blocks.1.downsamplers.0.conv.bias",)


def test_the_flux2_latents_convolutions_may_stand_inside_or_outside():
    outside = flux2_vae_bfl(outside=True)
    assert "quant_conv.weight" in outside
    assert FLUX2_BFL.table.to_ours(outside).shapes(outside.__getitem__) == flux2_vae_bfl()
    assert set(FLUX2_BFL.table.to_foreign(flux2_vae_bfl())) == set(flux2_vae_bfl())


def test_black_forest_labs_names_are_ours():
    for layout, listing in ((BFL, flux1_ae_bfl()), (FLUX2_BFL, flux2_vae_bfl())):
        plan = layout.table.to_ours(listing)
        assert set(plan) == set(listing)
        assert all(recipe.only_renames and recipe.sources == (name,) for name, recipe in plan.items())
