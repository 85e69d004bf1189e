"""A SigLIP vision tower and a Redux adapter as the host's CLIP_VISION and STYLE_MODEL.

Shapes: B pictures, N patches, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from torch import Tensor, nn

from ...flux.memory.policy import Policy
from ...flux.models.redux import Redux
from ...flux.models.vision.siglip import SiglipVision
from ...flux.ops.layers import on_meta
from ...flux.pipelines.library import given_files
from ...flux.pipelines.parts import joined
from ...flux.specs.fit import Given, check_redux, redux_faults
from ...flux.specs.vision import SiglipSpec
from .compat import archive_dtypes, is_dynamic, patch, register_reload
from .noting import noted_encoder
from .packed import pack_layers, packed_state
from .preflight import users_files
from .progress import check_cancelled
from .residents import FoundryPatcher, Residents, under_policy
from .weights import HOSTS, HostLayers, Weights, encoder_numbers, open_weights

__all__ = ["FoundryClipVision", "FoundryStyleModel", "check_pair", "load_redux", "load_style_model", "load_vision"]

SIGLIP_TYPE = "siglip_vision_model"  # the host's name
MIDDLE = [0.5, 0.5, 0.5]  # mean and deviation of SigLIP's colours
Build = Callable[[Any, HostLayers], nn.Module]


class HostSiglip(SiglipVision):
    """``SiglipVision`` with the call signature of the host's towers; ``given`` is what it was loaded from."""

    given: Given

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, intermediate_output: object = None
    ) -> tuple[Tensor, Tensor | None, Tensor, None]:
        """Hidden states (B, N, D), every layer's (B, L, N, D) if asked for, those that embed, and no projection."""
        own = self.vision_model
        with noted_encoder("vision", self, self, self.given, pixel_values.device) as meter:
            x = own.embeddings(pixel_values)
            states = []
            for layer in own.encoder.layers:
                check_cancelled()
                x = layer(x)
                if intermediate_output is not None:
                    states.append(x)
            last: Tensor = own.post_layernorm(x)
            meter.tick()
        return last, torch.stack(states, dim=1) if states else None, last, None


class FoundryClipVision(comfy.clip_vision.ClipVisionModel):
    """The host's CLIP_VISION around the engine's tower, with everything that the host's own constructor would set."""

    def __init__(self, patcher: Any, given: Given) -> None:
        spec: SiglipSpec = patcher.model.spec
        self.spec, self.given, self.patcher, self.model = spec, given, patcher, patcher.model
        self.image_size, self.image_mean, self.image_std = spec.side, MIDDLE, MIDDLE
        self.model_type, self.return_all_hidden_states, self.naf = SIGLIP_TYPE, True, None
        self.config = host_config(spec)
        self.load_device = patcher.load_device
        self.dtype = self.model.vision_model.post_layernorm.weight.dtype

    def look(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, side, side) in -1..1, as they are, to hidden states (B, N, D)."""
        comfy.model_management.load_models_gpu([self.patcher])
        last: Tensor = self.model(pixels.to(self.load_device, torch.float32))[0]
        return last.to(comfy.model_management.intermediate_device())


class FoundryStyleModel(comfy.sd.StyleModel):
    """The host's STYLE_MODEL around the engine's adapter, under the host's memory management."""

    def __init__(self, patcher: Any, given: Given) -> None:
        super().__init__(patcher.model)
        self.patcher, self.given = patcher, given

    def get_cond(self, input: Any) -> Tensor:  # noqa: A002 - the host's name
        """What a tower saw to text tokens (B, N, text width)."""
        comfy.model_management.load_models_gpu([self.patcher])
        hidden = input.last_hidden_state.to(self.patcher.load_device, torch.float32)
        out: Tensor = self.model(hidden)
        return out.to(comfy.model_management.intermediate_device())


def load_redux(
    style_path: str, vision_path: str, memory: Policy = HOSTS
) -> tuple[FoundryStyleModel, FoundryClipVision]:
    """Load a Redux adapter and the vision tower that it takes.

    Args:
        style_path: A safetensors or GGUF file.
        vision_path: The same, or a model with such a tower in it.
        memory: How much of the tower may stay on the device; with any but "auto" weights stay as they are stored.

    Raises:
        UserError: A file is missing, damaged or something else.
        MismatchError: The adapter takes another tower; the message names both files.
    """
    adapter = open_weights(Path(style_path), "redux")
    seen = given_files([Path(vision_path)])
    if seen:  # else it cannot be read, of which opening it tells
        tower = next((own for own in seen if own.found.kind == "vision"), None)
        check_pair(adapter.given, tower or Given(Path(vision_path), joined([own.found for own in seen])))
    return load_style_model(style_path), load_vision(vision_path, memory)


def check_pair(adapter: Given, tower: Given) -> None:
    """Refuse a Redux adapter and a vision tower that do not fit each other.

    Raises:
        MismatchError: They do not. The message names both files, and which of the user's would fit.
    """
    if redux_faults(adapter, tower):
        check_redux(adapter, tower, candidates=users_files(("redux", "vision")))


def load_vision(path: str, memory: Policy = HOSTS) -> FoundryClipVision:
    """Load a vision tower as the host's CLIP_VISION; see ``load_redux``."""
    weights = open_weights(Path(path), "vision")
    patcher = _managed(weights, HostSiglip, memory)
    register_reload(patcher, load_vision_patcher, path, memory)
    return FoundryClipVision(patcher, weights.given)


def load_style_model(path: str) -> FoundryStyleModel:
    """Load a Redux adapter as the host's STYLE_MODEL; see ``load_redux``."""
    weights = open_weights(Path(path), "redux")
    patcher = _managed(weights, Redux)
    register_reload(patcher, load_style_patcher, path)
    return FoundryStyleModel(patcher, weights.given)


def load_vision_patcher(path: str, memory: Policy, disable_dynamic: bool = False) -> Any:
    """The patcher of ``load_vision``, which the host asks for when it loads the tower again."""
    return _managed(open_weights(Path(path), "vision"), HostSiglip, memory, plain=disable_dynamic)


def load_style_patcher(path: str, disable_dynamic: bool = False) -> Any:
    """The patcher of ``load_style_model``, likewise."""
    return _managed(open_weights(Path(path), "redux"), Redux, plain=disable_dynamic)


def host_config(spec: SiglipSpec) -> dict[str, Any]:
    """The host's name for each of a tower's fields; other nodes read them."""
    return {
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": spec.width,
        "image_size": spec.side,
        "intermediate_size": spec.mlp_width,
        "model_type": SIGLIP_TYPE,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "patch_size": spec.patch,
        "image_mean": MIDDLE,
        "image_std": MIDDLE,
    }


def _managed(weights: Weights, build: Build, memory: Policy = HOSTS, *, plain: bool = False) -> Any:
    """A module of the host's layers with its weights, in a patcher; where a text encoder would be, as the host's are.

    Args:
        weights: What it is made of.
        build: Makes it of its spec.
        memory: What the user grants.
        plain: Without dynamic VRAM.
    """
    device = comfy.model_management.text_encoder_device()
    offload = comfy.model_management.text_encoder_offload_device()
    numbers = encoder_numbers(weights, device)
    packed = weights.packed(weights.chosen_layers(memory))
    with on_meta():
        module = build(weights.spec, HostLayers(comfy.ops.manual_cast, numbers))
    archive_dtypes(module)
    if packed:
        pack_layers(module, packed, numbers.weights, numbers.compute)
        under_policy(module, [Residents(module, "", weights, numbers.compute, memory, (), device)])
        patcher: Any = FoundryPatcher(module, load_device=device, offload_device=offload)
    else:
        patcher = patch(module, device, offload, plain=plain)
    state = weights.read(numbers.weights, without=packed, streamed=is_dynamic(patcher)) | packed_state(packed, device)
    module.load_state_dict(state, assign=True)
    module.eval().requires_grad_(False)
    module.given = weights.given  # type: ignore[assignment]
    return patcher
