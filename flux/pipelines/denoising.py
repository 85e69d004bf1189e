"""From noise to latents: a transformer, encoded prompts and a schedule, run by a solver.

Shapes: B batch, C latent channels, h and w in latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from ..adapters.blending import Prediction, predictions_of
from ..adapters.control_lora import Attachment, attached
from ..adapters.guides import Channels, StyleTokens
from ..errors import NumericError
from ..memory.exhaustion import Fallback
from ..memory.metering import Several
from ..memory.spread import shares
from ..models.flux1 import Flux1
from ..ops.attention_backends import AUTO, Attention, Case, choose_attention, until_finite
from ..ops.host_heap import keeping_freed_memory
from ..sampling.guidance import masked, true_cfg
from ..sampling.schedules import fraction_done
from ..sampling.solvers import OnStep, evaluation_sigmas, solver
from ..specs.flux1 import Flux1Spec
from .denoiser import Denoiser, Engine, Guidance, prepare_together
from .hooks import Hooks
from .one_by_one import pictures_one_by_one
from .parts import Part, title_of
from .prompts import EncodedPrompt
from .step_cache import CachedSteps

__all__ = [
    "TRANSFORMER", "Denoiser", "Engine", "Guidance", "Hooks", "Velocity", "attention_of", "denoise", "metered",
    "prepared", "walk",
]  # fmt: skip

Velocity = Callable[[Tensor, float], Tensor]
TRANSFORMER = "transformer"  # the stage's key


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
    guided: Guidance | None = None,
    limit: int | None = None,
    cached: CachedSteps | None = None,
    attention: str = AUTO,
    compiled: bool = False,
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
        guided=guided, limit=limit, cached=cached, attention=attention, compiled=compiled,
    )  # fmt: skip
    with metered(part, guided, hooks), ready as velocity:
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
    guided: Guidance | None = None,
    limit: int | None = None,
    cached: CachedSteps | None = None,
    attention: str = AUTO,
    compiled: bool = False,
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
        guided: What guides the run beside its prompts. Style tokens are the positive prompt's only.
        limit: Bytes that the weights may take, of all transformers together; what goes beyond is streamed.
        cached: A step cache, of the same schedule; whoever walks has it begin again for each walk.
        attention: One of ``ops.attention_backends.CHOICES``.
        compiled: Whether blocks run compiled, as far as the machine can compile; see ``compiled``.

    Yields:
        The velocity of latents (B, C, h, w) at a time of the schedule.

    Raises:
        UserError: There is no such attention, or it cannot run here.
    """
    hooks, guided = hooks or Hooks(), guided or Guidance()
    predictions = predictions_of(guided.guides)
    with ExitStack() as held:
        engines = _engines(held, part, guided, predictions, hooks, attention, tables=tables, limit=limit)
        if compiled:
            _compile(held, engines.values(), hooks)
        if part.device.type == "cpu":  # around what is compiled, so that it is for one picture, however many come
            for one in dict.fromkeys(engine.part for engine in engines.values()):
                held.enter_context(pictures_one_by_one(one.module, partial(getattr, one.residency, "streams")))
        going_on = _going_on(dict.fromkeys(engine.part for engine in engines.values()), hooks, tables=tables)
        flows = []
        for prediction in predictions:
            engine = engines[prediction.model]
            how = guided.layout, guided.empty, cached
            passes = [Denoiser(engine, positive, guidance, hooks, prediction.guides, *how)]
            if negative is not None and cfg != 1.0:
                unstyled = [guide for guide in prediction.guides if not isinstance(guide, StyleTokens)]
                passes.append(Denoiser(engine, negative, guidance, hooks, unstyled, *how))
            flows.append((prediction, passes))
        if tables:
            moments = evaluation_sigmas(solver_name, list(sigmas))
            alike: dict[tuple[object, ...], list[tuple[Denoiser, list[float]]]] = {}
            for prediction, passes in flows:
                own = [sigma for sigma in moments if prediction.covers(fraction_done(sigma, sigmas))]
                for flow in passes:
                    alike.setdefault(flow.modulated_by, []).append((flow, own))
            for group in alike.values():
                going_on(partial(prepare_together, group))

        kernels = dict.fromkeys(engine.kernel for engine in engines.values())
        if part.device.type == "cpu":
            held.enter_context(keeping_freed_memory())  # not while weights come: what they leave free fits no step

        def velocity(x: Tensor, sigma: float) -> Tensor:
            result = going_on(lambda: until_finite(kernels, lambda: predicted(x, sigma)))
            if cached is not None:
                cached.settle()  # not before: what memory ran out for is repeated from its beginning
            return result

        def predicted(x: Tensor, sigma: float) -> Tensor:
            done = fraction_done(sigma, sigmas)
            active = [(prediction, passes) for prediction, passes in flows if prediction.covers(done)]
            if len(active) == 1:
                return _with_cfg(active[0][1], x, sigma, cfg)
            weights = [prediction.weight((x.shape[-2], x.shape[-1]), x.device) for prediction, _ in active]
            parts = [
                weight * _with_cfg(passes, x, sigma, cfg) for weight, (_, passes) in zip(weights, active, strict=True)
            ]
            return torch.stack(parts).sum(dim=0)

        yield velocity


def _engines(
    held: ExitStack,
    part: Part[Flux1Spec, Flux1],
    guided: Guidance,
    predictions: Sequence[Prediction],
    hooks: Hooks,
    attention: str,
    *,
    tables: bool,
    limit: int | None,
) -> dict[str | None, Engine]:
    """Every transformer of a run, in memory as long as ``held`` is open, and the run's LoRAs on its own one.

    One that goes by several names, the run's own among them, is there once.
    """
    engines: dict[Part[Flux1Spec, Flux1], Engine] = {}
    followed = tuple(g for g in guided.guides if isinstance(g, Channels) and g.lora is not None and g.strength > 0)
    loras = [guide.lora for guide in followed if guide.lora is not None]
    models = {name: part if name is None else guided.models[name] for name in (p.model for p in predictions)}
    distinct = list(dict.fromkeys(models.values()))
    kernels = {model: attention_of(model, attention, hooks.warn) for model in distinct}
    for model, share in zip(distinct, _shares(distinct, limit, tables=tables), strict=True):
        apart = _apart(model, tables=tables)
        held.enter_context(model.resident(without=apart, watch=hooks.loading, limit=share, tell=hooks.warn))
        engines[model] = Engine(model, kernel=kernels[model])
    if loras and part in engines:

        def put_on() -> Attachment:
            how = {"norms_by_strength": guided.norms_by_strength}
            return held.enter_context(attached(part.module, loras, part.device, part.dtype, **how))

        attachment = _going_on(distinct, hooks, tables=tables)(put_on)
        engines[part] = Engine(part, followed, attachment, kernels[part])
    return {name: engines[model] for name, model in models.items()}


def _going_on(parts: Iterable[Part[Flux1Spec, Flux1]], hooks: Hooks, *, tables: bool) -> Fallback:
    """What goes on with fewer weights in memory where it runs out."""
    loaded = list(parts)
    without = [_apart(part, tables=tables) for part in loaded]
    return Fallback([part.residency for part in loaded], without, hooks.warn)


def _shares(parts: Sequence[Part[Flux1Spec, Flux1]], limit: int | None, *, tables: bool) -> Sequence[int | None]:
    """What each of a run's transformers may take of what they may take together."""
    needs = []
    for part in parts:
        accounts, apart = part.residency.accounts, _apart(part, tables=tables)
        needs.append((accounts.footprint(apart, 0).device_bytes, accounts.footprint(apart).device_bytes))
    return shares(limit, needs)


def metered(part: Part[Flux1Spec, Flux1], guided: Guidance | None, hooks: Hooks) -> AbstractContextManager[None]:
    """Have a meter note what a run's transformers take, as one stage."""
    further = () if guided is None else guided.models.values()
    modules = [own.residency for own in dict.fromkeys((part, *further))]
    return hooks.meter.stage(TRANSFORMER, title_of(part.spec), Several(modules))


def attention_of(
    part: Part[Flux1Spec, Flux1], name: str = AUTO, tell: Callable[[str], None] | None = None
) -> Attention:
    """What computes a transformer's attention where it runs; see ``choose_attention``."""
    return choose_attention(name, Case(part.device, part.dtype, part.spec.hidden // part.spec.heads), tell)


def _compile(held: ExitStack, engines: Iterable[Engine], hooks: Hooks) -> None:
    """Have the blocks of every transformer run compiled as long as ``held`` is open."""
    from .compiled import compiled_blocks  # which brings the compiler

    for part in dict.fromkeys(engine.part for engine in engines):
        held.enter_context(compiled_blocks(part.module, tell=hooks.warn))


def _apart(part: Part[Flux1Spec, Flux1], *, tables: bool) -> tuple[str, ...]:
    """What is made into a table, and does not stay."""
    return tuple(part.module.modulation_layers()) if tables else ()


def _with_cfg(passes: Sequence[Denoiser], x: Tensor, sigma: float, cfg: float) -> Tensor:
    positive = passes[0](x, sigma)
    return positive if len(passes) == 1 else true_cfg(positive, passes[1](x, sigma), cfg)


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
    hooks.meter.begin()
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
        hooks.meter.tick()
        if hooks.progress is not None:
            hooks.progress("sampling", index + 1, steps)
        if hooks.preview is not None:
            hooks.preview(index + 1, x0)
        hooks.check()

    return after_step
