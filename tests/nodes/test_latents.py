from __future__ import annotations


def test_an_empty_latent_has_flux_channels_and_tells_its_ratio_and_size(part) -> None:
    node = part("nodes.latents").EmptyLatent
    latent, width, height = node.execute("16:9", 1.0, 0, 0, 2).result
    assert (width, height) == (1360, 768)
    assert latent["samples"].shape == (2, 16, 96, 170)
    assert not latent["samples"].any()
    assert latent["downscale_ratio_spacial"] == 8
