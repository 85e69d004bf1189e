"""Pictures to text tokens: what a vision tower sees, made by FLUX.1 Redux into what stands behind a prompt's tokens.

Shapes: T views of a picture, g patches along a view's side, N tokens, D width of the transformer's text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.guides import MAX_STRENGTH, StyleTokens
from ..errors import NumericError, UserError
from ..memory.metering import Meter, NoMeter
from ..memory.residency import Watch
from ..models.redux import Redux
from ..models.vision.siglip import SiglipVision
from ..preprocess.control import Warn
from ..preprocess.vision import VisionViews, merge_tokens, reduce_grid
from ..specs.fit import Given
from ..specs.vision import ReduxSpec, SiglipSpec
from .library import given_files
from .parts import Part, check_redux_beside, joined, open_redux, open_vision

__all__ = [
    "ReduxEncoder",
    "ReduxPicture",
    "ReduxTokens",
    "combine_bfl",
    "combine_diffusers",
    "encode_redux",
    "fewer_tokens",
    "open_redux_encoder",
    "style_guide",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReduxPicture:
    """One picture to encode.

    Attributes:
        views: What the tower is given of it.
        grid: Tokens along each side that every view's are averaged to; None leaves them as they are (27 for SigLIP
            so400m, which is g).
        tokens: The most that are left of all views together: the most similar are merged. None merges none.
        scale: That its tokens are multiplied by.
    """

    views: VisionViews
    grid: int | None = None
    tokens: int | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= MAX_STRENGTH:
            raise UserError(
                f"the tokens' scale is {self.scale:g}; give a number from 0 to {MAX_STRENGTH:g}, where 1 leaves them "
                "as they are"
            )


@dataclass(frozen=True, eq=False)
class ReduxTokens:
    """What Redux made of a picture, its views one after another.

    Attributes:
        tokens: (1, N, D), fp32 on the CPU.
        weights: (N,) in 0..1, how much of each is taken over; None for all of each.
    """

    tokens: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class ReduxEncoder:
    """A Redux adapter with the vision tower that it takes.

    Raises:
        MismatchError: It takes another tower.
    """

    tower: Part[SiglipSpec, SiglipVision]
    redux: Part[ReduxSpec, Redux]

    def __post_init__(self) -> None:
        check_redux_beside(self.redux.given, self.tower.given)

    def encode(self, picture: ReduxPicture, *, watch: Watch | None = None) -> ReduxTokens:
        """Encode one picture; see ``encode_all``."""
        return self.encode_all([picture], watch=watch)[0]

    @torch.inference_mode()
    def encode_all(
        self,
        pictures: Sequence[ReduxPicture],
        *,
        watch: Watch | None = None,
        limits: Mapping[str, int | None] | None = None,
        warn: Warn | None = None,
        meter: Meter | NoMeter | None = None,
    ) -> list[ReduxTokens]:
        """Encode several pictures; tower and adapter are in memory once, and only while they run.

        Args:
            pictures: In any number.
            watch: Called before each weight on its way in; may raise to stop.
            limits: Bytes that the weights of "vision" may take; what goes beyond is streamed, layer by layer.
            warn: Told when memory runs out, and what is done about it.
            meter: Told what the tower takes, view by view.

        Raises:
            UserError: A grid is finer than the tower's, or no token would be left.
            NumericError: A result was not finite.
        """
        limit, meter = None if limits is None else limits.get("vision"), meter or NoMeter()
        resident = self.tower.resident(watch=watch, limit=limit, tell=warn)
        with self.tower.metered(meter, "vision"), resident as tower:
            meter.begin()
            seen = [self._look(tower, picture.views.pixels, warn, meter) for picture in pictures]
        with self.redux.resident(watch=watch, tell=warn) as redux:
            made = [redux(hidden.to(self.redux.device, self.redux.dtype)).float().cpu() for hidden in seen]
        if not all(bool(torch.isfinite(tokens).all()) for tokens in made):
            raise NumericError(
                f"the vision tower and Redux gave numbers that are not finite; {self.tower.path.name} or "
                f"{self.redux.path.name} is damaged, or the number format overflows: try bf16 or fp32"
            )
        return [_thinned(tokens, picture) for tokens, picture in zip(made, pictures, strict=True)]

    def _look(self, tower: SiglipVision, pixels: Tensor, warn: Warn | None, meter: Meter | NoMeter) -> Tensor:
        """Views (T, 3, side, side) to hidden states (T, g * g, vision width), one by one: alike in any company."""
        assert pixels.shape[1:] == (3, self.tower.spec.side, self.tower.spec.side)
        going_on, hidden = self.tower.going_on(warn), []
        for view in pixels.to(self.tower.device, self.tower.dtype):
            hidden.append(going_on(partial(tower, view[None])))
            meter.tick()
        return torch.cat(hidden)


def _thinned(tokens: Tensor, picture: ReduxPicture) -> ReduxTokens:
    fewer, weights = fewer_tokens(tokens, picture.views.weights, picture.grid, picture.tokens)
    return ReduxTokens(fewer * picture.scale, weights)


def fewer_tokens(
    tokens: Tensor, weights: Tensor | None, grid: int | None, most: int | None
) -> tuple[Tensor, Tensor | None]:
    """What the views of a picture became as one sequence, averaged and merged as is wanted.

    Args:
        tokens: (T, g * g, D).
        weights: (T, g * g) or None.
        grid: See ``ReduxPicture``.
        most: Likewise, ``tokens``.

    Returns:
        Tokens (1, N, D), and their weights (N,) or None.
    """
    if grid is not None:
        tokens, weights = reduce_grid(tokens, weights, grid)
    tokens, weights = tokens.flatten(0, 1)[None], None if weights is None else weights.flatten()[None]
    if most is not None:
        tokens, weights = merge_tokens(tokens, weights, most)
    return tokens, None if weights is None else weights[0]


def encode_redux(
    tower: Part[SiglipSpec, SiglipVision],
    redux: Part[ReduxSpec, Redux],
    views: VisionViews,
    *,
    grid: int | None = None,
    tokens: int | None = None,
    scale: float = 1.0,
    watch: Watch | None = None,
) -> ReduxTokens:
    """Encode one picture; see ``ReduxPicture`` and ``ReduxEncoder.encode_all``.

    Raises:
        MismatchError: Redux takes another tower.
    """
    picture = ReduxPicture(views=views, grid=grid, tokens=tokens, scale=scale)
    return ReduxEncoder(tower, redux).encode(picture, watch=watch)


def style_guide(
    encoded: ReduxTokens,
    *,
    strength: float = 1.0,
    region: Tensor | None = None,
    start: float = 0.0,
    end: float = 1.0,
) -> StyleTokens:
    """What Redux made of a picture as a guide of a run; see ``Guide``.

    Raises:
        UserError: The strength or the times are outside their ranges.
    """
    return StyleTokens(
        tokens=encoded.tokens, weights=encoded.weights, strength=strength, region=region, start=start, end=end
    )


def open_redux_encoder(
    tower_path: Path | None,
    redux_path: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    transformer: Given | None = None,
) -> ReduxEncoder:
    """Open a Redux adapter and its vision tower; ``transformer`` is what their tokens must fit, if that is known.

    Raises:
        UserError: A file is missing, damaged, or another than it should be.
    """
    redux = open_redux(redux_path, device, dtype)
    if tower_path is None:
        check_redux_beside(redux.given, None, transformer)
        raise AssertionError("a Redux adapter without a tower was let through")
    seen = given_files([tower_path])
    if seen and not any(own.found.kind == "vision" for own in seen):
        check_redux_beside(redux.given, Given(tower_path, joined([own.found for own in seen])), transformer)
    tower = open_vision(tower_path, device, dtype)
    check_redux_beside(redux.given, tower.given, transformer)
    return ReduxEncoder(tower, redux)


# Joining pictures' tokens with a prompt's, for who wants one sequence without guides.


def combine_bfl(
    prompt_tokens: Tensor, pooled: Tensor, image_tokens: Sequence[Tensor], scales: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Pictures' tokens behind the prompt's, one picture after another, as Black Forest Labs' code does with one.

    Args:
        prompt_tokens: (1, T, D).
        pooled: (1, P), which stays.
        image_tokens: Of each picture (1, N, D).
        scales: That each picture's tokens are multiplied by.

    Returns:
        Tokens (1, T + all N, D), and the pooled vector.
    """
    scaled = [tokens * scale for tokens, scale in zip(image_tokens, scales, strict=True)]
    return torch.cat([prompt_tokens, *scaled], dim=1), pooled


def combine_diffusers(
    prompt_tokens: Tensor,
    pooled: Tensor,
    image_tokens: Sequence[Tensor],
    scales: Sequence[float],
    pooled_scales: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum, over pictures, of the prompt's tokens with a picture's behind: diffusers' FluxPriorRedux.

    With one picture and scale 1 it is ``combine_bfl``. Scales that do not add up to 1 scale the prompt, too.

    Args:
        prompt_tokens: (1, T, D), or (pictures, T, D) where each has a prompt of its own.
        pooled: (1, P), or (pictures, P).
        image_tokens: Of each picture (1, N, D), all with the same N.
        scales: Of each picture's whole sequence, the prompt in it (``prompt_embeds_scale``).
        pooled_scales: Of each picture's pooled vector (``pooled_prompt_embeds_scale``); 1 for each when None.

    Returns:
        Tokens (1, T + N, D), and the pooled vector (1, P).

    Raises:
        UserError: There is no picture, or they have different numbers of tokens.
    """
    counts = sorted({tokens.shape[1] for tokens in image_tokens})
    if len(counts) != 1:
        raise UserError(
            f"pictures with {' and '.join(map(str, counts)) or 'no'} tokens have no sum; give them the same grid and "
            "views, or append them"
        )
    pictures = torch.cat(list(image_tokens))  # (pictures, N, D)
    count = pictures.shape[0]
    weights = pictures.new_tensor(list(scales))
    pooled_weights = pooled.new_tensor([1.0] * count if pooled_scales is None else list(pooled_scales))
    assert len(weights) == len(pooled_weights) == count
    whole = torch.cat([prompt_tokens.expand(count, -1, -1), pictures], dim=1) * weights[:, None, None]
    return whole.sum(0, keepdim=True), (pooled.expand(count, -1) * pooled_weights[:, None]).sum(0, keepdim=True)
