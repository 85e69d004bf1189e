"""What a run will take, stage by stage, in bytes and seconds; known before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .policy import Policy
from .spread import Footprint

__all__ = ["Rates", "RunPlan", "StagePlan"]


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        bytes: Brought from a file to the device.
        operations: Of matrix products, a multiplication and an addition being two.
    """

    bytes: float
    operations: float


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage of a run.

    Attributes:
        name: Its key: "clip", "t5", "vision", "encode", "transformer" or "decode"; and for each further transformer,
            that takes its steps between those of the first, "transformer 2" and so on.
        title: What runs in it.
        weights: Bytes of its weights as they are stored.
        footprint: Of them on the device.
        activations: The most bytes of tensors that it makes.
        workspace: Bytes for what is unpacked at use.
        beside: Bytes of what stays beside it: control LoRAs, further transformers that the run has, and the transformer
            where a picture is decoded and another one follows.
        once: Bytes that are brought once and let go, before the first pass.
        passes: How often its blocks run.
        operations: Of one pass.
        limit: Bytes that its weights may take; None for as many as there are.
        in_strips: Whether an autoencoder runs in strips of rows, which takes longer and less.
    """

    name: str
    title: str
    weights: int
    footprint: Footprint
    activations: int
    workspace: int = 0
    beside: int = 0
    once: int = 0
    passes: int = 1
    operations: float = 0.0
    limit: int | None = None
    in_strips: bool = False

    @property
    def resident_bytes(self) -> int:
        """Of weights that stay."""
        return self.footprint.others + self.footprint.blocks.resident_bytes

    @property
    def streamed_bytes(self) -> int:
        """Of weights that come for each pass."""
        return self.footprint.blocks.streamed_bytes

    @property
    def ring_bytes(self) -> int:
        """Of the buffers that they go through."""
        return self.footprint.blocks.ring_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that it takes at once."""
        return self.footprint.device_bytes + self.activations + self.workspace + self.beside

    def seconds(self, rates: Rates) -> float:
        """How long it takes: what stays is brought once, what is streamed comes while blocks run."""
        first = (self.resident_bytes + self.once) / rates.bytes
        return first + self.passes * max(self.operations / rates.operations, self.streamed_bytes / rates.bytes)

    def as_json(self, rates: Rates | None = None) -> dict[str, Any]:
        """Plain values, bytes and seconds."""
        streamed = self.footprint.blocks
        return {
            "title": self.title,
            "weights_bytes": self.weights,
            "resident_bytes": self.resident_bytes,
            "streamed_bytes": self.streamed_bytes,
            "ring_bytes": self.ring_bytes,
            "once_bytes": self.once,
            "activation_bytes": self.activations,
            "workspace_bytes": self.workspace,
            "beside_bytes": self.beside,
            "peak_bytes": self.peak_bytes,
            "blocks": len(streamed.kept),
            "blocks_streamed": list(streamed.streamed),
            "in_strips": self.in_strips,
            "passes": self.passes,
            "operations": self.operations,
            **({} if rates is None else {"seconds": self.seconds(rates)}),
        }


@dataclass(frozen=True)
class RunPlan:
    """Every stage of a run, in the order in which they come; one is over before the next begins.

    Attributes:
        stages: At least one.
        policy: That they were planned by.
        device: Where they run.
        available: Bytes that were free there.
        rates: What the machine does; None where that was not measured.
    """

    stages: tuple[StagePlan, ...]
    policy: Policy
    device: str
    available: int
    rates: Rates | None = None

    @property
    def peak_bytes(self) -> int:
        """The most that any stage takes."""
        return max(stage.peak_bytes for stage in self.stages)

    def stage(self, name: str) -> StagePlan:
        """A stage by its key.

        Raises:
            KeyError: The run has none of this name.
        """
        return {stage.name: stage for stage in self.stages}[name]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "policy": str(self.policy),
            "device": self.device,
            "available_bytes": self.available,
            "peak_bytes": self.peak_bytes,
            "stages": {stage.name: stage.as_json(self.rates) for stage in self.stages},
        }
