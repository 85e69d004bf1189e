"""The parts of a run, bound to their files: transformer, text encoders, autoencoder, vision tower, Redux adapter.

Opening a part reads headers only; its weights come when a stage needs them and go when it is over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ..errors import UserError
from ..memory.available import available_bytes
from ..memory.exhaustion import Fallback, load_what_fits
from ..memory.loss import is_lost, lost
from ..memory.metering import Meter, NoMeter
from ..memory.residency import Residency, Watch
from ..models.autoencoder import Autoencoder
from ..models.flux1 import Flux1
from ..models.redux import Redux
from ..models.text.clip import ClipText
from ..models.text.t5 import T5Encoder
from ..models.vision.siglip import SiglipVision
from ..ops.dtypes import SMALL_MODEL, compute_dtype, fast_dtype
from ..ops.host_heap import giving_back_freed_memory
from ..ops.layers import on_meta
from ..specs.autoencoder import AutoencoderSpec
from ..specs.fit import Given, check_fit, check_kind, check_redux, faults_between, redux_faults
from ..specs.flux1 import Flux1Spec
from ..specs.recognition import Recognised, titles_of
from ..specs.text import ClipTextSpec, T5Spec
from ..specs.vision import ReduxSpec, SiglipSpec
from ..weights.binding import Binding, bind
from ..weights.checkpoints import FilePart, read_parts
from ..weights.formats.floats import BF16, F16, F32
from ..weights.readers.stamps import FileStamp
from ..weights.sources import Checkpoint, open_checkpoint
from .library import given_files, model_files_in
from .modules import block_names, build_of

__all__ = [
    "KEEPS", "BoundPart", "MeteredPart", "Part", "bind_part", "check_beside", "check_redux_beside", "find_part",
    "joined", "open_autoencoder", "open_clip", "open_redux", "open_t5", "open_transformer", "open_vision", "packs_on",
    "title_of",
]  # fmt: skip

Spec = TypeVar("Spec")
Module = TypeVar("Module", bound=nn.Module)

KEEPS = ("auto", "numbers", "packed")
SIXTEEN_BITS = frozenset({BF16.name, F16.name})  # formats whose numbers are widened by a cast
SHARE_FOR_NUMBERS = 0.5  # of the memory that is left, which unpacked weights may take without being asked for


class Part(Generic[Spec, Module]):
    """A spec, its module on the meta device, the weights' residency, and the files that they come from, if from any."""

    def __init__(
        self, spec: Spec, module: Module, residency: Residency, given: Given, checkpoint: Checkpoint | None = None
    ) -> None:
        self.spec, self.module, self.residency, self.given = spec, module, residency, given
        self._checkpoint, self._use = checkpoint, threading.Lock()

    @property
    def stamps(self) -> Mapping[Path, FileStamp]:
        """The files, as they were when they were opened."""
        return {} if self._checkpoint is None else self._checkpoint.stamps

    @property
    def path(self) -> Path:
        return self.given.path

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed of the file."""
        return self.given.found.notes

    @property
    def device(self) -> torch.device:
        return self.residency.device

    @property
    def dtype(self) -> torch.dtype:
        return self.residency.dtype

    @contextmanager
    def resident(
        self,
        without: tuple[str, ...] = (),
        watch: Watch | None = None,
        limit: int | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> Iterator[Module]:
        """Have the weights in memory inside the block, except those below the prefixes ``without``.

        ``watch`` hears of each weight on its way in, and may raise to stop. Where they would take more than ``limit``
        bytes, or more than there is, some of the module's blocks are streamed; the latter is told.

        Raises:
            UserError: Another run has them, or a file was changed since it was opened, or is about to be.
            DeviceLostError: The device failed, in here or in the block.
        """
        if not self._use.acquire(blocking=False):
            raise UserError(
                f"{self.path.name} is in use by another run; wait until that is over, or open the model a second time"
            )
        try:
            with self._held(), self._memory():
                try:
                    load_what_fits(self.residency, without, watch, limit, tell)
                    yield self.module
                finally:
                    self.residency.release()
        except Exception as error:
            if is_lost(error):
                raise lost(self.device, error) from error
            raise
        finally:
            self._use.release()

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Have the files stay as they are, and checked, inside the block."""
        if self._checkpoint is None:
            yield
            return
        with self._checkpoint.held() as check, _checked(self.module, self.device, check):
            yield

    def _memory(self) -> AbstractContextManager[None]:
        """On a CPU, have an autoencoder give back what a layer lets go: none of its layers asks for as much again."""
        gives_back = self.device.type == "cpu" and not self.residency.accounts.blocks
        return giving_back_freed_memory() if gives_back else nullcontext()

    def going_on(self, tell: Callable[[str], None] | None) -> Fallback:
        """What repeats a pass of the resident module that runs out of memory, with fewer of its weights in it."""
        return Fallback([self.residency], [()], tell, "the pass")

    def metered(self, meter: Meter | NoMeter, stage: str) -> AbstractContextManager[None]:
        """Have a meter note what a stage takes that runs with this part."""
        return meter.stage(stage, title_of(self.spec), self.residency)


@contextmanager
def _checked(module: nn.Module, device: torch.device, check: Callable[[], None]) -> Iterator[None]:
    """Have files checked before everything that may use mapped pages of them: on a CPU weights can be such.

    That is before a module and its blocks, or before every layer where it has no row of blocks.
    """
    blocks = [module, *(module.get_submodule(name) for name in block_names(module))]
    layers = blocks if len(blocks) > 1 else [own for own in module.modules() if next(own.children(), None) is None]
    on_cpu = layers if device.type == "cpu" else []
    handles = [layer.register_forward_pre_hook(lambda *_: check()) for layer in on_cpu]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class MeteredPart(Generic[Spec, Module]):
    """A part whose every use is a pass of a stage that a meter notes; ``tell`` hears of what was done otherwise."""

    def __init__(
        self, part: Part[Spec, Module], meter: Meter | NoMeter, stage: str, tell: Callable[[str], None] | None = None
    ) -> None:
        self.tell = tell
        self.spec, self.path, self.device, self.dtype = part.spec, part.path, part.device, part.dtype
        self.stage, self._part, self._meter = stage, part, meter

    @contextmanager
    def resident(self) -> Iterator[Module]:
        """Have the weights in memory inside the block."""
        with self._part.metered(self._meter, self.stage), self._part.resident() as module:
            self._meter.begin()
            yield module
            self._meter.tick()


def title_of(spec: Any) -> str:
    """What a part is called."""
    return str(getattr(spec, "title", spec.name))


def open_transformer(
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    variant: str | None = None,
    keep: str = "auto",
) -> Part[Flux1Spec, Flux1]:
    """Open a FLUX.1 transformer.

    Args:
        path: A safetensors or GGUF file, the index of several, or their folder.
        device: Where it will run.
        dtype: Of its numbers there; chosen by the device when None.
        variant: What it is, where its tensors cannot tell: the name of a spec.
        keep: Whether its weights are in memory as "numbers", or "packed" as they are stored and unpacked layer by layer
            as they are used; "auto" packs those that would not fit otherwise, or that are unpacked at next to no cost.

    Raises:
        UserError: The file is missing, damaged, or something else.
    """
    return _open(path, "transformer", device, dtype, variant=variant, keep=keep)


def open_autoencoder(
    path: Path, device: torch.device, dtype: torch.dtype | None = None
) -> Part[AutoencoderSpec, Autoencoder]:
    """Open a FLUX.1 autoencoder file; see ``open_transformer``. It runs in fp32 where others run in fp16."""
    if dtype is None and fast_dtype(device) == torch.float16:
        dtype = torch.float32  # FLUX.1's activations leave fp16's range
    return _open(path, "autoencoder", device, dtype)


def open_clip(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> Part[ClipTextSpec, ClipText]:
    """Open a CLIP text encoder file; see ``open_transformer``."""
    return _open(path, "clip", device, dtype)


def open_t5(
    path: Path, device: torch.device, dtype: torch.dtype | None = None, *, keep: str = "auto"
) -> Part[T5Spec, T5Encoder]:
    """Open a T5 encoder file; see ``open_transformer``."""
    return _open(path, "t5", device, dtype, keep=keep)


def open_vision(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> Part[SiglipSpec, SiglipVision]:
    """Open the file of a vision tower, or a model that has one in it; see ``open_transformer``."""
    return _open(path, "vision", device, dtype)


def open_redux(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> Part[ReduxSpec, Redux]:
    """Open a Redux adapter file; see ``open_transformer``."""
    return _open(path, "redux", device, dtype)


@dataclass(frozen=True)
class BoundPart:
    """One part of a file, every parameter of its module bound to what it is made of.

    Attributes:
        recognised: What it is.
        checkpoint: The file.
        module: On the meta device.
        bindings: By the parameters' names.
    """

    recognised: Recognised
    checkpoint: Checkpoint
    module: Any
    bindings: dict[str, Binding]

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return sum(binding.parameters for binding in self.bindings.values())


def bind_part(
    path: Path,
    kind: str,
    variant: str | None = None,
    candidates: Callable[[], Sequence[Given]] | None = None,
) -> BoundPart:
    """Open a file by its header, and bind one of its parts to a module's parameters.

    Args:
        path: See ``open_transformer``.
        kind: "transformer", "autoencoder", "clip", "t5", "vision" or "redux".
        variant: See ``open_transformer``.
        candidates: Asked, where the file is something else, for the user's files, of which those that fit are named;
            those beside it when None.

    Raises:
        UserError: The file is missing, damaged, or something else; or a tensor is missing, unknown, or misshapen.
    """
    checkpoint, part = find_part(path, kind, variant, candidates)
    build = build_of(part.recognised.spec)
    assert build is not None, "a part that runs has a module"
    with on_meta():
        module = build(part.recognised.spec)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    bindings = bind(part.whole_plan(), checkpoint, shapes, checkpoint.path.name)
    return BoundPart(part.recognised, checkpoint, module.eval(), bindings)


def find_part(
    path: Path,
    kind: str,
    variant: str | None = None,
    candidates: Callable[[], Sequence[Given]] | None = None,
) -> tuple[Checkpoint, FilePart]:
    """Open a file by its header, and find one of its parts; see ``bind_part``."""
    checkpoint = open_checkpoint(path)
    parts = read_parts(checkpoint, variant)
    found = next((part for part in parts if part.kind == kind), None)
    if found is not None and found.recognised.runs:
        return checkpoint, found
    own = candidates or (lambda: given_files(model_files_in(checkpoint.path.parent)))
    what = [part.recognised for part in parts] if found is None else [found.recognised]
    check_kind(Given(checkpoint.path, joined(what)), kind, own())
    raise AssertionError("a part that is not run was taken for one that is")


def check_beside(transformer: Given, others: Sequence[Given]) -> None:
    """``check_fit``, with what lies in the folders of these files as candidates.

    Raises:
        MismatchError: One of ``others`` does not fit.
    """
    if faults_between(transformer, others):
        check_fit(transformer, others, _beside(transformer, *others))


def check_redux_beside(redux: Given, tower: Given | None, transformer: Given | None = None) -> None:
    """``check_redux``, with what lies in the folders of these files as candidates.

    Raises:
        MismatchError: One does not fit the other, or the tower is missing.
    """
    if redux_faults(redux, tower, transformer):
        given = [own for own in (redux, tower, transformer) if own is not None]
        check_redux(redux, tower, transformer, _beside(*given))


def _beside(*given: Given) -> list[Given]:
    """What lies in the folders of files."""
    folders = dict.fromkeys(own.path.parent for own in given)
    return given_files(path for folder in folders for path in model_files_in(folder))


def joined(found: Sequence[Recognised]) -> Recognised:
    """What a file is as a whole, for messages."""
    if len(found) == 1:
        return found[0]
    return Recognised("foreign", titles_of(found), runs=False)


def _open(
    path: Path,
    kind: str,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    variant: str | None = None,
    keep: str = "auto",
) -> Part[Any, Any]:
    assert keep in KEEPS
    bound = bind_part(path, kind, variant)
    chosen = dtype or compute_dtype(device, bound.parameters)
    packs = keep == "packed" or (keep == "auto" and packs_on(bound, device, chosen, available_bytes(device)))
    blocks = block_names(bound.module)
    residency = Residency(bound.module, bound.bindings, device=device, dtype=chosen, keeps_packed=packs, blocks=blocks)
    given = Given(bound.checkpoint.path, bound.recognised)
    return Part(bound.recognised.spec, bound.module, residency, given, bound.checkpoint)


def packs_on(bound: BoundPart, device: torch.device, dtype: torch.dtype, available: int) -> bool:
    """Whether weights stay packed: their numbers take too much, the device multiplies them so, or it costs little.

    Args:
        bound: What they are in.
        device: Where they go.
        dtype: Of their numbers there.
        available: Bytes free there.
    """
    if bound.parameters * dtype.itemsize > SHARE_FOR_NUMBERS * available:
        return True
    sources = [source for binding in bound.bindings.values() for source in binding.sources.values()]
    if widens_at_use(bound.parameters, {source.format.name for source in sources}, device, dtype):
        return True
    return any(source.multiplies_on(device) for source in sources)


def widens_at_use(parameters: int, formats: Set[str], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of 16 bits stay so though products are made in fp32, as on CPUs without units for 16 bits.

    To widen all matrices took 3 % of a step with 1280 tokens, on an Intel Xeon, and memory is half.

    Args:
        parameters: Of the model; a small one's memory is worth no time.
        formats: That its tensors are stored in.
        device: Where it runs.
        dtype: Of its numbers there.
    """
    if device.type != "cpu" or dtype != torch.float32 or parameters <= SMALL_MODEL:
        return False
    return not formats.isdisjoint(SIXTEEN_BITS) and formats <= SIXTEEN_BITS | {F32.name}
