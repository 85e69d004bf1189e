"""A FLUX.1 autoencoder file as the host's VAE."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ...flux.errors import MismatchError, NumericError
from ...flux.memory.policy import Policy
from ...flux.models.autoencoder import Autoencoder
from ...flux.pipelines.planning import Job, plan_run
from ...flux.pipelines.strips import decode_mean_in_strips, moments_in_strips
from ...flux.specs.autoencoder import FLUX1 as FLUX1_AE
from ...flux.specs.autoencoder import AutoencoderSpec
from ...flux.specs.fit import Given
from .compat import archive_dtypes, patch, register_reload, to_intermediate
from .noting import job_of_latent, noted_autoencoder
from .planning import planned_vae, reachable
from .preflight import MODEL, check_together
from .progress import say
from .weights import HOSTS, open_weights

__all__ = ["LATENT_OWNER", "FoundryVAE", "decode_latent", "load_vae"]

LATENT_OWNER = "fluxfoundry_autoencoder"  # our key in a LATENT: the autoencoder whose space it is in
ENCODE_BYTES, DECODE_BYTES = 1767, 2178  # working memory by pixel and byte of a number, as the host measured FLUX.1's
REFERENCE_CHANNELS = 128
LIBRARIES = 512 << 20  # bytes that libraries for convolutions may take besides, on a GPU
WORKING_DTYPES = [torch.bfloat16, torch.float32]


class HostAutoencoder(Autoencoder):
    """``Autoencoder`` in the latent space that the host expects of a VAE: neither scaled nor shifted.

    Attributes:
        in_strips: Whether it runs in strips of rows, which gives the same picture in less memory.
    """

    in_strips = False

    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to the posterior's mean."""
        if not self.in_strips:
            return self.encode_mean(pixels)
        return torch.cat([moments_in_strips(self, one).chunk(2, dim=1)[0] for one in pixels.split(1)])

    def decode(self, latents: Tensor, **_: Any) -> Tensor:
        """Back to pictures."""
        if not self.in_strips:
            return self.decode_mean(latents)
        return torch.cat([decode_mean_in_strips(self, one) for one in latents.split(1)])


class FoundryVAE(comfy.sd.VAE):
    """The host's VAE around the engine's autoencoder.

    The host's own constructor only knows its own modules, so that everything it would set is set here.
    """

    def __init__(
        self, module: HostAutoencoder, given: Given, device: torch.device, dtype: torch.dtype, memory: Policy = HOSTS
    ) -> None:
        spec: AutoencoderSpec = module.spec
        self.memory = memory
        self.spec, self.first_stage_model, self.given = spec, module, given
        self.device, self.vae_dtype = device, dtype
        self.output_device = comfy.model_management.intermediate_device()
        self.downscale_ratio = self.upscale_ratio = spec.downscale
        self.latent_channels, self.latent_dim, self.output_channels = spec.latent_channels, 2, 3
        self.working_dtypes = WORKING_DTYPES
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self._set_memory(spec)
        self._set_unused()
        archive_dtypes(module)
        offload = comfy.model_management.vae_offload_device()
        self.disable_offload = True  # plain torch layers: loaded whole or not at all
        self.patcher = patch(module, device, offload, plain=True)
        self.size = None
        self.model_size()

    def _set_memory(self, spec: AutoencoderSpec) -> None:
        """The host makes room for what these say, of shapes of latents and of pictures."""
        share = spec.base_channels / REFERENCE_CHANNELS
        bytes_of = comfy.model_management.dtype_size
        area = spec.downscale**2

        def encoding(shape: Sequence[int], dtype: torch.dtype) -> float:
            whole = ENCODE_BYTES * share * shape[2] * shape[3] * bytes_of(dtype)
            return self._needed("encode", (int(shape[2]), int(shape[3])), whole)

        def decoding(shape: Sequence[int], dtype: torch.dtype) -> float:
            whole = DECODE_BYTES * share * shape[2] * shape[3] * area * bytes_of(dtype)
            return self._needed("decode", (int(shape[2]) * spec.downscale, int(shape[3]) * spec.downscale), whole)

        self.memory_used_encode, self.memory_used_decode = encoding, decoding

    def _needed(self, stage: str, size: tuple[int, int], whole: float) -> float:
        """Working memory for a picture of a size in pixels; decides whether it is done in one piece, or in strips.

        Raises:
            UserError: A budget is below what strips take.
        """
        job = Job(height=size[0], width=size[1], starts=True)
        parts, free = [planned_vae(self)(None)], reachable(self.device)
        planned = plan_run(parts, job, self.memory, device=str(self.device), available=free).stage(stage)
        self.first_stage_model.in_strips = planned.in_strips
        if not planned.in_strips and self.memory.budget is None:
            return whole
        libraries = 0 if comfy.model_management.is_device_cpu(self.device) else LIBRARIES
        return planned.activations + planned.workspace + libraries

    def _set_unused(self) -> None:
        """What only other families' VAEs use, but the host reads of every one."""
        self.crop_input, self.handles_tiling, self.not_video = True, False, False
        self.pad_channel_value = self.format_encoded = self.extra_1d_channel = None
        self.downscale_index_formula = self.upscale_index_formula = None
        self.audio_sample_rate = 44100

    def decode(self, samples_in: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Latents to IMAGE, one after the other as plans have it.

        Raises:
            MismatchError: The latents have another number of channels.
        """
        check_channels(samples_in, self.latent_channels, self.spec.name)
        self._come(self.memory_used_decode(samples_in[:1].shape, self.vae_dtype))
        with noted_autoencoder(self, "decode", job_of_latent(samples_in)):
            made = [super(FoundryVAE, self).decode(own, *args, **kwargs) for own in samples_in.split(1)]
        return made[0] if len(made) == 1 else torch.cat(made)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """IMAGE to latents, likewise."""
        height, width = pixel_samples.shape[1:3]
        self._come(self.memory_used_encode((1, self.output_channels, height, width), self.vae_dtype))
        with noted_autoencoder(self, "encode", Job(width=width, height=height, batch=len(pixel_samples), starts=True)):
            made = [super(FoundryVAE, self).encode(own) for own in pixel_samples.split(1)]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _come(self, working: float) -> None:
        """Have the weights there, and room: what the host takes back for that is no part of what is noted."""
        with suppress(comfy.model_management.OOM_EXCEPTION):  # then the host tries again, and knows what to do
            comfy.model_management.load_models_gpu([self.patcher], memory_required=working, force_full_load=True)

    def decode_tiled_(self, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the host does when memory ran out: strips, which leave no seams, in place of its tiles."""
        if args or kwargs:
            tiled: Tensor = super().decode_tiled_(samples, *args, **kwargs)
            return tiled
        say("memory ran out while the picture was decoded in one piece: it is decoded in strips")
        self.first_stage_model.in_strips = True
        made = [self.first_stage_model.decode(one.to(self.device, self.vae_dtype)) for one in samples.split(1)]
        pictures = torch.cat([to_intermediate(one.float()) for one in made])
        processed: Tensor = self.process_output(pictures)
        return processed

    def encode_tiled_(self, pixel_samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Likewise."""
        if args or kwargs:
            tiled: Tensor = super().encode_tiled_(pixel_samples, *args, **kwargs)
            return tiled
        say("memory ran out while the picture was encoded in one piece: it is encoded in strips")
        self.first_stage_model.in_strips = True
        pixels = (self.process_input(one).to(self.device, self.vae_dtype) for one in pixel_samples.split(1))
        return torch.cat([to_intermediate(self.first_stage_model.encode(one).float()) for one in pixels])

    def decode_tiled(self, samples: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same tile by tile; see ``decode``."""
        check_channels(samples, self.latent_channels, self.spec.name)
        return super().decode_tiled(samples, *args, **kwargs)


def load_vae(path: str, memory: Policy = HOSTS, disable_dynamic: bool = False) -> FoundryVAE:
    """Load an autoencoder as the host's VAE.

    Args:
        path: A safetensors or GGUF file, or the index of several.
        memory: How much it may take; beyond it pictures are encoded and decoded in strips.
        disable_dynamic: Takes no effect: it never uses dynamic VRAM.

    Raises:
        UserError: The file is missing, damaged or something else.
    """
    del disable_dynamic
    weights = open_weights(Path(path), "autoencoder")
    device = comfy.model_management.vae_device()
    dtype = comfy.model_management.vae_dtype(device, WORKING_DTYPES)
    with torch.device("meta"):
        module = HostAutoencoder(weights.spec)
    module.load_state_dict(weights.read(dtype), assign=True)
    vae = FoundryVAE(module.eval().requires_grad_(False), weights.given, device, dtype, memory)
    register_reload(vae.patcher, load_vae_patcher, path, memory)
    return vae


def load_vae_patcher(path: str, memory: Policy, disable_dynamic: bool = False) -> Any:
    """The patcher of ``load_vae``, which the host asks for when it loads the autoencoder again."""
    return load_vae(path, memory, disable_dynamic).patcher


def decode_latent(vae: Any, latent: dict[str, Any]) -> Tensor:
    """A LATENT to an IMAGE with any VAE.

    Raises:
        MismatchError: The latent is another autoencoder's.
        NumericError: The picture is not finite.
    """
    samples, owner = latent["samples"], latent.get(LATENT_OWNER)
    own = getattr(vae, "spec", None)
    is_ours = isinstance(own, AutoencoderSpec)
    if is_ours and latent.get(MODEL) is not None:
        check_together(latent[MODEL], [vae.given])
    if owner not in (None, own.name if is_ours else FLUX1_AE.name):
        drawn = latent.get(MODEL)
        source = f"comes from {drawn.path.name} and " if isinstance(drawn, Given) else ""
        title = own.name if is_ours else "another loader's"
        raise MismatchError(
            f"this LATENT {source}was made for the autoencoder {owner}, but the VAE is {title}; load {owner} with Load "
            "FLUX Autoencoder"
        )
    check_channels(samples, getattr(vae, "latent_channels", samples.shape[1]), "this VAE")
    images: Tensor = vae.decode(samples)
    if not bool(torch.isfinite(images).all()):
        raise NumericError(
            "the decoded picture has numbers that are not finite; the latent or the VAE's file is damaged, or the VAE "
            "overflows its number format: start ComfyUI with --fp32-vae"
        )
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images


def check_channels(samples: Tensor, wanted: int, title: str) -> None:
    """Refuse latents with another number of channels."""
    if samples.shape[1] != wanted:
        raise MismatchError(
            f"the LATENT has {samples.shape[1]} channels, but {title} takes {wanted}; it comes from another model "
            "family: sample it with a FLUX.1 model, or use that family's VAE"
        )
