"""Blocks that run compiled: one compilation serves all double blocks of a model, another one all single blocks.

What is compiled is a block of each kind that has no weights. Its matrix products and its attention are operators that
the compiler cannot look into: they run those of the block that is called, with all that is on them. So compiled code
does not know how a weight is stored, whether it stays or is streamed, which LoRAs there are and how strong, and which
kernel attention has; and hooks of a block run outside of it. Joined are the many small steps between the products:
norms, modulation, rotation, activation, gates.

The numbers of tokens are left open, or else each is compiled by itself.

Shapes: B batch, I image, T text and L joint tokens, h hidden width, H heads, D head dimension.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..memory.exhaustion import is_exhausted
from ..models.flux1 import DoubleBlock, Flux1, HeadNorm, RotaryAttention, SingleBlock
from ..models.positions import apply_rope
from ..ops.layers import Layers, on_meta
from ..specs.flux1 import Flux1Spec
from .forwards import run_by

__all__ = ["INDUCTOR", "Backend", "compiled_blocks"]

Backend = str | Callable[..., Any]  # as ``torch.compile`` takes it
Tell = Callable[[str], None]

INDUCTOR = "inductor"
# For each kind of block which dimension of its inputs counts tokens: image, text and rotation; tokens and rotation.
TOKENS: dict[type[nn.Module], tuple[int | None, ...]] = {
    DoubleBlock: (1, 1, 0, None, None),
    SingleBlock: (1, 0, None),
}
ROTATION: dict[type[nn.Module], int] = {DoubleBlock: 2, SingleBlock: 1}


@contextmanager
def compiled_blocks(
    model: Flux1, *, dynamic: bool = True, backend: Backend | None = None, tell: Tell | None = None
) -> Iterator[None]:
    """Have a model's blocks run compiled inside the block, where no gradients are asked for.

    What was compiled is kept for the process, and serves every model of the same sizes. Where nothing can be compiled,
    blocks run as they are.

    Args:
        model: Its layers may be any, and change.
        dynamic: Whether one compilation serves all sizes of pictures, or each gets its own, which may be faster.
        backend: What compiles; torch's own compiler when None.
        tell: Told in a sentence when blocks could not be compiled.
    """
    runner = _Runner(model.spec, dynamic=dynamic, backend=backend or INDUCTOR, tell=tell)
    blocks = [*model.double_blocks, *model.single_blocks]
    with run_by(blocks, lambda block, _: partial(runner, block)):
        yield


class _Runner:
    """Runs blocks of one model."""

    def __init__(self, spec: Flux1Spec, *, dynamic: bool, backend: Backend, tell: Tell | None) -> None:
        self._spec, self._dynamic, self._backend = spec, dynamic, backend
        self._tell = tell or (lambda _: None)
        self._gave_up = False

    def __call__(self, block: nn.Module, *given: Any) -> Any:
        """What a block's ``forward`` gives."""
        *tensors, attend = given
        if self._gave_up or torch.is_grad_enabled() or type(attend) is not RotaryAttention:
            return type(block).forward(block, *given)  # an attention of somebody else's may do anything
        if self._backend not in _faults:
            _running.begin(block, attend)
            try:
                return self._compiled(block, tensors)(block, tensors)
            except Exception as error:
                # The compiler's own errors are many, and differ by release: what it raises comes before any operator.
                if _running.began or is_exhausted(error) or is_exhausted(_wrapped(error)):
                    raise
                _faults[self._backend] = _told_of(error)
            finally:
                _running.end()
        self._gave_up = True
        self._tell(
            f"the blocks could not be compiled ({_faults[self._backend]}), so they run uncompiled: the same picture, "
            "more slowly. torch.compile needs a C++ compiler, and Triton on a GPU"
        )
        return type(block).forward(block, *given)

    def _compiled(self, block: nn.Module, tensors: list[Tensor]) -> _Compiled:
        """What is compiled for this kind of block and these kinds of inputs: made once."""
        kind = type(block)
        shapes = tuple(
            (tensor.dtype, tensor.device, *self._lengths(tensor, tokens))
            for tensor, tokens in zip(tensors, TOKENS[kind], strict=True)
        )
        spec = self._spec
        key = kind, spec.hidden, spec.heads, spec.mlp_width, self._backend, shapes
        if key not in _compilations:
            _compilations[key] = _Compiled(kind, spec, self._backend, dynamic=self._dynamic)
        return _compilations[key]

    def _lengths(self, tensor: Tensor, tokens: int | None) -> tuple[int | None, ...]:
        """A tensor's sides, without the one that is left open."""
        return tuple(None if self._dynamic and place == tokens else side for place, side in enumerate(tensor.shape))


def _wrapped(error: Exception) -> BaseException:
    """What the compiler's error is about; the error itself where that is all."""
    return getattr(error, "inner_exception", None) or error.__cause__ or error


def _told_of(error: Exception) -> str:
    """An error of the compiler, or what it wraps, in a line."""
    cause = _wrapped(error)
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__


class _Compiled:
    """A block of one kind without weights, compiled for inputs of one kind."""

    def __init__(self, kind: Any, spec: Flux1Spec, backend: Backend, *, dynamic: bool) -> None:
        with on_meta():
            skeleton = kind(spec, cast(Layers, SimpleNamespace(Linear=_Elsewhere)))
        for path, module in skeleton.named_modules():
            if isinstance(module, _Elsewhere):
                module.path = path
        self._kind, self._dynamic = kind, dynamic
        self._norms = [path for path, module in skeleton.named_modules() if isinstance(module, HeadNorm)]

        def run(scales: Mapping[str, Tensor], tensors: list[Tensor]) -> Any:
            return functional_call(skeleton, dict(scales), (*tensors, _attend_elsewhere))

        self._run = torch.compile(
            _with_own_code(run), backend=backend, fullgraph=True, dynamic=None if dynamic else False
        )

    def __call__(self, block: nn.Module, tensors: list[Tensor]) -> Any:
        rotation = ROTATION[self._kind]
        tensors = [*tensors]
        tensors[rotation] = torch.view_as_real(tensors[rotation])
        if self._dynamic:
            for tensor, tokens in zip(tensors, TOKENS[self._kind], strict=True):
                if tokens is not None:
                    torch._dynamo.maybe_mark_dynamic(tensor, tokens)
        # Copies, for what is compiled also depends on whether a tensor is a parameter, and was made for inference.
        scales = {
            f"{path}.scale": cast(HeadNorm, block.get_submodule(path)).scale_for(tensors[0]).clone()
            for path in self._norms
        }
        return self._run(scales, tensors)


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function. Torch counts compilations by code, and after a few of one compiles it no more."""
    assert isinstance(function, FunctionType)
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


_compilations: dict[Hashable, _Compiled] = {}
_faults: dict[Backend, str] = {}  # of what could not compile: it is not tried again


class _Running(threading.local):
    """The block that is being run by a thread, with its attention, and whether it came to an operator."""

    block: nn.Module | None = None
    attend: RotaryAttention | None = None
    began = False

    def begin(self, block: nn.Module, attend: RotaryAttention) -> None:
        self.block, self.attend, self.began = block, attend, False

    def end(self) -> None:
        self.block = self.attend = None


_running = _Running()


# The operators. Their namespace has this module's name, for the pack may be imported under several.

_NAMESPACE = re.sub(r"\W", "_", __name__)
_library: Any = torch.library.Library(_NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
_library.define("layer(Tensor x, str path, int outputs) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("attend(Tensor q, Tensor k, Tensor v) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _layer(x: Tensor, path: str, outputs: int) -> Tensor:
    """Outputs (..., N) of a layer of the block that is running, for inputs (..., K)."""
    del outputs
    assert _running.block is not None
    _running.began = True
    out: Tensor = _running.block.get_submodule(path)(x)
    return out.contiguous()


def _like_layer(x: Tensor, path: str, outputs: int) -> Tensor:
    del path
    return x.new_empty((*x.shape[:-1], outputs))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The running block's attention (B, H, L, D) of rotated queries and keys; in memory as (B, L, H, D)."""
    assert _running.attend is not None
    out = _running.attend.kernel(q, k, v, _running.attend.bias)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _like_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    del k, v
    batch, heads, length, width = q.shape
    return q.new_empty((batch, length, heads, width)).transpose(1, 2)


for _name, _function, _like in (("layer", _layer, _like_layer), ("attend", _attend, _like_attend)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{_name}", _like, lib=_library)
_operators = getattr(torch.ops, _NAMESPACE)


def _attend_elsewhere(q: Tensor, k: Tensor, v: Tensor, rotation: Tensor) -> Tensor:
    out: Tensor = _operators.attend(apply_rope(q, rotation), apply_rope(k, rotation), v)
    return out


class _Elsewhere(nn.Module):
    """In the place of a layer: that of the running block is called.

    Attributes:
        path: The layer's, in its block.
    """

    path = ""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        del inputs
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _operators.layer(x, self.path, self.outputs)
        return out
