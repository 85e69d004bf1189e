"""The rows of FLUX.2's variants: what sets them apart, and what they must agree on."""

from __future__ import annotations

import dataclasses

import pytest

from flux.specs.flux2 import FLUX2, Flux2Spec

ARCHITECTURE = ("hidden", "heads", "double_blocks", "single_blocks", "context_width", "guidance_embedding")
# As published: the sizes above, language model, steps, guidance, a negative pass, licence.
PUBLISHED = {
    "flux2-dev": ((6144, 48, 8, 48, 15360, True), "mistral-small-24b", 50, 4.0, False, "FLUX Non-Commercial License"),
    "flux2-klein-4b": ((3072, 24, 5, 20, 7680, False), "qwen3-4b", 4, None, False, "Apache-2.0"),
    "flux2-klein-base-4b": ((3072, 24, 5, 20, 7680, False), "qwen3-4b", 50, 4.0, True, "Apache-2.0"),
    "flux2-klein-9b": ((4096, 32, 8, 24, 12288, False), "qwen3-8b", 4, None, False, "FLUX Non-Commercial License"),
    "flux2-klein-base-9b": ((4096, 32, 8, 24, 12288, False), "qwen3-8b", 50, 4.0, True, "FLUX Non-Commercial License"),
    "flux2-klein-9b-kv": ((4096, 32, 8, 24, 12288, False), "qwen3-8b", 4, None, False, "FLUX Non-Commercial License"),
}


@pytest.mark.parametrize("name", FLUX2)
def test_variants_are_as_published(name):
    spec = FLUX2[name]
    assert spec.name == name
    sizes = tuple(getattr(spec, field) for field in ARCHITECTURE)
    found = (sizes, spec.text_encoder, spec.steps, spec.guidance, spec.needs_negative, spec.licence)
    assert found == PUBLISHED[name]


def test_every_published_variant_is_a_row():
    assert set(FLUX2) == set(PUBLISHED)


def test_only_the_kv_variant_caches_references_and_is_else_the_9b():
    assert [name for name, spec in FLUX2.items() if spec.caches_references] == ["flux2-klein-9b-kv"]
    changed = {"name", "title", "files", "caches_references"}
    plain, cached = (dataclasses.asdict(FLUX2[name]) for name in ("flux2-klein-9b", "flux2-klein-9b-kv"))
    assert {field for field in plain if plain[field] != cached[field]} == changed


def test_what_the_whole_family_shares():
    for spec in FLUX2.values():
        assert (spec.in_channels, spec.out_channels, spec.latent_channels) == (128, 128, 32)
        assert (spec.axes, spec.theta, spec.mlp_ratio) == ((32, 32, 32, 32), 2000.0, 3.0)
        assert spec.hidden // spec.heads == 128
        assert spec.mlp_width == 3 * spec.hidden
        assert (spec.text_length, spec.autoencoder) == (512, "flux2-vae")


def test_release_files_name_one_variant_each():
    files = [file for spec in FLUX2.values() for file in spec.files]
    assert len(files) == len(set(files)) == len(FLUX2)


@pytest.mark.parametrize(
    ("changes", "words"), [({"heads": 7}, "does not divide into 7 heads"), ({"axes": (32, 32)}, "do not add up to 128")]
)
def test_sizes_that_do_not_fit_are_refused_with_both_numbers(changes, words):
    with pytest.raises(ValueError, match=words):
        Flux2Spec(name="odd", title="odd", **changes)
