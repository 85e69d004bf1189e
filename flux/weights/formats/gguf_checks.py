"""Whether the scales of GGUF blocks are numbers, before they are multiplied with.

A block's scales are fp16 at fixed places. Of each the upper byte alone is looked at: fp16's exponent is five ones for
infinities and NaN, and for nothing else (IEEE 754-2019, 3.4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import FileError
from .gguf_blocks import BLOCKS

__all__ = ["SCALE_PLACES", "check_block_scales"]

SCALE_PLACES: dict[str, tuple[int, ...]] = {
    "Q8_0": (0,),
    "Q5_1": (0, 2),
    "Q5_0": (0,),
    "Q4_1": (0, 2),
    "Q4_0": (0,),
    "IQ4_NL": (0,),
    "Q6_K": (208,),
    "Q5_K": (0, 2),
    "Q4_K": (0, 2),
    "Q3_K": (108,),
    "Q2_K": (80, 82),
    "IQ4_XS": (0,),
}
"""By format, the bytes of a block at which its fp16 scales and minimums begin."""

EXPONENT = 0x7C  # of an fp16's upper byte
RUN = 1 << 20  # blocks looked at at a time: what is held of them is a megabyte or two


def check_block_scales(name: str, data: Tensor, tensor: str = "its weight", file: str = "this file") -> None:
    """Refuse blocks whose scales would poison the numbers; for when a tensor is read, once.

    Args:
        name: The format; one without blocks has no scales, and passes.
        data: The blocks, uint8 of any shape, contiguous; at any byte of memory.
        tensor: Name of the tensor, for the message.
        file: Name of the file, for the message.

    Raises:
        FileError: A scale or a minimum is infinite or not a number; the message names the first such block.
    """
    if name not in SCALE_PLACES:
        return
    blocks = data.view(-1, BLOCKS[name].bytes)
    for place in SCALE_PLACES[name]:
        for number, run in enumerate(torch.split(blocks[:, place + 1], RUN)):
            bad = (run & EXPONENT) == EXPONENT
            if bool(bad.any()):
                block = number * RUN + int(bad.byte().argmax())
                raise FileError(
                    f"{file}: block {block} of tensor {tensor} ({name}) has a scale that is not finite; the file is "
                    "damaged, download it again"
                )
