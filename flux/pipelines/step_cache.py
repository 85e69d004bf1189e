"""Step caching: blocks that would do nearly what they did a step before are left out.

From step to step a transformer's blocks change slowly. So every evaluation runs the first block, and where what that
adds to the image has changed little since the last evaluation that ran them all, what the others added then is added
again in their place (the first-block cache of ParaAttention and diffusers). With r the first block's residual now, and
q at the last evaluation in full, the change is |r - q| / |q|, sums over all tokens of the picture.

Every prediction (each prompt, each model of a run, each stretch of time with its own guides) is compared with itself
only. What an evaluation leaves holds once the whole of it has succeeded, so that one that is broken off can be
repeated.

Evaluations are told by their time, whichever solver asks for them. Of Heun's two at one time the second differs from
the first by the solver's correction only, and is what is skipped first. Both count, for the cap too.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..ops.dtypes import clamp_to_range
from ..sampling.schedules import fraction_done
from ..specs.flux1 import Flux1Spec

__all__ = ["FEW_STEPS", "MOST", "CachedSteps", "Evaluation", "Skipped", "StepCache", "check_few", "check_steps"]

FEW_STEPS = 8  # in so many a run changes much at every one, as does every run of a model that is made for so few
MOST = 1000  # steps
ROUNDING = 1e-6  # of a moment: schedules are computed in floats, by hosts in fp32, and a step is far longer
PERCENT = 100


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """When a step may be skipped. The last step never is: nothing would put its error right.

    Attributes:
        threshold: How much the first block's residual may have changed, as a share. 0 skips nothing; 0.08 to 0.12 is
            usual for FLUX.1 [dev] at 28 steps.
        max_skips: Evaluations that may be skipped one after the other.
        warmup: Steps at the start that are never skipped; they decide the layout.
    """

    threshold: float = 0.1
    max_skips: int = 3
    warmup: int = 4

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and 0 <= self.threshold <= 1):
            raise UserError(f"the step cache's threshold is {self.threshold}; give a number from 0 to 1, 0.1 is usual")
        for name in ("max_skips", "warmup"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
                raise UserError(f"the step cache's {name} is {value!r}; give a whole number from 1 to {MOST}")


def check_few(spec: Flux1Spec) -> None:
    """Refuse a model that is made for few steps.

    Raises:
        UserError: It is.
    """
    if spec.steps <= FEW_STEPS:
        raise UserError(
            f"{spec.title} is made for {spec.steps} steps, and changes so much at every one that none can be skipped; "
            "run it without a step cache"
        )


def check_steps(steps: int) -> None:
    """Refuse a run of few steps.

    Raises:
        UserError: It is.
    """
    if steps <= FEW_STEPS:
        raise UserError(
            f"a step cache skips steps that change little, and with {steps} step{'' if steps == 1 else 's'} every one "
            f"changes much; take it out, or take more than {FEW_STEPS} steps (20 or more are usual with it)"
        )


@dataclass(frozen=True)
class Skipped:
    """What a run skipped.

    Attributes:
        settings: Of the cache.
        steps: Of the run.
        skipped: The numbers, from 1, of those in which something was skipped.
        blocks: That were skipped, of all predictions.
        of: That would have run without a cache.
        least: The smallest change that was too large; None where there was none.
    """

    settings: StepCache
    steps: int
    skipped: tuple[int, ...]
    blocks: int
    of: int
    least: float | None

    @property
    def share(self) -> float:
        """Of the blocks' work. Every block of FLUX.1, double or single, multiplies as much for a token."""
        return self.blocks / self.of if self.of else 0.0

    def sentence(self) -> str:
        """What was skipped, for the user."""
        if self.skipped:
            numbers = ", ".join(str(number) for number in self.skipped)
            return (
                f"step cache: blocks were skipped in {len(self.skipped)} of {self.steps} steps ({numbers}), "
                f"{PERCENT * self.share:.0f} % of their work"
            )
        why = "" if self.least is None else f"; the least change was {self.least:.3f}"
        return f"step cache: nothing was skipped at the threshold of {self.settings.threshold:g}{why}"

    def described(self) -> dict[str, object]:
        """As plain values, for a picture's settings."""
        own = self.settings
        rules = {"threshold": own.threshold, "max_skips": own.max_skips, "warmup": own.warmup}
        return {**rules, "skipped": list(self.skipped)}


class _Known(NamedTuple):
    """What a prediction did the last time that all of its blocks ran, and how often it was skipped since.

    Attributes:
        first: What the first block added to the picture's own tokens (B, I, h).
        rest: What all the others added to every token.
        skips: Evaluations since then.
    """

    first: Tensor
    rest: Tensor
    skips: int

    def fits(self, first: Tensor) -> bool:
        return (self.first.shape, self.first.dtype, self.first.device) == (first.shape, first.dtype, first.device)

    def change(self, first: Tensor) -> Tensor:
        """The largest of the pictures' changes (), so that one that moves is not lost among others that do not."""
        moved, was = ((x.abs().mean(dim=(1, 2), dtype=torch.float32)) for x in (first - self.first, self.first))
        return (moved / was).amax()


class CachedSteps:
    """The step cache of one run, or of several one after the other.

    Args:
        settings: When a step may be skipped.
        sigmas: The run's falling times.
    """

    def __init__(self, settings: StepCache, sigmas: Sequence[float]) -> None:
        self.settings, self.sigmas = settings, list(sigmas)
        self.begin()

    def begin(self) -> None:
        """Forget everything, for a run from the start."""
        self.known: dict[Hashable, _Known] = {}
        self._open: dict[tuple[Hashable, ...], Evaluation] = {}
        self._steps: set[int] = set()
        self._blocks = self._of = 0
        self._least: float | None = None

    def evaluation(self, streams: Sequence[Hashable], sigma: float, *, own: int, blocks: int) -> Evaluation:
        """An evaluation that is about to be made.

        Args:
            streams: Who predicts, in the order of their equal parts of the batch; always the same for the same.
            sigma: Its time.
            own: The picture's own tokens, before those of references, which hardly change.
            blocks: Of the transformer.
        """
        made = Evaluation(self, tuple(streams), self._step_of(sigma), own, blocks)
        self._open[made.streams] = made
        return made

    def settle(self, evaluation: Evaluation | None = None) -> None:
        """What an evaluation found holds from now on: it has succeeded. None: all those that are open have."""
        for made in list(self._open.values()) if evaluation is None else [evaluation]:
            self._open.pop(made.streams, None)
            self.known.update(made.found)
            self._of += made.blocks * len(made.streams)
            if made.skipped:
                self._steps.add(made.step)
                self._blocks += (made.blocks - 1) * len(made.streams)
            elif made.change is not None:
                self._least = made.change if self._least is None else min(self._least, made.change)

    def may_skip(self, step: int) -> bool:
        """Whether a step, counted from 0, is none of those that are always computed."""
        return self.settings.warmup <= step < self.steps - 1

    @property
    def steps(self) -> int:
        """Of the run."""
        return max(0, len(self.sigmas) - 1)

    @property
    def skipped(self) -> Skipped:
        """What was skipped so far."""
        steps = tuple(step + 1 for step in sorted(self._steps))
        return Skipped(self.settings, self.steps, steps, self._blocks, self._of, self._least)

    def _step_of(self, sigma: float) -> int:
        """The step, from 0, that a time lies in; what a step begins at is its own."""
        return math.floor((fraction_done(sigma, self.sigmas) + ROUNDING) * self.steps)


class Evaluation:
    """One call of a transformer, which asks behind its first block whether the others are needed.

    Attributes:
        found: What each of its streams is to remember.
        skipped: Whether all blocks but the first were left out.
        change: Since the last evaluation in full; None where that was not looked at.
    """

    def __init__(self, run: CachedSteps, streams: tuple[Hashable, ...], step: int, own: int, blocks: int) -> None:
        self.run, self.streams, self.step, self.own, self.blocks = run, streams, step, own, blocks
        self.found: dict[Hashable, _Known] = {}
        self.skipped = False
        self.change: float | None = None
        self._first: Tensor | None = None
        self._after: Tensor | None = None

    def recall(self, before: Tensor, after: Tensor) -> Tensor | None:
        """The image tokens (B, I, h) behind the last block, or None where the blocks have to run.

        They are left out where none of the streams has changed much: they are computed together.

        Args:
            before: Image tokens as the first block took them.
            after: As it gave them.
        """
        first = after[:, : self.own] - before[:, : self.own]
        parts = self._parts(first)
        known = [self.run.known.get(stream) for stream in self.streams]
        if self._is_small(known, parts):
            self.skipped = True
            self.found = {
                stream: was._replace(skips=was.skips + 1)
                for stream, was in zip(self.streams, known, strict=True)
                if was is not None
            }
            return clamp_to_range(after + _joined([was.rest for was in self.found.values()]))
        self._first, self._after = first, after
        return None

    def remember(self, last: Tensor) -> None:
        """Note the image tokens (B, I, h) behind the last block, which did run."""
        assert self._first is not None
        assert self._after is not None
        rests = self._parts(last - self._after)
        firsts = self._parts(self._first)
        self._first = self._after = None
        self.found = {
            stream: _Known(first, rest, 0) for stream, first, rest in zip(self.streams, firsts, rests, strict=True)
        }

    def _is_small(self, known: Sequence[_Known | None], parts: Sequence[Tensor]) -> bool:
        settings = self.run.settings
        if settings.threshold == 0 or not self.run.may_skip(self.step):
            return False
        pairs = [(was, part) for was, part in zip(known, parts, strict=True) if was is not None and was.fits(part)]
        if len(pairs) < len(parts) or any(was.skips >= settings.max_skips for was, _ in pairs):
            return False
        self.change = float(torch.stack([was.change(part) for was, part in pairs]).amax())
        return self.change < settings.threshold

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each stream's part of a batch."""
        return x.tensor_split(len(self.streams))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
