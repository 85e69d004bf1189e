"""Models under a memory policy: which weights stay on the device, within what the host grants, block by block.

``FoundryPatcher`` is to the host a model that is loaded in part. What it keeps is counted where the host counts; when
the host needs room, blocks go one by one, and what went is streamed from its file while the model runs (see
``memory.streaming``). Modulation layers never stay: they are lent once for a whole schedule.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor, nn

from ...flux.memory.accounts import Accounts
from ...flux.memory.lanes import lane_for
from ...flux.memory.outlines import Outlines
from ...flux.memory.policy import AUTO, Needs, Policy, weights_limit
from ...flux.memory.spread import Footprint
from ...flux.memory.streamed import Passed, StreamedBlocks
from ...flux.memory.streaming import Unit
from ...flux.ops.host_memory import drop_spare
from ...flux.ops.packed import PackedWeight
from ...flux.pipelines.modules import block_names
from ...flux.pipelines.parts import title_of
from ...flux.pipelines.plan_picture import spelled
from ...flux.pipelines.planning import Job, working_bytes
from ...flux.weights.binding import Binding
from ...flux.weights.packed import Packed
from .packed import PackedLinear, PackedPatcher, PatchAtUse
from .progress import say
from .weights import Weights

__all__ = ["FoundryPatcher", "Residents", "files_held", "outlines_of", "residents_of", "under_policy"]

logger = logging.getLogger(__name__)

OWN = "fluxfoundry_residents"  # our attribute of a host's model
ANY = Job(width=1024, height=1024)  # until it is known what is drawn
EVERYTHING = 1e31  # bytes that the host may load of what we list


class _Place:
    """A packed layer as the streamer sees it."""

    def __init__(self, layer: PackedLinear) -> None:
        self._layer = layer

    @property
    def packed(self) -> PackedWeight | None:
        """The weight that the layer uses in place of its own."""
        return self._layer.there

    @packed.setter
    def packed(self, weight: Packed | None) -> None:
        self._layer.there = weight


class Residents:
    """One module's weights: those that stay, and those that come when they are used.

    Args:
        module: Of the host's layers, of packed ones wherever the engine's module has linear ones or tables.
        prefix: Of the module's names in the host's model.
        weights: What it is made of.
        dtype: Of its numbers where they are used.
        policy: What the user grants.
        apart: Layers that never stay.
        device: Where it will run.

    Attributes:
        outlines: Its weights as layers have them on the device; None on a CPU.
        footprint: What is where now; None while nothing is loaded.
        flow: What is streamed.
        title: What it is called.
        working: Bytes that a run takes besides. Only a transformer's depend on what is drawn, of which it is told.
    """

    def __init__(
        self,
        module: nn.Module,
        prefix: str,
        weights: Weights,
        dtype: torch.dtype,
        policy: Policy,
        apart: Iterable[str],
        device: torch.device,
    ) -> None:
        self.module, self.prefix, self.policy, self.apart = module, prefix, policy, tuple(apart)
        self.title = title_of(weights.spec)
        self.footprint: Footprint | None = None
        self._bindings, self._checkpoint = weights.bound.bindings, weights.bound.checkpoint
        self.accounts = Accounts(
            weights.bound.module, self._bindings,
            item=max(dtype.itemsize, weights.stored.itemsize), keeps_packed=True,
            blocks=block_names(weights.bound.module),
        )  # fmt: skip
        self.outlines = outlines_of(self._bindings, self.accounts, dtype, device)
        self.working = (
            0 if policy.budget is None else self.working_for(weights.spec, dtype, ANY, self._unpacked_bytes())
        )
        self.flow = StreamedBlocks(module, self.accounts.blocks)
        self._streamed: tuple[int, ...] = ()

    def working_for(self, spec: Any, dtype: torch.dtype, job: Job, unpacked: int) -> int:
        """Bytes that a run takes besides.

        Args:
            spec: What the module is.
            dtype: That it computes with.
            job: What is drawn.
            unpacked: Bytes of one layer's weight while it is unpacked, and patched.
        """
        plain = working_bytes(spec, dtype, job) + unpacked
        return plain if self.outlines is None else max(plain, working_bytes(spec, dtype, job, packed=self.outlines))

    def _unpacked_bytes(self) -> int:
        """What one layer's weight takes while it is unpacked at use."""
        inside = (name for block in self.accounts.blocks for name in self.accounts.names_in(block, self.apart))
        return max(self.accounts.unpacked_bytes(self.accounts.packable), self.accounts.unpacked_bytes(inside))

    def choose(self, granted: int | None) -> Footprint:
        """What takes how much under the policy and what the host grants; None for no limit of its own.

        Raises:
            UserError: A budget is below what the model can do with.
        """
        accounts, limits = self.accounts, [granted]
        if self.policy.name != AUTO:
            whole, least = accounts.footprint(self.apart), accounts.footprint(self.apart, 0)
            limits.append(weights_limit(self.policy, Needs(whole.device_bytes, least.device_bytes, self.working), 0))
        known = [limit for limit in limits if limit is not None]
        return accounts.footprint(self.apart, min(known) if known else None)

    @property
    def least(self) -> int:
        """Bytes that stay in any case."""
        return self.accounts.footprint(self.apart, 0).device_bytes

    @property
    def away(self) -> set[str]:
        """The layers, by their names in the host's model, that do not stay."""
        if self.footprint is None:
            return set()
        blocks = (self.accounts.blocks[place] for place in self.footprint.blocks.streamed)
        weights = [name for block in blocks for name in self.accounts.names_in(block, self.apart)]
        layers = [name.rpartition(".")[0] for name in (*weights, *self.footprint.fetched)]
        return {f"{self.prefix}{name}" for name in (*layers, *self.apart)}

    @property
    def passed(self) -> Passed:
        """What was streamed so far, and how long blocks waited for it."""
        return self.flow.passed

    @property
    def resident_bytes(self) -> int:
        """Bytes on the device, the ring among them."""
        return 0 if self.footprint is None else self.footprint.device_bytes

    def stream(self, device: torch.device) -> None:
        """Have the blocks that do not stay come as they are used; nothing is done where they do already."""
        streamed = () if self.footprint is None else self.footprint.blocks.streamed
        if streamed != self._streamed:
            self.close()
            if streamed:
                self.flow.start([self._unit(place) for place in streamed], lane_for(device, say))
            self._streamed = streamed

    def held(self) -> AbstractContextManager[Callable[[], None]]:
        """Have the file stay as it is inside the block; see ``flux.weights.sources.Checkpoint``."""
        return self._checkpoint.held()

    def close(self) -> None:
        """Stream nothing any more."""
        self._streamed = ()
        self.flow.stop()

    def _unit(self, place: int) -> Unit:
        names = self.accounts.names_in(self.accounts.blocks[place], self.apart)
        layers = ((name, self.module.get_submodule(name.rpartition(".")[0])) for name in names)
        return Unit(place, tuple((_Place(layer), self._bindings[name]) for name, layer in layers))


def outlines_of(
    bindings: Mapping[str, Binding], accounts: Accounts, dtype: torch.dtype, device: torch.device
) -> Outlines | None:
    """Weights as they are in a file, for plans of what runs on a device; None on a CPU.

    Args:
        bindings: Of all parameters.
        accounts: Of them.
        dtype: Of their numbers where they are used.
        device: Where that is.
    """
    if comfy.model_management.is_device_cpu(device):
        return None
    return Outlines.of_file(bindings, accounts.movable, device, dtype)


def under_policy(model: nn.Module, residents: Sequence[Residents]) -> None:
    """Note on a host's model what of it is under a policy, for all patchers that it will have."""
    setattr(model, OWN, tuple(residents))


def residents_of(model: nn.Module) -> tuple[Residents, ...]:
    """What of a host's model is under a policy."""
    own: tuple[Residents, ...] = getattr(model, OWN, ())
    return own


@contextmanager
def files_held(models: Iterable[nn.Module]) -> Iterator[Callable[[], None]]:
    """Have the files of what of some host's models is under a policy stay as they are inside the block.

    Yields:
        What has to be called from time to time: others wait for 45 seconds at most.

    Raises:
        FileError: One was changed since it was opened, or is about to be; also from what is yielded.
    """
    with ExitStack() as held:
        checks = [held.enter_context(own.held()) for model in models for own in residents_of(model)]

        def check() -> None:
            for one in checks:
                one()

        yield check


class FoundryPatcher(PackedPatcher):
    """The host's patcher for a model under a memory policy; see the module."""

    @property
    def residents(self) -> tuple[Residents, ...]:
        """Of the model, whoever else patches it."""
        return residents_of(self.model)

    def model_size(self) -> int:
        """Bytes that will be on the device under the policy, which is what the host makes room for."""
        return sum(own.choose(None).device_bytes for own in self.residents)

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        """Bring in what may stay; patches, which act at use, do not make it load anything again."""
        if all(self._owner(key) is not None for key in (*self.patches, *self.backup)):
            self.model.current_weight_patches_uuid = self.patches_uuid
        brought: int = super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights)
        self._give_patches()
        return brought

    def load(
        self, device_to: Any = None, lowvram_model_memory: float = 0, force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:  # fmt: skip
        self._settle(None if full_load else int(lowvram_model_memory))
        super().load(device_to, EVERYTHING, force_patch_weights, full_load=False)
        self._account(device_to)
        self._give_patches()
        self._tell()

    def partially_unload(
        self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:  # fmt: skip
        """Give back blocks until so many bytes are free, or none is left that could be streamed; returns the bytes."""
        before = int(self.loaded_size())
        with self.use_ejected():
            away = self._away()
            self._settle(max(0, int(before - memory_to_free)))
            try:
                self._bring(away - self._away(), self.model.device)
            except Exception:  # what came half goes again, and all else that can
                self._settle(0)
                raise
            finally:
                self._account(self.model.device)
                self._give_patches()
        self._tell()
        return before - int(self.loaded_size())

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for own in self.residents:
                own.close()
                own.footprint = None
            drop_spare()

    def _load_list(self, *args: Any, **kwargs: Any) -> list[Any]:
        """What the host may load: each entry ends in a layer's name, the layer, and its parameters."""
        away = self._away()
        listed: list[Any] = super()._load_list(*args, **kwargs)
        return [entry for entry in listed if entry[-3] not in away]

    def _away(self) -> set[str]:
        return {name for own in self.residents for name in own.away}

    def _settle(self, granted: int | None) -> None:
        """Choose what stays of what the host grants to all modules together, and let go of the rest."""
        left = granted
        for index, own in enumerate(self.residents):
            others = sum(other.least for other in self.residents[index + 1 :])
            own.footprint = own.choose(None if left is None else max(0, left - others))
            left = None if left is None else left - own.footprint.device_bytes
        for name in self._away():
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        """Put a layer's stored tensors back where they rest."""
        layer = comfy.utils.get_attr(self.model, name)
        if not getattr(layer, "comfy_patched_weights", False):
            return
        for own, _ in layer.named_parameters(recurse=False):
            kept = self.backup.pop(f"{name}.{own}", None)
            if kept is not None:
                comfy.utils.set_attr_param(self.model, f"{name}.{own}", kept.weight)
        layer.comfy_patched_weights = False

    def _bring(self, names: Iterable[str], device: torch.device) -> None:
        """Put layers on the device as the host's loading does: where more are streamed, others are, evenly spread."""
        names = sorted(names)
        for own in self.residents if names else ():
            own.close()  # the ring makes room; what streams from here on has another
        for name in names:
            layer = comfy.utils.get_attr(self.model, name)
            layer.bias_function = []  # what it did while the layer was away is now done to the bias itself
            for own, _ in layer.named_parameters(recurse=False):
                self.patch_weight_to_device(f"{name}.{own}", device_to=device)
            layer.comfy_patched_weights = True  # before it moves: what came half has to be let go too
            layer.to(device)

    def _account(self, device: torch.device) -> None:
        """Have what stays counted, and the rest come as it is used."""
        self.model.model_loaded_weight_memory = sum(own.resident_bytes for own in self.residents)
        self.model.model_lowvram = bool(self._away())
        for name in self._away():
            _bring_bias(comfy.utils.get_attr(self.model, name), device)
        for own in self.residents:
            own.stream(device)

    def _give_patches(self) -> None:
        """Biases of what the host was not told of are patched at use, as weights are."""
        super()._give_patches()
        for name in self._away():
            layer, key = comfy.utils.get_attr(self.model, name), f"{name}.bias"
            if isinstance(layer, PackedLinear):
                layer.bias_function = [PatchAtUse(key, self.patches[key])] if key in self.patches else []

    def _tell(self) -> None:
        for line in self._lines():
            logger.info("FLUX Foundry: %s", line)

    def _lines(self) -> Iterator[str]:
        for own in self.residents:
            if own.footprint is not None:
                blocks = own.footprint.blocks
                yield (
                    f"{own.title}: {spelled(own.resident_bytes)} stay, {len(blocks.streamed)} of "
                    f"{len(blocks.kept)} blocks are streamed ({own.policy})"
                )


def _bring_bias(layer: nn.Module, device: torch.device) -> None:
    """Biases are small, and stay."""
    bias: Tensor | None = getattr(layer, "bias", None)
    if isinstance(layer, PackedLinear) and bias is not None and bias.device != device:
        layer.bias = nn.Parameter(comfy.model_management.cast_to_device(bias, device, bias.dtype), requires_grad=False)
