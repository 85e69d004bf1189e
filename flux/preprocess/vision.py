"""What a vision tower sees of a picture, and fewer tokens of what it saw.

Pictures: (B, H, W, C), fp32 in 0..1. Shapes: T views, g patches along a view's side, N tokens, D their width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from .control import Warn, as_bytes, as_rgb, choose, differs_in_aspect, resize

__all__ = ["MAX_TILES", "VIEWS", "VisionViews", "merge_tokens", "reduce_grid", "vision_pixels"]

VIEWS = ("stretch", "crop", "pad", "tiled")
PATCH = 14  # pixels along a side, of all SigLIP towers that FLUX uses
MAX_TILES = 4  # as many prompts' worth of tokens; longer pictures are squeezed into them
TILE_SQUEEZE = 1.1  # a picture that much longer than its tiles is squeezed, for one more would mostly see the same
BYTE_MIDDLE = 127.5


@dataclass(frozen=True, eq=False)
class VisionViews:
    """What the tower is given, and how much each of its tokens counts.

    Attributes:
        pixels: (T, 3, side, side) in -1..1, a picture's views one after another.
        weights: (T, g * g) in 0..1, row by row: 0 where the view shows nothing of what is to be taken over; None for 1.
    """

    pixels: Tensor
    weights: Tensor | None

    def shown(self) -> Tensor:
        """What of the views counts, for a look at it: (T, side, side, 3) in 0..1, grey where it does not."""
        pixels = self.pixels
        if self.weights is not None:
            grid = math.isqrt(self.weights.shape[-1])
            counts = self.weights.to(pixels).reshape(-1, 1, grid, grid)
            pixels = pixels * F.interpolate(counts, size=pixels.shape[-2:])
        return (pixels.movedim(1, -1) + 1) / 2


@dataclass(frozen=True)
class _Layout:
    """How a picture is laid under its views.

    Attributes:
        height: That the whole picture is resized to, in the views' pixels.
        width: Likewise.
        corners: Top and left of each view; negative where the view reaches beyond the picture.
    """

    height: int
    width: int
    corners: tuple[tuple[int, int], ...]


def vision_pixels(
    image: Tensor,
    side: int,
    how: str = "stretch",
    mask: Tensor | None = None,
    patch: int = PATCH,
    warn: Warn | None = None,
) -> VisionViews:
    """Pictures as a SigLIP tower takes them: 8 bits, bicubic by Pillow, then -1..1.

    Args:
        image: (B, H, W, 1 to 4).
        side: Of the tower's pictures, in pixels.
        how: "stretch" makes the picture square, as BFL does. "crop" sees its middle. "pad" sees all of it, with grey
            beside it whose patches weigh 0. "tiled" sees it in squares as large as its short side, spread evenly over
            the long one: as many as long / short, rounded up, at most ``MAX_TILES``.
        mask: (1 or B, H, W) in 0..1: only what is white is taken over. Its patches' means become weights.
        patch: Pixels along a patch's side.
        warn: Told where a mask or tiles do not fit the picture, and what is done.

    Returns:
        The views of all pictures, each with as many as the others.

    Raises:
        UserError: There is no such way, it is no picture, or the mask takes nothing over.
    """
    choose(how, VIEWS, "way to see a picture")
    image = as_rgb(image)
    layout = _lay_out(image, side, how, warn or (lambda _: None))
    pixels = torch.cat([_look(seen, layout, side) for seen in _seen(as_bytes(image), layout)])
    if mask is None and how != "pad":
        return VisionViews(pixels, None)
    return VisionViews(pixels, _patch_weights(image, mask, layout, side, patch, warn or (lambda _: None)))


def _lay_out(image: Tensor, side: int, how: str, warn: Warn) -> _Layout:
    h, w = image.shape[1:3]
    short, long = min(h, w), max(h, w)
    if how == "tiled":
        return _tiles(h, w, side, warn)
    if how == "stretch" or short == long:
        return _Layout(side, side, ((0, 0),))
    scale = side / (short if how == "crop" else long)
    height, width = max(1, round(h * scale)), max(1, round(w * scale))
    return _Layout(height, width, (((height - side) // 2, (width - side) // 2),))


def _tiles(h: int, w: int, side: int, warn: Warn) -> _Layout:
    """Squares along the longer side, from end to end."""
    ratio = max(h, w) / min(h, w)
    wanted = math.ceil(ratio / TILE_SQUEEZE)
    count = min(wanted, MAX_TILES)
    if wanted > MAX_TILES:
        warn(
            f"the picture ({w}x{h}) is {ratio:.1f} times as long as it is wide: it is squeezed into {MAX_TILES} "
            "squares; crop it to what matters"
        )
    length = min(round(ratio * side), count * side)
    starts = [round(index * (length - side) / max(1, count - 1)) for index in range(count)]
    if h > w:
        return _Layout(length, side, tuple((start, 0) for start in starts))
    return _Layout(side, length, tuple((0, start) for start in starts))


def _seen(pictures: NDArray[np.uint8], layout: _Layout) -> Iterator[Tensor]:
    """Bytes (B, H, W, 3) to one resized picture (1, 3, h, w) in -1..1 after another."""
    for picture in pictures:
        resized = Image.fromarray(picture).resize((layout.width, layout.height), Image.Resampling.BICUBIC)
        levels = torch.from_numpy(np.array(resized)).movedim(-1, 0)[None].float()
        yield levels / BYTE_MIDDLE - 1


def _look(laid: Tensor, layout: _Layout, side: int) -> Tensor:
    """What views see of a resized picture (1, C, h, w): (views, C, side, side), 0 where they reach beyond it."""
    views = []
    for top, left in layout.corners:
        beyond = (-left, left + side - layout.width, -top, top + side - layout.height)
        views.append(F.pad(laid, beyond))  # negative: that much is cut off
    return torch.cat(views)


def _patch_weights(image: Tensor, mask: Tensor | None, layout: _Layout, side: int, patch: int, warn: Warn) -> Tensor:
    """How much of each patch shows what is to be taken over (T, g * g)."""
    batch, h, w = image.shape[:3]
    if mask is None:
        laid = torch.ones(batch, 1, layout.height, layout.width)
    else:
        _check_mask(mask, image, warn)
        # Laid under the picture first, so that a mask of another size covers the same places.
        same = resize(mask[..., None].float(), h, w, Image.Resampling.BILINEAR)
        laid = resize(same, layout.height, layout.width, Image.Resampling.BILINEAR).movedim(-1, 1)
        laid = laid.expand(batch, -1, -1, -1).cpu()
    shares = [F.avg_pool2d(_look(one[None], layout, side), patch).flatten(1) for one in laid]
    if not all(share.any() for share in shares):
        raise UserError(
            "the reference's mask is black in all that is seen of the picture, so nothing would be taken over; paint "
            "white what is to be taken over, or invert the mask"
        )
    return torch.cat(shares)


def _check_mask(mask: Tensor, image: Tensor, warn: Warn) -> None:
    if mask.ndim != 3 or mask.shape[0] not in (1, image.shape[0]) or not mask.numel():
        raise UserError(
            f"the reference's mask has shape {list(mask.shape)}; give one mask (1, height, width), or one a picture"
        )
    if differs_in_aspect(image, mask.shape[1], mask.shape[2]):
        warn(
            f"the reference's mask ({mask.shape[2]}x{mask.shape[1]}) has another aspect than its picture "
            f"({image.shape[2]}x{image.shape[1]}): it is stretched over it"
        )


def reduce_grid(tokens: Tensor, weights: Tensor | None, side: int) -> tuple[Tensor, Tensor | None]:
    """Average a grid of tokens to a coarser one.

    Where the grid does not divide, neighbouring cells share tokens, as in torch's adaptive average pooling.

    Args:
        tokens: (T, g * g, D), row by row.
        weights: (T, g * g): a token counts so much in its average; None for 1.
        side: Tokens along the new grid's side.

    Returns:
        Tokens (T, side * side, D), and the means of the weights, which are None where there were none.

    Raises:
        UserError: The grid has fewer tokens along its side.
    """
    grid = math.isqrt(tokens.shape[1])
    if grid**2 != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens are no square grid")
    if not 1 <= side <= grid:
        raise UserError(f"a grid of {grid}x{grid} tokens cannot become {side}x{side}; give a number from 1 to {grid}")
    if side == grid:
        return tokens, weights
    if weights is None:
        return _pool(tokens, grid, side).to(tokens), None
    counted = weights[..., None].float()
    means = _pool(counted, grid, side)
    weighted = _pool(tokens.float() * counted, grid, side) / means.where(means > 0, 1)
    out = weighted.where(means > 0, _pool(tokens, grid, side))  # what counts nothing stays a finite average
    return out.to(tokens), means[..., 0].to(weights)


def _pool(values: Tensor, grid: int, side: int) -> Tensor:
    """(T, grid * grid, D) to (T, side * side, D)."""
    laid = values.float().transpose(1, 2).reshape(values.shape[0], -1, grid, grid)
    return F.adaptive_avg_pool2d(laid, side).flatten(2).transpose(1, 2)


def merge_tokens(tokens: Tensor, weights: Tensor | None, target: int) -> tuple[Tensor, Tensor | None]:
    """Merge the most similar tokens until ``target`` are left: bipartite soft matching of ToMe (Bolya et al. 2023).

    In each round every second token finds the most similar one (by cosine) of the others, and the most similar pairs
    become their mean, weighed by how many tokens each side stands for; half of them at most. Similarity is taken of the
    tokens themselves, not of a block's keys. Tokens that weigh 0 go first, for nothing sees them. The order is kept.

    Args:
        tokens: (T, N, D), each sequence for itself.
        weights: (T, N): a token counts so much in its mean; None for 1.
        target: Tokens that are left of each sequence; as many as there are, or more, changes nothing.

    Returns:
        Tokens (T, target, D), and the means of the weights, which are None where there were none.

    Raises:
        UserError: No token would be left.
    """
    if target < 1:
        raise UserError(f"{target} tokens cannot be left of a picture; give a number from 1 on")
    if target >= tokens.shape[1]:
        return tokens, weights
    counted = torch.ones(tokens.shape[:2], device=tokens.device) if weights is None else weights.float()
    merged = [_merge(*pair, target) for pair in zip(tokens.float(), counted, strict=True)]
    out = torch.stack([values for values, _ in merged]).to(tokens)
    return out, None if weights is None else torch.stack([left for _, left in merged]).to(weights)


def _merge(tokens: Tensor, weights: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """One sequence (N, D) with weights (N,)."""
    kept = _heaviest_first_seen(weights, target)
    tokens, weights = tokens[kept], weights[kept]
    sizes = torch.ones_like(weights)
    while tokens.shape[0] > target:
        tokens, weights, sizes = _merge_round(tokens, weights, sizes, tokens.shape[0] - target)
    return tokens, weights


def _heaviest_first_seen(weights: Tensor, target: int) -> Tensor:
    """Places of the tokens that count, filled up to ``target`` with the first of the others, in their order."""
    ranks = torch.sort((weights > 0).int(), descending=True, stable=True).indices
    return ranks[: max(target, int((weights > 0).sum()))].sort().values


def _merge_round(tokens: Tensor, weights: Tensor, sizes: Tensor, surplus: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``surplus`` pairs, or as many as a round can."""
    count = tokens.shape[0]
    directions = F.normalize(tokens, dim=-1)
    best = (directions[::2] @ directions[1::2].T).max(dim=1)
    order = torch.sort(best.values, descending=True, stable=True).indices
    sources = order[: min(surplus, count // 2)]
    # A row for each token that is left says what it is made of: a product instead of scattered sums, whose order on a
    # GPU, and so whose rounding, is left to chance.
    shares = torch.eye(count, device=tokens.device)
    shares[2 * best.indices[sources] + 1, 2 * sources] = 1
    left = torch.ones(count, dtype=torch.bool, device=tokens.device)
    left[2 * sources] = False
    shares = shares[left]
    new_sizes, mass = shares @ sizes, sizes * weights
    new_mass = shares @ mass
    merged = (shares @ (tokens * mass[:, None])) / new_mass.where(new_mass > 0, 1)[:, None]
    plain = (shares @ (tokens * sizes[:, None])) / new_sizes[:, None]
    return merged.where(new_mass[:, None] > 0, plain), new_mass / new_sizes, new_sizes
