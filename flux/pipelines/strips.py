"""An autoencoder run in strips of rows: the numbers of a run in one piece, in a fraction of its memory.

A convolution needs a row above and one below, a norm the mean and variance of the whole picture. So nothing is cut into
tiles that would have to be blended: where a norm stands, the strips before it are computed once for its statistics and
thrown away, and then again for use. What stays between is one map a residual block.

Shapes: B batch, C channels, H and W rows and columns of the map at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ExhaustedError
from ..memory.exhaustion import is_exhausted
from ..models.autoencoder import AttentionBlock, Autoencoder, Decoder, Downsample, Encoder, Middle, ResBlock, Upsample
from ..ops.attention import attention
from ..specs.autoencoder import AutoencoderSpec
from .parts import MeteredPart, Part

__all__ = [
    "AnyPart",
    "Striped",
    "StripedPart",
    "decode_in_strips",
    "decode_mean_in_strips",
    "in_strips_if_need",
    "moments_in_strips",
]

STRIP_BYTES = 16 << 20  # of a map, about which a strip is high
ITEM = 4  # bytes of a number, in which norms compute
LEAST_ROWS = 8  # of a strip: of fewer, the rows that neighbours share are most of the work
ALIKE = 3  # strips, of which the one between the first and the last is as all others that there may be
QUERIES = 1024  # that attend at once

Result = TypeVar("Result")
Size = tuple[int, int, int, int]
AnyPart = Part[AutoencoderSpec, Autoencoder] | MeteredPart[AutoencoderSpec, Autoencoder]


class Map(Protocol):
    """A map (B, C, H, W) of which rows can be asked for."""

    @property
    def size(self) -> Size: ...
    @property
    def widest(self) -> int:
        """Numbers in a row of the largest map that it is made of."""

    def rows(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` (B, C, last - first, W), not to be written to."""


class Whole:
    """A map that is there."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def size(self) -> Size:
        batch, channels, height, width = self.tensor.shape
        return batch, channels, height, width

    @property
    def widest(self) -> int:
        """See ``Map``."""
        return _row(self.size)

    def rows(self, first: int, last: int) -> Tensor:
        """See ``Map``."""
        return self.tensor[:, :, first:last]


class Shared:
    """A map that is asked for twice in a row: the rows of the last answer are kept."""

    def __init__(self, source: Map) -> None:
        self._source, self.size, self.widest = source, source.size, source.widest
        self._first, self._kept = 0, None  # type: int, Tensor | None

    def rows(self, first: int, last: int) -> Tensor:
        """See ``Map``."""
        kept = self._kept
        if kept is None or not self._first <= first <= last <= self._first + kept.shape[2]:
            self._kept = None
            kept = self._source.rows(first, last)
            self._first, self._kept = first, kept
        return kept[:, :, first - self._first : last - self._first]


class Convolved:
    """A convolution of a map, 3x3 or 1x1, around each place."""

    def __init__(self, source: Map, layer: nn.Conv2d) -> None:
        self._source, self._layer = source, layer
        batch, _, height, width = source.size
        self.size: Size = (batch, layer.out_channels, height, width)
        self.widest = max(source.widest, _row(self.size))
        self._reach = layer.kernel_size[0] // 2

    def rows(self, first: int, last: int) -> Tensor:
        """See ``Map``."""
        reach, height = self._reach, self.size[2]
        top, bottom = max(0, first - reach), min(height, last + reach)
        given = self._source.rows(top, bottom)
        lacking = (reach - (first - top), reach - (bottom - last))
        if any(lacking):
            given = F.pad(given, (0, 0, *lacking))
        return F.conv2d(given, self._layer.weight, self._layer.bias, padding=(0, reach))


class Halved:
    """``Downsample`` of a map."""

    def __init__(self, source: Map, layer: Downsample) -> None:
        self._source, self._layer = source, layer.conv
        batch, channels, height, width = source.size
        self.size: Size = (batch, channels, height // 2, width // 2)
        self.widest = max(2 * source.widest, _row(self.size))  # two rows of the one for one of the other

    def rows(self, first: int, last: int) -> Tensor:
        """See ``Map``."""
        wanted, there = 2 * last + 1, self._source.size[2]
        given = self._source.rows(2 * first, min(wanted, there))
        return F.conv2d(F.pad(given, (0, 1, 0, max(0, wanted - there))), self._layer.weight, self._layer.bias, stride=2)


class Doubled:
    """A map of twice the rows and columns, each place by its nearest neighbour."""

    def __init__(self, source: Map) -> None:
        self._source = source
        batch, channels, height, width = source.size
        self.size: Size = (batch, channels, 2 * height, 2 * width)
        self.widest = max(source.widest, _row(self.size))

    def rows(self, first: int, last: int) -> Tensor:
        """See ``Map``."""
        top = first // 2
        doubled = F.interpolate(self._source.rows(top, -(-last // 2)), scale_factor=2.0, mode="nearest")
        return doubled[:, :, first - 2 * top : last - 2 * top]


class Normed:
    """A map after a group norm and SiLU; the norm's statistics are those of the whole map."""

    def __init__(self, source: Map, norm: nn.GroupNorm) -> None:
        self._source, self.size, self.widest = source, source.size, source.widest
        batch, channels = self.size[:2]
        mean, variance = _statistics(source, norm.num_groups)
        each = channels // norm.num_groups
        scale = torch.rsqrt(variance + norm.eps).repeat_interleave(each, dim=1) * norm.weight.float()
        shift = norm.bias.float() - mean.repeat_interleave(each, dim=1) * scale
        self._scale, self._shift = (part.view(batch, channels, 1, 1) for part in (scale, shift))

    def rows(self, first: int, last: int) -> Tensor:
        """See ``Map``."""
        given = self._source.rows(first, last)
        normed = torch.addcmul(self._shift, given.float(), self._scale).to(given.dtype)  # rounded where one piece is
        return F.silu(normed, inplace=True)


class Sum:
    """Two maps together; the first is asked first, for it reaches farther."""

    def __init__(self, one: Map, other: Map) -> None:
        self._one, self._other, self.size = one, other, one.size
        self.widest = max(one.widest, other.widest)

    def rows(self, first: int, last: int) -> Tensor:
        """See ``Map``."""
        return self._one.rows(first, last) + self._other.rows(first, last)


def _row(size: Size) -> int:
    batch, channels, _, width = size
    return batch * channels * width


def _statistics(source: Map, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, groups) in fp32, put together strip by strip (Chan et al. 1979)."""
    count, mean, spread = 0, torch.zeros(()), torch.zeros(())
    for _, strip in _strips(source):
        numbers = strip.float().reshape(strip.shape[0], groups, -1)
        own = numbers.shape[-1]
        own_variance, own_mean = torch.var_mean(numbers, dim=-1, correction=0)
        if count == 0:
            count, mean, spread = own, own_mean, own_variance * own
            continue
        away, whole = own_mean - mean, count + own
        mean = mean + away * (own / whole)
        spread = spread + own_variance * own + away.square() * (count * own / whole)
        count = whole
    return mean, spread / count


def _strips(source: Map) -> Iterator[tuple[int, Tensor]]:
    """A map strip by strip, each with the number of its first row.

    On the meta device, where shapes are all that there is, strips between the second and the last are left out.
    """
    height = source.size[2]
    step = max(LEAST_ROWS, STRIP_BYTES // (source.widest * ITEM))
    places = list(range(0, height, step))
    for index, first in enumerate(places):
        strip = source.rows(first, min(height, first + step))
        yield first, strip
        if strip.is_meta and index == 1 and len(places) > ALIKE:
            break
    else:
        return
    yield places[-1], source.rows(places[-1], height)


def _made(source: Map) -> Whole:
    """A map computed and kept."""
    out: Tensor | None = None
    for first, strip in _strips(source):
        if out is None:
            out = strip.new_empty(source.size)
        out[:, :, first : first + strip.shape[2]] = strip
    assert out is not None
    return Whole(out)


def _res_block(source: Map, block: ResBlock) -> Whole:
    shared = Shared(source)
    once = Convolved(Normed(shared, block.norm1), block.conv1)
    twice = Convolved(Normed(once, block.norm2), block.conv2)
    return _made(Sum(twice, shared if block.nin_shortcut is None else Convolved(shared, block.nin_shortcut)))


def _blocks(level: nn.Module) -> Iterator[ResBlock]:
    for block in level.get_submodule("block").children():
        assert isinstance(block, ResBlock)
        yield block


def _middle(source: Map, middle: Middle) -> Whole:
    x = _res_block(source, middle.block_1).tensor
    return _res_block(Whole(_attended(x, middle.attn_1)), middle.block_2)


def _attended(x: Tensor, block: AttentionBlock) -> Tensor:
    """``AttentionBlock`` with some queries at a time, for kernels that write their logits out."""
    batch, channels, height, width = x.shape
    q, k, v = block.heads(block.norm(x))
    mixed = torch.cat([attention(part, k, v) for part in q.split_with_sizes(_shares(q.shape[2]), dim=2)], dim=2)
    out: Tensor = x + block.proj_out(mixed.transpose(2, 3).reshape(batch, channels, height, width))
    return out


def _shares(count: int) -> list[int]:
    return [min(QUERIES, count - first) for first in range(0, count, QUERIES)]


def decode_in_strips(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """``Autoencoder.decode``: scaled latents (B, C, h, w) to pictures (B, 3, H, W)."""
    return decode_mean_in_strips(autoencoder, autoencoder.from_model(latents))


def decode_mean_in_strips(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """``Autoencoder.decode_mean``: pictures from latents in the autoencoder's own space."""
    decoder: Decoder = autoencoder.decoder
    x: Map = _middle(Convolved(Whole(latents), decoder.conv_in), decoder.mid)
    for level in reversed(decoder.up):
        for block in _blocks(level):
            x = _res_block(x, block)
        if isinstance(level.upsample, Upsample):
            x = Convolved(Doubled(x), level.upsample.conv)
    return _made(Convolved(Normed(x, decoder.norm_out), decoder.conv_out)).tensor


def moments_in_strips(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """The encoder: pictures (B, 3, H, W) in -1..1 to means and log-variances (B, 2C, h, w)."""
    encoder: Encoder = autoencoder.encoder
    x: Map = Convolved(Whole(pixels), encoder.conv_in)
    for level in encoder.down:
        for block in _blocks(level):
            x = _res_block(x, block)
        if isinstance(level.downsample, Downsample):
            x = Halved(x, level.downsample)
    x = _middle(x, encoder.mid)
    return _made(Convolved(Normed(x, encoder.norm_out), encoder.conv_out)).tensor


class Striped:
    """An autoencoder whose every use is in strips."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder

    def encode(self, pixels: Tensor) -> Tensor:
        """See ``Autoencoder``."""
        return self._autoencoder.to_model(moments_in_strips(self._autoencoder, pixels).chunk(2, dim=1)[0])

    def encode_sample(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See ``Autoencoder``."""
        return self._autoencoder.sample_of(moments_in_strips(self._autoencoder, pixels), generator)

    def decode(self, latents: Tensor) -> Tensor:
        """See ``Autoencoder``."""
        return decode_in_strips(self._autoencoder, latents)


def in_strips_if_need(
    part: AnyPart | StripedPart,
    use: Callable[[AnyPart | StripedPart], Result],
    make_room: Callable[[], bool] | None = None,
) -> Result:
    """What a use of an autoencoder gives; with more room, and then in strips, where memory runs out.

    Args:
        part: The autoencoder; in strips already, or not.
        use: Called with it, and again with one in strips.
        make_room: Lets go of what a later stage would use again; whether there was anything.

    Raises:
        ExhaustedError: Memory runs out in strips too.
    """
    try:
        return use(part)
    except Exception as error:
        if not is_exhausted(error):
            raise
        fault = error
    # Outside of the handler, which holds what the failed computation had made.
    fault.__traceback__ = None
    metered = part.part if isinstance(part, StripedPart) else part
    stage, tell = (metered.stage, metered.tell) if isinstance(metered, MeteredPart) else ("decode", None)
    tell = tell or (lambda _: None)
    if make_room is not None and make_room():
        tell(f"memory ran out while the picture was {stage}d: the transformer makes room, and comes again afterwards")
        return in_strips_if_need(part, use)
    if isinstance(part, StripedPart):
        raise ExhaustedError(
            f"memory ran out though the picture was {stage}d in strips, which take least: ask for a smaller picture, "
            "or free memory that others hold"
        ) from fault
    tell(f"memory ran out while the picture was {stage}d in one piece: it is {stage}d in strips")
    return in_strips_if_need(StripedPart(part), use)


class StripedPart:
    """An autoencoder's part that lends it for use in strips.

    Attributes:
        part: The part itself.
    """

    def __init__(self, part: AnyPart) -> None:
        self.spec, self.path, self.device, self.dtype = part.spec, part.path, part.device, part.dtype
        self.part = part

    @contextmanager
    def resident(self) -> Iterator[Striped]:
        """Have the weights in memory inside the block."""
        with self.part.resident() as autoencoder:
            yield Striped(autoencoder)
