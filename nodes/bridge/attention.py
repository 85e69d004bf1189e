"""What computes attention inside the host: the engine's own choice, or what the user started the host with."""

from __future__ import annotations

import functools
import logging

import comfy.cli_args
import comfy.ldm.modules.attention
import torch
from torch import Tensor

from ...flux.ops.attention_backends import AUTO, Attention, Backend, Case, choose_attention
from ...flux.specs.flux1 import Flux1Spec
from .progress import say

__all__ = ["attention_for"]

logger = logging.getLogger(__name__)

FLAG_BEGINS, FLAG_ENDS = "use_", "_attention"  # of the host's options for attention


def attention_for(spec: Flux1Spec, like: Tensor) -> Attention:
    """What computes a transformer's attention, chosen once for each kind of device and numbers.

    Args:
        spec: Of the transformer.
        like: On its device, in its dtype.
    """
    return _chosen(str(like.device), like.dtype, spec.hidden // spec.heads)


@functools.cache
def _chosen(device: str, dtype: torch.dtype, width: int) -> Attention:
    """Kept, so that what had to be given up is not tried again in the next run."""
    flag = _flag()
    if flag is None:
        attention = choose_attention(AUTO, Case(torch.device(device), dtype, width), say)
    else:
        attention = Attention(_host_backend(flag), "the host was started so", _by_host, say)
    logger.info("FLUX Foundry: attention on %s by %s", device, attention.report)
    return attention


def _flag() -> str | None:
    """The option for attention that the user started the host with, as it was typed."""
    for name, value in vars(comfy.cli_args.args).items():
        if value is True and name.startswith(FLAG_BEGINS) and name.endswith(FLAG_ENDS):
            return f"--{name.replace('_', '-')}"
    return None


def _host_backend(flag: str) -> Backend:
    return Backend(name="comfyui", what=f"the host's, by {flag}", load=lambda: _by_host, takes_bias=True)


def _by_host(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, /, *, scale: float | None = None) -> Tensor:
    """The host's attention, read at each call, for nodes exchange it."""
    given = {} if scale is None else {"scale": scale}
    out: Tensor = comfy.ldm.modules.attention.optimized_attention(
        q, k, v, q.shape[1], mask=bias, skip_reshape=True, skip_output_reshape=True, **given
    )
    return out
