"""Further input channels of a MODEL: its own, and those that control LoRAs add to it.

A control LoRA widens the first layer by the channels of one more latent. They are slots, counted from 1, and filled by
our key, a dict of latents by slot. Without it slot 1 takes the host's ``concat_latent_image``, so that core nodes and
core-loaded LoRAs work; on a Fill model that is the picture with the hole. Latents in a CONDITIONING are in the VAE's
space.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.utils
import torch
from torch import Tensor

from ...flux.adapters.channels import CELL, FILL, MASK_CHANNELS, folded_mask
from ...flux.adapters.control_lora import ControlLora, check_control_lora, read_control_lora
from ...flux.adapters.guides import check_strength
from ...flux.errors import MismatchError
from ...flux.sampling.packing import PATCH
from ...flux.specs.flux1 import Flux1Spec
from .experts import our_spec
from .pictures import CONTROLS, IMAGE, MASK
from .progress import show

__all__ = ["control_slots", "further_channels", "put_control_lora", "takes_hole"]

NOISE_MASK = "denoise_mask"  # the host's key
NETWORK = "diffusion_model."  # the host's name of the transformer
IMG_IN = "img_in"
FIRST_LAYER = f"{NETWORK}{IMG_IN}.weight"
SCALE = ".scale"  # of a norm
RESHAPE = 5  # of a LoRA adapter's weights, in the host's order: the shape that it pads the layer to

Entry = Mapping[str, Any]


def put_control_lora(patcher: Any, path: Path, strength: float) -> Any:
    """A MODEL with a control LoRA on it, in its next free slot, by the host's own patches.

    As with the host's LoRA loader, the norms that the LoRA brings replace the MODEL's at any strength but 0; those of
    further ones add what makes them differ from the MODEL's own, so that their order makes no difference. At 0 only the
    slot is there, so that those of further control LoRAs stay as they are.

    Args:
        patcher: A MODEL of ours.
        path: The LoRA's file.
        strength: 0..2, 1 as it was trained.

    Returns:
        A clone.

    Raises:
        MismatchError: The MODEL is another loader's, or the LoRA another model's.
        UserError: The file is no control LoRA, or the strength is outside of 0..2.
    """
    check_strength(strength)
    spec = our_spec(patcher)
    if spec is None:
        raise MismatchError(
            "the MODEL was not loaded by FLUX Foundry; load it with Load FLUX Model, or put the control LoRA on it "
            "with ComfyUI's Load LoRA, which takes one"
        )
    lora = read_control_lora(path)
    check_control_lora(lora, spec)
    slot = control_slots(patcher, spec) + 1
    tensors = host_lora(lora, input_columns(patcher, spec), only_slot=strength == 0)
    layers = {name.removesuffix(".lora_up.weight") for name in tensors if name.endswith(".lora_up.weight")}
    model = patcher.clone()
    model.add_patches(comfy.lora.load_lora(tensors, {layer: f"{layer}.weight" for layer in layers}), strength)
    if strength:
        model.add_patches(norm_patches(patcher, lora), 1.0)
    show(f"{lora.name}: control picture {slot} of this MODEL")
    return model


def host_lora(lora: ControlLora, start: int, *, only_slot: bool) -> dict[str, Tensor]:
    """A control LoRA's tensors by the names that the host's reader of LoRAs takes.

    Args:
        lora: The control LoRA.
        start: Where the channels of its picture begin among those of an input token.
        only_slot: Leave out what would act on the model.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in lora.layers.items():
        if only_slot and name != IMG_IN:
            continue
        key, down = NETWORK + name, layer.down
        if name == IMG_IN:
            noisy, control = down.split((down.shape[1] - lora.channels, lora.channels), dim=1)
            between = down.new_zeros(len(down), start - noisy.shape[1])
            down = torch.cat((noisy, between, control), dim=1)
            tensors[f"{key}.reshape_weight"] = torch.tensor([len(layer.up), down.shape[1]])
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": layer.up}
        if layer.bias is not None and not only_slot:
            tensors[f"{key}.diff_b"] = layer.bias
    return tensors


def norm_patches(patcher: Any, lora: ControlLora) -> dict[str, tuple[str, tuple[Tensor]]]:
    """The host's patches of norms: the first LoRA's scales in place of the MODEL's, the differences of further ones."""
    scales = {f"{NETWORK}{name.removesuffix(SCALE)}.weight": scale for name, scale in lora.norms.items()}
    owns = patcher.get_key_patches(NETWORK) if any(patcher.patches.get(key) for key in scales) else {}
    patches: dict[str, tuple[str, tuple[Tensor]]] = {}
    for key, scale in scales.items():
        if patcher.patches.get(key):
            (own, _), *_ = owns[key]
            patches[key] = ("diff", (scale.float() - own.to(scale.device).float(),))
        else:
            patches[key] = ("set", (scale,))
    return patches


def takes_hole(spec: Flux1Spec) -> bool:
    """Whether a model takes a picture with a hole, and its mask."""
    return spec.task == FILL


def control_slots(patcher: Any, spec: Flux1Spec) -> int:
    """How many control pictures a MODEL of ours takes at once, by itself and by the control LoRAs on it."""
    further = input_columns(patcher, spec) // PATCH**2 - spec.latent_channels
    if takes_hole(spec):
        further -= spec.latent_channels + MASK_CHANNELS
    return max(0, further // spec.latent_channels)


def input_columns(patcher: Any, spec: Flux1Spec) -> int:
    """Channels of an input token with the patches on a MODEL, whether or not the host has merged them."""
    widest = spec.in_channels
    for _, value, *_ in patcher.patches.get(FIRST_LAYER, ()) if patcher is not None else ():
        weights = getattr(value, "weights", None)
        shape = weights[RESHAPE] if isinstance(weights, (tuple, list)) and len(weights) > RESHAPE else None
        widest = widest if shape is None else max(widest, int(shape[1]))
    return widest


def further_channels(model: Any, patcher: Any, entry: Entry) -> Tensor | None:
    """What stands behind the noisy latent's channels (B, further, h, w), in the model's space; None for nothing.

    Without a picture they are those of a latent of zeros, without a mask ones, as in the host.

    Args:
        model: Ours, as the host has it.
        patcher: What it is sampled as.
        entry: A CONDITIONING's entry, and what the sampler adds.
    """
    spec: Flux1Spec = model.spec
    slots = control_slots(patcher, spec)
    controls: Mapping[int, Tensor] = entry.get(CONTROLS) or {}
    parts = []
    if takes_hole(spec):
        parts += [_latent(model, entry.get(IMAGE), entry), _hole(entry)]
    for slot in range(1, slots + 1):
        hosts = entry.get(IMAGE) if slot == 1 and not takes_hole(spec) else None
        parts.append(_latent(model, controls.get(slot, hosts), entry))
    return torch.cat(parts, dim=1) if parts else None


def _latent(model: Any, latent: Tensor | None, entry: Entry) -> Tensor:
    """A latent at the noise's size and number, in the model's space."""
    noise = entry["noise"]
    image = torch.zeros_like(noise) if latent is None else latent
    image = comfy.utils.common_upscale(
        image.to(entry["device"]), noise.shape[-1], noise.shape[-2], "bilinear", "center"
    )
    fitted: Tensor = model.process_latent_in(comfy.utils.resize_to_batch_size(image, noise.shape[0]))
    return fitted


def _hole(entry: Entry) -> Tensor:
    """The mask's channels: of the picture's hole, else of the latent's noise mask, else of all."""
    noise, mask = entry["noise"], entry.get(MASK, entry.get(NOISE_MASK))
    if mask is None:
        mask = torch.ones_like(noise)[:, :1]
    mask = mask.to(entry["device"]).mean(dim=1, keepdim=True)
    mask = comfy.utils.common_upscale(mask, noise.shape[-1] * CELL, noise.shape[-2] * CELL, "bilinear", "center")
    channels: Tensor = comfy.utils.resize_to_batch_size(folded_mask(mask), noise.shape[0])
    return channels
