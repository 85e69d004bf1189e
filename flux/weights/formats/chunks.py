"""Bytes to numbers through a table, in chunks that stay in a processor's cache.

Every storage format of safetensors files is the same step: a byte stands for one number (fp8, int8) or for two (four
bits each), and a run of numbers shares a scale. On a CPU chunks run in threads of our own, for torch looks up single
items in one thread only. Two four-bit numbers are looked up as one item of 64 bits; in large tensors two bytes are too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops.host_memory import empty
from .threads import share_out

__all__ = ["as_bytes", "cast", "in_chunks", "look_up", "scale_runs"]

Array = npt.NDArray[Any]

BYTE_VALUES = 256
CHUNK = 1 << 18  # numbers, 1 MB of fp32: the product with the scales finds them in the cache
DEVICE_CHUNK = 1 << 24  # numbers; bounds what indices and fp32 take on an accelerator to 64 MiB each
LARGE = 1 << 20  # numbers from which threads and a table of byte pairs are paid back
SERIAL = 1 << 15  # numbers up to which torch does not start threads of its own


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor of one-byte items as uint8, without a copy."""
    return tensor if tensor.dtype == torch.uint8 else tensor.contiguous().view(torch.uint8)


def cast(data: Tensor, dtype: torch.dtype) -> Tensor:
    """``data`` in another type; as it is, without a copy, where it has that type."""
    if data.dtype == dtype:
        return data
    return empty(tuple(data.shape), dtype, data.device).copy_(data)


def look_up(
    codes: Tensor, table: Tensor, dtype: torch.dtype, scales: Tensor | None = None, run: int | None = None
) -> Tensor:
    """The numbers that bytes stand for, times the scales of their runs.

    Args:
        codes: Bytes, uint8 of any shape (n in all).
        table: What each byte stands for, fp32 (256, 1) or (256, 2), on the device of ``codes``.
        dtype: Floating-point type of the result. Products are made in fp32 and rounded once.
        scales: fp32, one for each run or a single one for all; None for 1.
        run: Consecutive numbers that share a scale, even where the table has two columns; the last run may be shorter.

    Returns:
        Numbers (n times the table's width,) of ``dtype``.
    """
    codes = codes.reshape(-1)
    out = empty((codes.numel() * table.shape[1],), dtype, codes.device)
    fill = _fill_on_cpu if codes.device.type == "cpu" else _fill_on_device
    fill(codes, table, out, scales, run or out.numel())
    return out


def in_chunks(
    numbers_of: Callable[[int, int], Tensor],
    out: Tensor,
    scales: Tensor | None = None,
    run: int | None = None,
    then: Callable[[Tensor], Tensor] = lambda numbers: numbers,
) -> Tensor:
    """Numbers that are made chunk by chunk, times the scales of their runs: for accelerators.

    Args:
        numbers_of: Makes those from a place to before another, fp32 (n,) of its own.
        out: Where they go, (n,) in all, rounded once.
        scales: See ``look_up``.
        run: See ``look_up``.
        then: Takes the products of a chunk, and gives what they become, in fp32. A chunk has whole runs; where a single
            scale is for all, ``DEVICE_CHUNK`` numbers, but for the last.

    Returns:
        ``out``.
    """
    length = run or max(1, out.numel())
    for start, stop in _spans(out.numel(), length, DEVICE_CHUNK, scales):
        # Without a name, so that nothing of a chunk is there any more when the next one is made.
        out[start:stop] = then(scale_runs(numbers_of(start, stop), _scales_of(scales, start, stop, length), length))
    return out


def scale_runs(numbers: Tensor, scales: Tensor | None, run: int) -> Tensor:
    """fp32 ``numbers`` (n,) times ``scales`` (one for each run of ``run``, or a single one), in place."""
    if scales is None:
        return numbers
    if scales.numel() == 1:
        return numbers.mul_(scales.reshape(()))
    whole = numbers.numel() // run
    numbers[: whole * run].view(whole, run).mul_(scales[:whole, None])
    if numbers.numel() > whole * run:
        numbers[whole * run :].mul_(scales[whole])
    return numbers


def _fill_on_device(codes: Tensor, table: Tensor, out: Tensor, scales: Tensor | None, run: int) -> None:
    width = table.shape[1]

    def numbers(start: int, stop: int) -> Tensor:
        return F.embedding(codes[start // width : -(-stop // width)].int(), table).view(-1)

    in_chunks(numbers, out, scales, run)


def _fill_on_cpu(codes: Tensor, table: Tensor, out: Tensor, scales: Tensor | None, run: int) -> None:
    if scales is not None and scales.numel() == 1:
        table, scales = table * scales.reshape(()), None
    large = out.numel() >= LARGE
    entries, keys, width = _entries(table, codes, pairs=large and (scales is None or run % 2 == 0))
    body = out.numel() // width * width
    spans = _spans(body, run, CHUNK, scales)
    threads = min(torch.get_num_threads(), len(spans)) if large else 1
    longest = max((stop - start for start, stop in spans), default=0)

    def work(spans: Iterator[tuple[int, int]]) -> None:
        index = torch.empty(longest // width, dtype=torch.int32)
        scratch = None if out.dtype == torch.float32 else torch.empty(longest)
        for start, stop in spans:
            part, own = out[start:stop], index[: (stop - start) // width]
            numbers = part if scratch is None else scratch[: stop - start]
            np.copyto(own.numpy(), keys[start // width : stop // width])
            torch.index_select(entries, 0, own, out=numbers.view(entries.dtype))
            _scale(numbers, _scales_of(scales, start, stop, run), run, serial=threads > 1)
            if numbers is not part:
                for target, source in zip(torch.split(part, SERIAL), torch.split(numbers, SERIAL), strict=True):
                    target.copy_(source)

    share_out(work, spans, threads)
    if body < out.numel():  # an odd byte at the end of pairs
        tail = table[codes[body:].long()].view(-1)
        out[body:] = scale_runs(tail, None if scales is None else scales[-1:], run)


def _entries(table: Tensor, codes: Tensor, pairs: bool) -> tuple[Tensor, Array, int]:
    """The table as items of one number or two, the items' keys, and how many numbers an item holds."""
    keys: Array = codes.contiguous().numpy()
    width = table.shape[1]
    if width == 1 and pairs:
        both = np.arange(BYTE_VALUES**2).astype(np.uint16).view(np.uint8)  # the bytes of each pair as memory has them
        table, width = table[torch.from_numpy(both).long()].view(-1, 2), 2
        keys = keys[: len(keys) // 2 * 2].view(np.uint16)
    return table.contiguous().view(torch.int64 if width == 2 else torch.float32).view(-1), keys, width


def _scale(numbers: Tensor, scales: Tensor | None, run: int, serial: bool) -> None:
    """``scale_runs``, in pieces for which torch starts no threads where ``serial``."""
    if scales is None or not serial:
        scale_runs(numbers, scales, run)
        return
    runs = max(1, SERIAL // run)
    for piece, own in zip(torch.split(numbers, runs * run), torch.split(scales, runs), strict=True):
        scale_runs(piece, own, run)


def _scales_of(scales: Tensor | None, start: int, stop: int, run: int) -> Tensor | None:
    return scales if scales is None or scales.numel() == 1 else scales[start // run : -(-stop // run)]


def _spans(total: int, run: int, chunk: int, scales: Tensor | None) -> list[tuple[int, int]]:
    """Where chunks begin and end: about ``chunk`` numbers each, and no run cut in two."""
    step = chunk if scales is None or scales.numel() == 1 else max(1, chunk // run) * run
    return [(start, min(start + step, total)) for start in range(0, total, step)]
