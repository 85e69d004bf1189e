"""A run of the engine's solvers inside the host's sampling, so that any MODEL, hook, mask and patch works with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...flux.errors import MismatchError, UserError
from ...flux.sampling.noise import SEEDS, check_seed, draw_noise
from ...flux.sampling.packing import token_grid
from ...flux.sampling.schedules import check_sigmas, flux1_mu, make_schedule, shorten
from ...flux.sampling.solvers import solver
from .compat import fit_empty_latent, to_intermediate
from .conditioning import check_conditioning, tell_of_regions, with_guidance
from .model import spec_of
from .noting import check_step
from .preflight import MODEL, given_of
from .progress import check_cancelled, preview_callback, say
from .vae import LATENT_OWNER

__all__ = ["Run", "plan", "sample", "tokens_of"]

Conditioning = list[list[Any]]
CELL = 8  # pixels of a FLUX.1 latent's cell along each side
FLUX1_CHANNELS = 16  # FLUX.2, whose latents have 128, is shifted by another rule


@dataclass(frozen=True, kw_only=True)
class Run:
    """What FLUX Sampler was asked for.

    Attributes:
        positive: CONDITIONING to follow.
        negative: CONDITIONING to stay away from, or None.
        cfg: Strength of classifier-free guidance; 1 leaves ``negative`` out.
        guidance: For the guidance embedding; 0 takes what the CONDITIONING carries.
        seed: Of the first picture.
        sigmas: Falling times; none at all leaves the latent as it is.
        solver: One of the engine's.
    """

    positive: Conditioning
    negative: Conditioning | None
    cfg: float
    guidance: float
    seed: int
    sigmas: Sequence[float]
    solver: str


class HostVelocity:
    """The host's model as the engine's velocity.

    The host gives the estimate D of the data; the velocity is (x - D) / sigma. D itself is kept as the anchor, because
    rounding would keep x - sigma * v from giving it back, and what a mask keeps has to stay as it is.
    """

    def __init__(self, model: Any, extra_args: dict[str, Any]) -> None:
        self.model, self.extra_args = model, extra_args
        self.data: Tensor | None = None

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor:
        check_cancelled()
        self.data = self.model(x, x.new_full((len(x),), sigma), **self.extra_args)
        return (x - self.data) / sigma

    def anchor(self, data: Tensor) -> Tensor:
        """The estimate of the last call."""
        return data if self.data is None else self.data


def sample(patcher: Any, latent: dict[str, Any], run: Run) -> dict[str, Any]:
    """Run a schedule with any MODEL; the LATENT that comes out is new, and nothing that came in is changed.

    Raises:
        UserError: Something that came in does not fit.
        NumericError: A step's result was not finite.
    """
    start = fit_empty_latent(patcher, latent)
    check_latent(patcher, start)
    conditioning = [*run.positive, *(run.negative or ())]
    check_conditioning(patcher, conditioning, masked=latent.get("noise_mask") is not None)
    tell_of_regions(conditioning, (start.shape[-2] * CELL, start.shape[-1] * CELL))
    sigmas = torch.tensor(check_sigmas(run.sigmas) if run.sigmas else [], dtype=torch.float32)
    _tell_of_grey(start, sigmas)
    out = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    out["samples"] = start if len(sigmas) == 0 else _sample(patcher, start, latent, run, sigmas)
    spec = spec_of(patcher)
    if spec is not None:
        out |= {LATENT_OWNER: spec.autoencoder, MODEL: given_of(patcher.model)}
    else:
        for key in (LATENT_OWNER, MODEL):
            out.pop(key, None)
    return out


def _tell_of_grey(start: Tensor, sigmas: Tensor) -> None:
    """Warn of a run that goes on from a picture where there is none."""
    if len(sigmas) > 0 and float(sigmas[0]) < 1 and torch.count_nonzero(start) == 0:
        say(
            f"the run begins at sigma {float(sigmas[0]):.2f} with an empty latent, so it goes on from plain grey; set "
            "denoise to 1 for a whole picture, or give it an encoded one"
        )


def _sample(patcher: Any, start: Tensor, latent: dict[str, Any], run: Run, sigmas: Tensor) -> Tensor:
    guider = _guider(shifted_by_size(patcher, tokens_of({"samples": start})), run)
    noise = batch_noise(start, run.seed, latent.get("batch_index"))
    mask = latent.get("noise_mask")
    callback = preview_callback(patcher, len(sigmas) - 1)
    kernel = comfy.samplers.KSAMPLER(solve, {"solver_name": run.solver})
    quiet = not comfy.utils.PROGRESS_BAR_ENABLED
    samples = guider.sample(
        noise, start, kernel, sigmas, denoise_mask=mask, callback=callback, disable_pbar=quiet, seed=run.seed
    )
    samples = to_intermediate(samples)
    return samples if mask is None else keep_exactly(samples, start, mask)


def shifted_by_size(patcher: Any, tokens: int) -> Any:
    """A MODEL for which parts of a run, as ``start_percent`` tells them, lie where this pack's own schedule has them.

    The host asks the MODEL's sampling for them, which is shifted for its native size; the schedule for the picture's.
    """
    if not _is_shifted_by_size(patcher):
        return patcher
    own = patcher.get_model_object("model_sampling")
    fitted = type(own)(patcher.model.model_config)
    fitted.set_parameters(shift=flux1_mu(tokens))
    clone = patcher.clone()
    clone.add_object_patch("model_sampling", fitted)
    return clone


def _guider(patcher: Any, run: Run) -> Any:
    conds = {"positive": run.positive}
    if run.negative is not None:
        conds["negative"] = run.negative
    if run.guidance > 0:
        conds = {name: with_guidance(cond, run.guidance) for name, cond in conds.items()}
    guider = comfy.samplers.CFGGuider(patcher)
    guider.inner_set_conds(conds)
    guider.set_cfg(run.cfg if run.negative is not None else 1.0)
    return guider


def solve(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    *,
    solver_name: str,
) -> Tensor:
    """One of the engine's solvers as a function that the host's KSAMPLER runs."""
    del disable
    times = [float(sigma) for sigma in sigmas.tolist()]
    steps = len(times) - 1

    def after_step(index: int, latent: Tensor, data: Tensor, _: float) -> None:
        check_step(latent, index, steps)
        if callback is not None:
            callback({"i": index, "x": latent, "denoised": data, "sigma": sigmas[index], "sigma_hat": sigmas[index]})

    return solver(solver_name)(HostVelocity(model, extra_args or {}), x, times, after_step)


def batch_noise(start: Tensor, seed: int, batch_index: Sequence[int] | None) -> Tensor:
    """Noise of every picture from its own seed; pictures that were picked from a batch keep their place's seed."""
    check_seed(seed)
    places = range(len(start)) if batch_index is None else batch_index
    _, channels, height, width = start.shape
    return draw_noise((channels, height, width), [(seed + int(place)) % SEEDS for place in places])


def keep_exactly(samples: Tensor, start: Tensor, mask: Tensor) -> Tensor:
    """The result with the start itself where the mask is 0: scaling there and back is not exact."""
    fitted = comfy.sampler_helpers.prepare_mask(mask, samples.shape, samples.device)
    return torch.where(fitted == 0, start.to(samples), samples)


def check_latent(patcher: Any, samples: Tensor) -> None:
    """Refuse a latent that the model cannot continue.

    Raises:
        MismatchError: It has another number of channels.
        UserError: It is no picture's.
    """
    check_picture(samples)
    wanted = patcher.get_model_object("latent_format").latent_channels
    if samples.shape[1] != wanted:
        raise MismatchError(
            f"the LATENT has {samples.shape[1]} channels, but this MODEL takes {wanted}; encode the picture with the "
            "model's own VAE, or use FLUX Empty Latent"
        )


def check_picture(samples: Tensor) -> None:
    """Refuse latents of other media."""
    if getattr(samples, "is_nested", False) or samples.ndim != 4:
        raise UserError("the LATENT is no picture's (video or audio); FLUX Sampler takes pictures only")


def tokens_of(latent: dict[str, Any]) -> int:
    """Image tokens of a LATENT, whatever the ratio that an empty one has.

    Raises:
        UserError: It is no picture's.
    """
    check_picture(latent["samples"])
    ratio = latent.get("downscale_ratio_spacial") or CELL
    rows, columns = token_grid(*(round(side * ratio / CELL) for side in latent["samples"].shape[-2:]))
    return rows * columns


def plan(patcher: Any, tokens: int, steps: int, schedule: str, amount: float, mu: float | None = None) -> list[float]:
    """The times of a run.

    Args:
        patcher: The MODEL, which knows whether, and how, its schedule is shifted.
        tokens: Image tokens.
        steps: How many steps.
        schedule: One of the engine's.
        amount: Denoise, 0..1.
        mu: A shift to use instead.
    """
    shift = model_mu(patcher, tokens) if mu is None else mu
    return shorten(lambda count: make_schedule(schedule, count, shift), steps, amount)


def model_mu(patcher: Any, tokens: int) -> float | None:
    """The shift of a MODEL: what a model-sampling node set, else FLUX.1's by size, else the MODEL's own."""
    if _is_shifted_by_size(patcher):
        return flux1_mu(tokens)
    sampling = patcher.get_model_object("model_sampling")
    shift = getattr(sampling, "shift", None)
    if shift is None:
        raise UserError("this MODEL is no flow model; FLUX Schedule and FLUX Sampler take FLUX models")
    if isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
        return float(shift)
    return None if shift == 1 else math.log(shift)


def _is_shifted_by_size(patcher: Any) -> bool:
    """Whether a MODEL is a FLUX.1 whose shift no node has set."""
    exponential = isinstance(patcher.get_model_object("model_sampling"), comfy.model_sampling.ModelSamplingFlux)
    of_flux1 = patcher.get_model_object("latent_format").latent_channels == FLUX1_CHANNELS
    return exponential and of_flux1 and "model_sampling" not in patcher.object_patches
