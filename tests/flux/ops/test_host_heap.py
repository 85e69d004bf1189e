"""Freed memory stays while someone wants it kept, goes back afterwards, and users' own settings are left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from flux.ops import host_heap
from flux.ops.host_heap import Heap, giving_back_freed_memory, keeping_freed_memory

MIB = 1 << 20
SCRIPT = """
import resource
import psutil
import torch
from flux.ops.host_heap import giving_back_freed_memory, keeping_freed_memory

def work():
    for _ in range(8):
        blocks = [torch.ones(12 << 18) for _ in range(10)]  # 120 MiB, more than glibc ever keeps by itself
        del blocks

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

work()
with giving_back_freed_memory():
    anew = faults()
with keeping_freed_memory():
    work()
    kept, inside = faults(), psutil.Process().memory_info().rss
after = psutil.Process().memory_info().rss
print(anew, kept, inside - after)
"""


def run_without_settings(script: str) -> list[int]:
    environment = {name: value for name, value in os.environ.items() if name not in host_heap.SET_BY_USERS}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return [int(word) for word in result.stdout.split()]


def has_glibc() -> bool:
    return sys.platform == "linux" and "glibc" in os.confstr("CS_GNU_LIBC_VERSION") if hasattr(os, "confstr") else False


@pytest.mark.skipif(not has_glibc(), reason="this system has another C library")
def test_no_page_comes_anew_inside_and_all_go_back_behind():
    anew, kept, given_back = run_without_settings(SCRIPT)
    pages = 12 * MIB // os.sysconf("SC_PAGE_SIZE")
    assert anew > 2 * pages  # of 80, if none come in large pages
    assert kept < pages // 4
    assert given_back > 50 * MIB


class Recorded:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        heap = Heap(self._set, lambda _: self.calls.append("trim") or 1)
        monkeypatch.setattr(host_heap, "_heap", lambda: heap)

    def _set(self, name: int, value: int) -> int:
        names = {own: name for name, way in WAYS.items() for own in way}
        self.calls.append(names[value])
        return 1


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


WAYS = {"keep": host_heap.KEEP, "usual": host_heap.USUAL, "back": host_heap.GIVE_BACK}
KEEP, GIVE_BACK = ["keep", "keep"], ["usual", "usual", "trim"]


def test_the_last_of_several_gives_back(recorded):
    inside, go_on = threading.Event(), threading.Event()

    def other():
        with keeping_freed_memory():
            inside.set()
            go_on.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with keeping_freed_memory(), keeping_freed_memory():
        assert recorded.calls == KEEP
    assert recorded.calls == KEEP
    go_on.set()
    thread.join()
    assert recorded.calls == KEEP + GIVE_BACK


def test_who_wants_it_given_back_comes_before_those_who_want_it_kept(recorded):
    with keeping_freed_memory():
        with giving_back_freed_memory(), keeping_freed_memory():
            assert recorded.calls == [*KEEP, "back", "back", "trim"]
        assert recorded.calls == [*KEEP, "back", "back", "trim", *KEEP]
    assert recorded.calls[-3:] == GIVE_BACK


def test_a_failure_gives_back_too(recorded):
    with pytest.raises(ValueError, match="inside"), keeping_freed_memory():
        raise ValueError("inside")
    assert recorded.calls == KEEP + GIVE_BACK


@pytest.mark.parametrize("name", host_heap.SET_BY_USERS)
def test_settings_of_a_user_stay(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert host_heap._heap.__wrapped__() is None


@pytest.mark.parametrize("error", [OSError("no such library"), TypeError("a name is needed")])
def test_other_systems_are_left_alone(monkeypatch, error):
    def load(_):
        raise error

    for name in host_heap.SET_BY_USERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(host_heap.ctypes, "CDLL", load)
    assert host_heap._heap.__wrapped__() is None
    monkeypatch.setattr(host_heap, "_heap", host_heap._heap.__wrapped__)
    with keeping_freed_memory():
        pass


def test_another_c_library_is_left_alone(monkeypatch):
    for name in host_heap.SET_BY_USERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(host_heap.ctypes, "CDLL", lambda _: object())
    assert host_heap._heap.__wrapped__() is None
