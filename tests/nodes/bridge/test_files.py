"""What files are, in words, and how often they are looked at."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.stored import suffix_of, write_stored


@pytest.fixture(scope="module")
def files(part):
    return part("nodes.bridge.files")


@pytest.fixture(scope="module")
def numbers(part) -> dict[str, torch.Tensor]:
    return {name: t.float() for name, t in load_file(part("flux.mini.files").MINI.transformer).items()}


@pytest.mark.parametrize(
    ("kind", "words"), [("gguf:Q4_K", "GGUF Q4_K"), ("nf4", "nf4"), ("fp8", "fp8_e4m3fn scaled"), ("bf16", "BF16")]
)
def test_a_file_is_told_by_its_model_and_storage_format(files, numbers, tmp_path: Path, kind: str, words: str) -> None:
    path = write_stored(tmp_path / f"model{suffix_of(kind)}", numbers, kind)
    assert files.describe_file(path) == f"Foundry Mini diffusion model, {words}"
    assert files.kinds_in(path) == {"transformer"}


def test_a_report_has_parts_formats_and_sizes(files, part, numbers, tmp_path: Path) -> None:
    mini = part("flux.mini.files").MINI
    tensors = {f"model.diffusion_model.{name}": t for name, t in numbers.items()}
    tensors |= {f"text_encoders.clip_l.transformer.{name}": t for name, t in load_file(mini.clip).items()}
    save_file(tensors, tmp_path / "all.safetensors", {"author": "me"})
    lines = files.inspect_file(tmp_path / "all.safetensors").splitlines()
    assert lines[0] == "all.safetensors"
    assert lines[1] == "what: Foundry Mini diffusion model, F32 and Foundry Mini's CLIP text encoder, BF16"
    assert any(line.startswith("layout: ") and "model.diffusion_model." in line for line in lines)
    assert "formats: F32 94.1%, BF16 5.9%" in lines
    assert f"numbers: {sum(t.numel() for t in tensors.values()):,} in {len(tensors)} tensors" in lines
    assert f"bytes: {sum(t.nbytes for t in tensors.values()) / 1e6:.1f} MB" in lines
    assert "metadata: author" in lines


def test_a_file_of_no_known_kind_shows_its_first_tensors(files, tmp_path: Path) -> None:
    save_file({"b": torch.zeros(1), "a": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert files.describe_file(tmp_path / "x.safetensors") == "of no kind that is known here"
    assert files.inspect_file(tmp_path / "x.safetensors").endswith("holds: a, b")


def test_what_is_wrong_with_a_file_stands_in_its_place(files, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    for path in (tmp_path / "cut.safetensors", tmp_path / "gone.safetensors"):
        assert path.name in files.describe_file(path)
        assert files.kinds_in(path) == frozenset()


def test_names_in_a_file_cannot_steer_a_terminal(files, tmp_path: Path) -> None:
    save_file({"a\x1b[31m": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert "\x1b" not in files.inspect_file(tmp_path / "x.safetensors")


def test_a_file_is_looked_at_again_only_when_it_changed(files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    real = files.describe
    monkeypatch.setattr(files, "describe", lambda path: opened.append(path) or real(path))
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    before = files.stamp(path)
    files.describe_file(path)
    files.inspect_file(path)
    assert len(opened) == 1
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, path)
    os.utime(path, ns=(0, before[1] + 1))
    assert files.inspect_file(path).endswith("holds: a, b")
    assert len(opened) == 2
    assert files.stamp(path) != before


def test_the_node_gives_and_shows_the_report(part, pack, files, monkeypatch) -> None:
    shown = []
    progress = SimpleNamespace(show=shown.append)  # the real one tells the host's server
    monkeypatch.setitem(sys.modules, f"{pack.__name__}.nodes.bridge.progress", progress)
    node = next(n for n in part("nodes.files").NODES if n.define_schema().node_id == "FluxFoundryInspectFile")
    output = node.execute("embedded: flux1-mini")
    assert output.result[0].splitlines()[1] == "what: Foundry Mini diffusion model, BF16"
    assert output.ui == {"text": (output.result[0],)}
    assert shown == [output.result[0]]
    assert node.fingerprint_inputs("embedded: flux1-mini") == node.fingerprint_inputs("embedded: flux1-mini")
