"""Muon (Jordan et al. 2024): momentum whose matrix updates are orthogonalised, with AdamW for all else.

The orthogonalisation is the quintic Newton-Schulz iteration with Jordan's coefficients. It runs in the number format
that the device multiplies fast; torch's own Muon always takes bf16, which most CPUs cannot do at speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..ops.dtypes import fast_dtype

__all__ = ["Muon", "orthogonalised", "split_parameters"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: steep at zero, so that small singular values grow fast
ITERATIONS = 5
EPS = 1e-7
RMS_OF_ADAM = 0.2  # updates are scaled to the size of AdamW's, so that one learning rate serves both


def orthogonalised(matrix: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix: singular values near 1 (0.68 to 1.2), same singular vectors.

    Args:
        matrix: (m, n), or (k, m, n) for k matrices at once.
        iterations: Newton-Schulz steps.
    """
    a, b, c = COEFFICIENTS
    x: Tensor = matrix.to(fast_dtype(matrix.device))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    if tall:
        x = x.mT
    return x.to(matrix.dtype)


def split_parameters(module: nn.Module, is_matrix: Callable[[str, Tensor], bool]) -> list[dict[str, Any]]:
    """Two parameter groups for ``Muon``: those that are orthogonalised, and those that AdamW takes."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in module.named_parameters():
        (matrices if is_matrix(name, parameter) else rest).append(parameter)
    return [{"params": matrices, "orthogonal": True}, {"params": rest, "orthogonal": False}]


class Muon(Optimizer):
    """Muon on the groups marked ``orthogonal``, AdamW on the others.

    Args:
        groups: As ``split_parameters`` gives them. Tensors of more than two dimensions count as matrices with all but
            the first dimension flattened.
        lr: Learning rate of both; the orthogonal updates have AdamW's typical size.
        momentum: Of Muon, with Nesterov's look-ahead.
        betas: Of AdamW.
        weight_decay: Decoupled, of both.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8,
            "orthogonal": False,
        }  # fmt: skip
        super().__init__(groups, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._step_orthogonal if group["orthogonal"] else self._step_adam)(parameters, group)
        return loss

    def _step_orthogonal(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])
            ahead = p.grad.lerp(state["momentum"], group["momentum"])
            flat = ahead.reshape(len(ahead), -1)
            update = orthogonalised(flat)
            scale = RMS_OF_ADAM * max(flat.shape) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.view(p.shape), alpha=-group["lr"] * scale)

    def _step_adam(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        if not parameters:
            return
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros(()), "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        gradients = [p.grad for p in parameters if p.grad is not None]
        means = [self.state[p]["mean"] for p in parameters]
        squares = [self.state[p]["square"] for p in parameters]
        for p in parameters:
            self.state[p]["step"] += 1
        first, second = group["betas"]
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        # Each parameter's own count: one that got its first gradient late is corrected like a young one.
        steps = [float(self.state[p]["step"]) for p in parameters]
        denominators = torch._foreach_sqrt(torch._foreach_div(squares, [1 - second**step for step in steps]))
        torch._foreach_add_(denominators, group["eps"])
        tensors: list[Tensor] = list(parameters)
        torch._foreach_mul_(tensors, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(tensors, means, denominators, [-group["lr"] / (1 - first**step) for step in steps])
