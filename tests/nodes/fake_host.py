"""As much of ComfyUI as a schema needs, ``comfy_api.latest`` and ``folder_paths`` with a few files, and its internals.

``FILES`` are listed without being there; what lies on the disk below the folder of a key is found as well.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FILES", "Vae", "internals", "modules"]

CELL = 8  # pixels along a latent cell's side

FILES = {
    "diffusion_models": ["flux1-dev.safetensors", "sub/flux1-schnell.sft", "old.ckpt"],
    "text_encoders": ["clip_l.safetensors", "t5xxl_fp16.safetensors"],
    "vae": ["ae.safetensors"],
}
LISTED = (".ckpt", ".safetensors", ".sft")  # by the host
TYPES = (
    "Boolean", "Clip", "ClipVision", "Combo", "Conditioning", "Float", "Image", "Int", "Latent", "Mask", "Model",
    "Sigmas", "String", "StyleModel", "Vae",
)  # fmt: skip
COMMON = {"display_name", "optional", "tooltip"}
OPTIONS = {
    "Boolean": {"default"},
    "Combo": {"options", "default"},
    "Float": {"default", "min", "max", "step", "round", "force_input"},
    "Int": {"default", "min", "max", "step", "control_after_generate", "force_input"},
    "String": {"default", "multiline", "dynamic_prompts", "placeholder", "force_input"},
}


class Input:
    """One input; an option that the oldest supported host does not know is refused."""

    def __init__(self, kind: str, id: str, **options: Any) -> None:
        unknown = options.keys() - COMMON - OPTIONS.get(kind, set())
        assert not unknown, f"{kind}.Input({id!r}) does not take {unknown}"
        self.kind, self.id, self.options = kind, id, options

    def __getattr__(self, name: str) -> Any:
        return self.options.get(name)


class Output:
    def __init__(self, kind: str, id: str | None = None, display_name: str = "", tooltip: str = "") -> None:
        self.kind, self.id, self.display_name, self.tooltip = kind, id, display_name, tooltip


@dataclasses.dataclass
class Schema:
    """The fields of ComfyUI 0.9's, the oldest that the pack supports: no ``search_aliases``."""

    node_id: str
    display_name: str = ""
    category: str = "sd"
    inputs: list[Input] = dataclasses.field(default_factory=list)
    outputs: list[Output] = dataclasses.field(default_factory=list)
    description: str = ""
    is_output_node: bool = False


class NodeOutput:
    def __init__(self, *result: Any, ui: Any = None) -> None:
        self.result, self.ui = result, ui


class ComfyNode:
    pass


def _type(kind: str) -> SimpleNamespace:
    return SimpleNamespace(
        Input=lambda id, **options: Input(kind, id, **options), Output=lambda **options: Output(kind, **options)
    )


def modules(folder: Path) -> dict[str, ModuleType]:
    """Modules by name; files lie in ``folder`` below their key."""
    io = SimpleNamespace(Schema=Schema, NodeOutput=NodeOutput, ComfyNode=ComfyNode, Input=Input, Output=Output)
    vars(io).update({kind: _type(kind) for kind in TYPES}, Custom=_type)
    api, latest, paths = ModuleType("comfy_api"), ModuleType("comfy_api.latest"), ModuleType("folder_paths")
    ui = SimpleNamespace(
        PreviewText=lambda text: {"text": (text,)}, PreviewImage=lambda image, cls=None: {"images": image}
    )
    vars(latest).update(io=io, ui=ui, ComfyExtension=type("ComfyExtension", (), {}))
    vars(api).update(latest=latest)

    def on_disk(place: str) -> list[str]:
        return [os.path.relpath(os.path.join(at, name), place) for at, _, names in os.walk(place) for name in names]

    def filename_list(key: str) -> list[str]:
        listed = {*FILES.get(key, ()), *on_disk(str(folder / key))}
        return sorted(name for name in listed if name.endswith(LISTED))

    def full_path(key: str, name: str) -> str:
        name = os.path.relpath(os.path.join("/", name), "/")
        if name not in FILES.get(key, ()) and not (folder / key / name).is_file():
            raise FileNotFoundError(name)
        return str(folder / key / name)

    def search(place: str, excluded_dir_names: list[str]) -> tuple[list[str], dict[str, float]]:
        assert excluded_dir_names == [".git"]
        return on_disk(place), {at: os.path.getmtime(at) for at, _, _ in os.walk(place)}

    vars(paths).update(
        get_filename_list=filename_list,
        get_full_path_or_raise=full_path,
        get_folder_paths=lambda key: [str(folder / key)],
        recursive_search=search,
        models_dir=str(folder),
        get_user_directory=lambda: str(folder / "user"),
        add_model_folder_path=lambda key, path, is_default=False: None,
    )
    return {"comfy_api": api, "comfy_api.latest": latest, "folder_paths": paths}


def internals() -> dict[str, ModuleType]:
    """As much of the host's internals as the bridge's modules of these nodes ask for when they are imported."""
    names = ("comfy", "comfy.cli_args", "comfy.conds", "comfy.lora", "comfy.model_management", "comfy.model_patcher",
             "comfy.ops", "comfy.patcher_extension", "comfy.sample", "comfy.utils", "comfy_execution",
             "comfy_execution.utils", "latent_preview", "node_helpers", "server")  # fmt: skip
    made = {name: ModuleType(name) for name in names}
    for name, module in made.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(made[parent], own, module)
    made["comfy.patcher_extension"].WrappersMP = SimpleNamespace(SAMPLER_SAMPLE="sampler_sample")
    made["comfy_execution.utils"].get_executing_context = lambda: None
    made["server"].PromptServer = SimpleNamespace(instance=None)
    management = made["comfy.model_management"]
    management.throw_exception_if_processing_interrupted = lambda: None
    management.get_torch_device = management.unet_offload_device = lambda: torch.device("cpu")
    management.load_models_gpu = lambda patchers, **_: None
    management.intermediate_device, management.intermediate_dtype = lambda: torch.device("cpu"), lambda: torch.float32
    made["comfy.model_patcher"].ModelPatcher = lambda module, **_: module
    made["comfy.utils"].ProgressBar = lambda total: SimpleNamespace(update=lambda count: None)
    made["comfy.conds"].CONDConstant = type("CONDConstant", (), {})
    return made


class Vae:
    """Latents that are means of cells, in channels that repeat."""

    def __init__(self, channels: int = 16) -> None:
        self.channels = channels

    def encode(self, picture: Tensor) -> Tensor:
        means = F.avg_pool2d(picture.movedim(-1, 1), CELL)
        return means.repeat(1, -(-self.channels // 3), 1, 1)[:, : self.channels]
