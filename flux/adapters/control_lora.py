"""Control LoRAs: what makes a text-to-image FLUX.1 follow a picture whose channels stand behind the noisy latent's.

Black Forest Labs' (``modules/lora.py`` of their repository): every linear layer gets a side branch of low rank with a
bias, of which ``img_in``'s takes the picture's channels besides, and the norms of queries and keys get other scales.
Here they are put beside the model's own weights, and taken out without a trace; several may be there at once.

Shapes: r rank, N and K a layer's outputs and inputs, D head dimension.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import FileError, MismatchError
from ..models.flux1 import Flux1, HeadNorm
from ..ops.layers import on_meta
from ..ops.packed import Linear, SideBranch
from ..specs.flux1 import FLUX1, Flux1Spec
from ..specs.recognition import titles_of
from ..weights.binding import listed
from ..weights.checkpoints import read_parts
from ..weights.json_text import load_json
from ..weights.renames.flux1 import BFL, DIFFUSERS
from ..weights.renames.tables import Change, Row
from ..weights.sources import Checkpoint, Source, open_checkpoint

__all__ = [
    "Attachment", "ControlLora", "LowRank", "attached", "check_control_lora", "control_lora_of", "control_lora_tensors",
    "random_control_lora", "read_control_lora",
]  # fmt: skip

ENTRY = "img_in"
GUIDANCE = "guidance_in."
NOISY_CHANNELS = FLUX1["flux1-dev"].out_channels
FILL_CHANNELS = FLUX1["flux1-fill-dev"].in_channels


class LowRank(NamedTuple):
    """One layer's branch: ``up @ (down @ x) + bias``.

    Attributes:
        down: (r, K).
        up: (N, r).
        bias: (N,) or None.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ControlLora:
    """A control LoRA. Tensors that come of a file may be views of it, not to be written to.

    Attributes:
        name: Its file's, or what else to call it.
        layers: Branches by the names of ``Flux1``'s layers; ``img_in`` is always among them.
        norms: Scales (D,) of norms, by the parameters' names.
        channels: Of the control picture in a token, which ``img_in``'s branch takes behind the noisy latent's.
    """

    name: str
    layers: Mapping[str, LowRank]
    norms: Mapping[str, Tensor]
    channels: int

    @property
    def parameters(self) -> int:
        """How many numbers."""
        tensors = [tensor for layer in self.layers.values() for tensor in layer if tensor is not None]
        return sum(tensor.numel() for tensor in (*tensors, *self.norms.values()))


def check_control_lora(lora: ControlLora, spec: Flux1Spec) -> None:
    """Refuse a LoRA that was made for a model of another size; of its task nothing tells.

    Raises:
        MismatchError: A layer is not the model's, or has another width there.
    """
    with on_meta():
        model = Flux1(spec)
    _check_fits(lora, model)


@contextmanager
def attached(
    model: Flux1,
    loras: Sequence[ControlLora],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    norms_by_strength: bool = False,
) -> Iterator[Attachment]:
    """Have control LoRAs on a model inside the block, each of strength 1 at first.

    The image tokens' channels are then those of the model, followed by those of each LoRA's control picture in turn.

    Args:
        model: Its weights may be packed or absent; it must be of the engine's own layers, without control LoRAs on it.
        loras: Any number.
        device: That the model runs on; None leaves tensors where they are.
        dtype: That the model runs in; None leaves tensors what they are. Both None is also for training, where the
            optimiser's own tensors are to be used.
        norms_by_strength: Whether scales of norms come in as far as the strength goes. In Black Forest Labs' code they
            take the model's place altogether, whatever the strength of the branches, which is the default.

    Yields:
        What the strengths are set by.

    Raises:
        MismatchError: A LoRA is for a model of another size.
    """
    for lora in loras:
        _check_fits(lora, model)
    attachment = Attachment(model, [_moved(lora, model, device, dtype) for lora in loras], norms_by_strength)
    try:
        yield attachment
    finally:
        attachment._take_out()


class Attachment:
    """Control LoRAs on a model; see ``attached``."""

    def __init__(self, model: Flux1, loras: Sequence[ControlLora], norms_by_strength: bool) -> None:
        self._loras, self._norms_by_strength = loras, norms_by_strength
        self._branches = [_branches(lora, columns) for lora, columns in zip(loras, _columns(model, loras), strict=True)]
        layers = {path: _linear(model, path) for branches in self._branches for path in branches}
        norms = {name: _norm(model, name) for lora in loras for name in lora.norms}
        self._layers = [(layer, layer.branches) for layer in layers.values()]  # with what was there before
        self._norms = [(name, norm, norm.replacements) for name, norm in norms.items()]
        self._strengths: tuple[float, ...] | None = None
        for path, layer in layers.items():
            own = (branches[path] for branches in self._branches if path in branches)
            layer.branches = (*layer.branches, *own)
        self.weigh([1.0] * len(loras))

    def weigh(self, strengths: Sequence[float]) -> None:
        """Set how much each LoRA does, in their order; all 0 leaves nothing but the model.

        A branch and its bias are multiplied by the strength. Norms' scales become ``own + sum of s * (LoRA's - own)``.
        """
        if len(strengths) != len(self._loras):
            raise ValueError(f"{len(strengths)} strengths were given for {len(self._loras)} control LoRAs")
        if self._strengths == tuple(strengths):
            return
        self._strengths = tuple(strengths)
        for branches, strength in zip(self._branches, strengths, strict=True):
            for branch in branches.values():
                branch.strength = strength
        shares = strengths if self._norms_by_strength else [float(strength > 0) for strength in strengths]
        active = [(share, lora.norms) for share, lora in zip(shares, self._loras, strict=True) if share]
        for name, norm, before in self._norms:
            norm.replacements = (*before, *((share, norms[name]) for share, norms in active if name in norms))

    def _take_out(self) -> None:
        for layer, branches in self._layers:
            _restore(layer, "branches", branches)
        for _, norm, replacements in self._norms:
            _restore(norm, "replacements", replacements)


def control_lora_tensors(lora: ControlLora) -> dict[str, Tensor]:
    """The LoRA's own tensors by Black Forest Labs' names: to be trained, or saved as safetensors."""
    tensors: dict[str, Tensor] = {}
    for path, branch in lora.layers.items():
        tensors |= {f"{path}.lora_A.weight": branch.down, f"{path}.lora_B.weight": branch.up}
        if branch.bias is not None:
            tensors[f"{path}.lora_B.bias"] = branch.bias
    return tensors | dict(lora.norms)


def control_lora_of(tensors: Mapping[str, Tensor], name: str) -> ControlLora:
    """A control LoRA over tensors by Black Forest Labs' names, as ``control_lora_tensors`` gives them, of FLUX.1."""
    layers = {
        path: LowRank(down, tensors[f"{path}.lora_B.weight"], tensors.get(f"{path}.lora_B.bias"))
        for key, down in tensors.items()
        if (path := key.removesuffix(".lora_A.weight")) != key
    }
    norms = {key: tensor for key, tensor in tensors.items() if key.endswith(".scale")}
    return ControlLora(name, layers, norms, layers[ENTRY].down.shape[1] - NOISY_CHANNELS)


def random_control_lora(
    model: Flux1, rank: int, channels: int = NOISY_CHANNELS, generator: torch.Generator | None = None
) -> ControlLora:
    """A LoRA to be trained, which does nothing yet: on every linear layer, and with all scales of norms.

    Args:
        model: With its numbers, for norms begin with its own scales.
        rank: Of every branch, less where a layer has fewer inputs or outputs.
        channels: Of the control picture in a token.
        generator: Of the first numbers of ``down``, on the device where all tensors will be; the CPU without one.

    Returns:
        Its tensors are fp32 parameters with gradients.
    """
    device = torch.device("cpu") if generator is None else generator.device
    layers = {}
    for path, layer in _linears(model).items():
        inputs = model.spec.out_channels + channels if path == ENTRY else layer.in_features
        r = min(rank, inputs, layer.out_features)
        bound = inputs**-0.5  # that of torch's layers, as in Black Forest Labs' and PEFT's first numbers
        down = torch.empty(r, inputs, device=device).uniform_(-bound, bound, generator=generator)
        up, bias = torch.zeros(layer.out_features, r, device=device), torch.zeros(layer.out_features, device=device)
        layers[path] = LowRank(nn.Parameter(down), nn.Parameter(up), nn.Parameter(bias))
    norms = {
        name: nn.Parameter(norm.scale.detach().clone().to(device, torch.float32))
        for name, norm in _head_norms(model).items()
    }
    return ControlLora("a new control LoRA", layers, norms, channels)


# On a model.


def _linears(model: Flux1) -> dict[str, nn.Linear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def _head_norms(model: Flux1) -> dict[str, HeadNorm]:
    """By their scales' names."""
    return {f"{path}.scale": norm for path, norm in model.named_modules() if isinstance(norm, HeadNorm)}


def _check_fits(lora: ControlLora, model: Flux1) -> None:
    spec, entry = model.spec, lora.layers[ENTRY]
    hidden, noisy = entry.up.shape[0], entry.down.shape[1] - lora.channels
    if (hidden, noisy) != (spec.hidden, spec.out_channels):
        raise MismatchError(
            f"{lora.name} is for a FLUX.1 model of width {hidden} with {noisy} latent channels, but {spec.title} has "
            f"{spec.hidden} and {spec.out_channels}; choose the model that it was made for, or another control LoRA"
        )
    known = {path: (layer.out_features, layer.in_features) for path, layer in _linears(model).items()}
    known[ENTRY] = (hidden, noisy + lora.channels)
    found = {path: (branch.up.shape[0], branch.down.shape[1]) for path, branch in lora.layers.items()}
    faults = [path for path, sides in found.items() if known.get(path) != sides and not _is_spare(path, model)]
    sizes = {name: norm.scale.shape for name, norm in _head_norms(model).items()}
    faults += [name for name, scale in lora.norms.items() if sizes.get(name) != scale.shape]
    if faults:
        raise MismatchError(
            f"{lora.name} does not fit {spec.title}, which lacks these layers or has them in another size: "
            f"{listed(faults)}; choose the model that it was made for, or another control LoRA"
        )


def _is_spare(path: str, model: Flux1) -> bool:
    """Whether a branch is of the guidance embedder, which a schnell goes without."""
    return path.startswith(GUIDANCE) and model.guidance_in is None


def _moved(lora: ControlLora, model: Flux1, device: torch.device | None, dtype: torch.dtype | None) -> ControlLora:
    """What the model has a place for, on a device and in a dtype: the same tensors where they are so already."""

    def to(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype)

    layers = {
        path: LowRank(to(branch.down), to(branch.up), None if branch.bias is None else to(branch.bias))
        for path, branch in lora.layers.items()
        if not _is_spare(path, model)
    }
    return ControlLora(lora.name, layers, {name: to(scale) for name, scale in lora.norms.items()}, lora.channels)


def _columns(model: Flux1, loras: Sequence[ControlLora]) -> list[tuple[slice, ...]]:
    """Of the image tokens' channels those that each LoRA sees: the noisy latent's, and its own picture's."""
    entry = _linear(model, ENTRY)
    assert all(branch.columns is None for branch in entry.branches), "control LoRAs are attached all at once"
    ends = list(accumulate((lora.channels for lora in loras), initial=entry.in_features))
    noisy = slice(0, model.spec.out_channels)
    return [(noisy, slice(start, end)) for start, end in zip(ends, ends[1:], strict=False)]


def _branches(lora: ControlLora, columns: tuple[slice, ...]) -> dict[str, SideBranch]:
    return {path: SideBranch(*branch, columns if path == ENTRY else None) for path, branch in lora.layers.items()}


def _linear(model: Flux1, path: str) -> Linear:
    layer = model.get_submodule(path)
    assert isinstance(layer, Linear), "side branches are for the engine's own layers"
    return layer


def _norm(model: Flux1, name: str) -> HeadNorm:
    norm = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(norm, HeadNorm)
    return norm


def _restore(module: nn.Module, name: str, before: tuple[Any, ...]) -> None:
    """Give an attribute back what it was: the class's own where that was empty."""
    if before:
        setattr(module, name, before)
    else:
        delattr(module, name)


# From a file.

DOWN, UP, BIAS, ALPHA = "down", "up", "bias", "alpha"
ENDINGS = {  # behind a layer's name, in the files of various programs
    ".lora_A.weight": DOWN, ".lora_A.default.weight": DOWN, ".lora_down.weight": DOWN,
    ".lora_B.weight": UP, ".lora_B.default.weight": UP, ".lora_up.weight": UP,
    ".lora_B.bias": BIAS, ".lora_B.default.bias": BIAS, ".lora_up.bias": BIAS,
    ".alpha": ALPHA,
}  # fmt: skip
PREFIXES = ("model.diffusion_model.", "base_model.model.", "diffusion_model.", "transformer.")
BLOCK = re.compile(r"^((?:double|single|transformer|single_transformer)_blocks)\.(0|[1-9][0-9]{0,3})\.")
PLACES: dict[str, tuple[Row, int]] = {  # Black Forest Labs' names, and diffusers'
    name: (row, index)
    for layout in (BFL, DIFFUSERS)
    for row in layout.table.rows
    for index, name in enumerate(row.foreign)
}
WEIGHT = ".weight"
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PEFT_CONFIG = "lora_adapter_metadata"  # diffusers' name for it in the header


class Place(NamedTuple):
    """Where something of a file goes: the whole of one of our tensors, or one of several parts that it is cut into."""

    name: str
    row: Row
    part: int


Group = dict[str, Source]  # what a branch is made of, by role


def read_control_lora(path: Path) -> ControlLora:
    """A control LoRA's file, with Black Forest Labs' names or diffusers'.

    Branches of layers that are cut apart in a file, as diffusers cuts queries, keys and values, are joined: of rank r
    where they share ``down``, else the sum of their ranks.

    Args:
        path: A safetensors file. Numbers stay in the mapped file until they are used, where they need not be joined.

    Raises:
        MissingFileError: There is no such file.
        FileError: It is damaged, or a branch is not whole.
        MismatchError: It is something else.
    """
    checkpoint = open_checkpoint(path)
    file = checkpoint.path.name
    groups, norms, unknown = _sorted(checkpoint)
    channels = _control_channels(checkpoint, groups)
    if unknown:
        raise FileError(
            f"{file} has tensors that a control LoRA for FLUX.1 does not have: {listed(unknown)}; use another file"
        )
    config = _peft_config(checkpoint)
    parts: dict[str, list[tuple[Place, LowRank]]] = {}
    for bare, group in groups.items():
        place = _place(bare + WEIGHT)
        assert place is not None
        _check_group(file, bare, group)
        branch = _scaled(group, _factor(file, config, bare, group))
        parts.setdefault(place.name.removesuffix(WEIGHT), []).append((place, branch))
    layers = {name: _joined(file, name, own) for name, own in parts.items()}
    return ControlLora(file, layers, {name: _numbers(source) for name, source in norms.items()}, channels)


def _sorted(checkpoint: Checkpoint) -> tuple[dict[str, Group], dict[str, Source], list[str]]:
    """Branches by the layers' names in the file without prefix, norms' scales by ours, and names that are not known.

    Raises:
        FileError: Two tensors stand for the same.
    """
    groups: dict[str, Group] = {}
    norms: dict[str, Source] = {}
    unknown = []
    for name, source in checkpoint.items():
        bare = _without_prefix(name)
        ending = next((end for end in ENDINGS if bare.endswith(end)), "")
        layer = bare.removesuffix(ending)
        place = _place(layer + WEIGHT if ending else bare)
        if place is None or place.name.endswith(WEIGHT) != bool(ending) or place.name.endswith(".bias"):
            unknown.append(name)
            continue
        taken, key = (groups.setdefault(layer, {}), ENDINGS[ending]) if ending else (norms, place.name)
        if key in taken:
            raise FileError(
                f"{checkpoint.path.name} has both {taken[key].name} and {name}, which stand for the same tensor; use "
                "another file"
            )
        taken[key] = source
    return groups, norms, unknown


def _without_prefix(name: str) -> str:
    """The name without prefixes, of which diffusers' training script writes two before norms."""
    while True:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        if not prefix:
            return name
        name = name.removeprefix(prefix)


def _place(name: str) -> Place | None:
    """What a tensor of a model is in ours, by its name in either layout; None for one that FLUX.1 does not have."""
    block = BLOCK.match(name)
    pattern = name if block is None else f"{block[1]}.{{}}.{name[block.end() :]}"
    found = PLACES.get(pattern)
    if found is None or found[0].ours is None:
        return None
    row, index = found
    return Place(found[0].ours if block is None else found[0].ours.replace("{}", block[2]), row, index)


def _control_channels(checkpoint: Checkpoint, groups: Mapping[str, Group]) -> int:
    """Channels of the control picture in a token.

    Raises:
        MismatchError: It is something else: its first layer takes no control picture, or it is for another family.
    """
    first = next((group for bare, group in groups.items() if _is_entry(bare)), {})
    shape = first[DOWN].shape if DOWN in first else ()
    width = shape[1] if len(shape) == 2 else 0
    what = [part.recognised for part in read_parts(checkpoint)]
    is_other = any(own.foreign is not None and own.foreign.family not in ("", "flux1") for own in what)
    if width <= NOISY_CHANNELS or width == FILL_CHANNELS or is_other:
        inputs = f" whose first layer takes {width} channels" if width and not is_other else ""
        raise MismatchError(
            f"{checkpoint.path.name} is {titles_of(what)}{inputs}, but a control LoRA for FLUX.1 is needed, which "
            "takes a control picture besides; choose a file as flux1-canny-dev-lora.safetensors"
        )
    return width - NOISY_CHANNELS


def _is_entry(bare: str) -> bool:
    place = _place(bare + WEIGHT)
    return place is not None and place.name == ENTRY + WEIGHT


def _check_group(file: str, layer: str, group: Group) -> None:
    """Refuse a branch that is not whole, or whose tensors do not fit each other.

    Raises:
        FileError: It is so.
    """
    missing = next((role for role in (DOWN, UP) if role not in group), None)
    if missing is not None:
        there = next(iter(group.values())).name
        raise FileError(f"{file} is not whole: it has {there} without what goes {missing} again; download it again")
    shapes = {role: source.shape for role, source in group.items()}
    down, up = shapes[DOWN], shapes[UP]
    fits = len(down) == len(up) == 2 and down[0] == up[1] and min(*down, *up) > 0
    if not fits or shapes.get(BIAS, up[:1]) != up[:1] or math.prod(shapes.get(ALPHA, ())) != 1:
        found = ", ".join(f"{source.name} {list(source.shape)}" for source in group.values())
        raise FileError(f"{file}: tensors of {layer} do not fit each other: {found}; download the file again")


def _peft_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What PEFT was told, as diffusers writes it into the header; empty where there is nothing.

    Raises:
        FileError: It cannot be read.
    """
    text = checkpoint.metadata.get(PEFT_CONFIG)
    if text is None:
        return {}
    try:
        config = load_json(text)
    except ValueError as error:
        raise FileError(
            f"{checkpoint.path.name} is damaged: its header's {PEFT_CONFIG} is not JSON ({error}); download it again"
        ) from error
    return {_without_prefix(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def _factor(file: str, config: Mapping[str, Any], layer: str, group: Group) -> float:
    """What a branch is multiplied by: alpha / rank, or 1 where no alpha is known.

    Raises:
        FileError: An alpha is not a number.
    """
    rank = group[DOWN].shape[0]
    alpha: Any = config.get("lora_alpha", rank)
    pattern = config.get("alpha_pattern") or {}
    if isinstance(pattern, dict):
        alpha = next((value for end, value in pattern.items() if f".{layer}".endswith(f".{end}")), alpha)
    if ALPHA in group:
        alpha = float(group[ALPHA].numbers(torch.float32))
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise FileError(f"{file} says that alpha is {alpha!r} for {layer}, which is not a number; download it again")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _scaled(group: Group, factor: float) -> LowRank:
    down, up = _numbers(group[DOWN]), _numbers(group[UP])
    bias = _numbers(group[BIAS]) if BIAS in group else None
    if factor == 1:
        return LowRank(down, up, bias)
    return LowRank(down, up * factor, None if bias is None else bias * factor)


def _numbers(source: Source) -> Tensor:
    """In their own type where that is plain, so that the file itself serves, and is not read before they are used."""
    dtype = PLAIN_DTYPES.get(source.format.name, torch.float32)
    return source.format.decode(source.stored(), source.shape, dtype)


def _joined(file: str, name: str, parts: Sequence[tuple[Place, LowRank]]) -> LowRank:
    """The branch of one of our layers, of those of the parts that the file cuts it into; some may have none.

    Raises:
        FileError: There is one under another name, or the parts' sizes do not fit each other.
    """
    row = parts[0][0].row
    if any(place.row is not row for place, _ in parts):
        raise FileError(
            f"{file} has a branch of {name} twice, by Black Forest Labs' name and by diffusers'; use another file"
        )
    branches = {place.part: branch for place, branch in sorted(parts, key=lambda part: part[0].part)}
    if len(row.foreign) == 1:
        branch = branches[0]
        return _swapped(branch) if row.change is Change.SWAPPED else branch
    shares = row.shares or (1,) * len(row.foreign)
    units = {branch.up.shape[0] / shares[part] for part, branch in branches.items()}
    unit = units.pop()
    if units or not unit.is_integer() or len({branch.down.shape[1] for branch in branches.values()}) > 1:
        raise FileError(f"{file}: branches that belong together in {name} do not fit each other; use another file")
    return _stacked(branches, shares, int(unit))


def _swapped(branch: LowRank) -> LowRank:
    """The lower half of the outputs first: diffusers has scale, then shift."""
    up, bias = (None if t is None else torch.cat(t.chunk(2)[::-1]) for t in branch[1:])
    assert up is not None
    return LowRank(branch.down, up, bias)


def _stacked(branches: Mapping[int, LowRank], shares: Sequence[int], unit: int) -> LowRank:
    """One branch of those of some of a layer's parts, each ``shares[part] * unit`` outputs; zeros for the others."""
    first = next(iter(branches.values()))
    is_shared = all(torch.equal(branch.down, first.down) for branch in branches.values())
    down = first.down if is_shared else torch.cat([branch.down for branch in branches.values()])
    outputs = sum(shares) * unit
    up = first.up.new_zeros(outputs, len(down))
    bias = None if all(branch.bias is None for branch in branches.values()) else first.up.new_zeros(outputs)
    column = 0
    for part, branch in branches.items():
        start = sum(shares[:part]) * unit
        rows, rank = slice(start, start + len(branch.up)), branch.up.shape[1]
        up[rows, column : column + rank] = branch.up
        if bias is not None and branch.bias is not None:
            bias[rows] = branch.bias
        column += 0 if is_shared else rank
    return LowRank(down, up, bias)
