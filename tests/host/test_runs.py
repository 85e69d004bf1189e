"""A run while it runs: previews, progress, cancelling."""

from __future__ import annotations

import time

import pytest
from client import Host
from graph import core_sampler, node, our_sampler, start

PREVIEWS = (1, 4)  # the two kinds of binary message that carry a picture
BLOCK_SECONDS = 1.0  # that each of the embedded model's four single blocks is made to take
CANCEL_SECONDS = 2.0  # one block, and the time that messages take; the rest of the step would take longer


@pytest.mark.parametrize("sampler", [our_sampler, core_sampler])
def test_previews_and_progress_arrive_step_by_step(host: Host, sampler: object) -> None:
    prompt = {**start(), "sample": sampler(steps=5, seed=101)}
    prompt["out"] = node("ProbeCompare", a=["sample", 0], b=["sample", 0])
    with host.listening() as listener:
        host.queue(prompt, listener.client)
        listener.until("execution_success", "execution_error")
    previews = [m for m in listener.seen if m["type"] == "binary" and m["kind"] in PREVIEWS]
    steps = [m["data"] for m in listener.seen if m["type"] == "progress" and m["data"].get("node") == "sample"]
    assert listener.seen[-1]["type"] == "execution_success"
    assert len(previews) == 5
    assert steps[-1]["value"] == steps[-1]["max"] == 5


@pytest.mark.parametrize("what", ["slow plain", "slow blocks"])
@pytest.mark.parametrize("sampler", [our_sampler, core_sampler])
def test_cancel_takes_effect_within_a_block(host: Host, sampler: object, what: str) -> None:
    prompt = {**start(), "slow": node("ProbeModel", model=["load", 0], what=what, seconds=BLOCK_SECONDS)}
    prompt["sample"] = sampler("slow", steps=3, seed=102)
    prompt["out"] = node("ProbeCompare", a=["sample", 0], b=["sample", 0])
    with host.listening() as listener:
        prompt_id = host.queue(prompt, listener.client)
        listener.until("binary")
        time.sleep(BLOCK_SECONDS / 2)  # into the second step
        begun = time.monotonic()
        host.post("/interrupt", {})
        listener.until("execution_interrupted", "execution_success", "execution_error")
        assert time.monotonic() - begun < CANCEL_SECONDS
    assert host.wait(prompt_id).status == "interrupted"
