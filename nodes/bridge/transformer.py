"""The engine's transformer in the shape of the host's denoisers.

Shapes: B batch (of all prompts of a call together), C channels, h and w in latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.patcher_extension
import torch
from torch import Tensor

from ...flux.errors import UserError
from ...flux.models.flux1 import Conditions, Flux1, Modulations
from ...flux.models.positions import image_ids, text_ids
from ...flux.pipelines.modulation_tables import tabulate
from ...flux.sampling.packing import PATCH, pack, pad_to_patch, token_grid, unpack
from ...flux.specs.flux1 import Flux1Spec
from .blocks import is_patched, run_patched
from .packed import lend
from .progress import check_cancelled
from .weights import HostLayers

__all__ = ["TABLE", "HostFlux1", "ModulationTable", "sample_with_table"]

TABLE = "fluxfoundry_modulations"  # our key in the host's transformer_options
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
            ref_latents: Not supported by this version.
            control: A ControlNet's residuals.
            transformer_options: The host's patches and information.
            **kwargs: What other models take.
        """
        options = {} if transformer_options is None else transformer_options
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
        _refuse(ref_latents, kwargs)
        padded, size = pad_to_patch(x)
        ids = scaled_ids(image_ids(*token_grid(*size), x.device), options.get("rope_options") or {})
        conditions = Conditions(context, text_ids(context.shape[1], x.device), ids)
        pooled = x.new_zeros(len(x), self.spec.pooled_width) if y is None else y
        modulations = self._modulations(timestep, pooled, guidance, options.get(TABLE))
        tokens = pack(padded)
        if is_patched(options, control):
            vector = self.embed(timestep, pooled, guidance)
            velocity = run_patched(self, tokens, conditions, modulations, vector, control, options)
        else:
            velocity = super().forward(tokens, conditions, modulations, check_cancelled)
        return unpack(velocity, *size)

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


def scaled_ids(ids: Tensor, options: Mapping[str, float]) -> Tensor:
    """Image positions (tokens, 3) as the host's ``rope_options`` scale and shift them, axis by axis."""
    if not options:
        return ids
    scale = ids.new_tensor([1.0, options.get("scale_y", 1.0), options.get("scale_x", 1.0)])
    shift = ids.new_tensor([options.get(f"shift_{axis}", 0.0) for axis in "tyx"])
    return ids * scale + shift


def _stack(rows: Sequence[Modulations]) -> Modulations:
    return Modulations(
        *(tuple(torch.cat(parts) for parts in zip(*(row[i] for row in rows), strict=True)) for i in range(3)),
        final=torch.cat([row.final for row in rows]),
    )


def _refuse(ref_latents: list[Tensor] | None, extra: dict[str, Any]) -> None:
    if ref_latents:
        raise UserError(
            "the CONDITIONING carries reference latents, which FLUX Foundry's MODEL does not take in this version; "
            "take ReferenceLatent out, or load the model with ComfyUI's Load Diffusion Model"
        )
    if extra.get("attention_mask") is not None:
        raise UserError(
            "the CONDITIONING carries an attention mask, which FLUX Foundry's MODEL does not take in this version; "
            "use strength_type 'multiply' in Apply Style Model"
        )
