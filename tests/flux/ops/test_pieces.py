"""Bytes brought by several threads are those that one would bring, and a fault of any of them is told."""

from __future__ import annotations

import threading

import pytest
import torch

from flux.ops.pieces import SMALLEST, by_several, copy_bytes, in_pieces

LENGTH = 5 * SMALLEST + 4321


def noted(length: int) -> tuple[list[tuple[int, int]], set[int]]:
    pieces, threads, lock = [], set(), threading.Lock()

    def work(first: int, last: int) -> None:
        with lock:
            pieces.append((first, last))
            threads.add(threading.get_ident())

    in_pieces(length, work)
    return sorted(pieces), threads


def test_alone_it_is_one_piece_in_the_same_thread():
    assert noted(LENGTH) == ([(0, LENGTH)], {threading.get_ident()})


def test_several_pieces_lie_side_by_side_and_cover_all():
    with by_several(3):
        pieces, threads = noted(LENGTH)
    assert len(pieces) == 3
    assert len(threads) > 1
    assert [first for first, _ in pieces] == [0, *(last for _, last in pieces[:-1])]
    assert pieces[-1][1] == LENGTH
    assert noted(LENGTH)[0] == [(0, LENGTH)]  # behind the block


@pytest.mark.parametrize("length", [0, 1, SMALLEST, 2 * SMALLEST - 1])
def test_what_is_small_stays_whole(length):
    with by_several(4):
        assert noted(length)[0] == [(0, length)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_copies_are_equal(count):
    source, target = torch.randint(0, 256, (LENGTH,), dtype=torch.uint8), torch.zeros(LENGTH, dtype=torch.uint8)
    with by_several(count):
        copy_bytes(target, source)
    assert torch.equal(target, source)


def test_the_fault_of_another_thread_is_raised_when_all_are_done():
    done = []

    def work(first: int, last: int) -> None:
        if first:
            raise OSError("gone")
        done.append(last)

    with by_several(2), pytest.raises(OSError, match="gone"):
        in_pieces(LENGTH, work)
    assert len(done) == 1
