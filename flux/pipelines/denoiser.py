"""One pass of a transformer: latents, a prompt and what guides it, to a velocity.

Shapes: B batch, C latent channels, h and w in latent cells, T text tokens, I image tokens, R reference tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapters.attending import Tokens, gather
from ..adapters.channels import neutral_channels
from ..adapters.control_lora import Attachment
from ..adapters.guides import Channels, Guide
from ..errors import MismatchError
from ..models.flux1 import Conditions, Flux1, Modulations
from ..ops.attention import Kernel, attention
from ..sampling.packing import PATCH, pack, unpack
from ..specs.flux1 import Flux1Spec
from .hooks import Hooks
from .modulation_tables import tabulate
from .parts import Part
from .prompts import EncodedPrompt
from .step_cache import CachedSteps, Evaluation

__all__ = ["Denoiser", "Engine", "Guidance", "check_text", "prepare_together"]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """What guides a run beside its prompts.

    Attributes:
        guides: In any order.
        models: Further transformers that guides name as theirs.
        layout: Where references are: one of ``models.positions.LAYOUTS``.
        empty: What a Fill model sees where its picture is left out, (1, c, h, w) as in ``Channels``: grey that is
            painted anew all over, as in training. None: zeros in place of the grey.
        norms_by_strength: Whether a control LoRA's norms come in as far as its strength goes; else they take the
            model's place altogether (Black Forest Labs). See ``adapters.control_lora.attached``.
    """

    guides: Sequence[Guide] = ()
    models: Mapping[str, Part[Flux1Spec, Flux1]] = field(default_factory=dict)
    layout: str = "offset"
    empty: Tensor | None = None
    norms_by_strength: bool = False


@dataclass(frozen=True)
class Engine:
    """A transformer with the control LoRAs that are on it for a run.

    Attributes:
        part: The transformer.
        followed: The guides of the LoRAs, in their order there; one LoRA may follow several pictures.
        attachment: What the LoRAs' strengths are set by; None without any.
        kernel: What computes attention.
    """

    part: Part[Flux1Spec, Flux1]
    followed: tuple[Channels, ...] = ()
    attachment: Attachment | None = None
    kernel: Kernel = attention

    def strengths(self, guides: Sequence[Guide]) -> tuple[float, ...]:
        """Every LoRA's: that of its guide, none where it has no guide here."""
        return tuple(guide.strength if guide in guides else 0.0 for guide in self.followed)

    def weigh(self, guides: Sequence[Guide]) -> None:
        """Give every LoRA its strength."""
        if self.attachment is not None:
            self.attachment.weigh(list(self.strengths(guides)))


class Denoiser:
    """The velocity of one prompt with its guides at any of the tabulated times, or directly at others.

    Args:
        engine: The transformer; its weights (modulation apart) are in memory while this is used.
        prompt: What to draw.
        guidance: Strength for the guidance embedding; ignored by models without one.
        hooks: Asked before every block whether to stop.
        guides: What the transformer is given beside the prompt.
        layout: Of references.
        empty: See ``Guidance``.
        cached: The run's step cache; None for none.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: EncodedPrompt,
        guidance: float | None,
        hooks: Hooks,
        guides: Sequence[Guide] = (),
        layout: str = "offset",
        empty: Tensor | None = None,
        cached: CachedSteps | None = None,
    ) -> None:
        part = engine.part
        check_text(part.spec, prompt)
        self.engine, self.part, self.hooks = engine, part, hooks
        self.guides, self.layout, self.empty, self.cached = tuple(guides), layout, empty, cached
        self.pooled = prompt.pooled.to(part.device, part.dtype)
        self.prompt = prompt.tokens.to(part.device, part.dtype)
        uses_guidance = part.spec.guidance_embedding and guidance is not None
        self.guidance = torch.tensor([guidance], device=part.device) if uses_guidance else None
        self.table: dict[float, Modulations] = {}
        self._tokens: dict[tuple[int, int], Tokens] = {}

    def prepare(self, sigmas: Sequence[float]) -> None:
        """Compute the modulations of these times ahead; their weights come and go layer by layer."""
        prepare_together([(self, sigmas)])

    @property
    def modulated_by(self) -> tuple[object, ...]:
        """What its modulations are made with: a transformer, and the strengths of the control LoRAs on it."""
        return self.part, self.engine.strengths(self.guides)

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The velocity (B, C, h, w) in fp32 of latents x at time ``sigma``."""
        self.engine.weigh(self.guides)
        batch, _, height, width = x.shape
        modulations = self.table.get(sigma) or self._direct(sigma)
        beside = self._beside((height, width))
        conditions = Conditions(beside.text.expand(batch, -1, -1), beside.text_ids, beside.image_ids, beside.bias)
        image = pack(torch.cat((x, *self._channels(x)), dim=1).to(self.part.dtype))
        count = image.shape[1]
        if beside.references is not None:
            image = self._with_references(image, beside.references.expand(batch, -1, -1))
        evaluation = self._evaluation(sigma, count)
        velocity = self.part.module(image, conditions, modulations, self.hooks.check, self.engine.kernel, evaluation)
        return unpack(velocity[:, :count].float(), height, width)

    def _evaluation(self, sigma: float, own: int) -> Evaluation | None:
        """What the step cache has to do with a call, of which some tokens are the picture's own."""
        if self.cached is None:
            return None
        return self.cached.evaluation([self], sigma, own=own, blocks=len(self.part.module.block_names()))

    def _beside(self, size: tuple[int, int]) -> Tokens:
        """What stands beside the image, made once for each size."""
        if size not in self._tokens:
            self._tokens[size] = gather(self.prompt, self.guides, size, self.layout)
        return self._tokens[size]

    def _channels(self, x: Tensor) -> list[Tensor]:
        """What stands behind the noisy latent's channels: the model's own, then each LoRA's."""
        own = [g.latents for g in self.guides if isinstance(g, Channels) and g.lora is None]
        extra = self.part.spec.in_channels // PATCH**2 - x.shape[1]
        behind = [own[0]] if own else [self._nothing(x, extra)] if extra else []
        behind += [g.latents if g in self.guides else torch.zeros_like(g.latents[:1]) for g in self.engine.followed]
        return [part.to(x).expand(len(x), -1, *x.shape[-2:]) for part in behind]

    def _nothing(self, x: Tensor, count: int) -> Tensor:
        """The model's own further channels where nothing is given for them."""
        if self.empty is not None and self.empty.shape[1] == count:
            return self.empty
        return neutral_channels(x, count)

    def _with_references(self, image: Tensor, references: Tensor) -> Tensor:
        """References (B, R, 4C) behind image tokens, with zeros for the channels that only the image has."""
        lacking = image.shape[-1] - references.shape[-1]
        return torch.cat((image, torch.nn.functional.pad(references, (0, lacking))), dim=1)

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


@torch.inference_mode()
def prepare_together(flows: Sequence[tuple[Denoiser, Sequence[float]]]) -> None:
    """Compute modulations of some times ahead, for several denoisers with the same ``modulated_by`` at once.

    Their weights come and go layer by layer, once for all.
    """
    first, _ = flows[0]
    first.engine.weigh(first.guides)
    wanted = [(flow, sigma) for flow, sigmas in flows for sigma in sorted(set(sigmas) - set(flow.table), reverse=True)]
    rows = tabulate(first.part.module, [flow._vector(sigma) for flow, sigma in wanted], first._borrow)
    for (flow, sigma), row in zip(wanted, rows, strict=True):
        flow.table[sigma] = row


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
