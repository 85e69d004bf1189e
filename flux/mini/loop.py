"""The training loop that every stage of the embedded models goes through."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..training import parallel
from ..training.checkpoints import load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer
from ..training.ema import Ema
from ..training.muon import Muon, split_parameters
from .train_autoencoder import SEED_STRIDE

__all__ = ["FlowRecipe", "Report", "run_stage"]

Report = Callable[[str], None]
Model = TypeVar("Model", bound=nn.Module)

GRADIENT_NORM = 1.0
EMA_DECAY = 0.995  # about the last 200 steps: while it still learns fast, older weights pull it back
WARM_UP = 100
WEIGHT_DECAY = 0.01


@dataclass(frozen=True, kw_only=True)
class FlowRecipe:
    """Numbers of one stage: steps, of which the last ``decay`` lower the learning rate linearly to nothing.

    ``batch`` is a process's; ``average`` is the decay of the averaged weights.
    """

    steps: int
    decay: int
    batch: int = 96
    learning_rate: float = 2e-3
    average: float = EMA_DECAY
    save_every: int = 200
    compile: bool = False


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """The blocks' matrices, modulation apart, and those of a vision tower's layers."""
    within = "_blocks." in name or "encoder.layers." in name
    return within and parameter.ndim == 2 and not any(part in name for part in ("_mod.", "modulation."))


def run_stage(
    stage: str,
    model: Model,
    loss_of: Callable[[int], Tensor],
    path: Path,
    recipe: FlowRecipe,
    seed: int,
    report: Report,
    helper: nn.Module | None = None,
) -> Model:
    """Train: resume, step, average, save.

    Args:
        stage: What it is called.
        model: What is trained and averaged; only parameters that require gradients are.
        loss_of: The loss of a step, by its number alone, so that a resumed run goes on unchanged.
        path: Of the checkpoint.
        recipe: Steps and rates.
        seed: Of what is drawn.
        report: Told in a line how far it is.
        helper: Trained along and not averaged.

    Returns:
        The model with averaged weights.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    helper = helper or nn.Module()
    trained = nn.ModuleDict({"model": model, "helper": helper})
    optimizer = Muon(split_parameters(trained, _is_matrix), recipe.learning_rate, weight_decay=WEIGHT_DECAY)
    parallel.share_weights(trained)
    average = Ema(model, recipe.average)
    start = 0
    if path.exists():
        tensors, meta = load_checkpoint(path)
        start = int(meta["step"])
        model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        helper.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("helper.")})
        average.load({k[8:]: v for k, v in tensors.items() if k.startswith("average.")}, int(meta["updates"]))
        unpack_optimizer(optimizer, tensors, "optimizer.")
        report(f"{stage}: resumed at step {start}")
    began, recent = time.monotonic(), 0.0
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _rate(step, recipe)
        torch.manual_seed(seed * SEED_STRIDE + step)
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        parallel.share_gradients(trained)
        torch.nn.utils.clip_grad_norm_(trained.parameters(), GRADIENT_NORM)
        optimizer.step()
        average.update(model)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"{stage}: the loss is {value} at step {step}; lower the learning rate")
        done = step + 1
        recent = value if recent == 0.0 else 0.95 * recent + 0.05 * value
        if done % 20 == 0:
            speed = (done - start) * recipe.batch * parallel.size() / (time.monotonic() - began)
            report(f"{stage} {done}/{recipe.steps}: loss {recent:.4f}, {speed:.0f} samples/s")
        if parallel.rank() == 0 and (done % recipe.save_every == 0 or done == recipe.steps):
            save_checkpoint(
                path,
                {f"model.{k}": v for k, v in model.state_dict().items()}
                | {f"helper.{k}": v for k, v in helper.state_dict().items()}
                | {f"average.{k}": v for k, v in average.weights.items()}
                | pack_optimizer(optimizer, "optimizer."),
                {"step": done, "stage": stage, "updates": average.updates},
            )
    parallel.wait()  # until the checkpoint is written, with which others may begin
    average.copy_to(model)
    return model.eval()


def _rate(step: int, recipe: FlowRecipe) -> float:
    """Warm-up, plateau, linear descent (so that a run can be lengthened before its descent begins)."""
    return min(1.0, (step + 1) / WARM_UP, (recipe.steps - step) / max(1, recipe.decay))
