"""The host's choice of attention, inside a host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from client import Host, find_comfyui, prepare, serve
from graph import node, our_sampler, start

CLOSE = 1e-3  # of the latent's spread: rounding, over three steps


def compared(host: Host, a: dict, b: dict, **more: dict) -> dict:
    prompt = {**start(), **more, "a": a, "b": b, "compare": node("ProbeCompare", a=["a", 0], b=["b", 0])}
    report = host.succeed(prompt).report()
    return {"close": report["largest"] < CLOSE * report["spread"], **report}


FLAG = "--use-split-cross-attention"


@pytest.fixture(scope="module")
def started_otherwise(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host that the user started with a flag for attention."""
    comfyui = find_comfyui()
    assert comfyui is not None
    base = tmp_path_factory.mktemp("comfyui-attention")
    prepare(base)
    with serve(comfyui, base, FLAG) as running:
        yield running


def test_attention_is_the_engines_unless_the_host_was_started_with_another(host: Host, started_otherwise: Host) -> None:
    lines = {
        host: "attention on cpu by sdpa (torch's, by its own choice): nothing else is faster here of what is exact",
        started_otherwise: f"attention on cpu by comfyui (the host's, by {FLAG}): the host was started so",
    }
    for own, line in lines.items():
        core = {"core": node("UNETLoader", unet_name="flux1-mini.safetensors", weight_dtype="default")}
        assert compared(own, our_sampler(steps=2), our_sampler("core", steps=2), **core)["close"]
        assert line in (own.base / "log.txt").read_text()
