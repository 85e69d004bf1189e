"""A FLUX.1 transformer file to the host's MODEL."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models
from torch import Tensor

from ...flux.adapters.channels import CELL
from ...flux.errors import FluxFoundryError, MismatchError
from ...flux.memory.exhaustion import is_exhausted
from ...flux.memory.policy import Policy
from ...flux.mini.files import MINI as MINI_FILES
from ...flux.pipelines.planning import Job
from ...flux.pipelines.text_to_image import GRID
from ...flux.sampling.packing import PATCH
from ...flux.sampling.schedules import flux1_mu
from ...flux.specs.autoencoder import MINI as MINI_AUTOENCODER
from ...flux.specs.fit import Given
from ...flux.specs.flux1 import Flux1Spec
from ...flux.weights.readers.safetensors import SafetensorsFile
from .compat import archive_dtypes, is_dynamic, patch, register_reload
from .conditioning import check_channels, check_widths, sample_and_tell
from .control_lora import control_slots, further_channels, takes_hole
from .experts import EXPERT, Expert, expert_of
from .giving_way import give_way
from .norms import host_state
from .noting import noted_sampling
from .packed import PackedLinear, pack_layers, packed_state
from .pictures import taken_by
from .preflight import check_together, files_of
from .references import VIEWS, ReferenceViews, as_bias, views_of
from .residents import FoundryPatcher, Residents, residents_of, under_policy
from .transformer import AHEAD, WRAPPERS, HostFlux1, host_config, sample_with_table
from .weights import HOSTS, HostLayers, Numbers, choose_numbers, open_weights

__all__ = ["FoundryFlux", "load_model", "spec_of"]

PATCHER = "fluxfoundry_patcher"  # our key among the host's inputs of ``extra_conds``
LATENT_CHANNELS = 16  # numbers in a latent's cell
REFERENCE_HIDDEN = 3072  # the host's memory factor of FLUX.1 is measured at this width


class FoundryConfig(comfy.supported_models.Flux):
    """The host's description of a model, filled from a spec."""

    unet_config: dict[str, Any] = {}

    def __init__(self, spec: Flux1Spec, numbers: Numbers) -> None:
        super().__init__(host_config(spec))
        self.sampling_settings = sampling_settings(spec)
        self.latent_format = latent_format(spec)
        self.memory_usage_factor = type(self).memory_usage_factor * spec.hidden / REFERENCE_HIDDEN
        self.set_inference_dtype(numbers.weights, numbers.cast)


class FoundryFlux(comfy.model_base.Flux):
    """The host's FLUX model around the engine's transformer."""

    def __init__(self, spec: Flux1Spec, numbers: Numbers, given: Given | None = None) -> None:
        kind = comfy.model_base.ModelType.FLUX if spec.shifted_schedule else comfy.model_base.ModelType.FLOW
        super().__init__(FoundryConfig(spec, numbers), model_type=kind)
        self.spec, self.given = spec, given
        operations = comfy.ops.pick_operations(numbers.weights, numbers.cast)
        self.diffusion_model = HostFlux1(spec, HostLayers(operations, numbers), numbers.weights)
        self.diffusion_model.eval().requires_grad_(False)
        archive_dtypes(self.diffusion_model)

    def memory_required(self, input_shape: Sequence[int], cond_shapes: Mapping[str, Any] | None = None) -> float:
        """Working memory in bytes: the host's estimate, and the numbers of the largest packed layer.

        The host asks this of every run before it loads the model, so that a budget knows here what the run takes.
        """
        unpacked = max((layer.unpacked_bytes for layer in self._packed_layers()), default=0)
        for own in (one for one in residents_of(self) if one.policy.budget is not None):
            job = job_of_shapes(input_shape, cond_shapes)
            own.working = own.working_for(self.spec, self.get_dtype_inference(), job, unpacked)
        needed: float = super().memory_required(input_shape, cond_shapes or {})
        return needed + unpacked

    def _packed_layers(self) -> Iterator[PackedLinear]:
        return (layer for layer in self.diffusion_model.modules() if isinstance(layer, PackedLinear))

    def _apply_model(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host's step; repeated with fewer weights on the device where memory runs out in it."""
        while True:
            try:
                out: Tensor = super()._apply_model(x, *args, **kwargs)
            except Exception as error:
                if not is_exhausted(error):
                    raise
                fault = error
            else:
                return out
            # Outside of the handler, which holds what the failed step had made.
            fault.__traceback__ = None
            give_way(self.current_patcher, fault, x.shape)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """The inputs of the denoiser for an entry of a CONDITIONING, made by the model that predicts it.

        Raises:
            UserError: The entry does not fit the model, or a further model is not loaded.
        """
        expert = expert_of(kwargs)
        if expert is None:
            return self.conds_of(self.current_patcher, kwargs)
        self._check_present(expert)
        made: dict[str, Any] = expert.model.conds_of(expert.patcher, kwargs)
        return made | {EXPERT: comfy.conds.CONDConstant(expert)}

    def conds_of(self, patcher: Any, entry: dict[str, Any]) -> dict[str, Any]:
        """The host's inputs of the denoiser and ours, after a look at whether an entry fits.

        Args:
            patcher: What this model is sampled as, with its patches.
            entry: The entry's dict, and what the sampler adds.
        """
        entry = taken_by(entry, hole=takes_hole(self.spec), slots=control_slots(patcher, self.spec))
        check_together(self.given, files_of(entry))
        check_widths(self.spec, entry.get("cross_attn"), entry.get("pooled_output"))
        check_channels(patcher, entry, masked=entry.get("denoise_mask") is not None)
        given = {"guidance": self.spec.guidance, **entry, PATCHER: patcher}
        if given.get("attention_mask") is not None:
            given["attention_mask"] = as_bias(given["attention_mask"])
        made: dict[str, Any] = super().extra_conds(**given)
        views = views_of(entry, entry["noise"].shape[-2:])
        return made | ({VIEWS: ReferenceViews(views)} if views else {})

    def concat_cond(self, **kwargs: Any) -> Tensor | None:
        """What stands behind the noisy latent's channels: the model's own further ones, then each control LoRA's."""
        return further_channels(self, kwargs.get(PATCHER) or self.current_patcher, kwargs)

    def _check_present(self, expert: Expert) -> None:
        patcher = self.current_patcher
        loaded = [self] if patcher is None else [self, *(p.model for p in patcher.get_nested_additional_models())]
        if not any(expert.model is model for model in loaded):
            raise MismatchError(
                "the CONDITIONING is FLUX Combine's, but the MODEL is not; connect the model output of FLUX Combine to "
                "the sampler"
            )


def load_model(
    path: str,
    dtype: str = "auto",
    variant: str | None = None,
    memory: Policy = HOSTS,
    disable_dynamic: bool = False,
) -> Any:
    """Load a transformer as the host's patcher.

    Args:
        path: A safetensors or GGUF file, or the index of several.
        dtype: Of the weights: "bf16", "fp16" or "fp32"; or "auto", which leaves packed ones packed.
        variant: What it is, where its tensors cannot tell: the name of a spec.
        memory: How much of it may stay on the device. With any but "auto" all weights stay as they are stored, and
            ``dtype`` only says what they are computed with.
        disable_dynamic: Leave the host's dynamic VRAM out, which the host asks for when it loads the model again.

    Raises:
        UserError: The file is missing, damaged or something else.
    """
    weights = open_weights(Path(path), "transformer", variant)
    device = comfy.model_management.get_torch_device()
    numbers = choose_numbers(weights, device, dtype)
    packed = weights.packed(weights.chosen_layers(memory, unpacked=dtype != "auto"))
    model = FoundryFlux(weights.spec, numbers, weights.given)
    offload = comfy.model_management.unet_offload_device()
    pack_layers(model.diffusion_model, packed, numbers.weights)
    if packed:
        own = Residents(
            model.diffusion_model, "diffusion_model.", weights, numbers.compute, memory,
            model.diffusion_model.modulation_layers(), device,
        )  # fmt: skip
        under_policy(model, [own])
        patcher: Any = FoundryPatcher(model, load_device=device, offload_device=offload)
    else:
        patcher = patch(model, device, offload, plain=disable_dynamic)
    dynamic = is_dynamic(patcher)
    kept = weights.stored if dynamic and dtype == "auto" else numbers.weights
    state = weights.read(kept, without=packed, streamed=dynamic) | packed_state(packed, device)
    model.diffusion_model.load_state_dict(host_state(state), assign=True)
    model.diffusion_model.requires_grad_(False)
    patcher.add_wrapper_with_key(WRAPPERS.SAMPLER_SAMPLE, "fluxfoundry", sample_with_table)
    patcher.add_wrapper_with_key(WRAPPERS.SAMPLER_SAMPLE, "fluxfoundry tells", sample_and_tell)
    patcher.add_wrapper_with_key(WRAPPERS.SAMPLER_SAMPLE, "fluxfoundry notes", noted_sampling)
    register_reload(patcher, load_model, path, dtype, variant, memory)
    return patcher


def job_of_shapes(shape: Sequence[int], conds: Mapping[str, Any] | None) -> Job:
    """What the host is about to sample, as memory goes; with as many steps as a table of modulations holds at most.

    Args:
        shape: Of the latents, in all that run at once.
        conds: Shapes of what goes with them, of which references take room.
    """
    batch, _, rows, columns = (int(side) for side in shape[:4])
    cells = sum(math.prod(own) // LATENT_CHANNELS for own in (conds or {}).get("ref_latents", ()))
    tokens = -(-cells // PATCH**2)
    return Job(
        width=columns * CELL, height=rows * CELL, batch=batch, steps=AHEAD,
        references=((tokens * PATCH * CELL, PATCH * CELL),) if tokens else (),
    )  # fmt: skip


def spec_of(patcher: Any) -> Flux1Spec | None:
    """What a MODEL is, if this pack loaded it."""
    return getattr(patcher.model, "spec", None) if isinstance(patcher.model, FoundryFlux) else None


def sampling_settings(spec: Flux1Spec) -> dict[str, float]:
    """What the core's schedulers read: mu at the model's native size, or no shift at all."""
    if not spec.shifted_schedule:
        return {"shift": 1.0, "multiplier": 1.0}
    return {"shift": flux1_mu((spec.native_side // GRID) ** 2)}


def latent_format(spec: Flux1Spec) -> Any:
    """The host's latent space: FLUX.1's, for an embedded model with previews that fit its own autoencoder."""
    host_format = comfy.latent_formats.Flux()
    if spec.autoencoder != MINI_AUTOENCODER.name:
        return host_format
    host_format.taesd_decoder_name = None
    colours = preview_colours(SafetensorsFile(MINI_FILES.autoencoder).metadata)
    if colours is not None:
        host_format.latent_rgb_factors, host_format.latent_rgb_factors_bias = colours
    return host_format


def preview_colours(metadata: Mapping[str, str]) -> tuple[list[list[float]], list[float]] | None:
    """A linear map from latent channels to colours out of an autoencoder file's metadata; None where it has none."""
    try:
        table = json.loads(metadata["preview"])
        return table["factors"], table["bias"]
    except KeyError:
        return None
    except (TypeError, ValueError) as error:
        raise FluxFoundryError(f"the embedded autoencoder's preview table is damaged: {error}") from error
