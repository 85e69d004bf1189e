"""Layers whose weights stay packed as they are stored, under the host's memory management.

``PackedLinear`` holds the stored tensors as parameters, so that the host counts, moves and unloads them, and unpacks
when it runs. ``PackedPatcher`` is the host's patcher for models with such layers. Two things stay true of them: the
host writes to no stored tensor (on the CPU they are views of the mapped file), and patches (LoRA) act on the unpacked
numbers at each use and are never stored, so that taking them out leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import comfy.hooks
import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...flux.errors import UserError
from ...flux.ops.linear import linear
from ...flux.weights.formats.base import DATA
from ...flux.weights.formats.floats import for_device
from ...flux.weights.packed import Packed
from .compat import brought, cast_once
from .progress import check_cancelled

__all__ = ["PackedEmbedding", "PackedLinear", "PackedPatcher", "PatchAtUse", "lend", "pack_layers", "packed_state"]

WEIGHT, BIAS = "weight", "bias"
COMPANION = "stored_"  # before the names of further stored tensors
SIXTEEN_BITS = ("BF16", "F16")  # names of formats
UNPACKED_COPIES = 2  # of a layer's weight at a time: the numbers, and as many bytes to make or to patch them

Product = Callable[[Tensor], Tensor]


class Backup(NamedTuple):
    """What the host remembers of a weight that it replaced, by the names that it reads."""

    weight: Tensor
    inplace_update: bool


class PatchAtUse:
    """The host's patches of one weight, as a function of its numbers.

    Args:
        key: The weight's, in the host's model.
        patches: As the host's patcher keeps them.
    """

    def __init__(self, key: str, patches: Sequence[Any]) -> None:
        self.key, self.patches = key, list(patches)

    def __call__(self, numbers: Tensor) -> Tensor:
        """The patched numbers; ``numbers`` may be written to."""
        more = {"original_weights": {self.key: [(numbers.clone(),)]}} if self._compares else {}
        patched: Tensor = comfy.lora.calculate_weight(
            self.patches, numbers, self.key, intermediate_dtype=numbers.dtype, **more
        )
        return patched

    @property
    def _compares(self) -> bool:
        """Whether a patch is another model's weight, of which the difference from ours is taken."""
        return any(isinstance(value, tuple) and "model_as_lora" in value[:1] for _, value, *_ in self.patches)


class PackedLinear(nn.Module, comfy.ops.CastWeightBiasOp):
    """A linear layer with a packed weight, to the host one of its own layers that cast their weights.

    Its state dict has the packed numbers as ``weight``, the name that LoRA looks for; what goes with them is beside it.

    Args:
        packed: The weight; its stored tensors are not kept, they come with ``packed_state``.
        has_bias: Whether there is one.
        dtype: Of the bias.
    """

    def __init__(self, packed: Packed, has_bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.weight_function: list[Callable[[Tensor], Tensor]] = []
        self.bias_function: list[Callable[[Tensor], Tensor]] = []
        self.hook: PatchAtUse | None = None
        self.there: Packed | None = None  # the weight on the device, while it is streamed
        self._names = parameter_names(packed)
        self._skeleton = packed.with_tensors({role: t.to("meta") for role, t in packed.tensors().items()})
        for role, tensor in self._skeleton.tensors().items():
            self.register_parameter(self._names[role], nn.Parameter(tensor, requires_grad=False))
        bias = torch.empty(self.out_features, dtype=dtype, device="meta") if has_bias else None
        self.register_parameter(BIAS, None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., N) of inputs (..., K)."""
        check_cancelled()
        with self.lend(x) as product:
            return product(x)

    @contextmanager
    def lend(self, like: Tensor) -> Iterator[Product]:
        """The layer for several inputs, its weight brought to the device of ``like`` and unpacked once.

        Args:
            like: Has the dtype and device of the inputs.
        """
        own = [] if self.there is not None else [*self._names.values()]
        names = [*own, *([] if self.bias is None else [BIAS])]
        with brought({name: getattr(self, name) for name in names}, like.device) as tensors:
            bias = tensors.get(BIAS)
            if bias is not None:
                bias = _apply(self.bias_function, bias.to(like.dtype), bias)
            yield _Lent(self.there or self._with(tensors), bias, self._functions())

    def packed(self, device: torch.device) -> Packed:
        """The weight as it is stored, on a device, without patches."""
        return self._with({name: getattr(self, name).detach() for name in self._names.values()}).to(device)

    def numbers(self, dtype: torch.dtype, device: torch.device | None = None, patches: Sequence[Any] = ()) -> Tensor:
        """The weight's numbers, not patched but by ``patches``, which the host keeps under the empty key."""
        tensors = {name: getattr(self, name) for name in self._names.values()}
        with brought(tensors, device or self.weight.device) as there:
            lent = _Lent(self._with(there), None, [PatchAtUse("", patches)] if patches else [])
            return lent.numbers(dtype)

    @property
    def unpacked_bytes(self) -> int:
        """Bytes that the numbers take for a moment, in a 16-bit type; none where they are stored in one."""
        if all(own.name in SIXTEEN_BITS for own in self._skeleton.formats):
            return 0
        return UNPACKED_COPIES * self.in_features * self.out_features * torch.bfloat16.itemsize

    def _with(self, tensors: Mapping[str, Tensor]) -> Packed:
        return self._skeleton.with_tensors({role: tensors[name] for role, name in self._names.items()})

    def _functions(self) -> list[Callable[[Tensor], Tensor]]:
        return [*self.weight_function, *([] if self.hook is None else [self.hook])]


class PackedEmbedding(nn.Module):
    """A table with packed rows, of which only those are unpacked that are asked for, wherever the table rests.

    Args:
        packed: The table; its stored tensors come with ``packed_state``.
        dtype: Of what it gives.
    """

    def __init__(self, packed: Packed, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.shape
        self.dtype = dtype
        self._names = parameter_names(packed)
        self._skeleton = packed.with_tensors({role: t.to("meta") for role, t in packed.tensors().items()})
        for role, tensor in self._skeleton.tensors().items():
            self.register_parameter(self._names[role], nn.Parameter(tensor, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Rows (..., K) by their numbers (...)."""
        stored = self._skeleton.with_tensors({role: getattr(self, name) for role, name in self._names.items()})
        rows = stored.rows(input.reshape(-1).to(self.weight.device), self.dtype)
        return rows.to(input.device).view(*input.shape, self.embedding_dim)


class _Lent:
    """A weight where its inputs are, unpacked when it is needed and at most once."""

    def __init__(self, packed: Packed, bias: Tensor | None, functions: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self._packed, self._bias, self._functions = packed, bias, functions
        self._numbers: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if not self._functions:
            out = self._packed.product(x, self._bias)
            if out is not None:
                return out
        if self._numbers is None:
            self._numbers = self.numbers(x.dtype)
        return linear(x, self._numbers, self._bias)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        numbers = self._packed.numbers(dtype)
        return _apply(self._functions, numbers, *self._packed.tensors().values())


def _apply(functions: Sequence[Callable[[Tensor], Tensor]], tensor: Tensor, *stored: Tensor) -> Tensor:
    """Functions that may write to their argument, on a tensor that may be a view of a stored one."""
    if functions and any(tensor.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() for own in stored):
        tensor = tensor.clone()
    for function in functions:
        tensor = function(tensor)
    return tensor


def parameter_names(packed: Packed) -> dict[str, str]:
    """What each stored tensor is called in its layer: the first of the packed numbers "weight"."""
    roles = list(packed.tensors())
    first = next(role for role in roles if role.rpartition(".")[2] == DATA)
    return {role: WEIGHT if role == first else COMPANION + role.replace(".", "_") for role in roles}


def pack_layers(
    module: nn.Module, packed: Mapping[str, Packed], dtype: torch.dtype, rows: torch.dtype = torch.float32
) -> None:
    """Put packed layers in the places of linear ones and of tables, still without their tensors.

    Args:
        module: Holds the layers.
        packed: Weights by their layers' names.
        dtype: Of biases.
        rows: Of what tables give.
    """
    for name, weight in packed.items():
        parent, _, own = name.rpartition(".")
        before = module.get_submodule(name)
        if hasattr(before, "num_embeddings"):
            layer: nn.Module = PackedEmbedding(weight, rows)
        else:
            layer = PackedLinear(weight, _has_bias(before), dtype)
        setattr(module.get_submodule(parent), own, layer)


def _has_bias(layer: nn.Module) -> bool:
    """With dynamic VRAM the host's layers have no bias until they are loaded, and say so."""
    return getattr(layer, BIAS, None) is not None or bool(getattr(layer, "comfy_need_lazy_init_bias", False))


def packed_state(packed: Mapping[str, Packed], device: torch.device) -> dict[str, Tensor]:
    """The stored tensors by their names in a module's state dict.

    Args:
        packed: Weights by their layers' names.
        device: Where they will run, which may not know every type.
    """
    return {
        f"{name}.{own}": for_device(weight.tensors()[role], device)
        for name, weight in packed.items()
        for role, own in parameter_names(weight).items()
    }


@contextmanager
def lend(layer: Any, like: Tensor) -> Iterator[Product]:
    """A linear layer, the host's or a packed one, its weight brought once for several inputs like ``like``."""
    if isinstance(layer, PackedLinear):
        with layer.lend(like) as product:
            yield product
    else:
        with cast_once(layer, like) as (weight, bias):
            yield partial(F.linear, weight=weight, bias=bias)


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    """The host's patcher, for models with packed layers: it leaves their stored tensors as they are.

    Where the host would merge patches into a weight, the layer is given them as a function of its numbers. A stored
    tensor that goes to the device is remembered, so that unloading puts the mapped one back and copies nothing.
    """

    def load(self, *args: Any, **kwargs: Any) -> None:
        super().load(*args, **kwargs)
        self._give_patches()

    def partially_unload(self, *args: Any, **kwargs: Any) -> int:
        freed: int = super().partially_unload(*args, **kwargs)
        self._give_patches()
        return freed

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for _, layer in self._packed_layers():
                layer.weight_function = []

    def patch_weight_to_device(
        self,
        key: str,
        device_to: torch.device | None = None,
        inplace_update: bool = False,
        return_weight: bool = False,
        force_cast: bool = False,
    ) -> Any:
        layer = self._owner(key)
        if layer is None and not self._is_table(key):
            changes = {"force_cast": True} if force_cast else {}  # not known to older hosts, which do not ask for it
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, **changes)
        stored = comfy.utils.get_attr(self.model, key)
        if return_weight:
            if layer is None:
                return stored
            is_weight = key.endswith(f".{WEIGHT}")
            return layer.numbers(torch.float32, device_to, self.patches.get(key, ())) if is_weight else stored
        if key not in self.backup:
            self.backup[key] = Backup(stored.detach(), False)  # moving a module puts other data into its parameters
        return None

    def pin_weight_to_device(self, key: str) -> None:
        """Pages of a mapped file cannot be pinned."""
        if self._owner(key) is None:
            super().pin_weight_to_device(key)

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, Any]:
        """Weights with what turns them into numbers, and their patches, as nodes that merge models ask for them."""
        found = {}
        for key, (first, *patches) in super().get_key_patches(filter_prefix).items():
            layer = self._owner(key)
            if layer is not None and not key.endswith(f".{WEIGHT}"):
                continue
            found[key] = [first if layer is None else (first[0], _Unpack(layer)), *patches]
        return found

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: Any, key: str, *args: Any, **kwargs: Any
    ) -> None:
        layer = self._owner(key)
        if layer is None:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)
        elif key in combined_patches:
            layer.hook = PatchAtUse(key, combined_patches[key])
            if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
                self.cached_hook_patches.setdefault(hooks, {})[key] = (layer.hook, None)

    def patch_cached_hook_weights(self, cached_weights: dict[str, Any], key: str, memory_counter: Any) -> None:
        layer = self._owner(key)
        if layer is None:
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)
        else:
            layer.hook = cached_weights[key][0]

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        for name, layer in self._packed_layers():
            if not whitelist_keys_set or f"{name}.{WEIGHT}" in whitelist_keys_set:
                layer.hook = None
        super().unpatch_hooks(whitelist_keys_set)

    def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refuse: a saver would write the packed numbers without what they mean.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "the weights of this model are packed, which ComfyUI's save nodes do not write; use Save FLUX Model, or "
            "load it with dtype bf16"
        )

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See ``model_state_dict_for_saving``."""
        return self.model_state_dict_for_saving()

    def _packed_layers(self) -> list[tuple[str, PackedLinear]]:
        return [(name, layer) for name, layer in self.model.named_modules() if isinstance(layer, PackedLinear)]

    def _owner(self, key: str) -> PackedLinear | None:
        """The packed layer that a stored tensor belongs to; None for biases and for other layers' tensors."""
        place, _, own = key.rpartition(".")
        layer = comfy.utils.get_attr(self.model, place) if place else None
        return layer if isinstance(layer, PackedLinear) and own != BIAS else None

    def _is_table(self, key: str) -> bool:
        place, _, _ = key.rpartition(".")
        return isinstance(comfy.utils.get_attr(self.model, place) if place else None, PackedEmbedding)

    def _give_patches(self) -> None:
        """Every packed layer has this patcher's patches once, wherever the host put them or left them out."""
        replaced = (comfy.model_patcher.LowVramPatch, PatchAtUse)
        for name, layer in self._packed_layers():
            key = f"{name}.{WEIGHT}"
            own = [PatchAtUse(key, self.patches[key])] if key in self.patches else []
            layer.weight_function = own + [f for f in layer.weight_function if not isinstance(f, replaced)]


class _Unpack:
    """The host's conversion of a stored weight to numbers; what it is given is only asked for its place."""

    def __init__(self, layer: PackedLinear) -> None:
        self._layer = layer

    def __call__(self, stored: Tensor, inplace: bool = False) -> Tensor:
        del inplace
        return self._layer.numbers(torch.float32, stored.device)
