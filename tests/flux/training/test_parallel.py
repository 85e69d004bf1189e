"""Processes that train together are as one with a batch of all theirs."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from torch import nn
from torch.multiprocessing import start_processes

from flux.mini.loop import FlowRecipe, run_stage
from flux.training import parallel
from flux.training.checkpoints import load_checkpoint

PROCESSES, BATCH, STEPS = 2, 3, 4


def batch_of(step, rank):
    random = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(BATCH, 5, generator=random), torch.randn(BATCH, 2, generator=random)


def trained(path, ranks, seed):
    """A layer after some steps of a stage on the batches of these ranks."""
    torch.manual_seed(seed)
    layer = nn.Linear(5, 2)

    def loss(step):
        inputs, wanted = (torch.cat(parts) for parts in zip(*(batch_of(step, rank) for rank in ranks), strict=True))
        return (layer(inputs) - wanted).square().mean()

    recipe = FlowRecipe(steps=STEPS, decay=2, batch=BATCH, learning_rate=0.1)
    return run_stage("layer", layer, loss, path, recipe, 0, lambda line: None)


def one_of_several(rank, folder, port):
    torch.set_num_threads(1)
    os.environ.update(
        WORLD_SIZE=str(PROCESSES), RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank)
    )
    parallel.join()
    assert (parallel.rank(), parallel.size()) == (rank, PROCESSES)
    order = folder / "order"
    with parallel.in_turn():
        order.write_text((order.read_text() if order.exists() else "") + str(rank))
    made = trained(folder / f"checkpoint-{rank}", [rank], seed=rank)
    torch.save(made.state_dict(), folder / f"weights-{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(one_of_several, (folder, port), nprocs=PROCESSES, start_method="spawn")
    return folder


def test_they_reach_what_one_process_reaches_with_all_batches(together, tmp_path):
    alone = trained(tmp_path / "checkpoint", range(PROCESSES), seed=0).state_dict()
    for rank in range(PROCESSES):
        made = torch.load(together / f"weights-{rank}", weights_only=True)
        for name, weight in alone.items():
            torch.testing.assert_close(made[name], weight)


def test_the_first_alone_writes_checkpoints(together):
    assert load_checkpoint(together / "checkpoint-0")[1]["step"] == STEPS
    assert not (together / "checkpoint-1").exists()


def test_they_take_turns(together):
    assert (together / "order").read_text() == "01"


def test_without_others_nothing_is_shared():
    parallel.join()
    assert (parallel.rank(), parallel.size()) == (0, 1)
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    before = [parameter.grad.clone() for parameter in layer.parameters()]
    parallel.share_gradients(layer)
    assert all(torch.equal(a, b.grad) for a, b in zip(before, layer.parameters(), strict=True))
