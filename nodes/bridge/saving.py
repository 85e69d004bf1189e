"""A MODEL to a file: any format, tensor by tensor, with the LoRAs that are on it merged."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import comfy.lora
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...flux.errors import MismatchError, UserError
from ...flux.specs.flux1 import Flux1Spec
from ...flux.specs.flux2 import Flux2Spec
from ...flux.specs.recognition import recognise_part
from ...flux.weights.convert import describe_formats, parse_target, suffix_for
from ...flux.weights.formats.written import GGUF
from ...flux.weights.packed import Packed
from ...flux.weights.renames import LAYOUTS, find_layout
from ...flux.weights.storing import Item, Stores, store
from .model import FoundryFlux
from .packed import PackedLinear
from .progress import check_cancelled

__all__ = ["AS_IT_IS", "save_model"]

PREFIX = "diffusion_model."
WEIGHT = ".weight"
AS_IT_IS = "as it is"
CPU = torch.device("cpu")
TITLE = "modelspec.title"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class ModelItem:
    """One weight of a MODEL.

    Attributes:
        shape: Of its numbers.
        key: In the host's model.
        stored: Gives the weight without patches.
        patches: The host's, in order.
        layer: Where it is packed.
        dtype: Of what ``stored`` gives.
    """

    shape: tuple[int, ...]
    key: str
    dtype: torch.dtype
    stored: Callable[[], Tensor]
    patches: Sequence[Any]
    layer: PackedLinear | None

    @property
    def stored_as(self) -> frozenset[str]:
        """The formats of a weight that nothing is merged into."""
        if self.patches:
            return frozenset()
        if self.layer is not None:
            return frozenset(row.name for row in self.layer.packed(CPU).formats)
        return frozenset({DTYPE_NAMES.get(self.dtype, "")})

    def numbers(self) -> Tensor:
        """With patches merged in fp32; without any as they are."""
        plain = self.stored().to(CPU)
        if not self.patches:
            return plain
        merged: Tensor = comfy.lora.calculate_weight(list(self.patches), plain.float().clone(), self.key)
        return merged

    def packed(self) -> Packed | None:
        """As it is stored, where nothing is to be merged."""
        if self.layer is None or self.patches:
            return None
        return self.layer.packed(CPU)


def save_model(patcher: Any, filename_prefix: str, form: str, layout: str) -> tuple[Path, str]:
    """Write a MODEL's diffusion model below the host's output folder.

    Args:
        patcher: The host's MODEL, ours or a core loader's.
        filename_prefix: Folder and beginning of the name, as the host's save nodes take it.
        form: A key of ``WRITTEN``, or ``AS_IT_IS``.
        layout: "bfl" or "diffusers".

    Returns:
        The new file, and what was written, in a sentence.

    Raises:
        UserError: The MODEL is not FLUX, the format does not go with the layout, or the file cannot be written.
    """
    written, _ = parse_target(layout if form == AS_IT_IS else form)
    items = model_items(patcher)
    spec = spec_of_items(patcher, items)
    family = "flux1" if isinstance(spec, Flux1Spec) else "flux2"
    is_gguf = written is not None and written.name.startswith(GGUF)
    stores = Stores(
        part="transformer",
        layout=LAYOUTS[f"{family}-{'bfl' if is_gguf else layout}"],
        written=written,
        metadata={TITLE: spec.title},
        title=spec.title,
    )
    path = _free_path(filename_prefix, suffix_for(written))
    bar = comfy.utils.ProgressBar(len(items))

    def watch(done: int, total: int, _: str) -> None:
        check_cancelled()
        bar.update_absolute(done, total)

    outcome = store(path, items, stores, watch=watch)
    merged = sum(bool(item.patches) for item in items.values())
    patched = f"; patches merged into {merged} weights" if merged else ""
    return path, f"{spec.title}: {describe_formats(outcome.formats)}{patched}"


def model_items(patcher: Any) -> dict[str, Item]:
    """The diffusion model's weights under our names.

    Raises:
        MismatchError: It is no FLUX model.
    """
    keys = patcher.get_key_patches(PREFIX)
    found = find_layout([key.removeprefix(PREFIX) for key in keys], "transformer")
    if found is None:
        raise MismatchError("this MODEL is no FLUX diffusion model; connect one that is")
    plan = found.to_ours([key.removeprefix(PREFIX) for key in keys], "this MODEL")
    items: dict[str, Item] = {}
    for name, recipe in plan.items():
        key = PREFIX + recipe.pieces[0].name
        (weight, convert), *patches = keys[key]
        owner = comfy.utils.get_attr(patcher.model, key.removesuffix(WEIGHT)) if key.endswith(WEIGHT) else None
        layer = owner if isinstance(owner, PackedLinear) else None
        shape = (layer.out_features, layer.in_features) if layer is not None else tuple(weight.shape)
        items[name] = ModelItem(shape, key, weight.dtype, partial(convert, weight), patches, layer)
    return items


def spec_of_items(patcher: Any, items: dict[str, Item]) -> Flux1Spec | Flux2Spec:
    """What a MODEL is: as it was loaded by us, else by its weights' shapes.

    Raises:
        MismatchError: It is no FLUX model that is known here.
    """
    if isinstance(patcher.model, FoundryFlux):
        own: Flux1Spec = patcher.model.spec
        return own
    found = recognise_part("transformer", "", {name: item.shape for name, item in items.items()})
    if not isinstance(found.spec, (Flux1Spec, Flux2Spec)):
        raise MismatchError(f"this MODEL is {found.title}; connect a FLUX diffusion model")
    return found.spec


def _free_path(filename_prefix: str, suffix: str) -> Path:
    """The next free name below the host's output folder.

    Raises:
        UserError: The prefix leads out of it.
    """
    output = folder_paths.get_output_directory()
    place = os.path.abspath(os.path.join(output, filename_prefix))
    if "\0" in filename_prefix or not PurePath(place).is_relative_to(os.path.abspath(output)):
        raise UserError(f"filename_prefix {filename_prefix!r} leads out of ComfyUI's output folder; keep it inside")
    folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, output)
    os.makedirs(folder, exist_ok=True)
    return Path(folder) / f"{name}_{counter:05}_{suffix}"
