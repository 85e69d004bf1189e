"""Outpainting that keeps the picture: a larger canvas to be painted, and the original put back into it exactly.

The seam is soft and the original exact, because all softening lies on the new side. There the painted picture fades in
over ``feather`` pixels from the original's edge, repeated outwards; and the model may repaint as many pixels within the
original, of which nothing is taken, so that what it paints outside goes on from what it sees.

A model's canvas has sides that divide by 16. On a side where pixels were asked for, more are added until it does; where
none were, the canvas is larger by a few, which ``finish`` cuts off again.

Pictures: (B, H, W, 3), fp32 in 0..1; masks (B, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..preprocess.control import Warn, choose
from .inpaint import check_painted, check_picture, composite
from .masks import match_batch, smoothstep

__all__ = [
    "ANCHORS",
    "FILLS",
    "MAX_SIDE",
    "Canvas",
    "OutpaintPlan",
    "extend",
    "finish",
    "plan_outpaint",
    "plan_to_aspect",
]

MULTIPLE = 16  # pixels of a FLUX token
MAX_SIDE = 16_384  # pixels of a canvas
ANCHORS = ("center", "left", "right", "top", "bottom")
FILLS = ("grey", "edge")
GREY = 0.5  # what Fill sees where it repaints


@dataclass(frozen=True, kw_only=True)
class OutpaintPlan:
    """Where a picture stands on its canvas, in pixels.

    Attributes:
        height: The picture's.
        width: Likewise.
        left: New pixels on this side; so are ``right``, ``top`` and ``bottom``.
        spare_right: Further ones that the canvas has and the result has not.
        spare_bottom: Likewise.
    """

    height: int
    width: int
    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0
    spare_right: int = 0
    spare_bottom: int = 0

    @property
    def result_height(self) -> int:
        return self.top + self.height + self.bottom

    @property
    def result_width(self) -> int:
        return self.left + self.width + self.right

    @property
    def canvas_height(self) -> int:
        return self.result_height + self.spare_bottom

    @property
    def canvas_width(self) -> int:
        return self.result_width + self.spare_right


@dataclass(frozen=True, eq=False)
class Canvas:
    """A picture on its larger canvas, with all that it takes to finish it; H, W are the canvas's sides.

    Attributes:
        picture: (B, H, W, 3), to be painted.
        mask: What the model is to repaint of it (B, H, W).
        blend: How much of the painted picture is taken (B, H, W): 0 on the original, 1 beyond the seam.
        original: The picture as it came in.
        plan: Where it stands.
    """

    picture: Tensor
    mask: Tensor
    blend: Tensor
    original: Tensor
    plan: OutpaintPlan


def plan_outpaint(
    height: int,
    width: int,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    multiple: int = MULTIPLE,
    warn: Warn | None = None,
    *,
    exact: bool = False,
) -> OutpaintPlan:
    """Grow a picture by sides.

    Args:
        height: The picture's, in pixels.
        width: Likewise.
        left: Pixels to add on this side.
        right: Likewise.
        top: Likewise.
        bottom: Likewise.
        multiple: What the canvas's sides have to divide by. What is missing is added to the side that was asked for, of
            two to the larger.
        warn: Told of each side that got more than was asked for.
        exact: Add to the pixel what is asked for; what the canvas lacks is painted too, and cut off in ``finish``.

    Raises:
        UserError: No side is asked for, one is less than 0, or the canvas would be too large.
    """
    _check_sides(height, width, {"left": left, "right": right, "top": top, "bottom": bottom})
    _check_multiple(multiple)
    if exact:
        return _with_spare(height, width, {"left": left, "right": right, "top": top, "bottom": bottom}, multiple)
    wider_left, wider_right = _rounded(width, left, right, multiple)
    higher_top, higher_bottom = _rounded(height, top, bottom, multiple)
    asked = {"left": left, "right": right, "top": top, "bottom": bottom}
    given = {"left": wider_left, "right": wider_right, "top": higher_top, "bottom": higher_bottom}
    changed = [f"{name} {given[name]} for {asked[name]}" for name in asked if given[name] != asked[name]]
    if changed and warn is not None:
        warn(f"so that the canvas divides by {multiple}, more pixels are added than asked for: {', '.join(changed)}")
    return _with_spare(height, width, given, multiple)


def plan_to_aspect(
    height: int, width: int, aspect_width: float, aspect_height: float, anchor: str = "center", multiple: int = MULTIPLE
) -> OutpaintPlan:
    """Grow a picture to an aspect, to the nearest pixel and never by cutting.

    Args:
        height: The picture's, in pixels.
        width: Likewise.
        aspect_width: As 16 of 16:9.
        aspect_height: As 9 of 16:9.
        anchor: Where the picture stands on the canvas, one of ``ANCHORS``: at "left" all that is new in width is on its
            right. It moves nothing in the direction in which the picture does not grow.
        multiple: What the canvas's sides have to divide by; what the result has not of it is spare.

    Raises:
        UserError: The aspect is none, the picture has it, there is no such anchor, or the canvas would be too large.
    """
    choose(anchor, ANCHORS, "place for the picture")
    _check_multiple(multiple)
    _check_size(height, width)
    for value in (aspect_width, aspect_height):
        if not 0 < value < float("inf"):
            raise UserError(f"the aspect is {aspect_width:g}:{aspect_height:g}; give two numbers above 0, as 16:9")
    more_width = max(0, round(height * aspect_width / aspect_height) - width)
    more_height = max(0, round(width * aspect_height / aspect_width) - height)
    if not (more_width or more_height):
        raise UserError(
            f"the picture ({width}x{height}) has the aspect {aspect_width:g}:{aspect_height:g} as it is, so there is "
            "nothing to add; give another aspect"
        )
    left = {"left": 0, "right": more_width}.get(anchor, more_width // 2)
    top = {"top": 0, "bottom": more_height}.get(anchor, more_height // 2)
    sides = {"left": left, "right": more_width - left, "top": top, "bottom": more_height - top}
    return _with_spare(height, width, sides, multiple)


def extend(image: Tensor, plan: OutpaintPlan, feather: int = 0, fill: str = "grey") -> Canvas:
    """Lay a picture on its canvas.

    Args:
        image: (B, H, W, 3) of the plan's size.
        plan: Where it stands.
        feather: How soft the seam is, in pixels to each side of it; nothing of it changes the original.
        fill: What the new area shows: "grey" as Fill itself puts there, or "edge", the picture's edge repeated.

    Raises:
        UserError: The picture is none or of another size, the feather is too wide for it, or there is no such filling.
    """
    check_picture(image)
    choose(fill, FILLS, "filling")
    height, width = image.shape[1:3]
    if (height, width) != (plan.height, plan.width):
        raise UserError(
            f"the picture is {width}x{height} and the plan for one of {plan.width}x{plan.height}; plan with its size"
        )
    if not 0 <= feather <= min(height, width) // 2:
        raise UserError(
            f"a feather of {feather} pixels does not fit a picture of {width}x{height}; "
            f"give 0 to {min(height, width) // 2}"
        )
    picture = _edge_repeated(image, plan) if fill == "edge" else _on_grey(image, plan)
    outside = _outside(plan, image.device)
    mask = torch.where(outside > 0, 1.0, 1 - smoothstep(_inside(plan, image.device) / (feather + 1)))
    blend = smoothstep(outside / (feather + 1))
    _, mask = match_batch(image, mask[None])
    _, blend = match_batch(image, blend[None])
    return Canvas(picture, mask, blend, image, plan)


def finish(canvas: Canvas, painted: Tensor) -> Tensor:
    """The grown picture: the original's bits where it stands, what was painted around it, and a soft seam between.

    Args:
        canvas: What ``extend`` gave.
        painted: (B, H, W, 3), as large as the canvas's picture; several for one original give several pictures.

    Returns:
        (B, H', W', 3) of the plan's result size, in the original's type.

    Raises:
        UserError: The painted picture does not fit the canvas.
        NumericError: It has numbers that are not finite.
    """
    check_painted(painted, canvas.picture, "canvas")
    plan = canvas.plan
    around, painted = match_batch(_edge_repeated(canvas.original, plan), painted.to(canvas.original.device))
    _, blend = match_batch(around, canvas.blend)
    whole = composite(around, painted, blend)
    return whole[:, : plan.result_height, : plan.result_width].contiguous()


def _check_sides(height: int, width: int, sides: dict[str, int]) -> None:
    _check_size(height, width)
    for name, pixels in sides.items():
        if pixels < 0:
            raise UserError(f"{pixels} pixels are to be added at the {name}; give 0 or more, for nothing is cut off")
    if not any(sides.values()):
        raise UserError("no side is to grow; give pixels for left, right, top or bottom")


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise UserError(f"a picture of {width}x{height} pixels cannot grow; give one with sides of 1 and more")


def _check_multiple(multiple: int) -> None:
    if multiple < 1:
        raise UserError(f"the canvas's sides are to divide by {multiple}; give 1 or more, as {MULTIPLE} for FLUX")


def _rounded(length: int, before: int, after: int, multiple: int) -> tuple[int, int]:
    """Both sides' pixels, where one was asked for with what is missing to the multiple."""
    missing = -(length + before + after) % multiple if before or after else 0
    return (before + missing, after) if before > after else (before, after + missing)


def _with_spare(height: int, width: int, sides: dict[str, int], multiple: int) -> OutpaintPlan:
    """The plan with what the canvas lacks to the multiple."""
    plan = OutpaintPlan(
        height=height,
        width=width,
        spare_right=-(width + sides["left"] + sides["right"]) % multiple,
        spare_bottom=-(height + sides["top"] + sides["bottom"]) % multiple,
        **sides,
    )
    if max(plan.canvas_height, plan.canvas_width) > MAX_SIDE:
        raise UserError(
            f"the canvas would be {plan.canvas_width}x{plan.canvas_height} pixels; add less, so that no side is longer "
            f"than {MAX_SIDE}"
        )
    return plan


def _on_grey(image: Tensor, plan: OutpaintPlan) -> Tensor:
    """(B, H, W, 3) to the canvas's size."""
    canvas = image.new_full((image.shape[0], plan.canvas_height, plan.canvas_width, 3), GREY)
    canvas[:, plan.top : plan.top + plan.height, plan.left : plan.left + plan.width] = image
    return canvas


def _edge_repeated(image: Tensor, plan: OutpaintPlan) -> Tensor:
    """(B, H, W, 3) to the canvas's size; each new pixel is the nearest one of the picture."""
    rows = (torch.arange(plan.canvas_height, device=image.device) - plan.top).clamp(0, plan.height - 1)
    columns = (torch.arange(plan.canvas_width, device=image.device) - plan.left).clamp(0, plan.width - 1)
    return image[:, rows][:, :, columns]


def _outside(plan: OutpaintPlan, device: torch.device) -> Tensor:
    """How far each pixel of the canvas (H, W) is from the original's nearest one; 0 within."""
    down = _beyond(plan.canvas_height, plan.top, plan.height, device)
    across = _beyond(plan.canvas_width, plan.left, plan.width, device)
    return torch.hypot(down[:, None], across[None])


def _beyond(length: int, start: int, count: int, device: torch.device) -> Tensor:
    """Distances of 0 .. length - 1 from the nearest of start .. start + count - 1."""
    places = torch.arange(length, device=device, dtype=torch.float32)
    return torch.maximum(start - places, places - (start + count - 1)).clamp(min=0)


def _inside(plan: OutpaintPlan, device: torch.device) -> Tensor:
    """How far each pixel of the canvas (H, W) is from the nearest new one that the result keeps; infinite without."""
    rows = torch.arange(plan.canvas_height, device=device, dtype=torch.float32)[:, None]
    columns = torch.arange(plan.canvas_width, device=device, dtype=torch.float32)[None]
    distances = [
        (columns - (plan.left - 1), plan.left),
        ((plan.left + plan.width) - columns, plan.right),
        (rows - (plan.top - 1), plan.top),
        ((plan.top + plan.height) - rows, plan.bottom),
    ]
    depth = torch.full((plan.canvas_height, plan.canvas_width), torch.inf, device=device)
    for distance, new_pixels in distances:
        depth = torch.minimum(depth, distance) if new_pixels else depth
    return depth
