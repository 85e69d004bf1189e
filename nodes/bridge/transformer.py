"""The engine's transformer in the shape of the host's denoisers.

Shapes: B batch (of all prompts of a call together), C channels, h and w in latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import comfy.patcher_extension
import torch
from comfy.ldm.flux.model import FluxParams
from torch import Tensor

from ...flux.models.flux1 import Conditions, Flux1, Modulations
from ...flux.models.positions import LAYOUTS, text_ids
from ...flux.ops.attention_backends import until_finite
from ...flux.pipelines.modulation_tables import tabulate
from ...flux.sampling.packing import PATCH, pack, pad_to_patch, unpack
from ...flux.specs.flux1 import Flux1Spec
from .attention import attention_for
from .blocks import is_patched, run_patched
from .experts import EXPERT, TABLE, Expert
from .norms import use_host_norms
from .packed import lend
from .progress import check_cancelled
from .references import VIEWS, joint_bias, positions, reference_tokens
from .step_cache import evaluation_of, settle
from .weights import HostLayers

__all__ = ["AHEAD", "HostFlux1", "ModulationTable", "host_config", "sample_with_table"]

AHEAD = 64  # times, which take 2 MB each for FLUX.1 [dev] in bf16
WRAPPERS = comfy.patcher_extension.WrappersMP

Row = tuple[bytes, float | None]


class ModulationTable:
    """Modulations of one sampling run, computed ahead: for each prompt, the times of the schedule that come next.

    Args:
        sigmas: The schedule's times.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.moments = sorted({float(s) for s in sigmas if s > 0}, reverse=True)
        self._rows: dict[Row, dict[float, Modulations]] = {}
        self._beside: dict[int, ModulationTable] = {}

    def beside(self, model: object) -> ModulationTable:
        """The table of a further model of the run."""
        return self._beside.setdefault(id(model), ModulationTable(self.moments))

    def lookup(self, row: Row, moment: float, compute: Callable[[Sequence[float]], list[Modulations]]) -> Modulations:
        """The modulations of a prompt at a time; ``compute`` makes those of times that are not in the table."""
        known = self._rows.get(row, {})
        if moment in known:
            return known[moment]
        if moment not in self.moments:  # between two sigmas, where some solvers look: not seen again
            return compute([moment])[0]
        place = self.moments.index(moment)
        wanted = self.moments[place : place + AHEAD]
        known = self._rows[row] = dict(zip(wanted, compute(wanted), strict=True))
        return known[moment]


def sample_with_table(executor: Any, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], *rest: Any) -> Any:
    """Wrapper of a sampling run that gives it a table, unless hooks change weights while it runs."""
    if not any("hooks" in cond for conds in guider.conds.values() for cond in conds or ()):
        options = extra_args["model_options"].setdefault("transformer_options", {})
        options[TABLE] = ModulationTable(sigmas.tolist())
    return executor(guider, sigmas, extra_args, *rest)


class HostFlux1(Flux1):
    """``Flux1`` with the host's call signature; its parameters keep Black Forest Labs' names.

    Args:
        spec: Which transformer.
        layers: The host's.
        dtype: Of its weights, which the host asks for.
    """

    patch_size = PATCH

    def __init__(self, spec: Flux1Spec, layers: HostLayers, dtype: torch.dtype) -> None:
        super().__init__(spec, layers)
        self.dtype = dtype
        self.params = parameters(spec)
        use_host_norms(self, layers)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The velocity (B, C, h, w).

        Args:
            x: Latents in the model's space, with concatenated channels where the variant takes some.
            timestep: Flow times (B,).
            context: T5 tokens (B, T, width).
            y: CLIP's pooled vectors (B, width); zeros when None.
            guidance: Strengths (B,); None leaves the guidance embedding out.
            ref_latents: References (B, C, any h, any w), in the model's space.
            control: A ControlNet's residuals.
            transformer_options: The host's patches and information.
            **kwargs: ``ref_latents_method``, ``attention_mask`` and our own keys; and what other models take.
        """
        options = {} if transformer_options is None else transformer_options
        expert: Expert | None = kwargs.pop(EXPERT, None)
        if expert is not None:
            own = expert.options(options)
            if TABLE in own:
                own[TABLE] = own[TABLE].beside(expert.model)
            return expert(x, timestep, context, y, guidance, ref_latents, control, own, **kwargs)
        wrappers = comfy.patcher_extension.get_all_wrappers(WRAPPERS.DIFFUSION_MODEL, options)
        run = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._run, self, wrappers)
        return run.execute(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)

    def _run(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = dict(transformer_options or {})
        padded, size = pad_to_patch(x)
        tokens = pack(padded)
        own = tokens.shape[1]
        references = reference_tokens(ref_latents or (), tokens.shape[-1], self.spec.latent_channels)
        counts = [part.shape[1] for part in references]
        if references:
            options["reference_image_num_tokens"] = counts
            tokens = torch.cat((tokens, *references), dim=1)
        method = kwargs.get("ref_latents_method") or getattr(self.params, "default_ref_method", LAYOUTS[0])
        sizes = [(int(latent.shape[-2]), int(latent.shape[-1])) for latent in ref_latents or ()]
        ids = positions(size, sizes, method, options.get("rope_options") or {}, x.device)
        views = kwargs.get(VIEWS) or ()
        bias = joint_bias(kwargs.get("attention_mask"), views, context.shape[1], size, counts, x.device)
        conditions = Conditions(
            context, text_ids(context.shape[1], x.device), ids, None if bias is None else bias[:, None].to(x.dtype)
        )
        pooled = x.new_zeros(len(x), self.spec.pooled_width) if y is None else y
        modulations = self._modulations(timestep, pooled, guidance, options.get(TABLE))
        kernel = attention_for(self.spec, tokens)
        evaluation = evaluation_of(self, options, timestep, own)

        def velocity() -> Tensor:
            if not is_patched(options, control):
                return Flux1.forward(self, tokens, conditions, modulations, check_cancelled, kernel, evaluation)
            vector = self.embed(timestep, pooled, guidance)
            return run_patched(self, tokens, conditions, modulations, vector, control, options, kernel, evaluation)

        found = until_finite([kernel], velocity)
        settle(options, evaluation)
        return unpack(found[:, :own], *size)

    def _modulations(
        self, times: Tensor, pooled: Tensor, guidance: Tensor | None, table: ModulationTable | None
    ) -> Modulations:
        """Modulations of every row of the batch; equal rows are computed once."""
        moments = times.tolist()
        strengths = [None] * len(moments) if guidance is None else guidance.tolist()
        keys = [row.tobytes() for row in pooled.float().cpu().numpy()]
        table = table or ModulationTable(())
        rows: dict[tuple[Row, float], Modulations] = {}
        order = []
        for index, (moment, strength, key) in enumerate(zip(moments, strengths, keys, strict=True)):
            place = ((key, strength), moment)
            if place not in rows:
                own = slice(index, index + 1)
                rows[place] = table.lookup(
                    *place, lambda wanted, own=own: self._compute(wanted, pooled[own], guidance, own)
                )
            order.append(place)
        return rows[order[0]] if len(rows) == 1 else _stack([rows[place] for place in order])

    def _compute(
        self, moments: Sequence[float], pooled: Tensor, guidance: Tensor | None, own: slice
    ) -> list[Modulations]:
        """One prompt's modulations at several times, each by a product of its own: the same bits, however many."""
        strength = None if guidance is None else guidance[own]
        times = torch.tensor(moments, dtype=torch.float32, device=pooled.device)
        return tabulate(self, [self.embed(time[None], pooled, strength) for time in times], partial(self._lend, pooled))

    @contextmanager
    def _lend(self, like: Tensor, prefix: str) -> Iterator[Callable[[Tensor], Tensor]]:
        """A modulation layer, its weights brought once for all moments, for inputs of the dtype and device of ``like``.

        Before it the user may stop the run.
        """
        check_cancelled()
        with lend(self.get_submodule(prefix), like) as product:
            yield product


def host_config(spec: Flux1Spec) -> dict[str, Any]:
    """The host's name for each of a spec's fields; LoRA nodes and others read them."""
    patch_area = PATCH * PATCH
    return {
        "disable_unet_model_creation": True,  # we set the network ourselves
        "image_model": "flux",
        "in_channels": spec.in_channels // patch_area,
        "out_channels": spec.out_channels // patch_area,
        "patch_size": PATCH,
        "vec_in_dim": spec.pooled_width,
        "context_in_dim": spec.context_width,
        "hidden_size": spec.hidden,
        "mlp_ratio": spec.mlp_ratio,
        "num_heads": spec.heads,
        "depth": spec.double_blocks,
        "depth_single_blocks": spec.single_blocks,
        "axes_dim": list(spec.axes),
        "theta": int(spec.theta),
        "qkv_bias": True,
        "guidance_embed": spec.guidance_embedding,
    }


def parameters(spec: Flux1Spec) -> FluxParams:
    """A transformer's settings as the host's own has them, for nodes that read or change them."""
    known = {field.name for field in fields(FluxParams)}
    given = {**host_config(spec), "txt_ids_dims": []}
    return FluxParams(**{name: value for name, value in given.items() if name in known})


def _stack(rows: Sequence[Modulations]) -> Modulations:
    return Modulations(
        *(tuple(torch.cat(parts) for parts in zip(*(row[i] for row in rows), strict=True)) for i in range(3)),
        final=torch.cat([row.final for row in rows]),
    )
