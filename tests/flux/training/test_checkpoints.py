"""Checkpoints: whole or not at all, and nothing but safetensors."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from flux.training import checkpoints
from flux.training.checkpoints import load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer


def test_tensors_and_values_come_back(tmp_path):
    path = tmp_path / "new" / "deep" / "state.safetensors"
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "half": torch.tensor([1.5, -2]).half(),
        "b16": torch.tensor([1.5]).bfloat16(),
        "step": torch.tensor(7, dtype=torch.int64),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    }
    meta = {"step": 12, "stage": "base", "rate": 0.25, "list": [1, "é"], "none": None}
    save_checkpoint(path, tensors, meta)
    loaded, values = load_checkpoint(path)
    assert values == meta
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_file_without_values_gives_none(tmp_path):
    save_checkpoint(tmp_path / "plain.safetensors", {"a": torch.ones(1)})
    assert load_checkpoint(tmp_path / "plain.safetensors")[1] == {}


def test_views_shared_and_strided_tensors_are_saved_as_they_look(tmp_path):
    base = torch.arange(24.0).view(2, 3, 2, 2)
    tensors = {
        "whole": base,
        "again": base,
        "part": base[:, 1:],
        "turned": base.transpose(0, 1),
        "last": base.to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(base),
    }
    save_checkpoint(tmp_path / "state.safetensors", tensors)
    loaded, _ = load_checkpoint(tmp_path / "state.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_files_are_safetensors(tmp_path):
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, {"a": torch.ones(2)}, {"step": 1})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header.keys() == {"a", "__metadata__"}
    assert load_file(path)["a"].tolist() == [1, 1]


def test_pickles_are_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pickled.safetensors")
    with pytest.raises(SafetensorError):
        load_checkpoint(tmp_path / "pickled.safetensors")


def test_saving_again_replaces_the_file(tmp_path):
    path = tmp_path / "state.safetensors"
    for step in (1, 2):
        save_checkpoint(path, {"a": torch.full((2,), float(step))}, {"step": step})
    tensors, meta = load_checkpoint(path)
    assert (tensors["a"].tolist(), meta) == ([2, 2], {"step": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_failure_while_writing_leaves_the_old_file_and_no_part_of_the_new(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, {"a": torch.ones(2)}, {"step": 1})
    before = path.read_bytes()

    def full_disk(tensors, target, metadata):
        target.write_bytes(b"half a")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"a": torch.zeros(2)}, {"step": 2})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_failure_to_replace_leaves_no_part(tmp_path):
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(OSError, match="taken"):
        save_checkpoint(tmp_path / "taken.safetensors", {"a": torch.ones(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["taken.safetensors"]


def test_values_that_are_not_plain_leave_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "state.safetensors", {"a": torch.ones(2)}, {"bad": object()})
    assert list(tmp_path.iterdir()) == []


def adam(seed):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    return model, torch.optim.Adam(model.parameters(), 0.1)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()


def test_an_optimizers_state_goes_through_a_file(tmp_path):
    model, optimizer = adam(0)
    step(model, optimizer)
    packed = pack_optimizer(optimizer, "optimizer.")
    assert set(packed) == {f"optimizer.{i}.{name}" for i in (0, 1) for name in ("step", "exp_avg", "exp_avg_sq")}
    save_checkpoint(tmp_path / "state.safetensors", packed)
    _, fresh = adam(1)
    unpack_optimizer(fresh, load_checkpoint(tmp_path / "state.safetensors")[0], "optimizer.")
    for one, other in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_unpacking_keeps_the_present_settings_and_skips_other_names():
    model, optimizer = adam(0)
    step(model, optimizer)
    packed = pack_optimizer(optimizer, "optimizer.") | {"model.weight": torch.zeros(2, 3), "optimize": torch.zeros(1)}
    fresh = torch.optim.Adam(adam(1)[0].parameters(), 0.7, betas=(0.1, 0.2))
    unpack_optimizer(fresh, packed, "optimizer.")
    assert fresh.param_groups[0]["lr"] == 0.7
    assert fresh.param_groups[0]["betas"] == (0.1, 0.2)
    assert len(fresh.state) == 2
