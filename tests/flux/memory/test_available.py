"""What is free on a host is no more than what its container's limit leaves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flux.memory import available
from flux.memory.available import available_bytes

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 100 GiB free; calling it confines a group."""
    groups = tmp_path / "groups"
    monkeypatch.setattr(available, "CGROUPS", tmp_path)
    monkeypatch.setattr(available, "OWN_GROUPS", groups)
    monkeypatch.setattr(available.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))

    def confine(line, folder, names, limit, use, files):
        groups.write_text(line)
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, use), strict=False):
            (tmp_path / folder / name).write_text(f"{value}\n")
        (tmp_path / folder / "memory.stat").write_text(f"anon 5\n{names[2]} {files}\n")

    return confine


def test_without_limits_it_is_what_the_system_says(machine):
    assert available_bytes(CPU) == 100 * GIB


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/", "", available.UNIFIED),
        ("0::/a.slice/b.service", "a.slice", available.UNIFIED),
        ("0::/not/seen/from/here", "", available.UNIFIED),
        ("5:cpu,cpuacct:/x\n4:memory:/docker/1\n1:name=systemd:/", "memory/docker/1", available.SPLIT),
        ("4:hugetlb,memory:/docker/1", "memory", available.SPLIT),
    ],
)
def test_a_limit_of_any_group_above_counts_and_cached_files_may_go(machine, line, folder, names):
    machine(line, folder, names, 16 * GIB, 10 * GIB, 3 * GIB)
    assert available_bytes(CPU) == 9 * GIB


def test_a_group_without_a_limit_leaves_all(machine):
    machine("0::/", "", available.UNIFIED, "max", 10 * GIB, 0)
    assert available_bytes(CPU) == 100 * GIB


def test_a_group_beyond_its_limit_leaves_nothing(machine):
    machine("0::/", "", available.UNIFIED, 4 * GIB, 5 * GIB, 0)
    assert available_bytes(CPU) == 0


def test_this_machine_has_something_free():
    assert 0 < available_bytes(CPU) < 1 << 50
