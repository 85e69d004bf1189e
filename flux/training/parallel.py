"""Data-parallel training by several processes, each with a batch of its own: ``python -m torch.distributed.run``.

On a CPU, processes with one thread each are faster than one process with as many threads: its operations wait for one
another at every end. Without that command everything here is for a single process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn

__all__ = ["in_turn", "join", "rank", "share_gradients", "share_weights", "size", "wait"]

WORLD_SIZE = "WORLD_SIZE"  # of the environment, set for each process


def join() -> None:
    """Meet the other processes, if this one was begun with others."""
    if int(os.environ.get(WORLD_SIZE, "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")


def size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


@contextmanager
def in_turn() -> Iterator[None]:
    """Have the block run in one process after the other."""
    for turn in range(size()):
        if turn == rank():
            yield
        wait()


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        distributed.barrier()


@torch.no_grad()
def share_weights(module: nn.Module) -> None:
    """Give the module the parameters and buffers of the first process's."""
    if size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            distributed.broadcast(tensor, 0)


@torch.no_grad()
def share_gradients(module: nn.Module) -> None:
    """Set the gradients of those parameters that have any to the mean of all processes', which must have the same."""
    if size() == 1:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= size()
    parts = flat.split_with_sizes([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
