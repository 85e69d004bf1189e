"""Prompts that a real host has encoded before come back to the bit, from memory and disk, and patched ones apart."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from client import Host
from graph import Prompt, node
from safetensors.torch import save_file

from flux.specs.text import CLIP_MINI

BOTH = "memory and disk"
LORA = "clip.safetensors"


@pytest.fixture
def kept(host: Host) -> Path:
    """The folder on disk, with nothing kept there or in memory."""
    cleared(host)
    return host.base / "user" / "fluxfoundry" / "prompts"


def cleared(host: Host, where: str = BOTH) -> list[str]:
    """What the node says that it cleared."""
    outcome = host.succeed({"clear": node("FluxFoundryClearPromptCache", where=where)})
    return outcome.outputs["clear"]["text"][0].splitlines()


def encoded(host: Host, guidance: float, clip: str = "load", more: Prompt | None = None, **inputs: Any) -> dict:
    """What FLUX Text Encode gives of a prompt; another guidance has the host run it anew."""
    prompt = {
        "load": node("FluxFoundryLoadEmbedded", model="mini"),
        **(more or {}),
        "text": node("FluxFoundryTextEncode", clip=[clip, 1], prompt="a red circle", guidance=guidance, **inputs),
        "out": node("ProbeText", text=["text", 0]),
    }
    return host.succeed(prompt).report()


def test_a_prompt_comes_back_from_memory_and_from_disk(host: Host, kept: Path) -> None:
    plain = encoded(host, 1.0, cache="off")
    assert not kept.exists()
    assert encoded(host, 1.1, cache=BOTH) == plain
    files = sorted(kept.iterdir())
    assert len(files) == 2  # of the prompt, and of the empty negative one
    for path in files:
        os.utime(path, (1, 1))
    before = {path: path.stat().st_ino for path in files}
    assert encoded(host, 1.2, cache=BOTH) == plain
    assert {path.stat().st_mtime for path in files} == {1}  # not even looked at
    assert cleared(host, "memory")[0].startswith("memory: prompts cleared: 2, ")
    assert encoded(host, 1.3, cache=BOTH) == plain
    assert {path: path.stat().st_ino for path in kept.iterdir()} == before
    assert all(path.stat().st_mtime > 1 for path in files)  # read, and not written again


def test_a_lora_on_the_encoders_is_kept_apart_and_never_on_disk(host: Host, kept: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, CLIP_MINI.width, generator=generator),
        f"{name}.lora_up.weight": torch.randn(CLIP_MINI.mlp_width, 4, generator=generator),
    }
    save_file(tensors, host.base / "models" / "loras" / LORA)
    lora = {
        "lora": node(
            "LoraLoader", model=["load", 0], clip=["load", 1], lora_name=LORA, strength_model=0.0, strength_clip=1.0
        )
    }
    plain = encoded(host, 2.0, cache=BOTH)
    patched = encoded(host, 2.1, "lora", lora, cache="off")
    assert patched["pooled"] != plain["pooled"]
    assert encoded(host, 2.2, "lora", lora, cache=BOTH) == patched
    assert encoded(host, 2.3, "lora", lora, cache=BOTH) == patched
    assert encoded(host, 2.4, cache=BOTH) == plain
    assert len(list(kept.iterdir())) == 2
    assert cleared(host)[0].startswith("memory: prompts cleared: 4, ")


def test_clearing_leaves_other_files_and_tells_when_there_was_nothing(host: Host, kept: Path) -> None:
    encoded(host, 3.0, cache=BOTH)
    (kept / "mine.txt").write_text("mine")
    assert cleared(host, "disk")[0].startswith("disk: prompts cleared: 2, ")
    assert [path.name for path in kept.iterdir()] == ["mine.txt"]
    shutil.rmtree(kept)
    assert cleared(host, "disk") == [f"disk: there was nothing, in {kept}"]
