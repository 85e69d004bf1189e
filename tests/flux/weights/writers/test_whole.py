"""At a target's name there is the old file or the whole new one, and nothing else is left in its folder."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import pytest
import torch

from flux.errors import UserError
from flux.weights.readers.gguf import GgufFile
from flux.weights.readers.safetensors import SafetensorsFile
from flux.weights.writers.gguf import GgufWriter
from flux.weights.writers.safetensors import SafetensorsWriter
from flux.weights.writers.whole import WholeFile

SIDE = 1 << 16
NUMBERS = torch.arange(float(SIDE))


def safetensors_writer(path, **options):
    return SafetensorsWriter(path, ["a", "b"], **options)


def gguf_writer(path, **options):
    return GgufWriter(path, {}, {"a": ("F32", (SIDE,)), "b": ("F32", (SIDE,))}, **options)


WRITERS = [
    pytest.param(safetensors_writer, SafetensorsFile, id="safetensors"),
    pytest.param(gguf_writer, GgufFile, id="gguf"),
]
both = pytest.mark.parametrize(("make", "read"), WRITERS)


def fill(writer, before_b=lambda: None, after_b=lambda: None):
    with writer:
        writer.add("a", NUMBERS)
        before_b()
        writer.add("b", NUMBERS)
        after_b()


@both
def test_the_target_appears_at_the_end_with_the_rights_of_any_new_file(tmp_path, make, read):
    path = tmp_path / "model"
    with make(path) as writer:
        writer.add("a", NUMBERS)
        assert not path.exists()
        writer.add("b", NUMBERS)
        assert len(os.listdir(tmp_path)) == 1  # the temporary file: in the same folder, so that a rename suffices
    assert os.listdir(tmp_path) == ["model"]
    assert torch.equal(read(path).read("b"), NUMBERS)
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(os.stat(path).st_mode) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


@both
def test_an_old_file_stands_until_the_new_one_is_whole(tmp_path, make, read):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    with make(path, replace=True) as writer:
        writer.add("a", NUMBERS)
        writer.add("b", NUMBERS)
        assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model"]
    assert torch.equal(read(path).read("a"), NUMBERS)


@both
def test_an_old_file_is_refused_unless_it_may_be_replaced(tmp_path, make, read):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="model is there already; choose another name, or have it replaced"):
        make(path)
    assert path.read_bytes() == b"old"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link is there already"):
        make(link)


@both
def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path, make, read):
    path = tmp_path / "model"
    with pytest.raises(UserError, match="is there already"):
        fill(make(path), after_b=lambda: path.write_bytes(b"another's"))
    assert path.read_bytes() == b"another's"
    assert os.listdir(tmp_path) == ["model"]


@both
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), ZeroDivisionError(), OSError(5, "a source that cannot be read")])
def test_what_stops_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, make, read, stop):
    path = tmp_path / "model"
    path.write_bytes(b"old")

    def raise_it():
        raise stop

    with pytest.raises(type(stop)) as caught:
        fill(make(path, replace=True), raise_it)
    assert caught.value is stop
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model"]


@contextlib.contextmanager
def at_most(nbytes):
    """No file grows beyond so many bytes: as on a disk without room, the system itself refuses."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@both
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_disk_that_takes_no_more_is_a_sentence_and_leaves_nothing(tmp_path, make, read, part):
    writer = make(tmp_path / "model")
    with at_most(int(part * 2 * NUMBERS.nbytes)), pytest.raises(UserError, match="model cannot be written: File too"):
        fill(writer)
    assert os.listdir(tmp_path) == []


@both
def test_a_file_that_lacks_bytes_is_not_kept_whatever_its_caller_does_then(tmp_path, make, read):
    writer = make(tmp_path / "model")

    def go_on_regardless():
        with writer:
            writer.add("a", NUMBERS)
            with at_most(NUMBERS.nbytes * 3 // 2), pytest.raises(UserError, match="cannot be written"):
                writer.add("b", NUMBERS)

    with pytest.raises(ValueError, match="is not open"):
        go_on_regardless()
    assert os.listdir(tmp_path) == []


@both
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_named_even_when_only_the_end_shows_it(tmp_path, make, read, monkeypatch):
    full = Path("/dev/full").open("wb", buffering=4 * NUMBERS.nbytes)  # noqa: SIM115
    monkeypatch.setattr(Path, "open", lambda self, mode: full)
    with pytest.raises(UserError, match="model cannot be written, because its disk is full; make room there"):
        fill(make(tmp_path / "model"))
    assert os.listdir(tmp_path) == []


@both
def test_a_place_that_cannot_be_is_named_before_any_work(tmp_path, make, read):
    with pytest.raises(UserError, match="cannot be written, because there is no folder .*missing; make it first"):
        make(tmp_path / "missing" / "model")
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        make(tmp_path, replace=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="there is no folder"):
        make(tmp_path / "file" / "model")


def test_a_start_that_fails_leaves_nothing(tmp_path):
    class Failing(WholeFile):
        def _begin(self):
            assert len(os.listdir(tmp_path)) == 1
            raise KeyboardInterrupt

        def _finish(self):
            pass

    with pytest.raises(KeyboardInterrupt), Failing(tmp_path / "model", replace=False):
        pass
    assert os.listdir(tmp_path) == []


@both
def test_a_folder_that_goes_meanwhile_is_a_sentence(tmp_path, make, read):
    (tmp_path / "folder").mkdir()
    writer = make(tmp_path / "folder" / "model")
    (tmp_path / "folder").rmdir()
    with pytest.raises(UserError, match="model cannot be written: No such file or directory; choose another place"):
        fill(writer)


@both
def test_a_writer_works_only_within_its_with_statement(tmp_path, make, read):
    writer = make(tmp_path / "model")
    with pytest.raises(ValueError, match="the writer of model is not open"):
        writer.add("a", NUMBERS)
    fill(writer)
    with pytest.raises(ValueError, match="the writer of model is not open"):
        writer.add("c", NUMBERS)
