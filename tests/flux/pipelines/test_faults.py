"""Files that change, devices that vanish, runs that meet: each ends with a sentence, and the next run works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux.cli.main import main
from flux.errors import BudgetError, Cancelled, DeviceLostError, FileError, UserError
from flux.memory.lanes import CpuLane
from flux.memory.policy import read_policy
from flux.mini import files
from flux.models.autoencoder import Autoencoder
from flux.models.flux1 import Flux1
from flux.pipelines.denoising import Hooks, denoise
from flux.pipelines.parts import open_transformer
from flux.pipelines.text_to_image import Request, generate, generate_each
from flux.specs.autoencoder import AUTOENCODERS
from flux.weights.readers import leases
from flux.weights.readers.file_bytes import ENVIRONMENT
from flux.weights.readers.leases import Lease
from tests.guides import PROMPT, SIGMAS, noise
from tests.tiny import TINY, write_module, write_tiny

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
DEEP = replace(TINY, name="deep", double_blocks=2, single_blocks=4)
LIMITS = {"numbers": None, "packed": None, "streamed": 0}
CUDA = "CUDA error: unspecified launch failure"
each_way = pytest.mark.parametrize("way", LIMITS)


@pytest.fixture
def path(tmp_path):
    return write_tiny(tmp_path, DEEP).transformer


@pytest.fixture
def without_leases(monkeypatch):
    """As on systems and disks that have none."""

    def refuse(_):
        raise OSError("none here")

    monkeypatch.setattr(leases, "_take", refuse)


def opened(path, way="numbers"):
    return open_transformer(path, CPU, torch.float32, keep="numbers" if way == "streamed" else way)


def run(part, way="numbers", **hooks):
    return denoise(part, PROMPT, noise(), SIGMAS, guidance=3.0, limit=LIMITS[way], hooks=Hooks(**hooks))


def once(act):
    """Acts at the first call."""
    calls = []

    def call(*_):
        calls.append(1)
        if len(calls) == 1:
            act()

    return call


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path):
    """Other numbers in place, at another time."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(1000))
    written = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(written, written))


def swap(path):
    """Another model of the same layout under the same name."""
    other = path.with_name("other.safetensors")
    save_file({name: tensor * 0.5 for name, tensor in load_file(path).items()}, other)
    os.replace(other, path)


# Files.


def leases_work(folder):
    (folder / "lease").write_bytes(b"x")
    descriptor = os.open(folder / "lease", os.O_RDONLY)
    lease = Lease(descriptor, "lease")
    is_held = lease.is_held
    lease.close()
    os.close(descriptor)
    return is_held


@pytest.mark.parametrize("way", ["resident", "packed", "streamed", "decoding"])
def test_a_file_that_another_process_cuts_in_the_middle_of_a_run_ends_it_with_a_sentence(tmp_path, way):
    if way != "streamed" and not leases_work(tmp_path):
        pytest.skip("there are no leases here: nothing can keep a mapped file whole")
    path = write_tiny(tmp_path, DEEP).transformer
    if way == "packed":
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    if way == "decoding":
        path = write_module(tmp_path / "own-ae.safetensors", Autoencoder(AUTOENCODERS["flux1-mini-ae"]), 4)
    size = path.stat().st_size
    command = [sys.executable, str(Path(__file__).with_name("cut.py")), str(path), way]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2, (ended.returncode, ended.stderr)
    assert re.fullmatch(rf"error: {path.name} (is about to be changed|was changed|ended while).*\n", ended.stderr)
    assert path.stat().st_size == size // 20
    assert float(ended.stdout) < 20  # that the other process had to wait for us afterwards


@each_way
@pytest.mark.parametrize(
    ("change", "says"), [(halve, "ended while .* was read"), (rewrite, "was changed after it was opened")]
)
def test_without_leases_it_is_noticed_before_the_next_block(path, way, change, says, without_leases):
    part, threads = opened(path, way), threading.active_count()
    with pytest.raises(FileError, match=rf"{path.name} {says}"):
        run(part, way, preview=once(lambda: change(path)))
    assert part.residency.resident_bytes == 0
    assert threading.active_count() == threads


@each_way
def test_without_leases_files_that_are_read_and_not_mapped_may_be_cut_at_any_moment(
    path, way, without_leases, monkeypatch
):
    monkeypatch.setenv(ENVIRONMENT, "read")
    part = opened(path, way)
    # In the middle of a block, which goes on with its other layers.
    part.module.double_blocks[0].img_attn.qkv.register_forward_hook(once(lambda: os.truncate(path, 1000)))
    with pytest.raises(FileError, match=rf"{path.name} ended while .* was read"):
        run(part, way)


@each_way
@pytest.mark.parametrize("change", [halve, rewrite, swap])
def test_a_file_that_changed_between_opening_and_running_is_refused(path, way, change):
    part = opened(path, way)
    change(path)
    with pytest.raises(FileError, match=rf"{path.name} (ended while|was changed)"):
        run(part, way)


@each_way
def test_a_file_that_changed_between_two_runs_is_refused_and_opened_again(path, way):
    part = opened(path, way)
    before = run(part, way)
    rewrite(path)
    with pytest.raises(FileError, match="was changed after it was opened"):
        run(part, way)
    assert not torch.equal(run(opened(path, way), way), before)


@each_way
@pytest.mark.parametrize("change", [Path.unlink, swap])
def test_a_file_that_is_deleted_or_replaced_during_a_run_is_used_to_the_end(path, way, change):
    expected = run(opened(path))
    part = opened(path, way)
    assert torch.equal(run(part, way, preview=once(lambda: change(path))), expected)
    assert torch.equal(run(part, way), expected)  # which still holds it
    if change is swap:
        assert not torch.equal(run(opened(path, way), way), expected)
    else:
        with pytest.raises(UserError, match="was not found"):
            opened(path, way)


def test_who_wants_to_write_waits_for_the_run_and_only_for_it(path):
    if not leases_work(path.parent):
        pytest.skip("there are no leases here")
    part, moments = opened(path), {}
    writer = threading.Thread(target=lambda: (rewrite(path), moments.update(written=time.monotonic())))

    def write():
        writer.start()
        time.sleep(0.2)
        moments["later"] = time.monotonic()

    with pytest.raises(
        FileError, match="is about to be changed by another program, so that it is not used any further"
    ):
        run(part, preview=once(write))
    writer.join(20)
    assert moments["written"] > moments["later"]
    fresh = opened(path)
    run(fresh)
    began = time.monotonic()
    rewrite(path)  # while the model is open, and nothing runs
    assert time.monotonic() - began < 5


def test_a_lease_that_two_runs_of_one_file_hold_is_given_back_by_the_last(path):
    file = opened(path)._checkpoint
    with file.held() as check:
        with file.held():
            pass
        check()
        assert file._file._bytes._lease is not None
    assert file._file._bytes._lease is None


# Devices.


class Vanishing(CpuLane):
    """A device that is gone after some transfers."""

    def __init__(self, after):
        self.left = after

    def bring(self, buffer, size, read, after):
        self.left -= 1
        if self.left < 0:
            raise torch.AcceleratorError(CUDA)
        return super().bring(buffer, size, read, after)


@pytest.mark.parametrize("after", [0, 1, 7, 20])
def test_a_device_that_vanishes_is_told_and_the_next_run_works(path, after):
    expected, threads = run(opened(path)), threading.active_count()
    part = opened(path)
    part.residency._lane = Vanishing(after)
    with pytest.raises(DeviceLostError, match=rf"the device cpu stopped working \({CUDA}\).*start the program anew"):
        run(part, "streamed")
    assert part.residency.resident_bytes == 0
    assert threading.active_count() == threads
    part.residency._lane = None
    assert torch.equal(run(part, "streamed"), expected)


def test_a_device_that_vanishes_while_it_computes_is_told_by_the_command_line_too(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError(f"{CUDA}\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1")

    monkeypatch.setattr(Flux1, "forward", fail)
    assert main(["generate", "a star", "--steps", "1", "--seed", "1", "--out", str(tmp_path / "a.png")]) == 1
    assert f"error: the device cpu stopped working ({CUDA})" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Runs that meet.


def test_a_second_run_of_one_opened_model_is_refused_and_harms_the_first_one_not(path):
    expected, part, told = run(opened(path)), opened(path), []

    def meet():
        with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="is in use by another run; wait until"):
            pool.submit(run, part).result()
        told.append(1)

    for way in LIMITS:
        assert torch.equal(run(part, way, preview=once(meet)), expected)
    assert told == [1, 1, 1]


def test_of_runs_at_once_each_gives_its_picture_or_is_refused(path):
    expected, part = run(opened(path)), opened(path)

    def attempt(_):
        try:
            return run(part, "streamed")
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(attempt, range(16)))
    drawn = [one for one in ended if isinstance(one, torch.Tensor)]
    assert drawn
    assert all(torch.equal(one, expected) for one in drawn)
    assert all("is in use by another run" in one for one in ended if isinstance(one, str))
    assert torch.equal(run(part), expected)


def test_a_run_between_two_pictures_of_another_is_refused_and_the_other_goes_on():
    model, request = files.open_mini(), Request(prompt="a star", steps=1, count=2)
    expected = generate(model, request)
    pictures = generate_each(model, request)
    drawn = [next(pictures)]
    with pytest.raises(UserError, match="is in use by another run"):
        generate(model, request)
    drawn += list(pictures)
    assert all(torch.equal(one.pixels, own.pixels) for one, own in zip(drawn, expected, strict=True))
    [again] = generate(model, replace(request, count=1))
    assert torch.equal(again.pixels, expected[0].pixels)


@each_way
def test_after_any_fault_the_same_opened_model_runs_again(path, way):
    expected, part = run(opened(path)), opened(path, way)
    for error in (Cancelled("stop"), RuntimeError(CUDA), ZeroDivisionError(), KeyboardInterrupt()):

        def fail(*_, error=error):
            raise error

        with pytest.raises((Cancelled, DeviceLostError, ZeroDivisionError, KeyboardInterrupt)):
            run(part, way, preview=fail)
        assert part.residency.resident_bytes == 0
        assert not part.module._forward_pre_hooks
        assert torch.equal(run(part, way), expected)


# Budgets.

LEAST = re.compile(r"is below the least that this takes, ([\d.]+) GiB; raise it")


def test_the_least_that_a_run_is_told_to_need_is_enough_for_all_its_stages():
    model, request = files.open_mini(), Request(prompt="a red circle", width=256, height=256, steps=2)
    with pytest.raises(BudgetError) as refused:
        generate(model, replace(request, memory=read_policy("0.000001")))
    least = LEAST.search(str(refused.value))[1]
    [picture] = generate(model, replace(request, memory=read_policy(least)))
    [expected] = generate(model, request)
    assert int((picture.pixels.int() - expected.pixels.int()).abs().max()) <= 1  # the last bit of norms in strips
    exact = f"{refused.value.least / 2**30!r}"
    generate(model, replace(request, memory=read_policy(exact)))
    below = f"{(refused.value.least - 1) / 2**30!r}"
    with pytest.raises(BudgetError):
        generate(model, replace(request, memory=read_policy(below)))


@pytest.mark.parametrize("command", [("generate", "a star", "--steps", "1"), ("plan", "mini")])
def test_the_command_line_says_the_least_and_takes_it(command, tmp_path, capsys):
    out = ("--out", str(tmp_path / "a.png"), "--seed", "1") if command[0] == "generate" else ()
    assert main([*command, *out, "--policy", "0.000001"]) == 2
    said = LEAST.search(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
    assert main([*command, *out, "--policy", said[1]]) == 0
