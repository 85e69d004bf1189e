"""From noise to latents: a transformer, encoded prompts and a schedule, run by a solver.

Shapes: B batch, C latent channels, h and w in latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Cancelled, MismatchError, NumericError
from ..models.flux1 import Conditions, Flux1, Modulations
from ..models.positions import image_ids, text_ids
from ..sampling.guidance import masked, true_cfg
from ..sampling.packing import pack, unpack
from ..sampling.solvers import OnStep, evaluation_sigmas, solver
from ..specs.flux1 import Flux1Spec
from .modulation_tables import tabulate
from .parts import Part
from .prompts import EncodedPrompt

__all__ = ["Denoiser", "Hooks", "Velocity", "denoise", "prepared", "walk"]

Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Hooks:
    """What a run tells its caller, and asks of it; every one is optional.

    Attributes:
        progress: Called with the stage's name, the steps done, and how many there are.
        preview: Called after a step with its number and the estimate (B, C, h, w) of the final latents.
        cancelled: Asked before every block, and every weight that is loaded; True stops the run with ``Cancelled``.
        warn: Told in a sentence what was done otherwise than asked.
    """

    progress: Callable[[str, int, int], None] | None = None
    preview: Callable[[int, Tensor], None] | None = None
    cancelled: Callable[[], bool] | None = None
    warn: Callable[[str], None] | None = None

    def loading(self, done: int, total: int) -> None:
        """Tell of weights on their way into memory, and raise ``Cancelled`` if the caller wants the run to stop."""
        self.check()
        if self.progress is not None:
            self.progress("loading", done, total)

    def check(self, _: int = 0) -> None:
        """Raise ``Cancelled`` if the caller wants the run to stop."""
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("the run was cancelled")


class Denoiser:
    """The velocity of one prompt at any of the tabulated times, or directly at others.

    Args:
        part: The transformer; its weights (modulation apart) are in memory while this is used.
        prompt: What to draw.
        guidance: Strength for the guidance embedding; ignored by models without one.
        hooks: Asked before every block whether to stop.
    """

    def __init__(
        self, part: Part[Flux1Spec, Flux1], prompt: EncodedPrompt, guidance: float | None, hooks: Hooks
    ) -> None:
        check_text(part.spec, prompt)
        self.part, self.hooks = part, hooks
        self.pooled = prompt.pooled.to(part.device, part.dtype)
        self.tokens = prompt.tokens.to(part.device, part.dtype)
        uses_guidance = part.spec.guidance_embedding and guidance is not None
        self.guidance = torch.tensor([guidance], device=part.device) if uses_guidance else None
        self.table: dict[float, Modulations] = {}

    @torch.inference_mode()
    def prepare(self, sigmas: Sequence[float]) -> None:
        """Compute the modulations of these times ahead; their weights come and go layer by layer."""
        moments = sorted(set(sigmas) - set(self.table), reverse=True)
        vectors = [self._vector(sigma) for sigma in moments]
        rows = tabulate(self.part.module, vectors, self._borrow)
        self.table |= dict(zip(moments, rows, strict=True))

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The velocity (B, C, h, w) in fp32 of latents x at time ``sigma``."""
        batch, _, height, width = x.shape
        modulations = self.table.get(sigma) or self._direct(sigma)
        conditions = Conditions(
            self.tokens.expand(batch, -1, -1),
            text_ids(self.tokens.shape[1], x.device),
            image_ids(height // 2, width // 2, x.device),
        )
        tokens = pack(x.to(self.part.dtype))
        velocity = self.part.module(tokens, conditions, modulations, self.hooks.check)
        return unpack(velocity.float(), height, width)

    def _vector(self, sigma: float) -> Tensor:
        return self.part.module.embed(torch.tensor([sigma], device=self.part.device), self.pooled, self.guidance)

    def _direct(self, sigma: float) -> Modulations:
        """Modulations of a time that was not known ahead, by the model's own way."""
        with ExitStack() as borrowed:
            for prefix in self.part.module.modulation_layers():
                borrowed.enter_context(self.part.residency.borrow(prefix))
            return self.part.module.modulate(self._vector(sigma))

    def _borrow(self, prefix: str) -> AbstractContextManager[None]:
        """A modulation layer's weights for the length of a block, unless the caller wants the run to stop."""
        self.hooks.check()
        return self.part.residency.borrow(prefix)


def check_text(spec: Flux1Spec, prompt: EncodedPrompt) -> None:
    """Refuse text that was encoded for another model.

    Raises:
        MismatchError: Its widths are not the model's.
    """
    found = (prompt.tokens.shape[-1], prompt.pooled.shape[-1])
    wanted = (spec.context_width, spec.pooled_width)
    if found != wanted:
        raise MismatchError(
            f"the text conditioning has width {found[0]} with a pooled vector of {found[1]}, but {spec.title} takes "
            f"{wanted[0]} and {wanted[1]}; encode the prompt with {' and '.join(spec.text_encoders)}"
        )


@torch.inference_mode()
def denoise(
    part: Part[Flux1Spec, Flux1],
    positive: EncodedPrompt,
    noise: Tensor,
    sigmas: Sequence[float],
    *,
    guidance: float | None = None,
    negative: EncodedPrompt | None = None,
    cfg: float = 1.0,
    solver_name: str = "euler",
    latents: Tensor | None = None,
    mask: Tensor | None = None,
    tables: bool = True,
    hooks: Hooks | None = None,
) -> Tensor:
    """Run a schedule: ``prepared`` for one ``walk``. See there for what the arguments are.

    Returns:
        Latents (B, C, h, w), fp32, in the transformer's space.

    Raises:
        Cancelled: ``hooks.cancelled`` said so.
        NumericError: A step's result was not finite.
        MismatchError: The text is another model's.
    """
    hooks = hooks or Hooks()
    ready = prepared(
        part, positive, sigmas,
        guidance=guidance, negative=negative, cfg=cfg, solver_name=solver_name, tables=tables, hooks=hooks,
    )  # fmt: skip
    with ready as velocity:
        return walk(
            velocity, noise, sigmas,
            device=part.device, solver_name=solver_name, latents=latents, mask=mask, hooks=hooks,
        )  # fmt: skip


@contextmanager
def prepared(
    part: Part[Flux1Spec, Flux1],
    positive: EncodedPrompt,
    sigmas: Sequence[float],
    *,
    guidance: float | None = None,
    negative: EncodedPrompt | None = None,
    cfg: float = 1.0,
    solver_name: str = "euler",
    tables: bool = True,
    hooks: Hooks | None = None,
) -> Iterator[Velocity]:
    """Have a transformer ready for a schedule inside the block, for as many walks as wanted.

    Args:
        part: The transformer.
        positive: What to draw.
        sigmas: Falling times, the first at most 1, the last 0.
        guidance: For the guidance embedding.
        negative: What to stay away from; used when ``cfg`` is not 1, at the price of a second pass.
        cfg: Strength of true classifier-free guidance.
        solver_name: One of ``sampling.solvers.SOLVERS``.
        tables: Whether to compute modulations ahead (the default) or at every step. Both give the same bits.
        hooks: Told of the stage "loading", weight by weight; asked whether to stop.

    Yields:
        The velocity of latents (B, C, h, w) at a time of the schedule.
    """
    hooks = hooks or Hooks()
    flows = [Denoiser(part, positive, guidance, hooks)]
    if negative is not None and cfg != 1.0:
        flows.append(Denoiser(part, negative, guidance, hooks))
    apart = tuple(part.module.modulation_layers()) if tables else ()

    def velocity(x: Tensor, sigma: float) -> Tensor:
        v = flows[0](x, sigma)
        return v if len(flows) == 1 else true_cfg(v, flows[1](x, sigma), cfg)

    with part.resident(without=apart, watch=hooks.loading):
        if tables:
            for flow in flows:
                flow.prepare(evaluation_sigmas(solver_name, list(sigmas)))
        yield velocity


@torch.inference_mode()
def walk(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Sequence[float],
    *,
    device: torch.device,
    solver_name: str = "euler",
    latents: Tensor | None = None,
    mask: Tensor | None = None,
    hooks: Hooks | None = None,
) -> Tensor:
    """From noise down a schedule, along what ``prepared`` gave for it.

    Args:
        velocity: From ``prepared``, with the same schedule and solver.
        noise: (B, C, h, w), fp32.
        sigmas: Falling times, the first at most 1, the last 0.
        device: Where ``velocity`` is computed.
        solver_name: One of ``sampling.solvers.SOLVERS``.
        latents: Where to start from (B, C, h, w), in the transformer's space; None for nothing.
        mask: (B or 1, 1, h, w), 1 where ``latents`` may change; None for everywhere.
        hooks: Progress, preview, cancelling.

    Returns:
        Latents (B, C, h, w), fp32 on the CPU, in the transformer's space.
    """
    hooks = hooks or Hooks()
    clean = torch.zeros_like(noise) if latents is None else latents
    noise, clean = noise.to(device, torch.float32), clean.to(device, torch.float32)
    x = sigmas[0] * noise + (1 - sigmas[0]) * clean
    field = velocity if mask is None else masked(velocity, mask.to(device, torch.float32), clean, noise)
    return solver(solver_name)(field, x, list(sigmas), _step_observer(hooks, len(sigmas) - 1)).cpu()


def _step_observer(hooks: Hooks, steps: int) -> OnStep:
    def after_step(index: int, x: Tensor, x0: Tensor, sigma_next: float) -> None:
        if not bool(torch.isfinite(x).all()):
            raise NumericError(
                f"step {index + 1} of {steps} gave numbers that are not finite; most often the weights are damaged or "
                "the number format overflows: try another dtype (bf16 or fp32), or a fresh copy of the file"
            )
        if hooks.progress is not None:
            hooks.progress("sampling", index + 1, steps)
        if hooks.preview is not None:
            hooks.preview(index + 1, x0)
        hooks.check()

    return after_step
